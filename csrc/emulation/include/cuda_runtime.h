// Stand-in for CUDA's header of the same name: the part of it that the kernels use, as C++.
//
// A CUDA thread is a fibre (emulation/emulator.cpp). A function that makes threads meet takes the
// place of its call, which all threads that meet have to share.

#pragma once

#include <math.h>

#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

using cudaStream_t = struct CUstream_st*;

// ---- the running thread ------------------------------------------------------------------------

struct Index {
  unsigned x;  // all launches are one-dimensional
};
extern Index threadIdx, blockIdx, blockDim;

// ---- meeting -----------------------------------------------------------------------------------

namespace vne::emulation {

struct Site {
  const char* function;
  const char* file;
  int line;
  bool operator==(const Site&) const = default;
};

void meet_block(Site site);
bool meet_block_or(Site site, bool predicate);
// The bits that lane `source` of the warp brought, whatever `source` that lane asked for.
uint64_t exchange(Site site, unsigned mask, uint64_t bits, int source);

template <typename T>
T shuffle(Site site, unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(site, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace vne::emulation

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  vne::emulation::meet_block({"__syncthreads", file, line});
}

inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(),
                            int line = __builtin_LINE()) {
  return vne::emulation::meet_block_or({"__syncthreads_or", file, line}, predicate != 0);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  return vne::emulation::shuffle({"__shfl_sync", file, line}, mask, value, source & 31);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  return vne::emulation::shuffle({"__shfl_xor_sync", file, line}, mask, value,
                                 static_cast<int>(threadIdx.x ^ lane_mask) & 31);
}

// ---- arithmetic --------------------------------------------------------------------------------

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

template <std::integral T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <std::integral T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
