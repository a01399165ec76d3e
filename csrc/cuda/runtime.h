// What a kernel needs of CUDA beyond its language: launching, shared memory, sums over threads.
//
// A source that includes only this compiles twice: by nvcc, and as plain C++ against the stand-in
// for the runtime in csrc/emulation, where every CUDA thread is a fibre.

#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/stable.h"

#ifdef VNE_EMULATION
#include <tuple>

#include "emulation/emulator.h"
#endif

// Static shared memory: VNE_SHARED(Type, name) or VNE_SHARED_ARRAY(Type, name, size) for a trivial
// type.
#ifdef VNE_EMULATION
#define VNE_SHARED(Type, name)     \
  static const char name##_site{}; \
  Type& name = *vne::emulation::shared<Type>(&name##_site)
#else
#define VNE_SHARED(Type, name) __shared__ Type name
#endif
#define VNE_SHARED_ARRAY(Type, name, size) \
  using name##_array = Type[size];         \
  VNE_SHARED(name##_array, name)

namespace vne {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarpSize = 32;

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

constexpr int kThreads = 256;  // of a block, where a kernel does not say otherwise
constexpr int kWarps = kThreads / kWarpSize;

// The blocks for `count` threads, or for `count` of whatever a block has `per_block` of.
__host__ __device__ constexpr int64_t grid_for(int64_t count, int per_block = kThreads) {
  return ceil_div<int64_t>(count, per_block);
}

// Runs kernel<<<blocks, threads, 0, stream>>>(arguments...), the arguments converted to the
// kernel's parameters. No blocks launch nothing.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            [[maybe_unused]] cudaStream_t stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  if (blocks == 0) return;
#ifdef VNE_EMULATION
  const std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
  emulation::launch(name, blocks, threads, [&] { std::apply(kernel, parameters); });
#else
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.stream = stream;
  const cudaError_t error =
      cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  VNE_CHECK(error == cudaSuccess, "CUDA kernel ", name, ": ", cudaGetErrorString(error));
#endif
}

// ---- over the 32 lanes of a warp, the result in all of them ----------------------------------
// Partners add the same two numbers, so that all lanes hold the same bits.

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

// As fmax, it takes the other argument for a NaN.
template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  return value;
}

__device__ __forceinline__ unsigned warp_max(unsigned value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kFullMask, value);
#else
  return warp_max<unsigned>(value);
#endif
}

// ---- over a one-dimensional block of whole warps, the result in all threads ------------------

// `scratch` [32] is shared memory; nothing may be in it that another thread still reads.
template <typename T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  const unsigned lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = warp_sum(value);
  __syncthreads();  // the previous sum has been read from scratch
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_sum(lane < blockDim.x / kWarpSize ? scratch[lane] : T(0));
}

}  // namespace vne
