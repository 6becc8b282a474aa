// Vectors of the machine's width, written with the compilers' vector extensions: one source for every
// instruction set and both element types. SD_ISA is 512 (AVX-512), 256 (AVX2) or 128 (anything else).
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#ifndef SD_ISA
#define SD_ISA 128
#endif

#define SD_INLINE inline __attribute__((always_inline))
#define SD_UNROLL _Pragma("GCC unroll 32")

namespace sd {

constexpr int kBytes = SD_ISA / 8;

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kBytes)));
  typedef float Unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(kBytes)));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kBytes)));
  typedef double Unaligned __attribute__((vector_size(kBytes), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(kBytes)));
};

template <class T>
using Vec = typename VectorOf<T>::Type;
template <class T>
using IntVec = typename VectorOf<T>::Int;

// Elements of a vector.
template <class T>
constexpr int kLanes = kBytes / int(sizeof(T));

template <class T>
SD_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::Unaligned*>(p);
}
template <class T>
SD_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::Unaligned*>(p) = v;
}
template <class T>
SD_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}
// The first n elements; the rest are zero.
template <class T>
SD_INLINE Vec<T> load_some(const T* p, int n) {
  T room[kLanes<T>] = {};
  std::memcpy(room, p, size_t(n) * sizeof(T));
  return load(room);
}
template <class T>
SD_INLINE void store_some(T* p, Vec<T> v, int n) {
  T room[kLanes<T>];
  store(room, v);
  std::memcpy(p, room, size_t(n) * sizeof(T));
}

// In lane j: lane j of a where bit `Stride` of j is clear, else lane j - Stride of b (Low), and the like for High.
// These are the two halves of one exchange of a transposition.
#if defined(__clang__) || __GNUC__ >= 12
template <int Stride, class T, int... J>
SD_INLINE Vec<T> exchange_low(Vec<T> a, Vec<T> b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, ((J & Stride) ? kLanes<T> + J - Stride : J)...);
}
template <int Stride, class T, int... J>
SD_INLINE Vec<T> exchange_high(Vec<T> a, Vec<T> b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, ((J & Stride) ? kLanes<T> + J : J + Stride)...);
}
#else
template <int Stride, class T, int... J>
SD_INLINE Vec<T> exchange_low(Vec<T> a, Vec<T> b, std::integer_sequence<int, J...>) {
  return __builtin_shuffle(a, b, IntVec<T>{((J & Stride) ? kLanes<T> + J - Stride : J)...});
}
template <int Stride, class T, int... J>
SD_INLINE Vec<T> exchange_high(Vec<T> a, Vec<T> b, std::integer_sequence<int, J...>) {
  return __builtin_shuffle(a, b, IntVec<T>{((J & Stride) ? kLanes<T> + J : J + Stride)...});
}
#endif

template <class T, int Stride>
SD_INLINE void transpose_stage(Vec<T>* rows) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>();
  SD_UNROLL
  for (int i = 0; i < kLanes<T>; i++) {
    if (i & Stride) continue;
    Vec<T> a = rows[i], b = rows[i + Stride];
    rows[i] = exchange_low<Stride, T>(a, b, lanes);
    rows[i + Stride] = exchange_high<Stride, T>(a, b, lanes);
  }
  if constexpr (Stride > 1) transpose_stage<T, Stride / 2>(rows);
}

// Transpose a square of kLanes x kLanes elements in registers.
template <class T>
SD_INLINE void transpose(Vec<T>* rows) {
  transpose_stage<T, kLanes<T> / 2>(rows);
}

// One vector that holds in lane j, for j < Count <= 4, the sum of v[j]'s lanes.
template <class T, int Count>
SD_INLINE Vec<T> sum_each(const Vec<T>* v) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>();
  auto fold = [&](auto stride, Vec<T> a, Vec<T> b) {
    return exchange_low<stride.value, T>(a, b, lanes) + exchange_high<stride.value, T>(a, b, lanes);
  };
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  Vec<T> all = fold(One(), v[0], Count > 1 ? v[1] : Vec<T>{});
  if constexpr (kLanes<T> >= 4) {
    Vec<T> rest = Count > 2 ? fold(One(), v[Count > 2 ? 2 : 0], Count > 3 ? v[Count > 3 ? 3 : 0] : Vec<T>{}) : Vec<T>{};
    all = fold(Two(), all, rest);
  }
  if constexpr (kLanes<T> >= 8) all += exchange_high<4, T>(all, all, lanes);
  if constexpr (kLanes<T> >= 16) all += exchange_high<8, T>(all, all, lanes);
  return all;
}

template <class T>
SD_INLINE Vec<T> clamp(Vec<T> x, T low, T high) {  // a nan stays a nan
  x = x < splat(low) ? splat(low) : x;
  return x > splat(high) ? splat(high) : x;
}

template <class T>
struct Exp {
  Vec<T> scale;  // 2^n
  Vec<T> m1;     // e^r - 1, where x = n ln 2 + r and |r| <= ln 2 / 2
};

// x within the range in which 2^n is a normal number.
SD_INLINE Exp<float> split_exp(Vec<float> x) {
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  Vec<float> n = x * 1.44269504f + magic;
  IntVec<float> bits;
  std::memcpy(&bits, &n, sizeof bits);
  n -= magic;
  Vec<float> r = x - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  bits = (bits + 127) << 23;  // the bits above the integer are shifted out
  Exp<float> e;
  std::memcpy(&e.scale, &bits, sizeof bits);
  e.m1 = p * (r * r) + r;
  return e;
}

SD_INLINE Exp<double> split_exp(Vec<double> x) {
  const Vec<double> magic = splat(6755399441055744.0);  // 1.5 * 2^52
  Vec<double> n = x * 1.4426950408889634 + magic;
  IntVec<double> bits;
  std::memcpy(&bits, &n, sizeof bits);
  n -= magic;
  Vec<double> r = x - n * 6.93145751953125e-1;
  r -= n * 1.42860682030941723212e-6;
  Vec<double> p = splat(1.0 / 6227020800.0);  // 1 / 13!
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  bits = (bits + 1023) << 52;
  Exp<double> e;
  std::memcpy(&e.scale, &bits, sizeof bits);
  e.m1 = p * (r * r) + r;
  return e;
}

template <class T>
constexpr T kExpLimit = sizeof(T) == 4 ? T(87) : T(708);

// Relative error about 1e-7 in float, 1e-16 in double; arguments beyond +-kExpLimit count as that limit.
template <class T>
SD_INLINE Vec<T> exp(Vec<T> x) {
  Exp<T> e = split_exp(clamp<T>(x, -kExpLimit<T>, kExpLimit<T>));
  return e.scale * e.m1 + e.scale;
}

template <class T>
SD_INLINE Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exp<T>(-x));
}

// By e^x - 1, so that small arguments keep their relative accuracy.
template <class T>
SD_INLINE Vec<T> tanh(Vec<T> x) {
  Vec<T> size = clamp<T>(x < splat(T(0)) ? -x : x, T(0), T(20));
  Exp<T> e = split_exp(Vec<T>(size * T(-2)));
  Vec<T> m1 = e.scale * e.m1 + (e.scale - T(1));
  Vec<T> t = -m1 / (m1 + T(2));
  return x < splat(T(0)) ? -t : t;
}

}  // namespace sd
