// Kernels right and wrong, for python_tests/test_emulation.py: what the emulator has to find.

#include "cuda/context.h"
#include "cuda/load.h"

namespace vne {
namespace {

constexpr int kThreads = 128;
using Values = float[kThreads];
using Scratch = float[32];

// Every thread takes its value from its neighbour's place.
template <bool with_barrier>
__global__ void rotate(const float* input, float* output) {
  VNE_SHARED(Values, values);
  const unsigned i = threadIdx.x, block = blockIdx.x * kThreads;
  values[i] = input[block + i];
  if constexpr (with_barrier) __syncthreads();
  output[block + i] = values[(i + 1) % kThreads];
}

// Blocks that depend on each other.
__global__ void add_previous_block(const float* input, float* output) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  output[i] = input[i] + (i >= kThreads ? output[i - kThreads] : 0);
}

__global__ void beyond_shared(const float* input, float* output, int distance) {
  VNE_SHARED(Values, values);
  const unsigned i = threadIdx.x;
  values[i] = input[i];
  __syncthreads();
  const float* first = values;
  output[i] = first[i + distance];
}

__global__ void beyond_global(const float* input, float* output, int distance) {
  output[threadIdx.x] = input[threadIdx.x + distance];
}

__global__ void misaligned(const float* input, float* output) {
  output[threadIdx.x] = read_quad(input + 1).v[0];
}

// Nothing was written to shared memory: every block reads NaN, not what the last one left.
__global__ void leftovers(const float* input, float* output) {
  VNE_SHARED(Values, values);
  const unsigned i = threadIdx.x, block = blockIdx.x * kThreads;
  output[block + i] = values[i];
  __syncthreads();
  values[i] = input[block + i];
}

__global__ void divergent_return(const float* input, float* output) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  output[threadIdx.x] = input[threadIdx.x];
}

__global__ void divergent_branch(const float* input, float* output) {
  if (threadIdx.x < 32) {
    __syncthreads();
    output[threadIdx.x] = input[threadIdx.x];
  } else {
    __syncthreads();
  }
}

__global__ void divergent_shuffle(const float* input, float* output) {
  const unsigned i = threadIdx.x;
  if (i % 32 == 31) return;
  output[i] = __shfl_sync(kFullMask, input[i], 31);
}

__global__ void partial_mask(const float* input, float* output) {
  const unsigned i = threadIdx.x;
  output[i] = __shfl_sync(0xffffu, input[i], 0);
}

__global__ void too_much_shared(const float* input, float* output) {
  using Large = float[8 << 10];
  VNE_SHARED(Large, first);
  VNE_SHARED(Large, second);
  first[threadIdx.x] = second[threadIdx.x] = input[threadIdx.x];
  output[threadIdx.x] = first[threadIdx.x];
}

// Everything that exchanges values, by one block: rows of the output [7, threads].
__global__ void exchanges(const float* input, float* output) {
  VNE_SHARED(Scratch, scratch);
  const unsigned i = threadIdx.x;
  const float x = input[i];
  const float results[7] = {
      __shfl_sync(kFullMask, x, 3),
      __shfl_xor_sync(kFullMask, x, 5),
      warp_sum(x),
      warp_max(x),
      static_cast<float>(warp_max(static_cast<unsigned>(x))),
      block_sum(x, scratch),
      __syncthreads_or(x == 77) ? 1.0f : 0.0f,
  };
  for (int row = 0; row < 7; ++row) output[row * kThreads + i] = results[row];
}

__global__ void halves(const __half* input, float* output) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  output[i] = __half2float(input[i]);
}

// Runs `kernel` over blocks of kThreads; the output is NaN where it writes nothing.
template <typename T, typename... Parameters, typename... Arguments>
Tensor run(const char* name, void (*kernel)(const T*, float*, Parameters...), const Tensor& input,
           int64_t rows, Arguments... arguments) {
  const Context context(input);
  const Tensor output = empty(input, {rows * input.size(0)}, ScalarType::Float);
  launch(name, kernel, grid_for(input.size(0), kThreads), kThreads, context.stream,
         static_cast<const T*>(input.const_data_ptr()),
         static_cast<float*>(output.mutable_data_ptr()), arguments...);
  return output;
}

Tensor run_halves(const Tensor& input) { return run("halves", halves, input, 1); }
Tensor run_exchanges(const Tensor& input) { return run("exchanges", exchanges, input, 7); }

template <void (*kernel)(const float*, float*)>
Tensor run_plain(const Tensor& input) {
  return run("faulty", kernel, input, 1);
}

template <void (*kernel)(const float*, float*, int)>
Tensor run_beyond(const Tensor& input, double distance) {
  return run("faulty", kernel, input, 1, distance);
}

// An operator of the module.
#define VNE_FAULT(name, arguments, function)            \
  STABLE_TORCH_LIBRARY_FRAGMENT(VNE_LIBRARY, library) { \
    library.def(name arguments " -> Tensor");           \
  }                                                     \
  STABLE_TORCH_LIBRARY_IMPL(VNE_LIBRARY, CPU, library) { library.impl(name, TORCH_BOX(&function)); }
VNE_FAULT("rotate", "(Tensor input)", run_plain<rotate<true>>)
VNE_FAULT("rotate_without_barrier", "(Tensor input)", run_plain<rotate<false>>)
VNE_FAULT("add_previous_block", "(Tensor input)", run_plain<add_previous_block>)
VNE_FAULT("beyond_shared", "(Tensor input, float distance)", run_beyond<beyond_shared>)
VNE_FAULT("beyond_global", "(Tensor input, float distance)", run_beyond<beyond_global>)
VNE_FAULT("misaligned", "(Tensor input)", run_plain<misaligned>)
VNE_FAULT("leftovers", "(Tensor input)", run_plain<leftovers>)
VNE_FAULT("divergent_return", "(Tensor input)", run_plain<divergent_return>)
VNE_FAULT("divergent_branch", "(Tensor input)", run_plain<divergent_branch>)
VNE_FAULT("divergent_shuffle", "(Tensor input)", run_plain<divergent_shuffle>)
VNE_FAULT("partial_mask", "(Tensor input)", run_plain<partial_mask>)
VNE_FAULT("too_much_shared", "(Tensor input)", run_plain<too_much_shared>)
VNE_FAULT("exchanges", "(Tensor input)", run_exchanges)
VNE_FAULT("halves", "(Tensor input)", run_halves)

}  // namespace
}  // namespace vne
