// What all C++ here computes with: vectors of floats, storage types, scratch memory. Compilers choose the instructions.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include <omp.h>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kMasked = -0x1.fffffep126f;  // half of the lowest float: scores at or below it are masked entries
constexpr int kMaxOrder = 16;

enum Type : int32_t { kFloat = 0, kBFloat16 = 1, kHalf = 2, kBool = 3 };

// ---------------------------------------------------------------------------------------------------- vectors

inline vf splat(float x) { return x - vf{}; }

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

template <class To, class From>
inline To bits(From x) {
  To y;
  static_assert(sizeof x == sizeof y, "same size");
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// a where a > b, else b, NaN being greater than nothing: one instruction on x86, which compilers do not find by themselves
inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// a * b + c, rounded once where the processor can: spelt out where two functions must agree bit for bit, as the compiler
// chooses what to fuse anew in each
inline vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_NEON)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline vf relu(vf a) { return max(a, vf{}); }

// A number for each lane, as a constant: compilers would put one together lane by lane, each time anew
template <class F>
constexpr std::array<int32_t, W> lanes(F f) {
  std::array<int32_t, W> numbers{};
  for (int i = 0; i < W; ++i) numbers[i] = f(i);
  return numbers;
}

inline vi load(const std::array<int32_t, W>& numbers) {
  vi v;
  std::memcpy(&v, numbers.data(), sizeof v);
  return v;
}

inline vi lane_numbers() {
  static constexpr auto kNumbers = lanes([](int i) { return i; });
  return load(kNumbers);
}

// Lane i of the result is lane i ^ STEP
template <int STEP>
inline vf swapped(vf v) {
  static constexpr auto kOthers = lanes([](int i) { return i ^ STEP; });
  return __builtin_shuffle(v, load(kOthers));
}

// log2(W) steps that join the halves of what is left: f(step)
template <int STEP = W / 2, class F>
inline void reduce(F f) {
  f(std::integral_constant<int, STEP>());
  if constexpr (STEP > 1) reduce<STEP / 2>(f);
}

inline float sum(vf v) {
  reduce([&](auto step) { v += swapped<step>(v); });
  return v[0];
}

// x = n log(2) + r with |r| <= log(2) / 2: power = 2^n, result = e^r - 1. NaN stays NaN.
inline vf exp_parts(vf x, vf& power) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  vf t = x * 1.44269504f + magic;
  vf n = t - magic;
  vf r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  power = bits<vf>((bits<vi>(t) << 23) + (127 << 23));
  vf p = r * 1.98412698e-4f + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  return (p * r) * r + r;
}

// e^x for x <= 88, 0 below -88 and at minus infinity
inline vf exp_(vf x) {
  vf power;
  vf r = exp_parts(max(splat(-88.0f), x), power);
  return r * power + power;
}

// tanh(x) = (e^2|x| - 1) / (e^2|x| + 1) with the sign of x, from e^r - 1 so that nothing cancels near zero
inline vf tanh_(vf x) {
  vf power, a = x < 0.0f ? -x : x;
  a = a > 10.0f ? splat(10.0f) : a;
  vf r = exp_parts(2.0f * a, power);
  vf e = r * power + (power - 1.0f);
  vf t = e / (e + 2.0f);
  return x < 0.0f ? -t : t;
}

// The smaller power of two and the mantissa's logarithm, from y > 0 or, where they are close to 1, from u = y - 1, so that
// nothing cancels: log(y) = e log(2) + 2 atanh(s). Below the smallest normal number the logarithm is that number's.
inline vf log_parts(vf y, vf u, vf& e) {
  y = max(y, splat(std::numeric_limits<float>::min()));
  const vi b = bits<vi>(y), shifted = b - 0x3f3504f3;  // sqrt(1/2) begins a power's interval
  const vi power = shifted >> 23;
  e = __builtin_convertvector(power, vf);
  const vf m = bits<vf>(b - (power << 23));
  const vf f = power == 0 ? u : m - 1.0f, s = f / (f + 2.0f), q = s * s;
  vf p = q * (2.0f / 11) + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  return p * q * s + 2.0f * s;
}

// log(1 + u), exact to a few units in the last place also where u is small; y is 1 + u or what it stands for
inline vf log_(vf y, vf u) {
  vf e;
  const vf r = log_parts(y, u, e);
  return e * 0.693145752f + (e * 1.42860677e-6f + r);
}

inline vf sqrt_(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < W; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

inline float largest(vf v) {
  reduce([&](auto step) { v = max(v, swapped<step>(v)); });
  return v[0];
}

// How many lanes of a comparison hold
inline int count(vi lanes) {
#if defined(__AVX512F__)
  return __builtin_popcount(_mm512_movepi32_mask((__m512i)lanes));
#elif defined(__AVX__)
  return __builtin_popcount(_mm256_movemask_ps((__m256)lanes));
#else
  int n = 0;
  for (int i = 0; i < W; ++i) n -= lanes[i];
  return n;
#endif
}

// Writes the lanes that hold, in order, and returns how many they are; a whole vector may be overwritten.
inline int compress(float* to, vf v, vi lanes) {
#if defined(__AVX512F__)
  const __mmask16 k = _mm512_movepi32_mask((__m512i)lanes);
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(k, (__m512)v));
  return __builtin_popcount(k);
#else
  int n = 0;
  if (!count(lanes)) return 0;
  for (int i = 0; i < W; ++i) {
    to[n] = v[i];
    n -= lanes[i];
  }
  return n;
#endif
}

// Transposes W vectors of W floats by log2(W) perfect shuffles.
inline void transpose(vf* rows) {
  static constexpr auto kLow = lanes([](int i) { return i / 2 + i % 2 * W; });
  const vi low = load(kLow), high = low + W / 2;
  for (int step = 1; step < W; step *= 2) {
    vf next[W];
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], high);
    }
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// ---------------------------------------------------------------------------------------------------- storage

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits<float>(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
  return bits<float>(bits<uint32_t>(bits<float>(rest << 13) * 0x1p112f) | sign);
}

inline uint16_t float_to_half(float f) {
  uint32_t x = bits<uint32_t>(f), sign = (x >> 16) & 0x8000, a = x & 0x7fffffff;
  if (a > 0x7f800000) return sign | 0x7e00;
  if (a >= 0x477ff000) return sign | 0x7c00;
  if (a < 0x38800000) return sign | uint16_t(bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3f000000);
  return sign | uint16_t((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13);
}

inline uint16_t float_to_bfloat16(float f) {
  uint32_t x = bits<uint32_t>(f);
  uint32_t rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
  return f != f ? 0x7fc0 : rounded;
}

inline int64_t size_of(int64_t type) { return type == kFloat ? 4 : type == kBool ? 1 : 2; }

// n elements of any floating type and stride as floats
void read(const char* from, int64_t type, int64_t stride, int64_t n, float* to) {
  if (type == kFloat) {
    const float* p = reinterpret_cast<const float*>(from);
    if (stride == 1) {
      std::memcpy(to, p, n * sizeof(float));
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = p[i * stride];
    }
    return;
  }
  const uint16_t* p = reinterpret_cast<const uint16_t*>(from);
  if (type == kBFloat16) {
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = bits<float>(uint32_t(p[i]) << 16);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = bits<float>(uint32_t(p[i * stride]) << 16);
    }
    return;
  }
  int64_t i = 0;
#if defined(__F16C__)
  if (stride == 1) {
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
    }
  }
#endif
  for (; i < n; ++i) to[i] = half_to_float(p[i * stride]);
}

// n floats into a contiguous row of a floating type
void write(const float* from, int64_t n, int64_t type, char* to) {
  if (type == kFloat) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  uint16_t* p = reinterpret_cast<uint16_t*>(to);
  int64_t i = 0;
  if (type == kBFloat16) {
    for (; i < n; ++i) p[i] = float_to_bfloat16(from[i]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
#endif
  for (; i < n; ++i) p[i] = float_to_half(from[i]);
}

// A thread's scratch memory, kept between calls: its size depends on block sizes, head dimensions and, where whole rows
// are computed, on their length.
class Scratch {
 public:
  float* reserve(int64_t count) {
    if (count > size_) {
      std::free(data_);
      data_ = static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64));
      size_ = data_ ? count : 0;
      if (!data_) std::abort();
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};
thread_local Scratch scratch_memory;

// Hands out pieces of the scratch, each aligned to a cache line.
class Pieces {
 public:
  float* operator()(int64_t count) {
    int64_t start = used_;
    used_ += (count + 15) / 16 * 16;
    return base_ ? base_ + start : nullptr;
  }
  void allocate() { base_ = scratch_memory.reserve(used_), used_ = 0; }

 private:
  float* base_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace
