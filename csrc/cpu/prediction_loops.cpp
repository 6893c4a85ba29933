#include "prediction_loops.h"

#include "vector_scalars.h"

namespace rada_fast::RADA_CAPABILITY {
namespace {

constexpr int64_t kAlign = 16;  // a number of accumulators: 64 bytes of float

int64_t padded(int64_t classes) { return (classes + kAlign - 1) / kAlign * kAlign; }

// Copies the logits to values and returns the largest, ignoring NaN; it is -infinity if all are NaN.
template <typename T, typename A>
A read(const T* logits, int64_t classes, A* values) {
  A best = -HUGE_VAL;
#pragma omp simd reduction(max : best)
  for (int64_t c = 0; c < classes; ++c) {
    const A x = load(logits[c]);
    values[c] = x;
    best = best < x ? x : best;
  }
  return best;
}

template <typename A>
struct Row {
  A best;    // the largest logit
  A others;  // r, see prediction_loops.h
  A spread;  // sum exp(-d) d
};

// On entry distance has the values; it receives d, and weight receives exp(-d). Without a finite maximum r is NaN.
template <bool with_spread, typename A>
Row<A> statistics(A best, int64_t classes, A* __restrict distance, A* __restrict weight) {
  A others = 0, spread = 0, ties = 0;
#pragma omp simd reduction(+ : others, spread, ties) aligned(distance, weight : 64)
  for (int64_t c = 0; c < classes; ++c) {
    const A x = distance[c];
    const A d = best - x;
    const A w = exponential_of(-d);
    distance[c] = d;
    weight[c] = w;
    others += x == best ? A(0) : w;
    ties += x == best ? A(1) : A(0);
    if constexpr (with_spread) spread += w == 0 ? A(0) : w * d;
  }
  others += ties - 1;
  return {best, best - best == 0 ? others : A(NAN), spread};
}

template <typename A>
inline A log_of_sum(const Row<A>& row) {
  return std::log1p(row.others);
}

int64_t scratch_row(int64_t classes) { return 2 * padded(classes); }

template <typename T, typename A>
A entropy(const T* logits, int64_t classes, A factor, A* scratch, T* gradient) {
  A *distance = scratch, *weight = scratch + padded(classes);
  const Row<A> row = statistics<true>(read(logits, classes, distance), classes, distance, weight);
  const A normaliser = log_of_sum(row), inverse = A(1) / (1 + row.others);
  const A average = row.spread * inverse, value = normaliser + average;
  if (gradient) {
    // -p (ln p + H) = p (d - mean d): the logarithm of the sum drops out.
    const A scale = factor * inverse;
#pragma omp simd aligned(distance, weight : 64)
    for (int64_t c = 0; c < classes; ++c) {
      const A p = scale * weight[c];
      put(gradient[c], p == 0 ? A(0) : p * (distance[c] - average));
    }
  }
  return value;
}

template <typename T, typename A>
A cross_entropy(const T* logits, int64_t classes, int64_t label, A smoothing, A factor, A* scratch, T* gradient) {
  A *distance = scratch, *weight = scratch + padded(classes);
  const Row<A> row = statistics<false>(read(logits, classes, distance), classes, distance, weight);
  const bool known = label >= 0 && label < classes;
  const A count = static_cast<A>(classes), uniform = smoothing / count;
  const A scale = (known ? factor : A(NAN)) / (1 + row.others), floor = factor * uniform;
  // The target's value is added up separately, so that a certain prediction of one class has gradient 0.
  const A target = factor * (uniform + (1 - smoothing));
  if (gradient) {
#pragma omp simd aligned(weight : 64)
    for (int64_t c = 0; c < classes; ++c) put(gradient[c], scale * weight[c] - floor);
    if (known) put(gradient[label], scale * weight[label] - target);
  }
  if (!known) return A(NAN);
  A value = log_of_sum(row) + (1 - smoothing) * distance[label];
  if (smoothing != 0) {
    A total = 0;
#pragma omp simd reduction(+ : total) aligned(distance : 64)
    for (int64_t c = 0; c < classes; ++c) total += distance[c];
    value += smoothing * (total / count);
  }
  return value;
}

int64_t scratch_marginal(int64_t rows, int64_t classes) { return (rows + 2) * padded(classes) + rows; }

template <typename T, typename A>
A marginal(const T* logits, int64_t rows, int64_t classes, A* scratch, T* gradient) {
  const int64_t ld = padded(classes);
  A *log_mean = scratch + rows * ld, *distance = log_mean + ld, *peak = distance + ld;
  const A share = A(1) / static_cast<A>(rows), log_share = std::log(share);
  for (int64_t c = 0; c < classes; ++c) log_mean[c] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    A* probability = scratch + r * ld;
    const A best = read(logits + r * classes, classes, distance);
    const Row<A> row = statistics<false>(best, classes, distance, probability);
    const A scale = A(1) / (1 + row.others);
    peak[r] = scale;
#pragma omp simd aligned(probability, log_mean : 64)
    for (int64_t c = 0; c < classes; ++c) {
      probability[c] *= scale;
      log_mean[c] += probability[c];
    }
  }
  A value = 0;
#pragma omp simd reduction(+ : value) aligned(log_mean : 64)
  for (int64_t c = 0; c < classes; ++c) {
    // The logarithm is that of the sum, which is no smaller than any term. The mean could be 0 where a probability is not.
    const A total = log_mean[c];
    log_mean[c] = logarithm_of(total) + log_share;
    value -= total == 0 ? A(0) : share * total * log_mean[c];
  }
  if (!gradient) return value;
  for (int64_t r = 0; r < rows; ++r) {
    const A* probability = scratch + r * ld;
    // The gradient needs sum_k p_k ln q_k - ln q_c. All ln q are taken relative to that of the row's likeliest class,
    // whose p may be near 1: beside its term those of the other classes would be lost.
    A origin = -HUGE_VAL;
#pragma omp simd reduction(max : origin) aligned(probability, log_mean : 64)
    for (int64_t c = 0; c < classes; ++c) {
      const A candidate = probability[c] == peak[r] ? log_mean[c] : -HUGE_VAL;
      origin = origin < candidate ? candidate : origin;
    }
    A centre = 0;
#pragma omp simd reduction(+ : centre) aligned(probability, log_mean : 64)
    for (int64_t c = 0; c < classes; ++c)
      centre += probability[c] == 0 ? A(0) : probability[c] * (log_mean[c] - origin);
    T* out = gradient + r * classes;
#pragma omp simd aligned(probability, log_mean : 64)
    for (int64_t c = 0; c < classes; ++c) {
      const A p = share * probability[c];
      put(out[c], p == 0 ? A(0) : p * ((origin - log_mean[c]) + centre));
    }
  }
  return value;
}

template <typename T>
const PredictionLoops<T>& table() {
  using A = Acc<T>;
  static const PredictionLoops<T> loops{scratch_row, scratch_marginal, entropy<T, A>, cross_entropy<T, A>,
                                        marginal<T, A>};
  return loops;
}

}  // namespace

template <>
const PredictionLoops<float>& loops() { return table<float>(); }
template <>
const PredictionLoops<double>& loops() { return table<double>(); }
template <>
const PredictionLoops<BF16>& loops() { return table<BF16>(); }
template <>
const PredictionLoops<Half>& loops() { return table<Half>(); }

}  // namespace rada_fast::RADA_CAPABILITY
