// Attention through a function of rows: a block of query rows has all its scores in a thread's scratch, the function
// runs in place, and the products that follow leave out the keys that no row of the block gives weight. The backward pass
// computes the weights anew, most of them from what the forward has found. Blocks have fewer rows the more keys there
// are, so that memory stays linear.

#pragma once

#include "attention_call.h"
#include "row_calls.h"
#include "together.h"

namespace {

constexpr int64_t kFewestRows = kStrip, kRowsOfBlock = 2 * kStrip, kMoreRows = 4 * kStrip;
constexpr int64_t kScores = 1 << 16;    // of a block
constexpr int64_t kKeysAtOnce = 512;    // that are packed, or added up before their sum joins the others'
constexpr int64_t kWeighedShare = 7;    // eighths of the keys above which none is left out

// ---------------------------------------------------------------------------------------------------- keys

// Keys and values as the products read them: those of one head
struct KeyPanels {
  float *k_transposed, *k, *v_transposed, *v;  // the forward has k_transposed and v, the backward the first three
};

class Panels {
 public:
  Panels(const Arguments& g, bool backward) : g_(g), backward_(backward) {
    const int64_t chunks = (g.keys + kKeysAtOnce - 1) / kKeysAtOnce, items = g.batch * g.kv_heads * chunks;
    memory_.reserve(g.batch * g.kv_heads * size());
#pragma omp parallel for schedule(static) num_threads(int(std::min(g.threads, items)))
    for (int64_t item = 0; item < items; ++item) {
      const int64_t head = item / chunks, first = item % chunks * kKeysAtOnce;
      const int64_t n = std::min(kKeysAtOnce, g.keys - first), b = head / g.kv_heads, kv = head % g.kv_heads;
      const KeyPanels to = (*this)(b, kv);
      float* scratch = scratch_memory.reserve(kKeysAtOnce * std::max(g.dim, g.value_dim));
      const Matrix k = rows_of(g.k, b, kv, first, n, g.dim, scratch);
      pack_transposed(k, n, g.dim, to.k_transposed + first * g.dim);
      if (backward) pack(k, n, g.dim, to.k + first * kPanel, g.keys);
      const Matrix v = rows_of(g.v, b, kv, first, n, g.value_dim, scratch);
      backward ? pack_transposed(v, n, g.value_dim, to.v_transposed + first * g.value_dim)
               : pack(v, n, g.value_dim, to.v + first * kPanel, g.keys);
    }
  }

  KeyPanels operator()(int64_t b, int64_t kv) {
    float* k_transposed = memory_.reserve(0) + (b * g_.kv_heads + kv) * size();
    float* rest = k_transposed + padded(g_.keys) * g_.dim;
    if (!backward_) return {k_transposed, nullptr, nullptr, rest};
    return {k_transposed, rest, rest + g_.keys * padded(g_.dim), nullptr};
  }

 private:
  int64_t size() const {
    const int64_t k_transposed = padded(g_.keys) * g_.dim;
    if (!backward_) return k_transposed + g_.keys * padded(g_.value_dim);
    return k_transposed + g_.keys * padded(g_.dim) + padded(g_.keys) * g_.value_dim;
  }

  const Arguments& g_;
  bool backward_;
  Scratch memory_;
};

// ---------------------------------------------------------------------------------------------------- blocks

// How many keys so many rows may see together, at most
int64_t seen(const Arguments& g, int64_t rows) {
  return g.window < 0 ? g.keys : std::min(g.keys, 2 * g.window + rows);
}

// The rows of a head in blocks of `size`; the last one has fewer, or some more where they would be few alone
struct Blocks {
  int64_t rows, size, number, largest;

  Blocks(const Arguments& g, bool backward) : rows(g.rows) {
    const int64_t most = backward || seen(g, kMoreRows) <= kShort ? kMoreRows : kRowsOfBlock;
    const int64_t fitting = kScores / std::max<int64_t>(seen(g, most), 1) / kStrip * kStrip;
    size = std::max(kFewestRows, std::min(most, fitting));
    number = std::max<int64_t>(1, (rows + size - 1 - kStrip / 2) / size);
    largest = std::min(rows, size + kStrip / 2);
  }
  int64_t first(int64_t block) const { return block * size; }
  int64_t count(int64_t block) const { return block + 1 < number ? size : rows - block * size; }
};

// Rows [row, row + count) of a head, and the keys [first, first + keys) that one of them may see
struct RowsOfHead {
  int64_t b, h, row, count, first, keys;

  RowsOfHead(const Arguments& g, int64_t b, int64_t h, int64_t row, int64_t count) : b(b), h(h), row(row), count(count) {
    const Range all = visible(g, row, count);
    first = all.low / kPanel * kPanel, keys = all.high - first;
  }
};

// A block's buffers, [rows, width] each; what only the backward reads again has one row in the forward.
struct BlockBuffers {
  int64_t width, kept_width;
  float *p, *q, *out, *line;
  float *scores, *capped, *dropout;  // for the backward
  int32_t *groups, *some, *lanes;
  float *dp, *grad_out, *panels;
  float *together, *found;  // for rows whose thresholds are found together
  Buffers row;
};

// Which scores the backward of a function reads, beside its weights
inline bool needs_scores(const Arguments& g) {
  const bool of_options = g.grad_value || g.grad_beta || g.grad_gamma;
  return of_options || g.kind == kAdaptiveTemperature || g.kind == kRSoftMax || g.kind == kTSoftMax || moves_zeros(g.kind);
}

BlockBuffers block_buffers(Pieces& piece, const Arguments& g, int64_t rows, bool backward) {
  BlockBuffers t{};
  const int64_t keys = padded(seen(g, rows) + kPanel);  // from the start of a panel on
  t.width = keys + kPanel, t.kept_width = backward ? t.width : 0;
  const int64_t kept = backward ? rows * t.width : t.width;
  t.p = piece(rows * t.width), t.q = piece(rows * g.dim), t.line = piece(t.width);
  t.out = piece(rows * std::max(g.dim, g.value_dim));
  t.some = reinterpret_cast<int32_t*>(piece(t.width)), t.lanes = reinterpret_cast<int32_t*>(piece(t.width));
  if (g.softcap > 0) t.capped = piece(kept);
  if (g.dropout > 0) t.dropout = piece(kept);
  t.row = buffers(piece, keys, is_structured(g.kind));
  if (!backward) {
    t.together = piece(whole(kShort) * W), t.found = piece(W * kStats);
    return t;
  }
  if (needs_scores(g)) t.scores = piece(kept);
  if (is_structured(g.kind)) t.groups = reinterpret_cast<int32_t*>(piece(kept));
  t.dp = piece(kept), t.grad_out = piece(rows * g.value_dim);
  t.panels = piece(std::max(rows * padded(std::max(g.dim, g.value_dim)), keys * g.value_dim));
  return t;
}

// A call of the function for one row at a time: row 0 of what the pointers name
RowCall row_call(const Arguments& g, int64_t h) {
  RowCall c{};
  c.type = kFloat, c.kind = g.kind, c.rows = 1, c.a = g.a, c.b = g.b;
  if (g.value) c.value = g.value + h;
  if (g.beta) c.beta = g.beta + h, c.gamma = g.gamma + h;
  return c;
}

inline void times(float* x, const float* factors, int64_t n) {
  for (int64_t j = 0; j < n; j += W) store(x + j, load(x + j) * load(factors + j));
}

// The keys of the block that row i may see
inline Range seen_by(const Arguments& g, const RowsOfHead& r, int64_t i) {
  return clip(visible(g, r.row + i, 1), r.first, r.first + r.keys);
}

// Products of row i of a block -> scores: what the softcap, the bias and the mask make of them
void score(const Arguments& g, const RowsOfHead& r, const BlockBuffers& t, int64_t i, Range in) {
  const int64_t n = in.high - in.low, key = r.first + in.low, kept = i * t.kept_width + in.low;
  float* s = t.p + i * t.width + in.low;
  if (g.softcap > 0) cap_row(g, n, s, t.capped + kept);
  if (g.bias.data) add_bias(g, r.b, r.h, r.row + i, key, n, s, t.line);
  if (g.mask.data) {
    mask_row(g, r.b, r.h, r.row + i, key, n, t.line);
    for (int64_t j = 0; j < n; j += W) {
      const vf a = load(t.line + j);
      store(s + j, a == -kInfinity ? a : load(s + j) + a);
    }
  }
  if (t.scores) std::memcpy(t.scores + kept, s, n * sizeof(float));
}

// Beside the weights of row i, which are zeros outside of what it sees: dropout, which the backward keeps apart, and
// what else that reads again
void fill_row(const Arguments& g, const RowsOfHead& r, const BlockBuffers& t, int64_t i, Range in) {
  const int64_t n = in.high - in.low, key = r.first + in.low, kept = i * t.kept_width + in.low;
  float* p = t.p + i * t.width;
  if (g.dropout > 0 && n > 0) dropout_row(g, r.b * g.heads + r.h, r.row + i, key, n, t.dropout + kept);
  if (g.dropout > 0 && !t.kept_width) times(p + in.low, t.dropout + kept, n);
  fill_outside(p, in, whole(r.keys));
  if (!t.kept_width) return;
  for (float* of_row : {t.scores, t.capped, t.dropout}) {
    if (of_row) fill_outside(of_row + i * t.width, in, whole(r.keys));
  }
  if (t.groups) {
    std::fill(t.groups + i * t.width, t.groups + kept, -1);
    std::fill(t.groups + kept + n, t.groups + i * t.width + whole(r.keys), -1);
  }
}

inline float* stats_of(const Arguments& g, const RowsOfHead& r, int64_t i) {
  return g.stats ? g.stats + ((r.b * g.heads + r.h) * g.rows + r.row + i) * stats_size(g.kind) : nullptr;
}

// The weights of a block in t.p; the backward wants them without dropout. It has the forward's numbers of the rows, and
// the forward finds those of W short rows together.
void weigh(const Arguments& g, const RowsOfHead& r, const BlockBuffers& t) {
  RowCall c = row_call(g, r.h);
  const bool backward = t.kept_width > 0, together = !backward && found_together(c, r.keys);
  const int64_t step = together ? W : 1;
  for (int64_t first = 0; first < r.count; first += step) {
    const int64_t last = std::min(first + step, r.count);
    for (int64_t i = first; i < last; ++i) {
      const Range in = seen_by(g, r, i);
      if (in.high > in.low) score(g, r, t, i, in);
      if (together) fill_outside(t.p + i * t.width, in, whole(r.keys), -kInfinity);
    }
    if (together && last - first > 1) {
      find_together(c, t.p + first * t.width, t.width, last - first, r.keys, t.together, t.found);
      if (g.stats) std::memcpy(stats_of(g, r, first), t.found, (last - first) * kStats * sizeof(float));
    }
    for (int64_t i = first; i < last; ++i) {
      const Range in = seen_by(g, r, i);
      float *s = t.p + i * t.width + in.low, *stats = stats_of(g, r, i);
      c.x = reinterpret_cast<const char*>(s), c.out = reinterpret_cast<char*>(s), c.n = in.high - in.low;
      c.groups = t.groups ? t.groups + i * t.kept_width + in.low : nullptr;
      const float* found = together && last - first > 1 ? t.found + (i - first) * kStats : nullptr;
      if (backward && g.rows > 1) found = stats;  // the forward of one query has products that are rounded otherwise
      if (c.n > 0 && !(found && weigh_found(c, found, s))) c.stats = stats, forward_one(c, 0, t.row);
      fill_row(g, r, t, i, in);
    }
  }
}

// Whether some keys may have no weight in all rows of a block
inline bool may_skip(const Arguments& g) {
  return g.mask.data || !(g.kind == kSoftMax || g.kind == kScalableSoftMax || g.kind == kAdaptiveTemperature ||
                          g.kind == kSoftMax1 || g.kind == kSigmoid);
}

// The keys that a row of the block gives weight: their places and number, all of them where few have none
int64_t weighed(const Arguments& g, const BlockBuffers& t, int64_t rows, int64_t keys) {
  if (!may_skip(g)) return keys;
  int64_t m = 0;
  const vi place = lane_numbers();
  for (int64_t j = 0; j < keys; j += W) {
    vi any = {};
    for (int64_t i = 0; i < rows; ++i) any |= load(t.p + i * t.width + j) != 0.0f;
    store(reinterpret_cast<float*>(t.lanes + j), bits<vf>(any));
    m += compress(reinterpret_cast<float*>(t.some + m), bits<vf>(place + int32_t(j)), any);
  }
  return 8 * m < kWeighedShare * keys ? m : keys;
}

// Each row of x without the keys that no row weighs, of which m are left, zeros behind them
void squeeze(const BlockBuffers& t, int64_t rows, int64_t keys, int64_t m, float* x) {
  for (int64_t i = 0; x && i < rows; ++i) {
    float* line = x + i * t.width;
    int64_t to = 0;  // in place: nothing is written beyond what was read
    for (int64_t j = 0; j < keys; j += W) {
      to += compress(line + to, load(line + j), bits<vi>(load(reinterpret_cast<float*>(t.lanes + j))));
    }
    std::fill(line + m, line + whole(m), 0.0f);
  }
}

// c[rows, columns] = alpha w x: the weights t.p or the gradients of scores, m of them in a row, times panels of a head
void product(const BlockBuffers& t, int64_t rows, int64_t columns, int64_t m, bool all, float alpha, const float* w,
             const float* panels, int64_t panel_rows, float* c) {
  for (int64_t j = 0; j < std::max<int64_t>(m, 1); j += kKeysAtOnce) {
    const int64_t n = std::min(kKeysAtOnce, m - j);
    if (all) {
      multiply<false>(rows, columns, n, alpha, {w + j, t.width}, panels + j * kPanel, j > 0, c, columns, panel_rows);
    } else {
      multiply<false, true>(rows, columns, n, alpha, {w + j, t.width}, panels, j > 0, c, columns, panel_rows, t.some + j);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- forward

// One query alone is a stream over the keys, of which nothing is packed.
void single_row(const Arguments& g, int64_t b, int64_t h) {
  Pieces piece;
  BlockBuffers t;
  float* plain;
  for (int pass = 0; pass < 2; ++pass) {
    t = block_buffers(piece, g, 1, false), plain = piece(kKeysAtOnce * std::max(g.dim, g.value_dim));
    if (!pass) piece.allocate();
  }
  const RowsOfHead r(g, b, h, 0, 1);
  const int64_t kv = h * g.kv_heads / g.heads;
  const Matrix q = rows_of(g.q, b, h, 0, 1, g.dim, t.q);
  for (int64_t j = 0; j < r.keys; j += kKeysAtOnce) {
    const int64_t n = std::min(kKeysAtOnce, r.keys - j);
    dot_rows(q.data, rows_of(g.k, b, kv, r.first + j, n, g.dim, plain), n, g.dim, float(g.scale), t.p + j);
  }
  weigh(g, r, t);
  std::fill(t.out, t.out + g.value_dim, 0.0f);
  auto weighs = [&](int64_t j) { return count(load(t.p + j) != 0.0f) > 0; };
  for (int64_t j = 0, n; j < r.keys; j += n) {  // runs of keys with weight
    for (n = 0; j + n < r.keys && n < kKeysAtOnce && weighs(j + n); n += W) {
    }
    if (n) {
      const int64_t own = std::min(n, r.keys - j);
      add_rows(t.p + j, rows_of(g.v, b, kv, r.first + j, own, g.value_dim, plain), own, g.value_dim, t.out);
    } else {
      n = W;
    }
  }
  write(t.out, g.value_dim, g.out.type, const_cast<char*>(at(g.out, b, h, 0, 0)));
}

// Products of a block and all its keys; behind these there are zeros up to a whole panel
void multiply_keys(const Arguments& g, const RowsOfHead& r, const KeyPanels& keys, Matrix q, const BlockBuffers& t) {
  const float* panels = keys.k_transposed + r.first * g.dim;
  multiply<false>(r.count, padded(r.keys), g.dim, float(g.scale), q, panels, false, t.p, t.width);
}

void rows_block(const Arguments& g, const KeyPanels& keys, const Blocks& blocks, int64_t b, int64_t h, int64_t block) {
  Pieces piece;
  BlockBuffers t;
  for (int pass = 0; pass < 2; ++pass) {
    t = block_buffers(piece, g, blocks.largest, false);
    if (!pass) piece.allocate();
  }
  const int64_t row = blocks.first(block);
  const RowsOfHead r(g, b, h, row, blocks.count(block));
  multiply_keys(g, r, keys, rows_of(g.q, b, h, row, r.count, g.dim, t.q), t);
  weigh(g, r, t);
  const int64_t m = weighed(g, t, r.count, r.keys);
  if (m < r.keys) squeeze(t, r.count, r.keys, m, t.p);
  product(t, r.count, g.value_dim, m, m == r.keys, 1.0f, t.p, keys.v + r.first * kPanel, g.keys, t.out);
  for (int64_t i = 0; i < r.count; ++i) {
    write(t.out + i * g.value_dim, g.value_dim, g.out.type, const_cast<char*>(at(g.out, b, h, row + i, 0)));
  }
}

// ---------------------------------------------------------------------------------------------------- backward

// Weights and their gradients, m in each row of a block -> gradients of the products in place of the latter, and the
// weights with dropout
void unweigh(const Arguments& g, const RowsOfHead& r, int64_t m, bool all, const BlockBuffers& t) {
  RowCall c = row_call(g, r.h);
  c.n = m;
  const int64_t line = (r.b * g.heads + r.h) * g.rows + r.row;
  const float inverse = g.softcap > 0 ? float(1.0 / g.softcap) : 0.0f;
  for (int64_t i = 0; i < r.count; ++i) {
    const int64_t start = i * t.width;
    float *p = t.p + start, *dp = t.dp + start;
    std::fill(dp + m, dp + whole(m), 0.0f);
    if (t.dropout) times(dp, t.dropout + start, m);
    c.stats = stats_of(g, r, i);
    if (t.scores) c.x = reinterpret_cast<const char*>(t.scores + start);
    if (t.groups) c.groups = t.groups + start;
    if (g.grad_value) c.grad_value = g.grad_value + line + i;
    if (g.grad_beta) c.grad_beta = g.grad_beta + line + i;
    if (g.grad_gamma) c.grad_gamma = g.grad_gamma + line + i;
    backward_one(c, {0, m, whole(m), p, dp, t.row.dx}, t.row);
    std::memcpy(dp, t.row.dx, m * sizeof(float));
    if (t.dropout) times(p, t.dropout + start, m);
    if (g.grad_bias) {
      const int64_t* stride = g.grad_bias_stride;
      float* to = g.grad_bias + r.b * stride[0] + r.h * stride[1] + (r.row + i) * stride[2] + r.first;
      for (int64_t j = 0; j < m; ++j) to[all ? j : t.some[j]] += dp[j];
    }
    for (int64_t j = 0; t.capped && j < m; j += W) {
      const vf x = load(t.capped + start + j) * inverse;
      store(dp + j, load(dp + j) * (1.0f - x * x));
    }
  }
}

// c[keys, columns] += alpha w^T x for x in t.panels: into the lines of the keys that have weight
void add_to_keys(const BlockBuffers& t, int64_t rows, int64_t columns, int64_t m, bool all, float alpha, const float* w,
                 float* c) {
  if (all) return multiply<true>(m, columns, rows, alpha, {w, t.width}, t.panels, true, c, columns);
  multiply<true, true>(m, columns, rows, alpha, {w, t.width}, t.panels, true, c, columns, 0, t.some);
}

void rows_block_back(const Arguments& g, const RowsOfHead& r, const KeyPanels& keys, const BlockBuffers& t, float* grad_k,
                     float* grad_v) {
  const int64_t b = r.b, h = r.h, row = r.row;
  const Matrix q = rows_of(g.q, b, h, row, r.count, g.dim, t.q);
  const Matrix grad_out = rows_of(g.grad_out, b, h, row, r.count, g.value_dim, t.grad_out);
  const float scale = float(g.scale);
  multiply_keys(g, r, keys, q, t);
  weigh(g, r, t);
  const int64_t m = moves_zeros(g.kind) ? r.keys : weighed(g, t, r.count, r.keys);
  const bool all = m == r.keys;
  const float* v_transposed = keys.v_transposed + r.first * g.value_dim;
  if (!all) {
    for (float* x : {t.p, t.scores, t.capped, t.dropout, reinterpret_cast<float*>(t.groups)}) {
      squeeze(t, r.count, r.keys, m, x);
    }
    const Matrix v{reinterpret_cast<const float*>(at(g.v, b, h * g.kv_heads / g.heads, r.first, 0)), g.v.stride[2]};
    pack_transposed(v, m, g.value_dim, t.panels, t.some);
    v_transposed = t.panels;
  }
  multiply<false>(r.count, padded(m), g.value_dim, 1.0f, grad_out, v_transposed, false, t.dp, t.width);
  unweigh(g, r, m, all, t);
  if (grad_v) {
    pack(grad_out, r.count, g.value_dim, t.panels);
    add_to_keys(t, r.count, g.value_dim, m, all, 1.0f, t.p, grad_v + r.first * g.value_dim);
  }
  if (grad_k) {
    pack(q, r.count, g.dim, t.panels);
    add_to_keys(t, r.count, g.dim, m, all, scale, t.dp, grad_k + r.first * g.dim);
  }
  if (g.grad_q) {
    float* to = g.grad_q + ((b * g.heads + h) * g.rows + row) * g.dim;
    product(t, r.count, g.dim, m, all, scale, t.dp, keys.k + r.first * kPanel, g.keys, to);
  }
}

// All query heads of one key-value head against its keys: every `splits`-th block of rows
void rows_of_keys_back(const Arguments& g, const KeyPanels& keys, int64_t b, int64_t kv, int64_t split) {
  const Blocks blocks(g, true);
  const int64_t group = g.heads / g.kv_heads;
  Pieces piece;
  BlockBuffers t;
  for (int pass = 0; pass < 2; ++pass) {
    t = block_buffers(piece, g, blocks.largest, true);
    if (!pass) piece.allocate();
  }
  const int64_t line = ((split * g.batch + b) * g.kv_heads + kv) * g.keys;
  float *grad_k = static_cast<float*>(g.grad_k.data), *grad_v = static_cast<float*>(g.grad_v.data);
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
    for (int64_t block = split; block < blocks.number; block += g.splits) {
      const RowsOfHead r(g, b, h, blocks.first(block), blocks.count(block));
      rows_block_back(g, r, keys, t, grad_k ? grad_k + line * g.dim : nullptr,
                      grad_v ? grad_v + line * g.value_dim : nullptr);
    }
  }
}

}  // namespace

extern "C" {

void multimax_row_attention_forward(const Arguments* arguments) {
  const Arguments& g = *arguments;
  if (g.rows == 1) {
    const int64_t items = g.batch * g.heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(std::min(g.threads, items)))
    for (int64_t item = 0; item < items; ++item) single_row(g, item / g.heads, item % g.heads);
    return;
  }
  Panels panels(g, false);
  const Blocks blocks(g, false);
  const int64_t items = g.batch * g.heads * blocks.number;
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(std::min(g.threads, items)))
  for (int64_t item = 0; item < items; ++item) {
    const int64_t h = item / blocks.number % g.heads, b = item / blocks.number / g.heads;
    // later rows see more keys under a causal mask: the longest first
    rows_block(g, panels(b, h * g.kv_heads / g.heads), blocks, b, h, blocks.number - 1 - item % blocks.number);
  }
}

void multimax_row_attention_backward(const Arguments* arguments) {
  const Arguments& g = *arguments;
  Panels panels(g, true);
  for_key_heads(g, [&](int64_t b, int64_t h, int64_t split) { rows_of_keys_back(g, panels(b, h), b, h, split); });
}

}  // extern "C"
