// Products of small matrices whose right factor is packed into panels.

#pragma once

#include "vectors.h"

namespace {

// Matrix products read their right factor from panels of kPanel columns, k rows each, zero-padded, so that a panel is
// contiguous in the first cache whatever the layout of the tensor it came from.
constexpr int kPanel = 2 * W;
#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int kStrip = 6;  // rows of a register tile: 12 accumulators of 16 registers
#else
constexpr int kStrip = 12;  // 24 accumulators of 32 registers
#endif

struct Matrix {
  const float* data;
  int64_t stride;
};

int64_t padded(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

// [n, columns] -> panels over the columns: a right factor whose inner dimension is n, or n rows of one of panel_rows
void pack(Matrix x, int64_t n, int64_t columns, float* to, int64_t panel_rows = 0) {
  for (int64_t c = 0; c < columns; c += kPanel, to += (panel_rows ? panel_rows : n) * kPanel) {
    const int64_t width = std::min<int64_t>(kPanel, columns - c);
    for (int64_t i = 0; i < n; ++i) {
      const float* from = x.data + i * x.stride + c;
      float* line = to + i * kPanel;
      if (width == kPanel) {
        store(line, load(from)), store(line + W, load(from + W));
      } else {
        std::copy(from, from + width, line);
        std::fill(line + width, line + kPanel, 0.0f);
      }
    }
  }
}

// Transposes W vectors of W floats by log2(W) perfect shuffles.
inline void transpose(vf* rows) {
  vi low, high;
  for (int i = 0; i < W; ++i) low[i] = i / 2 + (i % 2) * W, high[i] = low[i] + W / 2;
  for (int step = 1; step < W; step *= 2) {
    vf next[W];
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], high);
    }
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// [n, columns] -> panels over n of its transpose: a right factor whose inner dimension is columns. The n rows are those
// that `some` names, where it is given.
void pack_transposed(Matrix x, int64_t n, int64_t columns, float* to, const int32_t* some = nullptr) {
  for (int64_t first = 0; first < n; first += kPanel, to += columns * kPanel) {
    for (int half = 0; half < kPanel; half += W) {
      const int64_t rows = std::max<int64_t>(0, std::min<int64_t>(W, n - first - half));
      auto from = [&](int64_t i) { return x.data + (some ? some[first + half + i] : first + half + i) * x.stride; };
      int64_t c = 0;
      if (rows == W) {
        for (; c + W <= columns; c += W) {
          vf block[W];
          for (int i = 0; i < W; ++i) block[i] = load(from(i) + c);
          transpose(block);
          for (int i = 0; i < W; ++i) store(to + (c + i) * kPanel + half, block[i]);
        }
      }
      for (; c < columns; ++c) {
        for (int64_t i = 0; i < W; ++i) to[c * kPanel + half + i] = i < rows ? from(i)[c] : 0.0f;
      }
    }
  }
}

// One register tile: c[M, width] = alpha a b (+ c), a stored [inner, M] where TRANSPOSED. SOME: only the rows `some` of
// the panel take part, or, where TRANSPOSED, of c.
template <int M, bool TRANSPOSED, bool SOME>
inline void tile(int64_t inner, float alpha, const float* a, int64_t lda, const float* b, bool add, float* c,
                 int64_t ldc, int64_t width, const int32_t* some) {
  vf sums[M][2] = {};
#pragma GCC unroll 8
  for (int64_t k = 0; k < inner; ++k) {
    const float* line = b + (SOME && !TRANSPOSED ? some[k] : k) * kPanel;
    const vf b0 = load(line), b1 = load(line + W);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const vf x = splat(TRANSPOSED ? a[k * lda + i] : a[i * lda + k]);
      sums[i][0] = fused(x, b0, sums[i][0]);
      sums[i][1] = fused(x, b1, sums[i][1]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    float* line = c + (SOME && TRANSPOSED ? some[i] : i) * ldc;
    vf low = alpha * sums[i][0], high = alpha * sums[i][1];
    if (width == kPanel) {
      store(line, add ? load(line) + low : low), store(line + W, add ? load(line + W) + high : high);
    } else {
      float part[kPanel];
      store(part, low), store(part + W, high);
      for (int64_t j = 0; j < width; ++j) line[j] = add ? line[j] + part[j] : part[j];
    }
  }
}

template <int M, bool TRANSPOSED, bool SOME>
void last_strip(int64_t m, int64_t inner, float alpha, const float* a, int64_t lda, const float* b, bool add, float* c,
                int64_t ldc, int64_t width, const int32_t* some) {
  if (m == M) return tile<M, TRANSPOSED, SOME>(inner, alpha, a, lda, b, add, c, ldc, width, some);
  if constexpr (M > 1) {
    last_strip<M - 1, TRANSPOSED, SOME>(m, inner, alpha, a, lda, b, add, c, ldc, width, some);
  }
}

// c[m, n] = alpha a b (+ c) with b in panels of `panel_rows`, of which the first `inner` are used; a is stored
// [inner, m] where TRANSPOSED. SOME: the rows `some` of b in place of the first, or, where TRANSPOSED, of c.
template <bool TRANSPOSED, bool SOME = false>
void multiply(int64_t m, int64_t n, int64_t inner, float alpha, Matrix a, const float* panels, bool add, float* c,
              int64_t ldc, int64_t panel_rows = 0, const int32_t* some = nullptr) {
  for (int64_t j = 0; j < n; j += kPanel, panels += (panel_rows ? panel_rows : inner) * kPanel) {
    const int64_t width = std::min<int64_t>(kPanel, n - j);
    for (int64_t i = 0; i < m; i += kStrip) {
      const float* from = a.data + (TRANSPOSED ? i : i * a.stride);
      const bool chosen = SOME && TRANSPOSED;
      float* to = c + (chosen ? 0 : i * ldc) + j;
      const int32_t* own = chosen ? some + i : some;
      if (i + kStrip <= m) {
        tile<kStrip, TRANSPOSED, SOME>(inner, alpha, from, a.stride, panels, add, to, ldc, width, own);
      } else {
        last_strip<kStrip - 1, TRANSPOSED, SOME>(m - i, inner, alpha, from, a.stride, panels, add, to, ldc, width, own);
      }
    }
  }
}

// scores[j] = alpha q . k_j: one query row is a stream over the keys, which a matrix product does not do well
void dot_rows(const float* q, Matrix k, int64_t n, int64_t dim, float alpha, float* scores) {
  for (int64_t j = 0; j < n; ++j) {
    const float* row = k.data + j * k.stride;
    vf a{}, b{};
    int64_t d = 0;
    for (; d + 2 * W <= dim; d += 2 * W) {
      a += load(q + d) * load(row + d);
      b += load(q + d + W) * load(row + d + W);
    }
    float s = sum(a + b);
    for (; d < dim; ++d) s += q[d] * row[d];
    scores[j] = alpha * s;
  }
}

// out += sum_j p_j v_j
void add_rows(const float* p, Matrix v, int64_t n, int64_t dim, float* out) {
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) {
    vf a = load(out + d), b = load(out + d + W), c = load(out + d + 2 * W), e = load(out + d + 3 * W);
    for (int64_t j = 0; j < n; ++j) {
      const float* row = v.data + j * v.stride + d;
      a += p[j] * load(row), b += p[j] * load(row + W), c += p[j] * load(row + 2 * W), e += p[j] * load(row + 3 * W);
    }
    store(out + d, a), store(out + d + W, b), store(out + d + 2 * W, c), store(out + d + 3 * W, e);
  }
  for (; d < dim; ++d) {
    for (int64_t j = 0; j < n; ++j) out[d] += p[j] * v.data[j * v.stride + d];
  }
}

}  // namespace
