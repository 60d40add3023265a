// A row of scores: how it is read, masked, and written, whatever is made of it. Masked entries and the tail that fills a
// row up to whole vectors are minus infinity while it is computed, so that nothing else needs to know of them.

#pragma once

#include "vectors.h"

namespace {

enum Kind : int64_t {
  kMultiMax, kSoftMax, kScalableSoftMax, kAdaptiveTemperature, kSparseMax, kEntMax15, kEntMax, kRSoftMax, kTSoftMax,
  kEvSoftMax, kTopKSoftMax, kFusedMax, kOscarMax, kSoftMax1, kSigmoid, kAsEntMax, kSoftPick
};

constexpr float kMost = std::numeric_limits<float>::max();

// What the forward of a row leaves to its backward: four numbers of each function's own, three that the weights are made
// of in one pass over the scores, and whether these are there.
enum Stat { kOwn = 0, kTop = 4, kFactor = 5, kRest = 6, kFound = 7 };
constexpr int64_t kStats = 8;
// What gives weight in a row of fusedmax or oscarmax, where it is not more: first place, last place and weight of a piece;
// least and largest magnitude of a group's scores, and the weight of those above 0
constexpr int64_t kPieces = 16, kOfPiece = 3;

}  // namespace

extern "C" {

// Rows of n contiguous scores. A pointer is null where nothing is there to read, or nobody wants what it would get.
struct RowCall {
  const char* x;
  const unsigned char* mask;  // 0 where an entry is masked
  char* out;
  float* p;         // [rows, n]: the result in float32; the backward reads it
  float* stats;     // [rows, kStats]
  int32_t* groups;  // [rows, n]: which entries fusedmax and oscarmax fused, -1 where that passes no gradient
  const float* value;  // an option that is a tensor: one for every row, in place of `a`
  const float* beta;   // [rows], as gamma: of asentmax
  const float* gamma;
  const float* ranges;  // [heads, 2 order]
  const float* ts;
  const float* affine;  // [heads, 2]
  const char* grad;     // [rows, n], of x's type, as grad_x is
  char* grad_x;
  float* grad_value;    // [rows], as the two that follow
  float* grad_beta;
  float* grad_gamma;
  double* sums;         // [items, 4 order + 2]: gradients of ranges, ts, scale and shift, to be added up
  int64_t mask_stride[4];  // of the last dimension, then of those that rows are numbered by, slowest first
  int64_t mask_size[2];    // of the last two of these
  int64_t type, kind, rows, n, order, heads;
  int64_t head_rows;  // rows of one head that follow each other
  int64_t item_rows;  // rows that one thread takes at a time; a head's begin with a new item
  int64_t threads;
  double a, b;
};

}  // extern "C"

namespace {

// One row in scratch memory
struct Line {
  int64_t row, n, width;  // width: n rounded up to whole vectors
  int64_t kept;
  float* s;
  float peak;   // minus infinity where nothing is kept
  bool broken;  // NaN or infinity among what is kept
};

// A thread's buffers, each of a row's width and a vector more
struct Buffers {
  float *s, *p, *g, *dx, *a, *b;
  double *d, *e;
  int32_t *i, *j, *k;
  uint64_t *keys, *sorted;
  unsigned char* mask;
};

inline int64_t whole(int64_t n) { return (n + W - 1) / W * W; }

inline bool is_structured(int64_t kind) { return kind == kFusedMax || kind == kOscarMax; }

// Whether entries without weight have a gradient: oscarmax gives scores of opposite sign one together, and all scores
// are in softpick's denominator
inline bool moves_zeros(int64_t kind) { return kind == kOscarMax || kind == kSoftPick; }

Buffers buffers(Pieces& piece, int64_t n, bool structured) {
  const int64_t size = whole(n) + 2 * W;
  Buffers t{};
  t.s = piece(size), t.p = piece(size), t.g = piece(size), t.dx = piece(size), t.a = piece(size), t.b = piece(size);
  t.mask = reinterpret_cast<unsigned char*>(piece(size / 4 + W));
  if (structured) {
    t.d = reinterpret_cast<double*>(piece(2 * size)), t.e = reinterpret_cast<double*>(piece(2 * size));
    t.i = reinterpret_cast<int32_t*>(piece(size)), t.j = reinterpret_cast<int32_t*>(piece(size));
    t.k = reinterpret_cast<int32_t*>(piece(size));
    t.keys = reinterpret_cast<uint64_t*>(piece(2 * size)), t.sorted = reinterpret_cast<uint64_t*>(piece(2 * size));
  }
  return t;
}

Buffers buffers(int64_t n, bool structured) {
  Pieces piece;
  buffers(piece, n, structured);
  piece.allocate();
  return buffers(piece, n, structured);
}

// A row's numbers for its backward; null where nobody wants them
inline int64_t stats_size(int64_t kind) { return is_structured(kind) ? kStats + kPieces * kOfPiece : kStats; }

inline float* stats_of(const RowCall& g, int64_t row) { return g.stats ? g.stats + row * stats_size(g.kind) : nullptr; }

inline void leave(float* stats, float top, float factor, float rest) {
  if (stats) stats[kTop] = top, stats[kFactor] = factor, stats[kRest] = rest, stats[kFound] = 1.0f;
}

inline float value_of(const RowCall& g, int64_t row) { return g.value ? g.value[row] : float(g.a); }

// The mask of a row as contiguous bytes
const unsigned char* mask_of(const RowCall& g, int64_t row, unsigned char* scratch) {
  if (!g.mask) return nullptr;
  const int64_t i = row % g.mask_size[1], h = row / g.mask_size[1] % g.mask_size[0];
  const int64_t b = row / (g.mask_size[1] * g.mask_size[0]);
  const unsigned char* from = g.mask + b * g.mask_stride[1] + h * g.mask_stride[2] + i * g.mask_stride[3];
  if (g.mask_stride[0] == 1) return from;
  for (int64_t j = 0; j < g.n; ++j) scratch[j] = from[j * g.mask_stride[0]];
  return scratch;
}

inline vf first_lanes(const float* from, int64_t n, float rest) {
  vf v = splat(rest);
  std::memcpy(&v, from, n * sizeof(float));
  return v;
}

// Reads a row into t.s, each score through `first`; masks it, and finds its peak and what is broken. Scores at or below
// kMasked are masked entries.
template <class First>
Line take(const RowCall& g, int64_t row, const Buffers& t, First first) {
  typedef unsigned char vb __attribute__((vector_size(W)));
  Line l{row, g.n, whole(g.n), 0, t.s, -kInfinity, false};
  const float* x = reinterpret_cast<const float*>(g.x) + row * g.n;
  if (g.type != kFloat) read(g.x + row * g.n * 2, g.type, 1, g.n, t.s), x = t.s;
  const unsigned char* keep = mask_of(g, row, t.mask);
  vf top[2] = {splat(-kInfinity), splat(-kInfinity)};
  vi broken = {}, kept = {};
  auto step = [&](int64_t j, vf v, vi open, vf& most) {
    v = first(v);
    const vi stays = open & ~(v <= kMasked);
    v = stays ? v : splat(-kInfinity);
    broken |= stays & ~(v <= std::numeric_limits<float>::max());
    kept -= stays;
    most = max(v, most);
    store(t.s + j, v);
  };
  auto open = [&](int64_t j) {
    vb bytes;
    std::memcpy(&bytes, keep + j, W);
    return vi(__builtin_convertvector(bytes, vi) != 0);
  };
  int64_t j = 0;
  if (keep) {
    for (; j + W <= g.n; j += W) step(j, load(x + j), open(j), top[0]);
  } else {
    const vi all = vi{} == 0;
    for (; j + 2 * W <= g.n; j += 2 * W) step(j, load(x + j), all, top[0]), step(j + W, load(x + j + W), all, top[1]);
    for (; j + W <= g.n; j += W) step(j, load(x + j), all, top[0]);
  }
  if (j < g.n) {
    vi lanes;
    for (int i = 0; i < W; ++i) lanes[i] = i < g.n - j && (!keep || keep[j + i]) ? -1 : 0;
    step(j, first_lanes(x + j, g.n - j, 0.0f), lanes, top[0]);
  }
  l.kept = int64_t(sum(__builtin_convertvector(kept, vf)));  // exact: no lane has seen 2^24 vectors
  l.peak = largest(max(top[0], top[1]));
  l.broken = count(broken);
  return l;
}

// The result of a row: f of what stands in its scratch
template <class F>
inline void emit(const RowCall& g, const Line& l, F f) {
  float* to = g.type == kFloat ? reinterpret_cast<float*>(g.out) + l.row * l.n : l.s;
  int64_t j = 0;
  for (; j + W <= l.n; j += W) store(to + j, f(load(l.s + j)));
  if (j < l.n) {
    const vf v = f(load(l.s + j));
    std::memcpy(to + j, &v, (l.n - j) * sizeof(float));
  }
  if (g.type == kFloat) return;
  write(l.s, l.n, g.type, g.out + l.row * l.n * 2);
  if (g.p) std::memcpy(g.p + l.row * l.n, l.s, l.n * sizeof(float));
}

constexpr int64_t kBlock = 4096;  // entries that are added up in float32 before their sum joins one in float64

// The sum of f(j) over whole vectors
template <class F>
inline double total(int64_t width, F f) {
  double sum_ = 0;
  for (int64_t first = 0; first < width; first += kBlock) {
    const int64_t last = std::min(first + kBlock, width);
    vf a = {}, b = {};
    int64_t j = first;
    for (; j + 2 * W <= last; j += 2 * W) a += f(j), b += f(j + W);
    for (; j < last; j += W) a += f(j);
    sum_ += sum(a + b);
  }
  return sum_;
}

// One row of the backward pass: probabilities and their gradient, zero in the tail, and where the scores' goes
struct BackLine {
  int64_t row, n, width;
  const float *p, *g;
  float* dx;
};

const float* as_floats(const RowCall& g, const char* from, int64_t type, int64_t row, float* scratch) {
  const int64_t width = whole(g.n);
  if (type == kFloat && width == g.n) return reinterpret_cast<const float*>(from) + row * g.n;
  read(from + row * g.n * size_of(type), type, 1, g.n, scratch);
  std::fill(scratch + g.n, scratch + width, 0.0f);
  return scratch;
}

BackLine take_back(const RowCall& g, int64_t row, const Buffers& t) {
  BackLine l{row, g.n, whole(g.n), nullptr, nullptr, nullptr};
  l.p = as_floats(g, reinterpret_cast<const char*>(g.p), kFloat, row, t.p);
  l.g = as_floats(g, g.grad, g.type, row, t.g);
  l.dx = g.type == kFloat && l.width == l.n ? reinterpret_cast<float*>(g.grad_x) + row * l.n : t.dx;
  return l;
}

void finish(const RowCall& g, const BackLine& l) {
  if (g.type == kFloat && l.width == l.n) return;
  write(l.dx, l.n, g.type, g.grad_x + l.row * l.n * size_of(g.type));
}

// p g, and nothing where p is 0, whatever stands there
inline vf product(vf p, vf g) { return p == 0.0f ? vf{} : p * g; }

inline double mean_gradient(const BackLine& l) {
  return total(l.width, [&](int64_t j) { return product(load(l.p + j), load(l.g + j)); });
}

// The largest, NaN where one is NaN
float largest_of(const float* p, int64_t width) {
  vf top = {};
  vi nan = {};
  for (int64_t j = 0; j < width; j += W) top = max(load(p + j), top), nan |= load(p + j) != load(p + j);
  return count(nan) ? std::numeric_limits<float>::quiet_NaN() : largest(top);
}

}  // namespace
