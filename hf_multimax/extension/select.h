// The k-th smallest of some floats without sorting them: a bracket from a sample, then what lies inside of it.

#pragma once

#include "vectors.h"

namespace {

// Of few numbers, by counting for each how many are smaller; c is overwritten with infinity up to a whole vector.
float nth_of_few(float* c, int64_t m, int64_t k) {
  for (int64_t i = m; i < m + W; ++i) c[i] = kInfinity;
  for (int64_t i = 0; i < m; ++i) {
    int64_t less = 0, not_greater = 0;
    for (int64_t j = 0; j < m; j += W) less += count(load(c + j) < c[i]), not_greater += count(load(c + j) <= c[i]);
    if (less <= k && k < not_greater) return c[i];
  }
  return c[0];  // not reached: no number is NaN
}

// f(v) for the vectors of m floats, where NaN, which compares with nothing, fills up the last
template <class F>
inline void for_vectors(const float* from, int64_t m, F f) {
  int64_t j = 0;
  for (; j + W <= m; j += W) f(load(from + j));
  if (j == m) return;
  vf v = splat(std::numeric_limits<float>::quiet_NaN());
  for (int64_t i = 0; i < m - j; ++i) v[i] = from[j + i];
  f(v);
}

// The k-th smallest, from 0, of the m floats at c, none of which is NaN; `work` has room for them and a vector more.
float nth_smallest(const float* c, int64_t m, int64_t k, float* work) {
  constexpr int64_t kSample = 32, kFew = 64, kMargin = 3;
  const float* from = c;
  while (m > kFew) {
    float sample[kSample + W];
    for (int64_t i = 0; i < kSample; ++i) sample[i] = from[i * m / kSample];
    const int64_t rank = k * kSample / m;
    const float low = rank < kMargin ? -kInfinity : nth_of_few(sample, kSample, rank - kMargin);
    const float high = rank + kMargin >= kSample ? kInfinity : nth_of_few(sample, kSample, rank + kMargin);
    int64_t below = 0, up_to = 0, kept = 0;
    for_vectors(from, m, [&](vf v) { below += count(v < low), up_to += count(v <= high); });
    const bool left = k < below, right = k >= up_to;
    if (!left && !right && low == high) return low;
    const float least = left ? -kInfinity : low, most = right ? kInfinity : high;
    for_vectors(from, m, [&](vf v) {  // may be in place: nothing is written beyond what was read
      const vi taken = left ? vi(v < low) : right ? vi(v > high) : vi((v >= least) & (v <= most));
      kept += compress(work + kept, v, taken);
    });
    k -= left ? 0 : right ? up_to : below;
    const bool slow = kept > m * 3 / 4;
    from = work, m = kept;
    if (slow) {
      std::nth_element(work, work + k, work + m);
      return work[k];
    }
  }
  if (from == c) std::copy(c, c + m, work);
  return nth_of_few(work, m, k);
}

// The (k + 1)-th smallest, where there is one, from the k-th
float next_smallest(const float* c, int64_t m, int64_t k, float nth) {
  int64_t not_greater = 0;
  vf least = splat(-kInfinity);  // of what is greater, negated
  for_vectors(c, m, [&](vf v) {
    not_greater += count(v <= nth);
    least = max(v > nth ? -v : splat(-kInfinity), least);
  });
  return not_greater > k + 1 ? nth : -largest(least);
}

}  // namespace
