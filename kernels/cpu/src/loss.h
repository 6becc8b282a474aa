// Log-softmax and negative log-likelihood of a row of logits, without ever holding the log-softmax.
#pragma once

#include <cmath>

#include "operands.h"

namespace sd {

// The largest of n values; nan if any is.
template <class T>
inline T largest(const T* x, int64_t n) {
  Vec<T> best = splat(x[0]);
  Vec<T> odd = Vec<T>{};  // becomes nan where a value is not a number
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    Vec<T> v = load(x + i);
    best = v > best ? v : best;
    odd += v != v ? v : Vec<T>{};
  }
  T lanes[kLanes<T>], odds[kLanes<T>];
  store(lanes, best);
  store(odds, odd);
  T top = lanes[0], bad = 0;
  for (int j = 0; j < kLanes<T>; j++) {
    top = std::max(top, lanes[j]);
    bad += odds[j];
  }
  for (; i < n; i++) {
    top = std::max(top, x[i]);
    if (x[i] != x[i]) bad = x[i];
  }
  return top + bad;
}

template <class T>
inline void exp_sum(const T* x, int64_t n, T top, T* sum, T* plain_sum) {
  Vec<T> total = Vec<T>{}, plain = Vec<T>{};
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    Vec<T> v = load(x + i);
    total += exp<T>(v - top);
    plain += v;
  }
  if (i < n) {
    int left = int(n - i);
    Vec<T> v = load_some(x + i, left);
    T room[kLanes<T>];
    store(room, exp<T>(v - top));
    for (int j = left; j < kLanes<T>; j++) room[j] = 0;
    total += load(room);
    plain += v;
  }
  *sum = sum_each<T, 1>(&total)[0];
  *plain_sum = sum_each<T, 1>(&plain)[0];
}

// loss[r] = (1 - smoothing) * -log p[target] + smoothing * mean over columns of -log p; zero where the target is
// `ignored`. lse[r]: log of the sum of exponentials.
template <class T>
void cross_entropy_forward(int threads, int64_t rows, int64_t columns, const T* logits, int64_t stride,
                           const int64_t* target, int64_t ignored, double smoothing, T* lse, T* loss) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* x = logits + r * stride;
    T sum, plain;
    T top = largest(x, columns);
    exp_sum(x, columns, top, &sum, &plain);
    lse[r] = top + std::log(sum);
    loss[r] = target[r] == ignored ? T(0) : T(1 - smoothing) * (lse[r] - x[target[r]]);
    // Only if asked for: zero times the infinite loss of a masked column is not a number.
    if (smoothing != 0 && target[r] != ignored) loss[r] += T(smoothing) * (lse[r] - plain / T(columns));
  }
}

// scale[r]: gradient of loss[r].
template <class T>
void cross_entropy_backward(int threads, int64_t rows, int64_t columns, const T* logits, int64_t stride,
                            const int64_t* target, int64_t ignored, double smoothing, const T* lse, const T* scale,
                            T* dlogits) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* x = logits + r * stride;
    T* d = dlogits + r * columns;
    if (target[r] == ignored) {
      std::fill(d, d + columns, T(0));
      continue;
    }
    const T factor = scale[r], level = T(smoothing / double(columns));
    int64_t i = 0;
    for (; i + kLanes<T> <= columns; i += kLanes<T>) store(d + i, Vec<T>(factor * (exp<T>(load(x + i) - lse[r]) - level)));
    if (i < columns) {
      int left = int(columns - i);
      store_some(d + i, Vec<T>(factor * (exp<T>(load_some(x + i, left) - lse[r]) - level)), left);
    }
    d[target[r]] -= factor * T(1 - smoothing);
  }
}

}  // namespace sd
