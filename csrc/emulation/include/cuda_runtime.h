// Stand-in for CUDA's header of the same name: the part of it that the kernels use, as C++.
//
// A CUDA thread is a fibre (emulation/emulator.cpp). A function that makes threads meet takes the
// place of its call, which all threads that meet have to share.

#pragma once

#include <math.h>

#include <algorithm>
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

// ---- types -------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(16) double2 {
  double x, y;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

// ---- the running thread ------------------------------------------------------------------------

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

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
void meet_warp(Site site, unsigned mask);
// The 64 bits that lane `source` of the warp brought, whatever `source` that lane asked for.
// The values of all 32 lanes; they stay until the lanes have met once more.
const uint64_t* exchange(Site site, unsigned mask, uint64_t bits);
int lane();

template <typename T>
T shuffle(Site site, unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(site, mask, bits)[source];
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

inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  vne::emulation::meet_warp({"__syncwarp", file, line}, mask);
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
                                 (vne::emulation::lane() ^ lane_mask) & 31);
}

// Beyond the last lane, a thread keeps its own value.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const unsigned lane = static_cast<unsigned>(vne::emulation::lane());
  return vne::emulation::shuffle({"__shfl_down_sync", file, line}, mask, value,
                                 static_cast<int>(lane + delta < 32 ? lane + delta : lane));
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value,
                                  const char* file = __builtin_FILE(),
                                  int line = __builtin_LINE()) {
  const uint64_t* values = vne::emulation::exchange({"__reduce_max_sync", file, line}, mask, value);
  return static_cast<unsigned>(*std::max_element(values, values + 32));
}

// Blocks run one after another, and a write is seen by whoever runs next.
inline void __threadfence() {}

// ---- arithmetic --------------------------------------------------------------------------------

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }

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
