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

// The first n floats of a vector to memory, added to what is there where `add`
inline void put(float* to, vf v, int64_t n, bool add) {
  if (n >= W) return store(to, add ? load(to) + v : v);
  for (int64_t j = 0; j < n; ++j) to[j] = add ? to[j] + v[j] : v[j];
}

// One register tile: c[M, width] = alpha a b (+ c), a stored [inner, M] where TRANSPOSED. SOME: only the rows `some` of
// the panel take part, or, where TRANSPOSED, of c. VECTORS: those of a panel's row that width reaches into.
template <int M, bool TRANSPOSED, bool SOME, int VECTORS>
inline void tile(int64_t inner, float alpha, const float* a, int64_t lda, const float* b, bool add, float* c,
                 int64_t ldc, int64_t width, const int32_t* some) {
  vf sums[M][VECTORS] = {};
#pragma GCC unroll 8
  for (int64_t k = 0; k < inner; ++k) {
    const float* line = b + (SOME && !TRANSPOSED ? some[k] : k) * kPanel;
    vf of_line[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) of_line[v] = load(line + v * W);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const vf x = splat(TRANSPOSED ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = fused(x, of_line[v], sums[i][v]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    float* line = c + (SOME && TRANSPOSED ? some[i] : i) * ldc;
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) put(line + v * W, alpha * sums[i][v], width - v * W, add);
  }
}

template <int M, bool TRANSPOSED, bool SOME, int VECTORS>
void last_strip(int64_t m, int64_t inner, float alpha, const float* a, int64_t lda, const float* b, bool add, float* c,
                int64_t ldc, int64_t width, const int32_t* some) {
  if (m == M) return tile<M, TRANSPOSED, SOME, VECTORS>(inner, alpha, a, lda, b, add, c, ldc, width, some);
  if constexpr (M > 1) {
    last_strip<M - 1, TRANSPOSED, SOME, VECTORS>(m, inner, alpha, a, lda, b, add, c, ldc, width, some);
  }
}

template <bool TRANSPOSED, bool SOME, int VECTORS>
void multiply_panel(int64_t m, int64_t inner, float alpha, Matrix a, const float* panel, bool add, float* c, int64_t ldc,
                    int64_t width, const int32_t* some) {
  for (int64_t i = 0; i < m; i += kStrip) {
    const float* from = a.data + (TRANSPOSED ? i : i * a.stride);
    const bool chosen = SOME && TRANSPOSED;
    float* to = c + (chosen ? 0 : i * ldc);
    const int32_t* own = chosen ? some + i : some;
    if (i + kStrip <= m) {
      tile<kStrip, TRANSPOSED, SOME, VECTORS>(inner, alpha, from, a.stride, panel, add, to, ldc, width, own);
    } else {
      last_strip<kStrip - 1, TRANSPOSED, SOME, VECTORS>(m - i, inner, alpha, from, a.stride, panel, add, to, ldc, width,
                                                        own);
    }
  }
}

// c[m, n] = alpha a b (+ c) with b in panels of `panel_rows`, of which the first `inner` are used; a is stored
// [inner, m] where TRANSPOSED. SOME: the rows `some` of b in place of the first, or, where TRANSPOSED, of c.
template <bool TRANSPOSED, bool SOME = false>
void multiply(int64_t m, int64_t n, int64_t inner, float alpha, Matrix a, const float* panels, bool add, float* c,
              int64_t ldc, int64_t panel_rows = 0, const int32_t* some = nullptr) {
  for (int64_t j = 0; j < n; j += kPanel, panels += (panel_rows ? panel_rows : inner) * kPanel) {
    const int64_t width = std::min<int64_t>(kPanel, n - j);
    if (width > W) {
      multiply_panel<TRANSPOSED, SOME, 2>(m, inner, alpha, a, panels, add, c + j, ldc, width, some);
    } else {
      multiply_panel<TRANSPOSED, SOME, 1>(m, inner, alpha, a, panels, add, c + j, ldc, width, some);
    }
  }
}

// scores[j] = alpha q . k_j: one query row is a stream over the keys, which a matrix product does not do well. Some keys
// at a time, as each sum across a vector waits for its last step.
void dot_rows(const float* q, Matrix k, int64_t n, int64_t dim, float alpha, float* scores) {
  constexpr int64_t kKeys = 4;
  for (int64_t j = 0; j < n; j += kKeys) {
    const float* rows[kKeys];
    for (int64_t r = 0; r < kKeys; ++r) rows[r] = k.data + std::min(j + r, n - 1) * k.stride;
    vf sums[kKeys] = {};
    int64_t d = 0;
    for (; d + W <= dim; d += W) {
      const vf x = load(q + d);
      for (int64_t r = 0; r < kKeys; ++r) sums[r] = fused(x, load(rows[r] + d), sums[r]);
    }
    for (int64_t r = 0; r < std::min(kKeys, n - j); ++r) {
      float s = sum(sums[r]);
      for (int64_t i = d; i < dim; ++i) s += q[i] * rows[r][i];
      scores[j + r] = alpha * s;
    }
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
