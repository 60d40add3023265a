// MultiMax attention for CPUs, forward and backward, in blocks: softmax(mask(sigma(softcap(q k^T * scale) + bias))) v.
//
// The scores of a block live in a thread's scratch only. The forward keeps a running maximum and sum per row and saves
// both; the backward recomputes the scores with keys outside, so that dk and dv have one owner. All
// arithmetic is float32; storage may be bfloat16 or float16. The number of threads may change a result's last digit:
// it sets the blocks of rows, and how many splits of the keys are added up.

#include "attention_call.h"

namespace {

constexpr float kLargestPower = 0x1p120f;  // scores of larger powers are left out of the slopes' gradients

constexpr int64_t kKeysForward = 512, kRowsForward = 2 * kStrip, kKeysBackward = 256, kRowsBackward = 10 * kStrip;

// ---------------------------------------------------------------------------------------------------- the modulator

// One head's parameters; slot n - 1 belongs to order n.
struct Modulator {
  int order;
  float b[kMaxOrder], d[kMaxOrder], tb[kMaxOrder], td[kMaxOrder], most[kMaxOrder];
  bool affine;
  float scale, shift;

  Modulator(const Arguments& g, int64_t head) : order(int(g.order)), affine(g.affine != nullptr) {
    const float* r = g.ranges + head * g.parameter_stride;
    const float* t = g.ts + head * g.parameter_stride;
    for (int n = 0; n < order; ++n) b[n] = r[2 * n], d[n] = r[2 * n + 1], tb[n] = t[2 * n], td[n] = t[2 * n + 1];
    for (int n = 0; n < order; ++n) most[n] = std::pow(kLargestPower, 1.0f / (n + 1.0f));
    for (int n = 0; n < order; ++n) {
      if (b[n] != b[n] || d[n] != d[n]) tb[n] = std::numeric_limits<float>::quiet_NaN();  // which relu would swallow
    }
    scale = affine ? g.affine[head * g.affine_stride] : 1.0f;
    shift = affine ? g.affine[head * g.affine_stride + 1] : 0.0f;
  }
};

// t x^n, multiplied from t on: where t is 0 it stays 0, however large the power
inline vf times_power(vf t, vf x, int n) {
  for (int i = 0; i < n; ++i) t *= x;
  return t;
}

// sigma(x), the same bits in the forward and in the backward: scores may be so large that one unit in the last place
// changes their exponential. ORDER 0 takes the order at run time.
template <int ORDER>
inline vf modulated(const Modulator& m, vf x) {
  vf out = x;
  const int order = ORDER ? ORDER : m.order;
  for (int n = 0; n < order; ++n) {
    const vf up = relu(m.b[n] - x), wp = relu(x - m.d[n]);
    const vf low = times_power(splat(m.tb[n]), up, n + 1);
    out += fused(times_power(splat(m.td[n]), wp, n), wp, low);
  }
  return out;
}

// Sums over scores s of g(s) times: relu(b - s)^n, relu(s - d)^n, and n-th parts of the derivatives of those with respect
// to b and -d.
template <int ORDER>
struct ScalarSums {
  vf tb[ORDER ? ORDER : kMaxOrder], td[ORDER ? ORDER : kMaxOrder], b[ORDER ? ORDER : kMaxOrder],
      d[ORDER ? ORDER : kMaxOrder];
};

// d sigma / dx; adds g times the derivatives with respect to the parameters to the sums
template <int ORDER, bool SCALARS>
inline vf slope(const Modulator& m, vf x, vf g, ScalarSums<ORDER>& sums) {
  vf out = splat(1.0f);
  const int order = ORDER ? ORDER : m.order;
  for (int n = 0; n < order; ++n) {
    const vf u = m.b[n] - x, w = x - m.d[n], up = relu(u), wp = relu(w);
    if (n == 0) {
      const vf du = u > 0.0f ? splat(1.0f) : vf{}, dw = w > 0.0f ? splat(1.0f) : vf{};
      out += m.td[n] * dw - m.tb[n] * du;
      if (SCALARS) sums.b[n] += g * du, sums.d[n] += g * dw, sums.tb[n] += g * up, sums.td[n] += g * wp;
      continue;
    }
    out += (n + 1.0f) * (times_power(splat(m.td[n]), wp, n) - times_power(splat(m.tb[n]), up, n));
    if (SCALARS) {
      vf near_u = up, near_w = wp;
      if (ORDER == 0) near_u = up < m.most[n] ? up : vf{}, near_w = wp < m.most[n] ? wp : vf{};
      const vf gu = times_power(g, near_u, n), gw = times_power(g, near_w, n);
      sums.b[n] += gu;
      sums.d[n] += gw;
      sums.tb[n] += gu * near_u;
      sums.td[n] += gw * near_w;
    }
  }
  return out;
}

// ---------------------------------------------------------------------------------------------------- rows

// What one row of scores needs beside the scores: buffers of a block's width plus one vector.
struct RowBuffers {
  float* mask;     // values added after sigma, -infinity where masked
  float* dropout;  // 0 or 1 / (1 - p)
  float* capped;   // scores before the bias, for the softcap's derivative
  float* plain;    // scores before the affine map, 0 where masked
  float* bias;
};

// Raw products s[0, n) -> scores before sigma: softcap, bias, affine map. Keeps what the backward needs.
void prepare_row(const Arguments& g, const Modulator& m, const RowBuffers& r, int64_t b, int64_t h, int64_t i,
                 int64_t key, int64_t n, float* s) {
  if (g.softcap > 0) cap_row(g, n, s, r.capped);
  if (g.bias.data) add_bias(g, b, h, i, key, n, s, r.bias);
  if (m.affine) {
    for (int64_t j = 0; j < n; j += W) {
      vf x = load(s + j);
      vi masked = x <= kMasked;
      store(r.plain + j, masked ? vf{} : x);
      store(s + j, masked ? splat(-kInfinity) : m.scale * x + m.shift);
    }
    std::fill(r.plain + n, r.plain + n + W, 0.0f);
  }
  for (int64_t j = n; j < n + W; ++j) s[j] = -kInfinity;
}

// The largest modulated score of a row, and that score before sigma
struct Peak {
  float top, score;
};

// Scores -> modulated and masked scores in place; SCORE: whether anybody wants the peak's
template <int ORDER, bool SCORE>
Peak modulate_row(const Modulator& m, const float* mask, int64_t n, float* s) {
  const Modulator local = m;
  vf top = splat(-kInfinity), score{};
  for (int64_t j = 0; j < n; j += W) {
    const vf x = load(s + j);
    vf y = modulated<ORDER>(local, x);
    if (mask) {
      const vf a = load(mask + j);
      y = a == -kInfinity ? a : y + a;
    }
    y = x <= kMasked ? splat(-kInfinity) : y;
    if (SCORE) score = y > top ? x : score;
    top = max(y, top);
    store(s + j, y);
  }
  if (!SCORE) return {largest(top), 0.0f};
  reduce([&](auto step) {
    const vf other = swapped<step>(top), its_score = swapped<step>(score);
    const vi better = other > top;
    top = better ? other : top;
    score = better ? its_score : score;
  });
  return {top[0], score[0]};
}

// s -> exp(s - top) in place; returns the sum
float exponentials(float top, int64_t n, float* s) {
  vf total{};
  for (int64_t j = 0; j < n; j += W) {
    vf p = exp_(load(s + j) - top);
    total += p;
    store(s + j, p);
  }
  return sum(total);
}

bool has_nan(const float* s, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    if (s[j] != s[j]) return true;
  }
  return false;
}

RowBuffers row_buffers(Pieces& piece, int64_t width) {
  return {piece(width), piece(width), piece(width), piece(width), piece(width)};
}

// ---------------------------------------------------------------------------------------------------- forward

// The running softmax of some rows: maxima, sums and unnormalised outputs
struct Running {
  float *top, *total, *peak, *acc;
};

// One row's products with a block of keys -> weights exp(score - top) in place, zeros outside of what the row may see
template <int ORDER>
void forward_row(const Arguments& g, const Modulator& m, const RowBuffers& buffers, int64_t b, int64_t h, int64_t row,
                 int64_t key, int64_t keys, float* line, float& top, float& total, float& peak, float* acc) {
  const Range in = clip(visible(g, row, 1), key, key + keys);
  const int64_t n = in.high - in.low, first = key + in.low;
  float* s = line + in.low;
  if (n > 0) {
    prepare_row(g, m, buffers, b, h, row, first, n, s);
    if (g.mask.data) mask_row(g, b, h, row, first, n, buffers.mask);
    const float* mask = g.mask.data ? buffers.mask : nullptr;
    auto [best, score] = g.peak ? modulate_row<ORDER, true>(m, mask, n, s) : modulate_row<ORDER, false>(m, mask, n, s);
    // A maximum skips NaN. Without anything else in the row, NaN must not pass for an empty row.
    if (!(best > -kInfinity) && has_nan(s, n)) best = std::numeric_limits<float>::quiet_NaN();
    const float next = best <= top ? top : best;
    if (next == -kInfinity) {
      std::fill(s, s + n, 0.0f);
    } else {
      if (next != top) {
        const float shrink = top == -kInfinity ? 0.0f : std::exp(top - next);
        total *= shrink;
        for (int64_t d = 0; d < g.value_dim; ++d) acc[d] *= shrink;
        top = next, peak = score;
      }
      total += exponentials(next, n, s);
      if (g.dropout > 0) {
        dropout_row(g, b * g.heads + h, row, first, n, buffers.dropout);
        for (int64_t j = 0; j < n; ++j) s[j] *= buffers.dropout[j];
      }
    }
  }
  fill_outside(line, in, keys);
}

// Rows [row, row + row_block) of one head against the keys of one split
template <int ORDER>
void forward_block(const Arguments& g, int64_t b, int64_t h, int64_t row, int64_t split) {
  const int64_t rows = std::min(g.row_block, g.rows - row), dim = g.dim, value_dim = g.value_dim;
  const int64_t width = kKeysForward + kPanel, kv = h * g.kv_heads / g.heads;
  Pieces piece;
  float *scores, *q_scratch, *plain, *k_panels, *v_panels;
  Running run;
  RowBuffers buffers;
  for (int pass = 0; pass < 2; ++pass) {
    scores = piece(kRowsForward * width), q_scratch = piece(rows * dim);
    run = {piece(rows), piece(rows), piece(rows), piece(rows * value_dim)};
    plain = piece(kKeysForward * std::max(dim, value_dim));
    k_panels = piece((kKeysForward + kPanel) * dim), v_panels = piece(kKeysForward * padded(value_dim));
    buffers = row_buffers(piece, width);
    if (!pass) piece.allocate();
  }
  const Modulator m(g, h);
  const Matrix q = rows_of(g.q, b, h, row, rows, dim, q_scratch);
  std::fill(run.acc, run.acc + rows * value_dim, 0.0f);
  std::fill(run.peak, run.peak + rows, 0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    const bool sink = g.sinks && split == 0;
    run.top[i] = sink ? g.sinks[h] : -kInfinity;
    run.total[i] = sink && run.top[i] > -kInfinity ? 1.0f : 0.0f;
  }

  const Range own{split * g.keys / g.splits, (split + 1) * g.keys / g.splits};
  Range all = visible(g, row, rows);
  all = {std::max(all.low, own.low), std::min(all.high, own.high)};
  for (int64_t key = all.low; key < all.high; key += kKeysForward) {
    const int64_t keys = std::min(kKeysForward, all.high - key);
    if (rows == 1 && !g.peak) {  // not where a backward follows, whose products have other bits
      dot_rows(q.data, rows_of(g.k, b, kv, key, keys, dim, plain), keys, dim, float(g.scale), scores);
      forward_row<ORDER>(g, m, buffers, b, h, row, key, keys, scores, run.top[0], run.total[0], run.peak[0],
                         run.acc);
      add_rows(scores, rows_of(g.v, b, kv, key, keys, value_dim, plain), keys, value_dim, run.acc);
      continue;
    }
    pack_transposed(rows_of(g.k, b, kv, key, keys, dim, plain), keys, dim, k_panels);
    pack(rows_of(g.v, b, kv, key, keys, value_dim, plain), keys, value_dim, v_panels);
    // few rows at a time: their scores stay in the first cache from one product to the other
    for (int64_t i = 0; i < rows; i += kRowsForward) {
      const int64_t count = std::min(kRowsForward, rows - i);
      const Range in = clip(visible(g, row + i, count), key, key + keys);
      if (in.high <= in.low) continue;
      float* acc = run.acc + i * value_dim;
      multiply<false>(count, in.high, dim, float(g.scale), {q.data + i * q.stride, q.stride}, k_panels, false, scores,
                      width);
      for (int64_t r = 0; r < count; ++r) {
        forward_row<ORDER>(g, m, buffers, b, h, row + i + r, key, in.high, scores + r * width, run.top[i + r],
                           run.total[i + r], run.peak[i + r], acc + r * value_dim);
      }
      multiply<false>(count, value_dim, in.high, 1.0f, {scores, width}, v_panels, true, acc, value_dim, keys);
    }
  }

  const int64_t line = ((split * g.batch + b) * g.heads + h) * g.rows + row;
  for (int64_t i = 0; i < rows; ++i) {
    const float inverse = run.total[i] == 0.0f ? 0.0f : 1.0f / run.total[i];
    float* a = run.acc + i * value_dim;
    for (int64_t d = 0; d < value_dim; ++d) a[d] *= inverse;
    if (g.top) g.top[line + i] = run.top[i], g.total[line + i] = run.total[i];
    if (g.peak) g.peak[line + i] = run.peak[i];
    if (g.out32) std::memcpy(g.out32 + (line + i) * value_dim, a, value_dim * sizeof(float));
    if (g.splits == 1) write(a, value_dim, g.out.type, const_cast<char*>(at(g.out, b, h, row + i, 0)));
  }
}

template <int ORDER>
void forward(const Arguments& g) {
  const int64_t blocks = (g.rows + g.row_block - 1) / g.row_block;
  const int64_t items = g.batch * g.heads * blocks * g.splits;
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(std::min(g.threads, items)))
  for (int64_t item = 0; item < items; ++item) {
    const int64_t split = item % g.splits, block = item / g.splits % blocks, head = item / (g.splits * blocks);
    // later rows see more keys under a causal mask: the longest first
    forward_block<ORDER>(g, head / g.heads, head % g.heads, (blocks - 1 - block) * g.row_block, split);
  }
}

// ---------------------------------------------------------------------------------------------------- backward

struct BackwardBuffers {
  float *p, *dp, *q, *plain, *grad_out, *grad_k, *grad_v;
  float *k_transposed, *v_transposed, *k_panels, *row_panels;
  RowBuffers row;
};

// Gradients g of a row's scores sum to zero, but only up to the rounding of delta. In a row with one weight near 1 that
// rest would swamp them once multiplied by the large terms of the scalars' sums, so it is taken out: the terms' values
// at the row's peak, times the sum of g, are subtracted. In exact arithmetic that subtracts nothing, the gradient
// of a sink being part of the sum.
template <int ORDER>
void centre(const Modulator& m, vf rest, float peak, ScalarSums<ORDER>& sums, vf* affine_sums) {
  const vf there = rest * slope<ORDER, true>(m, splat(peak), -rest, sums);
  if (m.affine && m.scale != 0.0f) {
    affine_sums[0] -= there * ((peak - m.shift) / m.scale);
    affine_sums[1] -= there;
  }
}

// One row: products s and dp = grad_out v^T -> weights in s (with dropout) and gradients of the scores in dp; returns
// the sum of the gradients of the modulated scores
template <int ORDER, bool SCALARS>
vf backward_row(const Modulator& m, const float* mask, const float* dropout, float top, float total, float delta,
                int64_t n, float* s, float* dp, ScalarSums<ORDER>& sums) {
  const Modulator local = m;
  // top and total apart: rounding their log-sum-exp would put the same error on a whole row
  const float inverse = 1.0f / total;
  vf rest{};
  for (int64_t j = 0; j < n; j += W) {
    const vf x = load(s + j);
    vi masked = x <= kMasked;
    vf y = modulated<ORDER>(local, x);
    if (mask) {
      const vf a = load(mask + j);
      y += a;
      masked |= a == -kInfinity;
    }
    vf p = masked ? vf{} : exp_(y - top) * inverse;
    vf drop = dropout ? load(dropout + j) : splat(1.0f);
    const vi nothing = p == 0.0f;  // times infinity would be NaN
    vf g = nothing ? vf{} : p * (load(dp + j) * drop - delta);
    vf safe = nothing ? vf{} : x;
    store(s + j, p * drop);
    store(dp + j, g * slope<ORDER, SCALARS>(local, safe, g, sums));
    rest += g;
  }
  return rest;
}

// The derivatives of what prepare_row did, last step first
void unprepare_row(const Arguments& g, const Modulator& m, const RowBuffers& r, int64_t b, int64_t h, int64_t i,
                   int64_t key, int64_t n, float* ds, vf* affine_sums) {
  if (m.affine) {
    for (int64_t j = 0; j < n; j += W) {
      vf d = load(ds + j);
      affine_sums[0] += d * load(r.plain + j);
      affine_sums[1] += d;
      store(ds + j, d * m.scale);
    }
  }
  if (g.grad_bias) {
    const int64_t* stride = g.grad_bias_stride;
    float* to = g.grad_bias + b * stride[0] + h * stride[1] + i * stride[2] + key;
    for (int64_t j = 0; j < n; ++j) to[j] += ds[j];
  }
  if (g.softcap > 0) {
    const float inverse = float(1.0 / g.softcap);
    for (int64_t j = 0; j < n; j += W) {
      vf t = load(r.capped + j) * inverse;
      store(ds + j, load(ds + j) * (1.0f - t * t));
    }
  }
}

template <int ORDER>
void add_scalars(const Modulator& m, const ScalarSums<ORDER>& sums, const vf* affine_sums, double* to) {
  const int order = m.order;
  for (int n = 0; n < order; ++n) {
    to[2 * n] += (n + 1) * double(m.tb[n]) * sum(sums.b[n]);
    to[2 * n + 1] -= (n + 1) * double(m.td[n]) * sum(sums.d[n]);
    to[2 * order + 2 * n] += sum(sums.tb[n]);
    to[2 * order + 2 * n + 1] += sum(sums.td[n]);
  }
  to[4 * order] += sum(affine_sums[0]);
  to[4 * order + 1] += sum(affine_sums[1]);
}

// Rows by the size of the scores that they attend to. Where squares of those might overflow only equal scores compete,
// and of the slopes' gradients nothing remains. (Higher powers are left out one by one.)
enum Rows { kAll, kNear, kFar };

template <int ORDER>
inline bool is_far(const Arguments& g, const Modulator& m, int64_t line) {
  return ORDER == 2 && std::abs(g.peak[line]) >= m.most[1] && g.total[line] > 0.0f;
}

// One block of keys against some rows of one block of one head
template <int ORDER, bool SCALARS>
void backward_block(const Arguments& g, const Modulator& m, const BackwardBuffers& t, int64_t b, int64_t h, int64_t row,
                    int64_t key, int64_t block_keys, int64_t split, Rows which) {
  const int64_t rows = std::min(kRowsBackward, g.rows - row), width = kKeysBackward + kPanel;
  const Range all = clip(visible(g, row, rows), key, key + block_keys);
  // whole rows of the block are computed from its first key on, so that k, v and their gradients share an origin
  const int64_t keys = all.high;
  if (all.high <= all.low) return;
  const float scale = float(g.scale);
  const Matrix q = rows_of(g.q, b, h, row, rows, g.dim, t.q);
  const Matrix grad_out = rows_of(g.grad_out, b, h, row, rows, g.value_dim, t.grad_out);
  multiply<false>(rows, keys, g.dim, scale, q, t.k_transposed, false, t.p, width);
  multiply<false>(rows, keys, g.value_dim, 1.0f, grad_out, t.v_transposed, false, t.dp, width);

  ScalarSums<ORDER> sums;
  if (SCALARS) std::memset(&sums, 0, sizeof sums);
  vf affine_sums[2] = {};
  const int64_t line = (b * g.heads + h) * g.rows + row;
  for (int64_t i = 0; i < rows; ++i) {
    Range in = clip(visible(g, row + i, 1), key, key + keys);
    if (g.total[line + i] == 0.0f) in = {0, 0};
    if (which != kAll && is_far<ORDER>(g, m, line + i) != (which == kFar)) in = {0, 0};
    float *s = t.p + i * width + in.low, *ds = t.dp + i * width + in.low;
    const int64_t n = in.high - in.low, first = key + in.low;
    if (n > 0) {
      prepare_row(g, m, t.row, b, h, row + i, first, n, s);
      std::fill(ds + n, ds + n + W, 0.0f);
      if (g.mask.data) mask_row(g, b, h, row + i, first, n, t.row.mask);
      if (g.dropout > 0) dropout_row(g, b * g.heads + h, row + i, first, n, t.row.dropout);
      vf rest = backward_row<ORDER, SCALARS>(m, g.mask.data ? t.row.mask : nullptr,
                                                   g.dropout > 0 ? t.row.dropout : nullptr, g.top[line + i],
                                                   g.total[line + i], g.delta[line + i], n, s, ds, sums);
      if (SCALARS && g.sinks && first == visible(g, row + i, 1).low) {  // the sink's part of the sum, once in a row
        rest[0] -= std::exp(g.sinks[h] - g.top[line + i]) / g.total[line + i] * g.delta[line + i];
      }
      if (SCALARS) centre<ORDER>(m, rest, g.peak[line + i], sums, affine_sums);
      unprepare_row(g, m, t.row, b, h, row + i, first, n, ds, affine_sums);
    }
    fill_outside(t.p + i * width, in, keys);
    fill_outside(t.dp + i * width, in, keys);
  }
  if (SCALARS) {
    const int64_t head = (split * g.batch + b) * g.heads + h;
    add_scalars<ORDER>(m, sums, affine_sums, g.sums + head * (4 * g.order + 2));
  }

  if (g.grad_v.data) {
    pack(grad_out, rows, g.value_dim, t.row_panels);
    multiply<true>(keys, g.value_dim, rows, 1.0f, {t.p, width}, t.row_panels, true, t.grad_v, g.value_dim);
  }
  if (g.grad_k.data) {
    pack(q, rows, g.dim, t.row_panels);
    multiply<true>(keys, g.dim, rows, scale, {t.dp, width}, t.row_panels, true, t.grad_k, g.dim);
  }
  if (g.grad_q) {
    float* grad_q = g.grad_q + (((split * g.batch + b) * g.heads + h) * g.rows + row) * g.dim;
    multiply<false>(rows, g.dim, keys, scale, {t.dp, width}, t.k_panels, true, grad_q, g.dim, block_keys);
  }
}

// All rows and query heads of one key-value head against the keys of one split
template <int ORDER>
void backward_keys(const Arguments& g, int64_t b, int64_t kv, int64_t split) {
  const int64_t width = kKeysBackward + kPanel, group = g.heads / g.kv_heads;
  Pieces piece;
  BackwardBuffers t;
  for (int pass = 0; pass < 2; ++pass) {
    t.p = piece(kRowsBackward * width), t.dp = piece(kRowsBackward * width);
    t.q = piece(kRowsBackward * g.dim), t.grad_out = piece(kRowsBackward * g.value_dim);
    t.plain = piece(kKeysBackward * std::max(g.dim, g.value_dim));
    t.k_transposed = piece((kKeysBackward + kPanel) * g.dim), t.v_transposed = piece((kKeysBackward + kPanel) * g.value_dim);
    t.k_panels = piece(kKeysBackward * padded(g.dim));
    t.row_panels = piece(kRowsBackward * std::max(padded(g.dim), padded(g.value_dim)));
    t.grad_k = piece(kKeysBackward * g.dim), t.grad_v = piece(kKeysBackward * g.value_dim);
    t.row = row_buffers(piece, width);
    if (!pass) piece.allocate();
  }
  const int64_t end = (split + 1) * g.keys / g.splits;
  for (int64_t key = split * g.keys / g.splits; key < end; key += kKeysBackward) {
    const int64_t keys = std::min(kKeysBackward, end - key);
    const Matrix k = rows_of(g.k, b, kv, key, keys, g.dim, t.plain);
    pack_transposed(k, keys, g.dim, t.k_transposed);
    pack(k, keys, g.dim, t.k_panels);
    pack_transposed(rows_of(g.v, b, kv, key, keys, g.value_dim, t.plain), keys, g.value_dim, t.v_transposed);
    std::fill(t.grad_k, t.grad_k + keys * g.dim, 0.0f);
    std::fill(t.grad_v, t.grad_v + keys * g.value_dim, 0.0f);
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      const Modulator m(g, h);
      for (int64_t row = 0; row < g.rows; row += kRowsBackward) {
        if (!g.sums) {
          backward_block<ORDER, false>(g, m, t, b, h, row, key, keys, split, kAll);
          continue;
        }
        backward_block<ORDER, true>(g, m, t, b, h, row, key, keys, split, kNear);
        bool far = false;
        for (int64_t i = row; i < std::min(row + kRowsBackward, g.rows); ++i) {
          far |= is_far<ORDER>(g, m, (b * g.heads + h) * g.rows + i);
        }
        if (far) backward_block<ORDER, false>(g, m, t, b, h, row, key, keys, split, kFar);
      }
    }
    for (int64_t j = 0; j < keys; ++j) {
      if (g.grad_k.data) {
        write(t.grad_k + j * g.dim, g.dim, g.grad_k.type, const_cast<char*>(at(g.grad_k, b, kv, key + j, 0)));
      }
      if (g.grad_v.data) {
        write(t.grad_v + j * g.value_dim, g.value_dim, g.grad_v.type, const_cast<char*>(at(g.grad_v, b, kv, key + j, 0)));
      }
    }
  }
}

void compute_delta(const Arguments& g) {
  constexpr int64_t kLines = 8;  // sums at a time, as each waits for its last step
  const int64_t lines = g.batch * g.heads * g.rows, groups = (lines + kLines - 1) / kLines;
#pragma omp parallel num_threads(int(g.threads))
  {
    float* scratch = scratch_memory.reserve(kLines * g.value_dim);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      const float *grad[kLines], *out[kLines];
      for (int64_t l = 0; l < kLines; ++l) {
        const int64_t line = std::min(group * kLines + l, lines - 1);
        const int64_t i = line % g.rows, h = line / g.rows % g.heads, b = line / (g.rows * g.heads);
        grad[l] = rows_of(g.grad_out, b, h, i, 1, g.value_dim, scratch + l * g.value_dim).data;
        out[l] = g.out32 + line * g.value_dim;
      }
      // in the order of a register tile: a row with one weight of 1 then has the same number as its product, bit for bit
      float total[kLines] = {};
      for (int64_t d = 0; d < g.value_dim; ++d) {
#pragma GCC unroll 8
        for (int64_t l = 0; l < kLines; ++l) total[l] = fused(grad[l][d], out[l][d], total[l]);
      }
      for (int64_t l = 0; l < kLines; ++l) g.delta[std::min(group * kLines + l, lines - 1)] = total[l];
    }
  }
}

// Columns [first, first + count) of the sums, added over splits, batches and, where they share the parameter, heads
void add_up(const Arguments& g, int64_t first, int64_t count, bool own_per_head, float* to) {
  const int64_t size = 4 * g.order + 2, lines = g.splits * g.batch * g.heads, step = own_per_head ? g.heads : 1;
  for (int64_t head = 0; head < step; ++head, to += count) {
    for (int64_t j = 0; j < count; ++j) {
      double total = 0;
      for (int64_t line = head; line < lines; line += step) total += g.sums[line * size + first + j];
      to[j] = float(total);
    }
  }
}

template <int ORDER>
void backward(Arguments g) {
  compute_delta(g);
  std::vector<double> sums(g.grad_ranges ? g.splits * g.batch * g.heads * (4 * g.order + 2) : 0);
  g.sums = g.grad_ranges ? sums.data() : nullptr;
  for_key_heads(g, [&](int64_t b, int64_t h, int64_t split) { backward_keys<ORDER>(g, b, h, split); });
  if (!g.grad_ranges) return;
  add_up(g, 0, 2 * g.order, g.parameter_stride, g.grad_ranges);
  add_up(g, 2 * g.order, 2 * g.order, g.parameter_stride, g.grad_ts);
  if (g.grad_affine) add_up(g, 4 * g.order, 2, g.affine_stride, g.grad_affine);
}

// Whether sigma is the identity for every head, as at the start of training, or for SoftMax with a temperature
bool is_softmax(const Arguments& g) {
  const int64_t heads = g.parameter_stride ? g.heads : 1;
  for (int64_t i = 0; i < heads * 2 * g.order; ++i) {
    if (g.ts[i] != 0.0f || g.ranges[i] != g.ranges[i]) return false;
  }
  return true;
}

Arguments without_terms(Arguments g) {
  g.order = 0;
  return g;
}

}  // namespace

extern "C" {

int64_t multimax_arguments_size() { return sizeof(Arguments); }

int64_t multimax_max_order() { return kMaxOrder; }

void multimax_forward(const Arguments* g) {
  if (is_softmax(*g)) return forward<0>(without_terms(*g));
  if (g->order == 1) return forward<1>(*g);
  if (g->order == 2) return forward<2>(*g);
  forward<0>(*g);
}

void multimax_backward(const Arguments* g) {
  if (is_softmax(*g) && !g->grad_ranges) return backward<0>(without_terms(*g));
  if (g->order == 1) return backward<1>(*g);
  if (g->order == 2) return backward<2>(*g);
  backward<0>(*g);
}

}  // extern "C"

#include "row_attention.h"
