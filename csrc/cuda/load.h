// Reading z on the device: elements in the dtype they came in, four at a time, scaled without
// overflow, and the norm of a row.

#pragma once

#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

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

// to <- from[0 .. 3], zeros from `count` on. `vector`: `from` is aligned for a Quad and count is a
// multiple of 4.
template <typename T, typename In>
__device__ __forceinline__ void load_quad(const In* from, int64_t count, bool vector, T (&to)[4]) {
  if (vector && count > 0) {
    const Quad<In> quad = *reinterpret_cast<const Quad<In>*>(from);
#pragma unroll
    for (int q = 0; q < 4; ++q) to[q] = convert<T>(quad.v[q]);
  } else {
#pragma unroll
    for (int q = 0; q < 4; ++q) to[q] = q < count ? convert<T>(from[q]) : T(0);
  }
}

// Whether rows of d elements from `data` on can be read as Quads.
template <typename In>
bool is_vector(const In* data, int64_t d) {
  return d % 4 == 0 && reinterpret_cast<uintptr_t>(data) % alignof(Quad<In>) == 0;
}

// Sums of squares that neither overflowed nor lost what matters to underflow.
template <typename T>
__device__ __forceinline__ bool is_safe_square(T square) {
  constexpr T kTiny = sizeof(T) == 8 ? T(1e-280) : T(1e-30);
  return square > kTiny && square < 1 / kTiny;
}

// A factor, possibly beyond the range of float32, as a product of a power of two and a rest of
// ordinary size, to be multiplied with one after the other: the rest may be multiplied further.
// The factor 0, of a row that is absent, makes 0 of a NaN and of an infinity too.
template <typename T>
struct Scale {
  T power, rest;
  __device__ __forceinline__ bool is_zero() const { return rest == T(0); }
  __device__ __forceinline__ T operator()(T x) const { return is_zero() ? T(0) : x * power * rest; }
};

// The scale by factor times other, whose product may be beyond the range of float64.
template <typename T>
__device__ Scale<T> make_scale(double factor, double other = 1) {
  if (factor == 0 || other == 0 || !isfinite(factor) || !isfinite(other)) {
    return {T(1), static_cast<T>(factor * other)};
  }
  constexpr int kLimit = sizeof(T) == 8 ? 1022 : 120;
  const int factor_exponent = ilogb(factor), other_exponent = ilogb(other);
  const int whole = factor_exponent + other_exponent;
  const int exponent = min(max(whole, -kLimit), kLimit);
  const double rest = ldexp(factor, -factor_exponent) * ldexp(other, -other_exponent);
  return {static_cast<T>(ldexp(1.0, exponent)), static_cast<T>(ldexp(rest, whole - exponent))};
}

// |x| of a row x [d], computed by the 32 lanes of a warp.
template <typename T, typename In>
__device__ double row_norm(const In* x, int64_t d, bool vector) {
  const int lane = threadIdx.x % 32;
  T sum = 0;
#pragma unroll 2
  for (int64_t j = 4 * lane; j < d; j += 128) {
    T quad[4];
    load_quad(x + j, d - j, vector, quad);
    sum += quad[0] * quad[0] + quad[1] * quad[1] + (quad[2] * quad[2] + quad[3] * quad[3]);
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

}  // namespace vne
