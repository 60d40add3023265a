// The entmax family: a threshold by Newton steps on the scores that may be in the support, which are few as a rule.

#pragma once

#include "rows.h"

namespace {

constexpr int kHalf_ = W / 2;
typedef double vd __attribute__((vector_size(8 * kHalf_)));
typedef int64_t vl __attribute__((vector_size(8 * kHalf_)));
typedef float vh __attribute__((vector_size(4 * kHalf_)));

inline vd load_wide(const float* p) {
  vh v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vd);
}

inline double sum_wide(vd v) {
  double s = 0;
  for (int i = 0; i < kHalf_; ++i) s += v[i];
  return s;
}

// The scores of a row above peak + bound, less the peak; minus infinity fills up the last vector. Their number.
int64_t candidates(const Line& l, float bound, float* to) {
  const float peak = l.peak;
  int64_t m = 0;
  for (int64_t j = 0; j < l.width; j += W) {
    const vf z = load(l.s + j) - peak;
    m += compress(to + m, z, z > bound);
  }
  store(to + m, splat(-kInfinity));
  return m;
}

// The threshold with sum(max(c - tau, 0)) = 1, c <= 0 its largest 0, from below: exact once the support stays.
double sparsemax_threshold(const float* c, int64_t m) {
  double tau = -1;
  for (int64_t left = 0;;) {
    vd sum_ = {}, many = {};
    for (int64_t j = 0; j < m; j += kHalf_) {
      const vd x = load_wide(c + j);
      const vl in = x > tau;
      sum_ += in ? x : vd{}, many += in ? vd{} + 1.0 : vd{};
    }
    const int64_t now = int64_t(sum_wide(many));
    tau = (sum_wide(sum_) - 1) / double(now);
    if (now == left) return tau;
    left = now;
  }
}

// The threshold with sum(max(c / 2 - tau, 0)^2) = 1: Newton's method on the convex norm, from below
double entmax15_threshold(const float* c, int64_t m) {
  double tau = -1;
  for (int step = 0; step < 60; ++step) {
    vd first = {}, second = {};
    for (int64_t j = 0; j < m; j += kHalf_) {
      vd x = 0.5 * load_wide(c + j) - tau;
      x = x > 0.0 ? x : vd{};
      first += x, second += x * x;
    }
    const double norm = std::sqrt(sum_wide(second)), move = (norm - 1) * norm / sum_wide(first);
    tau += move;
    if (std::abs(move) < 1e-9 * -tau) break;  // the next step would be its square
  }
  return tau;
}

// A threshold below the peak in two floats, and the weights that it leaves
struct Threshold {
  float peak, high, low;

  Threshold(float peak, double tau) : peak(peak), high(float(tau)), low(float(tau - high)) {}
  explicit Threshold(const float* stats) : peak(stats[kTop]), high(stats[kFactor]), low(stats[kRest]) {}
  void left(float* stats) const { leave(stats, peak, high, low); }
  vf sparsemax(vf x) const { return relu((x - peak - high) - low); }
  vf entmax15(vf x) const {
    const vf root = relu((0.5f * (x - peak) - high) - low);
    return root * root;
  }
};

void sparsemax_row(const RowCall& g, const Line& l, const Buffers& t) {
  const Threshold tau(l.peak, sparsemax_threshold(t.a, candidates(l, -1.0f, t.a)));
  tau.left(stats_of(g, l.row));
  emit(g, l, [&](vf x) { return tau.sparsemax(x); });
}

void entmax15_row(const RowCall& g, const Line& l, const Buffers& t) {
  const Threshold tau(l.peak, entmax15_threshold(t.a, candidates(l, -2.0f, t.a)));
  tau.left(stats_of(g, l.row));
  emit(g, l, [&](vf x) { return tau.entmax15(x); });
}

// (1 + d (z - s))_+ ^ (1 / d) and the base, for 0 < d < 1; powers of small whole exponents are products
struct Power {
  float d, inverse;
  int exponent;

  explicit Power(float d) : d(d), inverse(1 / d), exponent(0) {
    for (int k = 2; k <= 8; ++k) {
      if (d * float(k) == 1.0f) exponent = k;
    }
  }
  vf operator()(vf z, float s, vf& base) const {
    const vf u = max(d * (z - s), splat(-1.0f));
    base = 1.0f + u;
    if (exponent) {
      vf p = base;
      for (int k = 1; k < exponent; ++k) p *= base;
      return p;
    }
    const vf p = exp_(log_(base, u) * inverse);
    return base > 0.0f ? p : vf{};
  }
};

// s of the above with a sum of 1, and the sum that rounding leaves
double entmax_shift(const float* c, int64_t m, const Power& power, double& sum_) {
  const double d = power.d;
  double s = 0, low = 0, high = -std::expm1(-d * std::log(double(m))) / d;
  for (int step = 0; step < 100; ++step) {
    double slope = 0;
    sum_ = 0;
    vf all = {}, slopes = {};
    for (int64_t j = 0; j < m; j += W) {
      vf base;
      const vf p = power(load(c + j), float(s), base);
      all += p, slopes += p > 0.0f ? p / base : vf{};
      if (j % kBlock == kBlock - W) sum_ += sum(all), slope += sum(slopes), all = slopes = vf{};
    }
    sum_ += sum(all), slope += sum(slopes);
    (sum_ >= 1 ? low : high) = s;
    double moved = s + std::expm1(d * std::log(sum_)) / d * std::pow(sum_, 1 - d) / slope;
    if (!(moved >= low && moved <= high)) moved = (low + high) / 2;
    if (std::abs(moved - s) <= 4 * 1.2e-7 * (1 + std::abs(s))) break;
    s = double(float(moved));
  }
  return s;
}

// For d > 1, where scores that hardly differ may have very different p: in float64, from the smallest score of the
// support on, p_i = (r^d + d (z_i - z_k))^(1/d) with r = p_k, whose sum is convex in r.
void steep_entmax(float* c, int64_t m, double d, std::vector<double>& p) {
  std::sort(c, c + m, [](float a, float b) { return a > b; });
  int64_t inside = 0, outside = m;
  while (outside - inside > 1) {
    const int64_t middle = (inside + outside) / 2;
    double room = 0;
    for (int64_t i = 0; i < middle && c[i] > c[middle]; ++i) room += std::pow(d * (double(c[i]) - c[middle]), 1 / d);
    (room < 1 ? inside : outside) = middle;
  }
  const double least = c[inside];
  int64_t n = inside + 1;
  while (n < m && c[n] == c[inside]) ++n;
  p.resize(n);
  double log_r = 0;
  for (int step = 0; step < 200; ++step) {
    double all = 0, slope = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double gap = std::log(d * (c[i] - least)), own = d * log_r, top = std::max(gap, own);
      const double log_p = (top + std::log1p(std::exp(std::min(gap, own) - top))) / d;
      p[i] = std::exp(log_p);
      all += p[i], slope += std::exp((d - 1) * (log_r - log_p));
    }
    const double r = std::exp(log_r), moved = std::max(r - (all - 1) / slope, 1e-300);
    if (r - moved <= 1e-15 * r) break;
    log_r = std::log(std::min(moved, r));
  }
  double all = 0;
  for (double x : p) all += x;
  for (double& x : p) x /= all;
}

void steep_row(const RowCall& g, const Line& l, const Buffers& t, float d) {
  std::vector<double> p;
  const int64_t m = candidates(l, -1 / d, t.a);
  steep_entmax(t.a, m, d, p);
  const float least = t.a[p.size() - 1], peak = l.peak;
  for (int64_t j = 0; j < l.n; ++j) {  // equal scores have equal weights, which stand in the order of the scores
    const float z = l.s[j] - peak;
    const auto at = std::lower_bound(t.a, t.a + p.size(), z, [](float a, float b) { return a > b; }) - t.a;
    l.s[j] = z >= least ? float(p[at]) : 0.0f;
  }
  emit(g, l, [](vf x) { return x; });
}

// alpha - 1 of a row
inline float steepness(const RowCall& g, int64_t row) { return std::max(value_of(g, row) - 1.0f, 1e-12f); }

// Weights of d < 1 that add up to 1 by the factor
struct Shifted {
  Power power;
  float peak, s, factor, least;

  Shifted(float d, float peak, float s, float factor)
      : power(d), peak(peak), s(s), factor(factor), least(std::max(s - 1 / d, -kMost)) {}
  vf operator()(vf x) const {
    const vf z = x - peak;
    if (!count(z > least)) return vf{};
    vf base;
    const vf p = power(z, s, base) * factor;
    return z > -kInfinity ? p : vf{};
  }
};

void entmax_row(const RowCall& g, const Line& l, const Buffers& t) {
  const float d = steepness(g, l.row);
  if (d == 1.0f) return sparsemax_row(g, l, t);
  if (d == 0.5f) return entmax15_row(g, l, t);
  if (d > 1.0f) return steep_row(g, l, t, d);
  double sum_;
  const float s = float(entmax_shift(t.a, candidates(l, std::max(-1 / d, -kMost), t.a), Power(d), sum_));
  const Shifted weight(d, l.peak, s, float(1 / sum_));
  leave(stats_of(g, l.row), l.peak, s, weight.factor);
  emit(g, l, weight);
}

// (g - mean) over the support
void sparsemax_back(const BackLine& l) {
  double many = 0, sum_ = 0;
  for (int64_t first = 0; first < l.width; first += kBlock) {
    vf gradients = {};
    for (int64_t j = first; j < std::min(first + kBlock, l.width); j += W) {
      const vi in = load(l.p + j) > 0.0f;
      gradients += in ? load(l.g + j) : vf{};
      many += count(in);
    }
    sum_ += sum(gradients);
  }
  const float mean = float(sum_ / many);
  for (int64_t j = 0; j < l.width; j += W) {
    store(l.dx + j, load(l.p + j) > 0.0f ? load(l.g + j) - mean : vf{});
  }
}

// w (g - sum(w g) / sum(w)) with w = weight(p), which is 0 where p is
template <class Weight>
void weighted_mean_back(const BackLine& l, Weight weight) {
  double weights = 0;
  const double products = total(l.width, [&](int64_t j) {
    const vf p = load(l.p + j);
    vf w = {};
    if (count(p != 0.0f)) w = p == 0.0f ? vf{} : weight(p);
    store(l.dx + j, w);
    return product(w, load(l.g + j));
  });
  weights = total(l.width, [&](int64_t j) { return load(l.dx + j); });
  const float mean = float(products / weights);
  for (int64_t j = 0; j < l.width; j += W) {
    const vf w = load(l.dx + j);
    store(l.dx + j, product(w, load(l.g + j) - mean));
  }
}

// For d > 1, in float64: p ** (1 - d) may overflow, and is cut off where no float would hold what comes of it
void steep_back(const BackLine& l, float d, float* grad_value) {
  double most = -1e300, weights = 0, mean = 0, entropy = 0, by_value = 0, all = 0;
  int64_t steepest = 0;
  for (int64_t j = 0; j < l.n; ++j) {
    if (l.p[j] > 0 && (1 - double(d)) * std::log(double(l.p[j])) > most) {
      most = (1 - double(d)) * std::log(double(l.p[j])), steepest = j;
    }
  }
  for (int64_t j = 0; j < l.n; ++j) {
    if (!(l.p[j] > 0)) continue;
    const double log_p = std::log(double(l.p[j])), w = std::exp((1 - double(d)) * log_p - most);
    weights += w, mean += w * (double(l.g[j]) - l.g[steepest]), entropy += l.p[j] * log_p;
  }
  mean /= weights;
  const double bound = std::log(double(kMost)) / 2;
  for (int64_t j = 0; j < l.n; ++j) {
    l.dx[j] = 0;
    if (!(l.p[j] > 0)) continue;
    const double p = l.p[j], log_p = std::log(p), steepness = (1 - double(d)) * log_p;
    const double w = std::exp(steepness - most) / weights;
    by_value += l.g[j] * ((p - w) / (double(d) * d) - (p * log_p - w * entropy) / d);
    if (j == steepest) continue;
    const double dx = std::exp(std::min(steepness, bound)) * (double(l.g[j]) - l.g[steepest] - mean);
    l.dx[j] = float(dx), all += dx;
  }
  l.dx[steepest] = float(-all);
  if (grad_value) *grad_value = float(by_value);
}

// (e^u - 1) / u and (e^u - 1 - u) / u^2
inline void exponential_parts(vf u, vf& first, vf& second) {
  vf power;
  const vf r = exp_parts(max(u, splat(-80.0f)), power), e = r * power + (power - 1.0f);
  const vi small = (u < 0.3f) & (u > -0.3f), tiny = (u < 1e-4f) & (u > -1e-4f);
  const vf divisor = tiny ? splat(1.0f) : u;
  first = tiny ? 1.0f + 0.5f * u : e / divisor;
  vf series = splat(1.0f / 362880);
  series = series * u + 1.0f / 40320;
  series = series * u + 1.0f / 5040;
  series = series * u + 1.0f / 720;
  series = series * u + 1.0f / 120;
  series = series * u + 1.0f / 24;
  series = series * u + 1.0f / 6;
  series = series * u + 0.5f;
  second = small ? series : (e - u) / (divisor * divisor);
}

// sum(g dp/dalpha): the terms in 1/d and 1/d^2 of the published form cancel and are taken out
float entmax_by_alpha(const BackLine& l, float d) {
  double firsts = 0, seconds = 0, logs = 0;
  auto parts = [&](int64_t j, vf& p, vf& log_p, vf& first, vf& second) {
    p = load(l.p + j);
    log_p = p > 0.0f ? log_(p, p - 1.0f) : vf{};
    exponential_parts(-d * log_p, first, second);
    first *= -log_p, second *= log_p * log_p;
  };
  for (int64_t j = 0; j < l.width; j += W) {
    vf p, log_p, first, second;
    if (!count(load(l.p + j) != 0.0f)) continue;
    parts(j, p, log_p, first, second);
    firsts += sum(p * first), seconds += sum(p * second), logs += sum(p * log_p);
  }
  const float mean_first = float(firsts), mean_second = float(seconds), mean_log = float(logs);
  double all = 0;
  for (int64_t j = 0; j < l.width; j += W) {
    vf p, log_p, first, second;
    if (!count(load(l.p + j) != 0.0f)) continue;
    parts(j, p, log_p, first, second);
    all += sum(product(p * (mean_second - second - mean_first * log_p + first * mean_log), load(l.g + j)));
  }
  return float(all / (1 + double(d) * firsts));
}

void entmax_back(const RowCall& g, const BackLine& l) {
  const float d = steepness(g, l.row), rest = 1.0f - d;
  float* grad_value = g.grad_value ? g.grad_value + l.row : nullptr;
  if (d > 1.0f) return steep_back(l, d, grad_value);
  if (grad_value) *grad_value = entmax_by_alpha(l, d);
  if (d == 1.0f) return sparsemax_back(l);
  if (d == 0.5f) return weighted_mean_back(l, [](vf p) { return sqrt_(p); });
  if (d == 0.25f) return weighted_mean_back(l, [](vf p) { return sqrt_(p) * sqrt_(sqrt_(p)); });
  weighted_mean_back(l, [&](vf p) { return exp_(rest * log_(p, p - 1.0f)); });
}

}  // namespace
