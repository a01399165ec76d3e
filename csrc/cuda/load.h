// Reads z on the device: elements in the dtype they came in, four at a time, scaled without
// overflow, and the norm of a row.

#pragma once

#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/runtime.h"

namespace vne {

struct bfloat16 {  // the upper half of a float32
  uint16_t bits;
};

template <typename T, typename In>
__device__ __forceinline__ T convert(In x) {
  if constexpr (std::is_same_v<In, __half>) {
    return static_cast<T>(__half2float(x));
  } else if constexpr (std::is_same_v<In, bfloat16>) {
    return static_cast<T>(__uint_as_float(static_cast<unsigned>(x.bits) << 16));
  } else {
    return static_cast<T>(x);
  }
}

template <typename In>
struct alignas(sizeof(In) * 4 < 16 ? sizeof(In) * 4 : 16) Quad {
  In v[4];
};

template <typename T>
__device__ __forceinline__ Quad<T> read_quad(const T* from) {
  return *reinterpret_cast<const Quad<T>*>(from);
}

template <typename T>
__device__ __forceinline__ void write_quad(T* to, const Quad<T>& quad) {
  *reinterpret_cast<Quad<T>*>(to) = quad;
}

template <typename T>
__device__ __forceinline__ T sum_of_squares(const T (&x)[4]) {
  return x[0] * x[0] + x[1] * x[1] + (x[2] * x[2] + x[3] * x[3]);
}

// to <- from[0 .. 3], with zeros from `count` on. `vector` says that `from` is aligned for a Quad
// and that count is a multiple of 4.
template <typename T, typename In>
__device__ __forceinline__ void load_quad(const In* from, int64_t count, bool vector, T (&to)[4]) {
  if (vector && count > 0) {
    const Quad<In> quad = read_quad(from);
#pragma unroll
    for (int q = 0; q < 4; ++q) to[q] = convert<T>(quad.v[q]);
  } else {
#pragma unroll
    for (int q = 0; q < 4; ++q) to[q] = q < count ? convert<T>(from[q]) : T(0);
  }
}

// Returns whether rows of d elements from `data` on can be read as Quads.
template <typename In>
bool is_vector(const In* data, int64_t d) {
  return d % 4 == 0 && reinterpret_cast<uintptr_t>(data) % alignof(Quad<In>) == 0;
}

// Returns whether a sum of squares neither overflowed nor lost digits to underflow.
template <typename T>
__device__ __forceinline__ bool is_safe_square(T square) {
  constexpr T kTiny = sizeof(T) == 8 ? T(1e-280) : T(1e-30);
  return square > kTiny && square < 1 / kTiny;
}

// A factor that may be beyond the range of float32: a power of two times a mantissa of ordinary
// size. An entry is multiplied by one after the other. The factor 0, of a row that is absent, makes
// 0 of a NaN and of an infinity too.
template <typename T>
struct Scale {
  T power_of_two, mantissa;
  __device__ __forceinline__ bool is_zero() const { return mantissa == T(0); }
  __device__ __forceinline__ T operator()(T x) const {
    return is_zero() ? T(0) : x * power_of_two * mantissa;
  }
  __device__ __forceinline__ Quad<T> operator()(const Quad<T>& x) const {
    return {(*this)(x.v[0]), (*this)(x.v[1]), (*this)(x.v[2]), (*this)(x.v[3])};
  }
};

// The scale by factor * other. The product may be beyond the range of float64.
template <typename T>
__device__ Scale<T> make_scale(double factor, double other = 1) {
  if (factor == 0 || other == 0 || !isfinite(factor) || !isfinite(other)) {
    return {T(1), static_cast<T>(factor * other)};
  }
  constexpr int kLimit = sizeof(T) == 8 ? 1022 : 120;
  const int factor_exponent = ilogb(factor), other_exponent = ilogb(other);
  const int whole = factor_exponent + other_exponent;
  const int exponent = min(max(whole, -kLimit), kLimit);
  const double mantissa = ldexp(factor, -factor_exponent) * ldexp(other, -other_exponent);
  return {static_cast<T>(ldexp(1.0, exponent)), static_cast<T>(ldexp(mantissa, whole - exponent))};
}

// Computes |x| of a row x [d] by the 32 lanes of a warp.
template <typename T, typename In>
__device__ double row_norm(const In* x, int64_t d, bool vector) {
  const int lane = threadIdx.x % 32;
  T sum = 0;
#pragma unroll 2
  for (int64_t j = 4 * lane; j < d; j += 128) {
    T quad[4];
    load_quad(x + j, d - j, vector, quad);
    sum += sum_of_squares(quad);
  }
  sum = warp_sum(sum);
  if (is_safe_square(sum)) return sqrt(sum);  // in T
  if (isnan(sum)) return sum;

  T largest = 0;  // zero, infinite, or the squares left the range of T
#pragma unroll 1
  for (int64_t j = 4 * lane; j < d; j += 128) {
    T quad[4];
    load_quad(x + j, d - j, vector, quad);
#pragma unroll
    for (int q = 0; q < 4; ++q) largest = max(largest, quad[q] < 0 ? -quad[q] : quad[q]);
  }
  largest = warp_max(largest);
  if (largest == 0 || isinf(largest)) return largest;
  const int exponent = max(ilogb(static_cast<double>(largest)), -1022);  // 2^1023 is the last
  const Scale<T> scale = make_scale<T>(ldexp(1.0, -exponent));
  sum = 0;
#pragma unroll 1
  for (int64_t j = 4 * lane; j < d; j += 128) {
    T quad[4];
    load_quad(x + j, d - j, vector, quad);
#pragma unroll
    for (int q = 0; q < 4; ++q) sum += scale(quad[q]) * scale(quad[q]);
  }
  return ldexp(sqrt(static_cast<double>(warp_sum(sum))), exponent);
}

// Runs f(In{}) with the type of the elements of z, which are computed in T.
template <typename T, typename F>
void dispatch_elements(ScalarType dtype, const F& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(double{});
  } else if (dtype == ScalarType::Half) {
    f(__half{});
  } else if (dtype == ScalarType::BFloat16) {
    f(bfloat16{});
  } else {
    f(float{});
  }
}

}  // namespace vne
