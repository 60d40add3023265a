// SoftMax, MultiMax, and what leaves SoftMax with something left out or sharpened: forward and backward of a row.

#pragma once

#include "rows.h"
#include "select.h"

namespace {

constexpr float kUnderflow = -103.972077f;  // whose exponential is no positive float, not even a subnormal one
constexpr float kThresholdShift = 1e-8f, kEvTrainingFactor = 1e-6f;

// s = e^f(s), and the sum
template <class F>
inline double exponentials(const Line& l, F f) {
  return total(l.width, [&](int64_t j) {
    const vf e = exp_(f(load(l.s + j)));
    store(l.s + j, e);
    return e;
  });
}

// What adds up to `sum_`, divided by that; `top` is what was taken from the scores before
inline void emit_scaled(const RowCall& g, const Line& l, float top, double sum_) {
  const float factor = float(1.0 / sum_);
  leave(stats_of(g, l.row), top, factor, 0.0f);
  emit(g, l, [&](vf e) { return e * factor; });
}

// (x - peak) / temperature, minus infinity for no finite score; by the inverse where that is exact
struct Cooled {
  float peak, temperature, inverse;
  bool exact;

  Cooled(float peak, float temperature) : peak(peak), temperature(temperature), inverse(1.0f / temperature) {
    int exponent;
    exact = std::frexp(temperature, &exponent) == 0.5f && std::abs(exponent) < 100;
  }
  vf operator()(vf x) const {
    if (temperature == 1.0f) return x - peak;
    const vf z = max(x - peak, splat(-kMost));
    return x == -kInfinity ? x : exact ? z * inverse : z / temperature;
  }
};

void softmax_row(const RowCall& g, const Line& l, float temperature) {
  emit_scaled(g, l, l.peak, exponentials(l, Cooled(l.peak, temperature)));
}

// A score of 0 takes a share, too
void softmax1_row(const RowCall& g, const Line& l) {
  const float most = std::max(l.peak, 0.0f);
  emit_scaled(g, l, most, exponentials(l, [&](vf x) { return x - most; }) + std::exp(-double(most)));
}

inline vf sigmoid_of(vf v) {
  const vf e = exp_(v < 0.0f ? v : -v);
  return (v < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

void sigmoid_row(const RowCall& g, const Line& l) {
  const float shift = g.b != 0 ? float(g.a) : -std::log(float(l.kept));
  leave(stats_of(g, l.row), shift, 0.0f, 0.0f);
  emit(g, l, [&](vf x) { return sigmoid_of(x + shift); });
}

void sigmoid_back(const BackLine& l) {
  for (int64_t j = 0; j < l.width; j += W) {
    const vf p = load(l.p + j);
    store(l.dx + j, product(p * (1.0f - p), load(l.g + j)));
  }
}

// scale (x - peak), of masked entries minus infinity
inline vf scaled_score(vf x, float peak, float scale) {
  return x == -kInfinity ? x : scale * max(x - peak, splat(-kMost));
}

// e^x - 1 over e^most, for most >= 0
struct Excess {
  float most, one;

  explicit Excess(float most) : most(most), one(std::exp(-most)) {}
  vf operator()(vf x) const {
    const vi near = (x < 1.0f) & (x > -1.0f);  // where e^x - 1 would lose digits
    vf power;
    const vf r = exp_parts(max(splat(-88.0f), near ? x : x - most), power);
    return x == -kInfinity ? vf{} : near ? (r * power + (power - 1.0f)) * one : r * power + power - one;
  }
};

// max(e^x - 1, 0) / (sum |e^x - 1| + eps), over e^m with m = max(peak, 0)
void softpick_row(const RowCall& g, const Line& l) {
  const float most = std::max(l.peak, 0.0f);
  const Excess excess(most);
  const double sum_ = total(l.width, [&](int64_t j) {
    const vf e = excess(load(l.s + j));
    store(l.s + j, e);
    return max(e, -e);
  });
  const float denominator = float(sum_ + g.a), below = denominator > 0.0f ? denominator : 1.0f;
  leave(stats_of(g, l.row), most, below, 0.0f);
  emit(g, l, [&](vf e) { return relu(e) / below; });
}

void softpick_back(const RowCall& g, const BackLine& l, const Buffers& t) {
  const float* stats = stats_of(g, l.row);
  const float most = stats[kTop], factor = 1.0f / stats[kFactor];
  const float mean = float(mean_gradient(l));
  const float* scores = as_floats(g, g.x, g.type, l.row, t.s);
  for (int64_t j = 0; j < l.width; j += W) {
    const vf x = load(scores + j), slope = exp_(x - most) * factor;
    const vf by_excess = x > 0.0f ? load(l.g + j) - mean : x < 0.0f ? splat(mean) : vf{};
    store(l.dx + j, slope == 0.0f ? vf{} : slope * by_excess);
  }
  const unsigned char* keep = mask_of(g, l.row, t.mask);
  for (int64_t j = 0; keep && j < l.n; ++j) l.dx[j] = keep[j] ? l.dx[j] : 0.0f;
}

// SoftMax of scale (x - peak), where the scale may be 0 or negative
void scaled_row(const RowCall& g, const Line& l, float scale) {
  const float peak = l.peak;
  vf top = splat(-kInfinity);
  for (int64_t j = 0; j < l.width; j += W) {
    const vf z = scaled_score(load(l.s + j), peak, scale);
    store(l.s + j, z);
    top = max(z, top);
  }
  const float most = largest(top);
  emit_scaled(g, l, most, exponentials(l, [&](vf z) { return z - most; }));
}

// c p (g - mean): the gradient of SoftMax
inline void softmax_back(const BackLine& l, float c) {
  const float mean = float(mean_gradient(l));
  for (int64_t j = 0; j < l.width; j += W) {
    const vf p = load(l.p + j);
    store(l.dx + j, product(p, load(l.g + j) - mean) * c);
  }
}

// The scores of a row in the backward pass, less the peak, 0 where p is 0
const float* shifted_scores(const RowCall& g, const BackLine& l, float peak, float* to) {
  const float* x = as_floats(g, g.x, g.type, l.row, to);
  for (int64_t j = 0; j < l.width; j += W) {
    store(to + j, load(l.p + j) == 0.0f ? vf{} : max(load(x + j) - peak, splat(-kMost)));
  }
  return to;
}

inline float scale_of(const RowCall& g, int64_t row, float log_count) {
  return float(g.b) + value_of(g, row) * log_count;
}

void scalable_row(const RowCall& g, const Line& l) {
  const float log_count = std::log(float(l.kept));
  if (float* stats = stats_of(g, l.row)) stats[0] = log_count, stats[1] = l.peak;
  scaled_row(g, l, scale_of(g, l.row, log_count));
}

void scalable_back(const RowCall& g, const BackLine& l, const Buffers& t) {
  const float log_count = stats_of(g, l.row)[0], scale = scale_of(g, l.row, log_count);
  if (g.grad_value) {
    const float* z = shifted_scores(g, l, stats_of(g, l.row)[1], t.s);
    const float mean = float(mean_gradient(l));
    g.grad_value[l.row] = log_count * float(total(l.width, [&](int64_t j) {
      return product(load(l.p + j), load(l.g + j) - mean) * load(z + j);
    }));
  }
  softmax_back(l, scale);
}

constexpr double kAdaptive[] = {-0.037, 0.481, -2.3, 4.917, -1.791};
constexpr float kLeastLog = 20.7232658f;  // -log(1e-9): logarithms end there

// beta of adaptive temperature, and its derivative by the entropy
double inverse_temperature(double entropy, double& slope) {
  double beta = 0;
  slope = 0;
  for (double c : kAdaptive) slope = slope * entropy + beta, beta = beta * entropy + c;
  if (entropy > 0.5 && beta >= 1) return beta;
  slope = 0;
  return 1;
}

void adaptive_row(const RowCall& g, const Line& l, const Buffers& t) {
  if (g.b != 0) return softmax_row(g, l, 1.0f);
  const float peak = l.peak;
  const double sum_ = total(l.width, [&](int64_t j) {
    const vf e = exp_(load(l.s + j) - peak);
    store(t.a + j, e);
    return e;
  });
  const float log_sum = float(std::log(sum_));
  const double entropy = total(l.width, [&](int64_t j) {
    const vf z = log_sum - (load(l.s + j) - peak);
    return load(t.a + j) * (z < kLeastLog ? z : splat(kLeastLog));
  }) / sum_;
  double slope;
  const double beta = inverse_temperature(entropy, slope);
  if (float* stats = stats_of(g, l.row)) {
    stats[0] = l.peak, stats[1] = float(beta), stats[2] = float(slope), stats[3] = log_sum;
  }
  scaled_row(g, l, float(beta));
}

void adaptive_back(const RowCall& g, const BackLine& l, const Buffers& t) {
  if (g.b != 0) return softmax_back(l, 1.0f);
  const float* stats = stats_of(g, l.row);
  const float beta = stats[1], slope = stats[2], log_sum = stats[3];
  softmax_back(l, beta);
  if (slope == 0.0f) return;
  const float* z = shifted_scores(g, l, stats[0], t.s);
  const float by_entropy = slope / beta * float(total(l.width, [&](int64_t j) { return load(l.dx + j) * load(z + j); }));
  auto first = [&](int64_t j) { return load(l.p + j) == 0.0f ? vf{} : exp_(load(z + j) - log_sum); };
  auto by_first = [&](int64_t j) {
    const vf log_p = load(z + j) - log_sum;
    return log_p >= -kLeastLog ? -log_p - 1.0f : splat(kLeastLog);
  };
  const float mean = float(total(l.width, [&](int64_t j) { return first(j) * by_first(j); }));
  for (int64_t j = 0; j < l.width; j += W) {
    store(l.dx + j, load(l.dx + j) + by_entropy * first(j) * (by_first(j) - mean));
  }
}

// e^z of what is not below the mean, `others` e^z of the rest
inline vf likely_exponential(vf z, float mean, float others) {
  return exp_(z) * ((z >= mean) | (z == 0.0f) ? splat(1.0f) : splat(others));
}

void evsoftmax_row(const RowCall& g, const Line& l) {
  const float peak = l.peak, others = g.b != 0 ? kEvTrainingFactor : 0.0f;
  const double sum_z = total(l.width, [&](int64_t j) {
    const vf x = load(l.s + j);
    return x == -kInfinity ? vf{} : x - peak;
  });
  const float mean = float(sum_z / double(l.kept));
  if (float* stats = stats_of(g, l.row)) stats[0] = mean, stats[1] = others;
  emit_scaled(g, l, peak, total(l.width, [&](int64_t j) {
    const vf e = likely_exponential(load(l.s + j) - peak, mean, others);
    store(l.s + j, e);
    return e;
  }));
}

void topk_row(const RowCall& g, const Line& l, const Buffers& t) {
  const int64_t k = int64_t(g.a);
  float* stats = stats_of(g, l.row);
  if (stats) stats[0] = -kInfinity, stats[1] = kInfinity;
  if (k >= l.kept) return softmax_row(g, l, 1.0f);
  int64_t m = 0;
  for (int64_t j = 0; j < l.width; j += W) {
    const vf x = load(l.s + j);
    m += compress(t.a + m, x, x > -kInfinity);
  }
  const float least = nth_smallest(t.a, m, m - k, t.b);
  int64_t room = k, equal = 0;
  for (int64_t j = 0; j < l.width; j += W) room -= count(load(l.s + j) > least), equal += count(load(l.s + j) == least);
  if (stats) stats[0] = least;
  if (equal > room) {  // the first ones are taken
    for (int64_t j = 0; j < l.n; ++j) {
      if (l.s[j] != least) continue;
      if (room-- > 0) {
        if (stats) stats[1] = float(j);
      } else {
        l.s[j] = -kInfinity;
      }
    }
  }
  const float peak = l.peak;
  emit_scaled(g, l, peak, exponentials(l, [&](vf x) { return x >= least ? x - peak : splat(-kInfinity); }));
}

// The factor that keeps w e^z from overflowing
inline float unit_of(float threshold) { return threshold > 1.0f ? 1.0f / threshold : 1.0f; }

// w e^z / sum(w e^z), w = max(z + t, 0), z = x - peak. Stats: t, the factor of w e^z, how many entries are largest,
// whether w has a slope, and in the end dt by the sparsity.
void weighted_row(const RowCall& g, const Line& l, float threshold, bool sloped, float by_sparsity) {
  const float peak = l.peak, unit = unit_of(threshold);
  int64_t most = 0;
  const double sum_ = total(l.width, [&](int64_t j) {
    const vf z = load(l.s + j) - peak;
    const vf e = relu(z + threshold) * unit * exp_(z);
    most += count(z == 0.0f);
    store(l.s + j, e);
    return e;
  });
  emit_scaled(g, l, peak, sum_);
  if (float* stats = stats_of(g, l.row)) {
    stats[0] = threshold, stats[1] = float(unit / sum_), stats[2] = float(most), stats[3] = sloped;
    stats[kRest] = by_sparsity;
  }
}

void weighted_back(const RowCall& g, const BackLine& l, const Buffers& t) {
  const float* stats = stats_of(g, l.row);
  const float mean = float(mean_gradient(l)), factor = stats[1];
  const bool single = stats[2] == 1.0f;
  if (stats[3] == 0.0f) {
    for (int64_t j = 0; j < l.width; j += W) store(l.dx + j, product(load(l.p + j), load(l.g + j) - mean));
    if (g.grad_value) g.grad_value[l.row] = 0.0f;
    return;
  }
  const float* x = as_floats(g, g.x, g.type, l.row, t.s);
  const float peak = stats[kTop];
  // what the w of all entries but the largest pulls, and of the largest; one alone has a constant w, and gives the rest
  double top_pull = 0;
  const double pull = total(l.width, [&](int64_t j) {
    const vf p = load(l.p + j);
    if (!count(p != 0.0f)) {
      store(l.dx + j, vf{});
      return vf{};
    }
    const vf z = load(x + j) - peak, slope = load(l.g + j) - mean, e = factor * exp_(z) * slope;
    const vi top = z == 0.0f, out = p == 0.0f;
    const vf dw = out | top ? vf{} : e;
    store(l.dx + j, out ? vf{} : p * slope + dw);
    if (count(top & ~out)) top_pull += sum(top & ~out ? e : vf{});
    return dw;
  });
  const float given = float(single ? -pull : -pull / stats[2]);
  for (int64_t j = 0; j < l.width; j += W) {
    const vi top = (load(x + j) == peak) & (load(l.p + j) != 0.0f);
    if (count(top)) store(l.dx + j, load(l.dx + j) + (top ? splat(given) : vf{}));
  }
  if (!single) {  // all of them have the same pull, unless their gradients differ
    const float mean_pull = float(top_pull / stats[2]);
    for (int64_t j = 0; j < l.width; j += W) {
      const vi top = (load(x + j) == peak) & (load(l.p + j) != 0.0f);
      if (count(top)) store(l.dx + j, load(l.dx + j) + (top ? factor * (load(l.g + j) - mean) - mean_pull : vf{}));
    }
  }
  if (g.grad_value) g.grad_value[l.row] = float((pull + top_pull) * stats[kRest]);
}

void rsoftmax_row(const RowCall& g, const Line& l, const Buffers& t) {
  const float peak = l.peak, sparsity = value_of(g, l.row);
  int64_t m = 0;  // what does not underflow; the others count as largest
  for (int64_t j = 0; j < l.width; j += W) {
    const vf z = load(l.s + j) - peak;
    m += compress(t.a + m, z, z > kUnderflow);
  }
  const float kept = float(l.kept), already = float(l.kept - m) / kept;
  const float share = (sparsity - already) / (1.0f - already), q = std::min(std::max(share, 0.0f), 1.0f);
  const float position = q * (kept - 1.0f);
  const int64_t index = int64_t(position);
  float below = 0.0f, above = 0.0f;
  if (index < m) {
    below = nth_smallest(t.a, m, index, t.b);
    above = index + 1 < m ? next_smallest(t.a, m, index, below) : index + 1 < l.kept ? 0.0f : below;
  }
  const float threshold = -(below + (position - float(index)) * (above - below)) + kThresholdShift;
  const bool inside = share >= 0.0f && share <= 1.0f;
  const float by_sparsity = inside ? -(above - below) * (kept - 1.0f) / (1.0f - already) : 0.0f;
  weighted_row(g, l, threshold, threshold > 2 * kThresholdShift, by_sparsity);
}

// ---------------------------------------------------------------------------------------------------- MultiMax

struct Sigma {
  int order;
  float b[kMaxOrder], d[kMaxOrder], tb[kMaxOrder], td[kMaxOrder], most[kMaxOrder];
  bool affine;
  float scale, shift;

  Sigma(const RowCall& g, int64_t head) : order(int(g.order)), affine(g.affine != nullptr) {
    const float *r = g.ranges + head * 2 * g.order, *t = g.ts + head * 2 * g.order;
    for (int n = 0; n < order; ++n) {
      b[n] = r[2 * n], d[n] = r[2 * n + 1], tb[n] = t[2 * n], td[n] = t[2 * n + 1];
      most[n] = n ? std::pow(kMost / 256, 1.0f / (n + 1.0f)) : kInfinity;
      if (b[n] != b[n] || d[n] != d[n]) tb[n] = std::numeric_limits<float>::quiet_NaN();  // which relu would swallow
    }
    scale = affine ? g.affine[2 * head] : 1.0f, shift = affine ? g.affine[2 * head + 1] : 0.0f;
  }

  // What sigma leaves alone: NaN, infinity, and the scores of masked entries
  static vi stays(vf x) { return ~((x > kMasked) & (x <= kMost)); }
};

inline vf power_times(vf t, vf x, int n) {
  for (int i = 0; i < n; ++i) t *= x;
  return t;
}

template <int ORDER>
inline vf sigma(const Sigma& m, vf score) {
  const vi stays = Sigma::stays(score);
  vf x = stays ? vf{} : score, out = x;
  if (m.affine) {
    out = m.scale * x + m.shift;
    x = out > kMost ? splat(kMost) : out < -kMost ? splat(-kMost) : out;
  }
  const int order = ORDER ? ORDER : m.order;
  for (int n = 0; n < order; ++n) {
    out += power_times(splat(m.tb[n]), relu(m.b[n] - x), n + 1) + power_times(splat(m.td[n]), relu(x - m.d[n]), n + 1);
  }
  return stays ? score : out;
}

template <int ORDER>
void multimax_back(const RowCall& g, const BackLine& l, const Buffers& t, const Sigma& sigma_, double* sums) {
  const Sigma m = sigma_;  // a copy that no store can change
  constexpr int kOrder = ORDER ? ORDER : kMaxOrder;
  const int order = ORDER ? ORDER : m.order;
  const float mean = float(mean_gradient(l));
  const float* scores = as_floats(g, g.x, g.type, l.row, t.s);
  vf by_b[kOrder] = {}, by_d[kOrder] = {}, by_tb[kOrder] = {}, by_td[kOrder] = {}, by_scale = {}, by_shift = {};
  for (int64_t j = 0; j < l.width; j += W) {
    const vf p = load(l.p + j), ds = product(p, load(l.g + j) - mean), score = load(scores + j);
    const vi stays = (p == 0.0f) | Sigma::stays(score);
    const vf x0 = stays ? vf{} : score;
    vf x = x0, outer = splat(1.0f), inner = {};
    vi within = vi{} == 0;
    if (m.affine) {
      x = m.scale * x0 + m.shift;
      within = ~((x > kMost) | (x < -kMost));
      x = x > kMost ? splat(kMost) : x < -kMost ? splat(-kMost) : x;
    }
    for (int n = 0; n < order; ++n) {
      const vf u = m.b[n] - x, w = x - m.d[n];
      vf up = relu(u), wp = relu(w), slope_u, slope_w;
      if (n == 0) {
        slope_u = u > 0.0f ? splat(1.0f) : vf{}, slope_w = w > 0.0f ? splat(1.0f) : vf{};
      } else {
        up = up > m.most[n] ? vf{} : up, wp = wp > m.most[n] ? vf{} : wp;
        slope_u = up, slope_w = wp;
        for (int i = 1; i < n; ++i) slope_u *= up, slope_w *= wp;
      }
      inner += (n + 1.0f) * (m.td[n] * slope_w - m.tb[n] * slope_u);
      if (sums) {
        const vf gu = stays ? vf{} : ds * slope_u, gw = stays ? vf{} : ds * slope_w;
        by_b[n] += gu, by_d[n] += gw, by_tb[n] += gu * up, by_td[n] += gw * wp;
      }
    }
    outer += within ? inner : vf{};
    const vf dx = stays ? vf{} : ds * outer;
    if (sums && m.affine) by_scale += dx * x0, by_shift += dx;
    store(l.dx + j, m.affine ? dx * m.scale : dx);
  }
  if (mean != mean) {  // a broken row breaks all that it touches
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (int64_t j = 0; j < l.n; ++j) l.dx[j] = l.p[j] == 0.0f ? 0.0f : nan;
    by_shift = by_scale = splat(nan);
    for (int n = 0; n < order; ++n) by_b[n] = by_d[n] = by_tb[n] = by_td[n] = splat(nan);
  }
  if (!sums) return;
  for (int n = 0; n < order; ++n) {
    sums[2 * n] += (n + 1) * double(m.tb[n]) * sum(by_b[n]);
    sums[2 * n + 1] -= (n + 1) * double(m.td[n]) * sum(by_d[n]);
    sums[2 * order + 2 * n] += sum(by_tb[n]);
    sums[2 * order + 2 * n + 1] += sum(by_td[n]);
  }
  sums[4 * order] += sum(by_scale);
  sums[4 * order + 1] += sum(by_shift);
}

}  // namespace
