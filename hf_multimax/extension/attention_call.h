// A call of attention: its tensors and numbers, and what of them a row of scores meets in every kernel.

#pragma once

#include "products.h"

extern "C" {

// A [batch, heads, rows, columns] view; data is null where the argument is absent, strides count elements.
struct View {
  void* data;
  int64_t stride[4];
  int64_t type;
};

struct Arguments {
  View q, k, v, out, grad_out, bias, mask, grad_k, grad_v;  // of rows of functions the last two are float32
  float* out32;       // [splits, batch, heads, rows, value_dim] (forward, may be null), [batch, heads, ...] (backward)
  float* top;         // [splits, batch, heads, rows] (no splits in the backward): each row's largest modulated score
  float* total;       // shaped like top: sum of exp(score - top), 0 for a row that sees nothing
  float* peak;        // shaped like top: that score before sigma; all three are null if not wanted
  float* delta;       // [batch, heads, rows]: rowsum(out * grad_out), written by the backward
  float* grad_q;      // [splits, batch, heads, rows, dim], zeros on entry; like grad_k and grad_v null where not wanted
  float* grad_bias;   // contiguous, zeros on entry; null where not wanted
  float* grad_ranges;    // contiguous, shaped like the parameters; the three are null where none of them is wanted
  float* grad_ts;
  float* grad_affine;    // null without affine
  double* sums;  // [splits, batch, heads, 4 order + 2]: what those are the sums of; set by the backward itself
  const float* ranges;   // [1 or heads, 2 order]
  const float* ts;
  const float* affine;  // [1 or heads, 2], null where absent
  const float* sinks;   // [heads], null where absent
  const float* value;   // options of a function of rows, [heads], null where it has none; see RowCall
  const float* beta;
  const float* gamma;
  float* stats;         // [batch, heads, rows, stats_size(kind)]: what the forward of a row leaves to the backward, see rows.h
  float* grad_value;    // [batch, heads, rows], null where not wanted
  float* grad_beta;
  float* grad_gamma;
  int64_t grad_bias_stride[4];
  int64_t batch, heads, kv_heads, rows, keys, dim, value_dim, order;
  int64_t parameter_stride;  // elements from one head to the next, 0 where shared
  int64_t splits, threads, row_block;
  int64_t affine_stride;   // as parameter_stride
  int64_t causal, window;  // window -1: none
  int64_t seed;
  int64_t kind;  // the function of rows, a Kind of rows.h
  double scale, softcap, dropout;  // softcap 0: none
  double a, b;  // its numbers
};

}  // extern "C"

namespace {

inline const char* at(const View& t, int64_t b, int64_t h, int64_t i, int64_t j) {
  return static_cast<const char*>(t.data) +
         size_of(t.type) * (b * t.stride[0] + h * t.stride[1] + i * t.stride[2] + j * t.stride[3]);
}

// Rows [start, start + count) of one head as floats: in place where they are floats already, else converted.
Matrix rows_of(const View& t, int64_t b, int64_t h, int64_t start, int64_t count, int64_t columns, float* scratch) {
  if (t.type == kFloat) return {reinterpret_cast<const float*>(at(t, b, h, start, 0)), t.stride[2]};
  for (int64_t i = 0; i < count; ++i) read(at(t, b, h, start + i, 0), t.type, 1, columns, scratch + i * columns);
  return {scratch, columns};
}

struct Range {
  int64_t low, high;
};

// The keys that rows [row, row + count) may see, as [low, high) of all keys, before any mask
Range visible(const Arguments& g, int64_t row, int64_t count) {
  const int64_t shift = g.keys - g.rows;
  Range r{0, g.keys};
  if (g.causal) r.high = std::min(r.high, row + count + shift);
  if (g.window >= 0) {
    r.low = std::max<int64_t>(0, row + shift - g.window + 1);
    if (!g.causal) r.high = std::min(r.high, row + count - 1 + shift + g.window);
  }
  r.high = std::max(r.high, r.low);
  return r;
}

Range clip(Range r, int64_t low, int64_t high) {
  r.low = std::min(std::max(r.low, low), high) - low;
  r.high = std::max(std::min(r.high, high) - low, r.low);
  return r;
}

void mask_row(const Arguments& g, int64_t b, int64_t h, int64_t i, int64_t key, int64_t n, float* to) {
  const char* from = at(g.mask, b, h, i, key);
  const int64_t stride = g.mask.stride[3];
  if (g.mask.type == kBool) {
    const unsigned char* p = reinterpret_cast<const unsigned char*>(from);
    if (stride == 1) {
      for (int64_t j = 0; j < n; ++j) to[j] = p[j] ? 0.0f : -kInfinity;
    } else {
      for (int64_t j = 0; j < n; ++j) to[j] = p[j * stride] ? 0.0f : -kInfinity;
    }
    return;
  }
  const float lowest = g.mask.type == kHalf ? -32752.0f : g.mask.type == kBFloat16 ? -0x1.fep126f : kMasked;
  read(from, g.mask.type, stride, n, to);
  for (int64_t j = 0; j < n; ++j) to[j] = to[j] <= lowest ? -kInfinity : to[j];
}

inline uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The dropout factors of a row: a function of (seed, head, row, key) alone, whatever the blocks
void dropout_row(const Arguments& g, int64_t head, int64_t i, int64_t key, int64_t n, float* to) {
  const uint64_t state = mix(mix(uint64_t(g.seed) + mix(uint64_t(head))) + uint64_t(i));
  const uint32_t first = uint32_t(state), second = uint32_t(state >> 32);
  const uint32_t limit = uint32_t(std::min(g.dropout * 4294967296.0, 4294967295.0));
  const float kept = float(1.0 / (1.0 - g.dropout));
  const vu lane = bits<vu>(lane_numbers()) + uint32_t(key);
  for (int64_t j = 0; j < n; j += W) {
    vu x = (lane + uint32_t(j)) * 0x9e3779b9u + first;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = ((x ^ (x >> 15)) + second) * 0x846ca68bu;
    x ^= x >> 16;
    store(to + j, x >= limit ? splat(kept) : vf{});
  }
}

// Products s[0, n) -> scores within the softcap; `capped` keeps them for its derivative
void cap_row(const Arguments& g, int64_t n, float* s, float* capped) {
  const float cap = float(g.softcap), inverse = float(1.0 / g.softcap);
  for (int64_t j = 0; j < n; j += W) {
    vf x = cap * tanh_(load(s + j) * inverse);
    store(s + j, x), store(capped + j, x);
  }
}

void add_bias(const Arguments& g, int64_t b, int64_t h, int64_t i, int64_t key, int64_t n, float* s, float* scratch) {
  read(at(g.bias, b, h, i, key), g.bias.type, g.bias.stride[3], n, scratch);
  for (int64_t j = 0; j < n; j += W) store(s + j, load(s + j) + load(scratch + j));
}

void fill_outside(float* s, Range inside, int64_t n, float with = 0.0f) {
  std::fill(s, s + inside.low, with);
  std::fill(s + inside.high, s + n, with);
}

// Calls keys_of(b, kv_head, split) for every key head and share of the keys or rows, in parallel. Batches and heads that
// share a bias entry go to one thread in turn, so that its gradient has one writer.
template <class KeysOf>
void for_key_heads(const Arguments& g, const KeysOf& keys_of) {
  const bool join_batch = g.grad_bias && g.grad_bias_stride[0] == 0, join_heads = g.grad_bias && g.grad_bias_stride[1] == 0;
  const int64_t outer_b = join_batch ? 1 : g.batch, outer_h = join_heads ? 1 : g.kv_heads;
  const int64_t inner_b = g.batch / outer_b, inner_h = g.kv_heads / outer_h;
  const int64_t items = outer_b * outer_h * g.splits;
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(std::min(g.threads, items)))
  for (int64_t item = 0; item < items; ++item) {
    const int64_t split = item % g.splits, h = item / g.splits % outer_h, b = item / (g.splits * outer_h);
    for (int64_t i = 0; i < inner_b; ++i) {
      for (int64_t j = 0; j < inner_h; ++j) keys_of(b * inner_b + i, h * inner_h + j, split);
    }
  }
}

}  // namespace
