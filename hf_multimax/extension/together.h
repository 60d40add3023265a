// The thresholds of W rows at once, one in each lane. In a short row a step of Newton's method takes less time than the sum
// across its vectors, which lanes do not need.

#pragma once

#include "found.h"

namespace {

constexpr int64_t kShort = 128;  // scores of a row that still is one

inline bool found_together(const RowCall& g, int64_t n) {
  return n <= kShort && (g.kind == kSparseMax || g.kind == kEntMax15);
}

// The half h of a vector in float64
inline vd half_of(const float* x, int h) { return load_wide(x + h * kHalf_); }

// W thresholds tau with sum(max(z - tau, 0)) = 1, from below, where z = scores less their peak, n vectors of them: the
// support grows smaller until it stays; a step in float64 ends it.
void sparsemax_thresholds(const float* z, int64_t n, double* tau) {
  vf t = splat(-1.0f), before = splat(-1.0f);
  for (;;) {
    vf sum_ = {}, many = {};
    for (int64_t j = 0; j < n; ++j) {
      const vf x = load(z + j * W);
      const vi in = x > t;
      sum_ += in ? x : vf{}, many += in ? splat(1.0f) : vf{};
    }
    if (!count(many != before)) break;
    const vf next = (sum_ - 1.0f) / many;
    t = max(next, t), before = many;  // rounding must not let it fall
  }
  float from[W];
  store(from, t);
  for (int h = 0; h < 2; ++h) {
    const vd start = half_of(from, h);
    vd sum_ = {}, many = {};
    for (int64_t j = 0; j < n; ++j) {
      const vd x = half_of(z + j * W, h);
      const vl in = x > start;
      sum_ += in ? x : vd{}, many += in ? vd{} + 1.0 : vd{};
    }
    const vd exact = (sum_ - 1.0) / many;
    std::memcpy(tau + h * kHalf_, &exact, sizeof exact);
  }
}

// The same with sum(max(z / 2 - tau, 0)^2) = 1
void entmax15_thresholds(const float* z, int64_t n, double* tau) {
  vf t = splat(-1.0f);
  for (int step = 0; step < 30; ++step) {
    vf first = {}, second = {};
    for (int64_t j = 0; j < n; ++j) {
      const vf x = relu(0.5f * load(z + j * W) - t);
      first += x, second += x * x;
    }
    const vf norm = sqrt_(second), move = (norm - 1.0f) * norm / first;
    t += move;
    if (!count((move > -1e-5f * t) | (move < 1e-5f * t))) break;  // the step in float64 squares what is missing
  }
  float from[W];
  store(from, t);
  for (int h = 0; h < 2; ++h) {
    const vd start = half_of(from, h);
    vd first = {}, second = {};
    for (int64_t j = 0; j < n; ++j) {
      vd x = 0.5 * half_of(z + j * W, h) - start;
      x = x > 0.0 ? x : vd{};
      first += x, second += x * x;
    }
    for (int i = 0; i < kHalf_; ++i) {
      const double norm = std::sqrt(second[i]);
      tau[h * kHalf_ + i] = start[i] + (norm - 1) * norm / first[i];
    }
  }
}

// The numbers that weigh_found wants of `rows` <= W rows of n <= kShort scores, `stride` floats from each other and minus
// infinity where they are masked, up to whole vectors. `z` has room for whole(n) vectors.
void find_together(const RowCall& g, const float* s, int64_t stride, int64_t rows, int64_t n, float* z, float* stats) {
  vf top = splat(-kInfinity);
  vi broken = {};
  for (int64_t first = 0; first < n; first += W) {
    vf block[W];
    for (int64_t i = 0; i < W; ++i) block[i] = load(s + std::min(i, rows - 1) * stride + first);
    transpose(block);
    for (int64_t j = 0; j < std::min<int64_t>(W, n - first); ++j) {
      const vi masked = block[j] <= kMasked;
      broken |= ~(masked | (block[j] <= kMost));
      const vf x = masked ? splat(-kInfinity) : block[j];
      top = max(x, top);
      store(z + (first + j) * W, x);
    }
  }
  broken |= top == -kInfinity;
  const vf peak = broken ? vf{} : top;
  for (int64_t j = 0; j < n; ++j) {
    const vf x = load(z + j * W) - peak;
    store(z + j * W, broken ? (j ? splat(-kInfinity) : vf{}) : x);  // of nothing to find, something that is found
  }
  double tau[W];
  g.kind == kSparseMax ? sparsemax_thresholds(z, n, tau) : entmax15_thresholds(z, n, tau);
  for (int64_t i = 0; i < rows; ++i) {
    std::fill(stats + i * kStats, stats + (i + 1) * kStats, 0.0f);
    if (!broken[i]) Threshold(peak[i], tau[i]).left(stats + i * kStats);
  }
}

}  // namespace
