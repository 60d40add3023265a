// The weights of a row from what its forward pass left: one pass over the scores, which is all that a backward pass that
// computes them anew needs, and the second half of finding the thresholds of several rows at once.

#pragma once

#include "asentmax.h"
#include "structured.h"

namespace {

template <class Weight>
inline void weigh_each(float* s, int64_t n, Weight weight) {
  for (int64_t j = 0; j < n; j += W) {
    const vf x = load(s + j);
    store(s + j, weight(x <= kMasked ? splat(-kInfinity) : x));
  }
}

// The softmax of what `exponent` makes of the scores
template <class Exponent>
inline void weigh_softmax(float* s, int64_t n, const float* stats, Exponent exponent) {
  const float factor = stats[kFactor];
  weigh_each(s, n, [&](vf x) { return exp_(exponent(x)) * factor; });
}

inline void weigh_scaled(float* s, int64_t n, const float* stats, float peak, float scale) {
  const float top = stats[kTop];
  weigh_softmax(s, n, stats, [&](vf x) { return scaled_score(x, peak, scale) - top; });
}

void weigh_entmax(float* s, int64_t n, const float* stats, float d) {
  const Threshold tau(stats);
  if (d == 1.0f) return weigh_each(s, n, [&](vf x) { return tau.sparsemax(x); });
  if (d == 0.5f) return weigh_each(s, n, [&](vf x) { return tau.entmax15(x); });
  weigh_each(s, n, Shifted(d, stats[kTop], stats[kFactor], stats[kRest]));
}

void weigh_topk(float* s, int64_t n, const float* stats) {
  const float peak = stats[kTop], least = stats[0];
  if (stats[1] < kInfinity) {  // of the scores that are just the least, the first ones are taken
    for (int64_t j = int64_t(stats[1]) + 1; j < n; ++j) s[j] = s[j] == least ? -kInfinity : s[j];
  }
  weigh_softmax(s, n, stats, [&](vf x) { return x >= least ? x - peak : splat(-kInfinity); });
}

void weigh_shares(float* s, int64_t n, const float* stats) {
  const float peak = stats[kTop], threshold = stats[0], unit = unit_of(threshold), factor = stats[kFactor];
  weigh_each(s, n, [&](vf x) {
    const vf z = x - peak;
    return relu(z + threshold) * unit * exp_(z) * factor;
  });
}

// Scores -> weights in place, in whole vectors, of a function whose call names one row; false where they are not to be had
// from that row's numbers
bool weigh_found(const RowCall& g, const float* stats, float* s) {
  if (stats[kFound] == 0.0f) return false;
  const float top = stats[kTop];
  switch (g.kind) {
    case kSoftMax: weigh_softmax(s, g.n, stats, Cooled(top, float(g.a))); return true;
    case kScalableSoftMax: weigh_scaled(s, g.n, stats, stats[1], scale_of(g, 0, stats[0])); return true;
    case kAdaptiveTemperature:
      if (g.b != 0) {
        weigh_softmax(s, g.n, stats, Cooled(top, 1.0f));
      } else {
        weigh_scaled(s, g.n, stats, stats[0], stats[1]);
      }
      return true;
    case kSparseMax: weigh_entmax(s, g.n, stats, 1.0f); return true;
    case kEntMax15: weigh_entmax(s, g.n, stats, 0.5f); return true;
    case kEntMax: weigh_entmax(s, g.n, stats, steepness(g, 0)); return true;
    case kRSoftMax:
    case kTSoftMax: weigh_shares(s, g.n, stats); return true;
    case kEvSoftMax: {
      const float mean = stats[0], others = stats[1], factor = stats[kFactor];
      weigh_each(s, g.n, [&](vf x) { return likely_exponential(x - top, mean, others) * factor; });
      return true;
    }
    case kTopKSoftMax: weigh_topk(s, g.n, stats); return true;
    case kSoftMax1: weigh_softmax(s, g.n, stats, [&](vf x) { return x - top; }); return true;
    case kSoftPick: {
      const Excess excess(top);
      const float below = stats[kFactor];
      weigh_each(s, g.n, [&](vf x) { return relu(excess(x)) / below; });
      return true;
    }
    case kSigmoid: weigh_each(s, g.n, [&](vf x) { return sigmoid_of(x + top); }); return true;
    case kAsEntMax: {
      const float peak = stats[0], factor = stats[1];
      weigh_each(s, g.n, [&](vf x) { return scaled_score(x, peak, factor); });
      weigh_entmax(s, g.n, stats, steepness(g, 0));
      return true;
    }
    case kFusedMax: weigh_pieces(g, stats, s); return true;
    case kOscarMax: weigh_groups(g, stats, s); return true;
    default: return false;  // multimax leaves no such numbers
  }
}

}  // namespace
