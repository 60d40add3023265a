// The functions of rows that are called from outside: each thread takes some rows of a call.

#pragma once

#include "found.h"

namespace {

void forward_row(const RowCall& g, const Line& l, const Buffers& t) {
  switch (g.kind) {
    case kMultiMax: return softmax_row(g, l, 1.0f);
    case kSoftMax: return softmax_row(g, l, float(g.a));
    case kScalableSoftMax: return scalable_row(g, l);
    case kAdaptiveTemperature: return adaptive_row(g, l, t);
    case kSparseMax: return sparsemax_row(g, l, t);
    case kEntMax15: return entmax15_row(g, l, t);
    case kEntMax: return entmax_row(g, l, t);
    case kRSoftMax: return rsoftmax_row(g, l, t);
    case kTSoftMax: return weighted_row(g, l, value_of(g, l.row), value_of(g, l.row) > 2 * kThresholdShift, 1.0f);
    case kEvSoftMax: return evsoftmax_row(g, l);
    case kTopKSoftMax: return topk_row(g, l, t);
    case kFusedMax: return fusedmax_row(g, l, t);
    case kOscarMax: return oscarmax_row(g, l, t);
    case kSoftMax1: return softmax1_row(g, l);
    case kSigmoid: return sigmoid_row(g, l);
    case kAsEntMax: return asentmax_row(g, l, t);
    case kSoftPick: return softpick_row(g, l);
  }
}

void backward_row(const RowCall& g, const BackLine& l, const Buffers& t) {
  switch (g.kind) {
    case kSoftMax: return softmax_back(l, 1.0f / float(g.a));
    case kScalableSoftMax: return scalable_back(g, l, t);
    case kAdaptiveTemperature: return adaptive_back(g, l, t);
    case kSparseMax: return sparsemax_back(l);
    case kEntMax15: return weighted_mean_back(l, [](vf p) { return sqrt_(p); });
    case kEntMax: return entmax_back(g, l);
    case kRSoftMax:
    case kTSoftMax: return weighted_back(g, l, t);
    case kEvSoftMax:
    case kSoftMax1:
    case kTopKSoftMax: return softmax_back(l, 1.0f);
    case kFusedMax: return structured_back(g, l, t, false);
    case kOscarMax: return structured_back(g, l, t, true);
    case kSigmoid: return sigmoid_back(l);
    case kAsEntMax: return asentmax_back(g, l, t);
    case kSoftPick: return softpick_back(g, l, t);
  }
}

// What is there is NaN or infinite, or nothing is there
void forward_rest(const RowCall& g, const Line& l) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  emit(g, l, [&](vf x) { return x == -kInfinity ? vf{} : splat(nan); });
  if (g.groups) std::fill(g.groups + l.row * l.n, g.groups + (l.row + 1) * l.n, -1);
}

// One row of any function but MultiMax
void forward_one(const RowCall& g, int64_t row, const Buffers& t) {
  if (float* stats = stats_of(g, row)) std::fill(stats, stats + kStats, 0.0f);
  const Line l = take(g, row, t, [](vf x) { return x; });
  l.broken || l.peak == -kInfinity ? forward_rest(g, l) : forward_row(g, l, t);
}

void backward_one(const RowCall& g, const BackLine& l, const Buffers& t) {
  if (largest_of(l.p, l.width) > 0.0f) return backward_row(g, l, t);
  std::fill(l.dx, l.dx + l.n, 0.0f);  // nothing is kept, or it is NaN: no gradient passes
  for (float* grad : {g.grad_value, g.grad_beta, g.grad_gamma}) {
    if (grad) grad[l.row] = 0.0f;
  }
}

template <int ORDER>
void forward_rows(const RowCall& g, int64_t first, int64_t last) {
  const Buffers t = buffers(g.n, is_structured(g.kind));
  const int64_t heads = g.heads ? g.heads : 1;
  if (g.kind == kMultiMax) {
    const Sigma m(g, first / g.head_rows % heads);
    for (int64_t row = first; row < last; ++row) {
      const Line l = take(g, row, t, [&](vf x) { return sigma<ORDER>(m, x); });
      l.broken || l.peak == -kInfinity ? forward_rest(g, l) : softmax_row(g, l, 1.0f);
    }
    return;
  }
  for (int64_t row = first; row < last; ++row) forward_one(g, row, t);
}

template <int ORDER>
void backward_rows(const RowCall& g, int64_t first, int64_t last, int64_t item) {
  const Buffers t = buffers(g.n, is_structured(g.kind));
  const int64_t heads = g.heads ? g.heads : 1;
  if (g.kind == kMultiMax) {
    const Sigma m(g, first / g.head_rows % heads);
    double* sums = g.sums ? g.sums + item * (4 * g.order + 2) : nullptr;
    for (int64_t row = first; row < last; ++row) {
      const BackLine l = take_back(g, row, t);
      multimax_back<ORDER>(g, l, t, m, sums);
      finish(g, l);
    }
    return;
  }
  for (int64_t row = first; row < last; ++row) {
    const BackLine l = take_back(g, row, t);
    backward_one(g, l, t);
    finish(g, l);
  }
}

// Rows by the item: those of one head first to last, so many at a time
template <class F>
void for_items(const RowCall& g, F f) {
  const int64_t pieces = (g.head_rows + g.item_rows - 1) / g.item_rows, items = g.rows / g.head_rows * pieces;
  auto run = [&](int64_t item) {
    const int64_t start = item / pieces * g.head_rows, piece = item % pieces * g.item_rows;
    f(start + piece, start + std::min(piece + g.item_rows, g.head_rows), item);
  };
  if (g.threads <= 1) {
    for (int64_t item = 0; item < items; ++item) run(item);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(int(std::min(g.threads, items)))
  for (int64_t item = 0; item < items; ++item) run(item);
}

}  // namespace

extern "C" {

int64_t multimax_row_call_size() { return sizeof(RowCall); }

void multimax_rows_forward(const RowCall* g) {
  for_items(*g, [&](int64_t first, int64_t last, int64_t) {
    if (g->order == 1) return forward_rows<1>(*g, first, last);
    if (g->order == 2) return forward_rows<2>(*g, first, last);
    forward_rows<0>(*g, first, last);
  });
}

void multimax_rows_backward(const RowCall* g) {
  for_items(*g, [&](int64_t first, int64_t last, int64_t item) {
    if (g->order == 1) return backward_rows<1>(*g, first, last, item);
    if (g->order == 2) return backward_rows<2>(*g, first, last, item);
    backward_rows<0>(*g, first, last, item);
  });
}

}  // extern "C"
