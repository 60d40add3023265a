// asentmax: entmax of scores that are multiplied by delta + beta log(n + 1)^gamma.

#pragma once

#include "entmax.h"
#include "softmaxes.h"

namespace {

void asentmax_row(const RowCall& g, const Line& l, const Buffers& t) {
  const double length = std::log(double(l.kept + 1)), power = std::pow(length, double(g.gamma[l.row]));
  const float factor = float(g.b + g.beta[l.row] * power), peak = l.peak;
  if (float* stats = stats_of(g, l.row)) {
    stats[0] = peak, stats[1] = factor, stats[2] = float(power), stats[3] = float(std::log(length));
  }
  Line scaled = l;
  vf top = splat(-kInfinity);
  for (int64_t j = 0; j < l.width; j += W) {
    const vf x = load(l.s + j), z = scaled_score(x, peak, factor);
    store(l.s + j, z);
    top = max(z, top);
  }
  scaled.peak = largest(top);
  entmax_row(g, scaled, t);
}

void asentmax_back(const RowCall& g, const BackLine& l, const Buffers& t) {
  const float* stats = stats_of(g, l.row);
  const float factor = stats[1];
  entmax_back(g, l);
  if (g.grad_beta || g.grad_gamma) {
    const float* z = shifted_scores(g, l, stats[0], t.s);
    const double by_factor = total(l.width, [&](int64_t j) { return load(l.dx + j) * load(z + j); });
    if (g.grad_beta) g.grad_beta[l.row] = float(by_factor * stats[2]);
    if (g.grad_gamma) g.grad_gamma[l.row] = float(by_factor * g.beta[l.row] * stats[2] * stats[3]);
  }
  for (int64_t j = 0; j < l.width; j += W) store(l.dx + j, load(l.dx + j) * factor);
}

}  // namespace
