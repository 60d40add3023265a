// fusedmax and oscarmax: a proximal operator in float64, then sparsemax of what it gives.

#pragma once

#include "entmax.h"

namespace {

// The places that a row keeps, in order; their number
int64_t kept_places(const Line& l, int32_t* places) {
  if (l.kept == l.n) {
    for (int64_t j = 0; j < l.n; ++j) places[j] = int32_t(j);
    return l.n;
  }
  int64_t m = 0;
  for (int64_t j = 0; j < l.n; ++j) {
    places[m] = int32_t(j);
    m += l.s[j] != -kInfinity;
  }
  return m;
}

// argmin 1/2 ||z - y||^2 + lam sum |z_{i+1} - z_i|: z is the slope of the shortest path from (0, 0) to (m, sums[m]) that
// stays within lam of the sums in between. A funnel of two chains, along the lower and the upper border, holds what the
// path may become; every vertex enters and leaves a chain once. group: the number of each entry's piece.
void total_variation(const float* y, int64_t m, double lam, double* sums, int32_t* lower, int32_t* upper, double* z,
                     int32_t* group) {
  sums[0] = 0;
  for (int64_t i = 0; i < m; ++i) sums[i + 1] = sums[i] + y[i];
  int64_t low_first = 0, low_end = 0, up_first = 0, up_end = 0, apex = 0;
  double apex_height = 0;
  int32_t pieces = 0;
  auto above = [&](int64_t i) { return i < m ? sums[i] + lam : sums[i]; };
  auto below = [&](int64_t i) { return sums[i] - lam; };
  auto move_to = [&](int64_t to, double height) {
    const double slope = (height - apex_height) / double(to - apex);
    for (int64_t i = apex; i < to; ++i) z[i] = slope, group[i] = pieces;
    ++pieces, apex = to, apex_height = height;
  };
  // the sign of the turn at (j, b) between (i, a) and (k, c): positive to the left, upwards
  auto turn = [](int64_t i, double a, int64_t j, double b, int64_t k, double c) {
    return (c - b) * double(j - i) - (b - a) * double(k - j);
  };
  for (int64_t i = 1; i <= m; ++i) {
    const double high = above(i), low = below(i);
    while (up_end > up_first) {
      const bool first = up_end - up_first == 1;
      const int64_t last = upper[up_end - 1], before = first ? apex : upper[up_end - 2];
      if (turn(before, first ? apex_height : above(before), last, above(last), i, high) > 0) break;
      --up_end;
    }
    if (up_end == up_first) {
      while (low_end > low_first) {
        const int64_t next = lower[low_first];
        if (turn(apex, apex_height, next, below(next), i, high) > 0) break;
        move_to(next, below(next)), ++low_first;
      }
    }
    upper[up_end++] = int32_t(i);
    if (i == m) break;
    while (low_end > low_first) {
      const bool first = low_end - low_first == 1;
      const int64_t last = lower[low_end - 1], before = first ? apex : lower[low_end - 2];
      if (turn(before, first ? apex_height : below(before), last, below(last), i, low) < 0) break;
      --low_end;
    }
    if (low_end == low_first) {
      while (up_end > up_first) {
        const int64_t next = upper[up_first];
        if (next == i || turn(apex, apex_height, next, above(next), i, low) < 0) break;
        move_to(next, above(next)), ++up_first;
      }
    }
    lower[low_end++] = int32_t(i);
  }
  for (; up_first < up_end; ++up_first) move_to(upper[up_first], above(upper[up_first]));
}

// sparsemax of the m values z at places; the other entries of the row are 0. Groups without weight get -1.
void emit_sparsemax(const RowCall& g, const Line& l, const Buffers& t, const double* z, const int32_t* places,
                    const int32_t* group, int64_t m) {
  vd tops = vd{} + z[0];
  for (int64_t i = 0; i + kHalf_ <= m; i += kHalf_) {
    vd x;
    std::memcpy(&x, z + i, sizeof x);
    tops = x > tops ? x : tops;
  }
  double top = tops[0];
  for (int i = 1; i < kHalf_; ++i) top = std::max(top, tops[i]);
  for (int64_t i = m / kHalf_ * kHalf_; i < m; ++i) top = std::max(top, z[i]);
  for (int64_t i = 0; i < m; ++i) t.g[i] = float(z[i] - top);
  for (int64_t i = m; i < whole(m); ++i) t.g[i] = -kInfinity;
  int64_t few = 0;
  for (int64_t i = 0; i < m; i += W) few += compress(t.b + few, load(t.g + i), load(t.g + i) > -1.0f);
  store(t.b + few, splat(-kInfinity));
  const double tau = sparsemax_threshold(t.b, few);
  float* p = m == l.n ? l.s : t.g;
  for (int64_t i = 0; i < m; ++i) p[i] = float(std::max(t.g[i] - tau, 0.0));
  if (m < l.n) {
    std::fill(l.s, l.s + l.width, 0.0f);
    for (int64_t i = 0; i < m; ++i) l.s[places[i]] = p[i];
  }
  if (g.groups) {
    int32_t* to = g.groups + l.row * l.n;
    std::fill(to, to + l.n, -1);
    for (int64_t i = 0; i < m; ++i) to[places[i]] = group[i];
  }
  emit(g, l, [](vf x) { return x; });
}

// The pieces of m kept entries that have weight, each at its places, for the backward
void leave_pieces(const RowCall& g, const Line& l, const int32_t* places, const int32_t* group, int64_t m) {
  float* stats = stats_of(g, l.row);
  if (!stats) return;
  int64_t pieces = 0;
  for (int64_t i = 0, end; i < m; i = end) {
    for (end = i + 1; end < m && group[end] == group[i];) ++end;
    const float p = l.s[places[i]];
    if (!(p > 0.0f)) continue;
    if (pieces == kPieces) return;
    float* piece = stats + kStats + pieces++ * kOfPiece;
    piece[0] = float(places[i]), piece[1] = float(places[end - 1]), piece[2] = p;
  }
  stats[kOwn] = float(pieces), stats[kFound] = l.n < 1 << 24;  // places are exact up to there
}

// Scores -> weights in place, and the entries' groups
void weigh_pieces(const RowCall& g, const float* stats, float* s) {
  int64_t j = 0;
  if (g.groups) std::fill(g.groups, g.groups + g.n, -1);
  for (int64_t i = 0; i < int64_t(stats[kOwn]); ++i) {
    const float* piece = stats + kStats + i * kOfPiece;
    const int64_t first = int64_t(piece[0]), last = int64_t(piece[1]);
    std::fill(s + j, s + first, 0.0f);
    for (j = first; j <= last; ++j) {
      const bool kept = s[j] > kMasked;
      s[j] = kept ? piece[2] : 0.0f;
      if (g.groups && kept) g.groups[j] = int32_t(i);
    }
  }
  std::fill(s + j, s + g.n, 0.0f);
}

void fusedmax_row(const RowCall& g, const Line& l, const Buffers& t) {
  const float lam = float(g.a), least = -4 * lam - 2;  // scores that far down stay apart from the support
  if (lam == 0.0f) {
    const int64_t m = kept_places(l, t.i);
    if (g.groups) {
      int32_t* to = g.groups + l.row * l.n;
      std::fill(to, to + l.n, -1);
      for (int64_t i = 0; i < m; ++i) to[t.i[i]] = int32_t(i);
    }
    sparsemax_row(g, l, t);
    if (float* stats = stats_of(g, l.row)) stats[kFound] = 0.0f;  // these numbers are not of pieces
    return;
  }
  const int64_t m = kept_places(l, t.i);
  for (int64_t i = 0; i < m; ++i) t.a[i] = std::max(l.s[t.i[i]] - l.peak, least);
  int32_t *lower = t.j, *upper = reinterpret_cast<int32_t*>(t.keys), *group = t.k;
  total_variation(t.a, m, g.a, t.d, lower, upper, t.e, group);
  emit_sparsemax(g, l, t, t.e, t.i, group, m);
  leave_pieces(g, l, t.i, group, m);
}

// Sorts by the upper 32 bits, of which 31 are used, in three passes of 11 bits; equal ones stay in order.
void radix_sort(uint64_t* keys, uint64_t* other, int64_t m) {
  for (int shift = 32; shift < 64; shift += 11) {
    uint32_t starts[2049] = {};
    for (int64_t i = 0; i < m; ++i) ++starts[(keys[i] >> shift & 2047) + 1];
    for (int i = 0; i < 2047; ++i) starts[i + 1] += starts[i];
    for (int64_t i = 0; i < m; ++i) other[starts[keys[i] >> shift & 2047]++] = keys[i];
    std::swap(keys, other);
  }
}

// The groups that give weight, as the magnitudes of their scores and the weight of the positive ones, for the backward
void leave_groups(const RowCall& g, const Line& l, const Buffers& t, const uint64_t* sorted, int64_t blocks, int64_t m) {
  float* stats = stats_of(g, l.row);
  if (!stats || g.b == 0) return;  // without a pull between ranks equal scores are groups of their own
  int64_t pieces = 0, weighted = 0, all = 0;
  auto entry = [&](int64_t rank) { return int64_t(uint32_t(sorted[rank])); };
  for (int64_t block = 0; block < blocks && t.d[block] > 0; ++block) {
    const int64_t first = t.j[block], end = block + 1 < blocks ? t.j[block + 1] : m;
    float p = 0.0f;
    int64_t positive = 0;
    for (int64_t rank = first; rank < end; ++rank) {
      if (t.a[entry(rank)] > 0.0f) p = l.s[t.i[entry(rank)]], ++positive;
    }
    if (p == 0.0f && positive) break;  // those that follow are smaller
    if (p == 0.0f) continue;
    if (pieces == kPieces) return;
    float* piece = stats + kStats + pieces++ * kOfPiece;
    piece[0] = std::abs(t.a[entry(end - 1)]), piece[1] = std::abs(t.a[entry(first)]), piece[2] = p;
    weighted += positive;
  }
  for (int64_t j = 0; j < l.width; j += W) all += count(load(l.s + j) > 0.0f);
  stats[kOwn] = float(pieces), stats[kFound] = all == weighted;  // not so where scores of 0 or below have weight, too
}

// prox of alpha ||z||_1 + beta sum max(|z_i|, |z_j|): isotonic regression of the sorted magnitudes less their weights
void oscarmax_row(const RowCall& g, const Line& l, const Buffers& t) {
  const int64_t m = kept_places(l, t.i);
  const double alpha = g.a, beta = g.b < 0 ? 1.0 / double(std::max<int64_t>(m - 1, 1)) : g.b;
  const double strength = alpha + (g.b < 0 ? 2.0 : g.b * double(m));
  const float least = float(std::max(-2 * std::abs(double(l.peak)) - 4 * strength - 2, -double(kMost)));
  for (int64_t i = 0; i < m; ++i) {
    t.a[i] = std::max(l.s[t.i[i]], least);
    const uint32_t magnitude = bits<uint32_t>(t.a[i]) & 0x7fffffff;
    t.keys[i] = uint64_t(0x7fffffff - magnitude) << 32 | uint64_t(i);
  }
  uint64_t* sorted = t.keys;
  if (m < 200) {
    std::sort(t.keys, t.keys + m);
  } else {
    radix_sort(t.keys, t.sorted, m), sorted = t.sorted;
  }
  // blocks of the regression: where each begins, and its mean
  int32_t *start = t.j, *group = t.k;
  double* mean = t.d;
  int64_t blocks = 0;
  for (int64_t rank = 0; rank < m; ++rank) {
    const double v = std::abs(double(t.a[uint32_t(sorted[rank])])) - alpha - beta * double(m - 1 - rank);
    int64_t first = rank;
    double value = v;
    while (blocks && mean[blocks - 1] < value) {
      --blocks;
      const double size = double(rank + 1 - first), more = double(first - start[blocks]);
      value = mean[blocks] + (value - mean[blocks]) * (size / (size + more));
      first = start[blocks];
    }
    start[blocks] = int32_t(first), mean[blocks] = value, ++blocks;
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = block + 1 < blocks ? start[block + 1] : m;
    const double value = std::max(mean[block], 0.0);
    for (int64_t rank = start[block]; rank < end; ++rank) {
      const int64_t i = uint32_t(sorted[rank]);
      t.e[i] = t.a[i] == 0.0f ? 0.0 : std::copysign(value, double(t.a[i]));
      group[i] = value > 0 && t.a[i] != 0.0f ? int32_t(block) : -1;
    }
  }
  emit_sparsemax(g, l, t, t.e, t.i, group, m);
  leave_groups(g, l, t, sorted, blocks, m);
}

// Scores -> weights in place, and the entries' groups
void weigh_groups(const RowCall& g, const float* stats, float* s) {
  const int64_t pieces = int64_t(stats[kOwn]);
  for (int64_t j = 0; j < g.n; j += W) {
    const vf x = load(s + j), magnitude = max(x, -x);
    vf p = {};
    vi group = vi{} - 1;
    for (int64_t i = 0; i < pieces; ++i) {
      const float* piece = stats + kStats + i * kOfPiece;
      const vi in = (magnitude >= piece[0]) & (magnitude <= piece[1]);
      p = in & (x > 0.0f) ? splat(piece[2]) : p;
      group = in ? vi{} + int32_t(i) : group;
    }
    store(s + j, p);
    if (g.groups) std::memcpy(g.groups + j, &group, std::min<int64_t>(W, g.n - j) * sizeof(int32_t));
  }
}

// The gradient of sparsemax, then its mean over every group, each entry with the sign of its score where those count
void structured_back(const RowCall& g, const BackLine& l, const Buffers& t, bool with_signs) {
  sparsemax_back(l);
  const int32_t* group = g.groups + l.row * l.n;
  const float* x = with_signs ? as_floats(g, g.x, g.type, l.row, t.s) : nullptr;
  for (int64_t j = 0; j < l.n; ++j) {
    if (group[j] >= 0) t.d[group[j]] = 0, t.e[group[j]] = 0;
  }
  for (int64_t j = 0; j < l.n; ++j) {
    if (group[j] < 0) continue;
    t.d[group[j]] += with_signs && x[j] < 0 ? -l.dx[j] : l.dx[j];
    t.e[group[j]] += 1;
  }
  for (int64_t j = 0; j < l.n; ++j) {
    if (group[j] < 0) {
      l.dx[j] = 0;
    } else {
      const double mean = t.d[group[j]] / t.e[group[j]];
      l.dx[j] = float(with_signs && x[j] < 0 ? -mean : mean);
    }
  }
}

}  // namespace
