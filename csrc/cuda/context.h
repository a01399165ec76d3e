// Where an operator runs: the device of its tensors, torch's current stream there, the device's
// size. The emulation is one device.
//
// libtorch's headers declare what is CUDA's only with -DUSE_CUDA, which CMakeLists.txt sets.

#pragma once

#ifdef VNE_EMULATION
#include "common/stable.h"
#include "emulation/emulator.h"

namespace vne {

struct Context {
  explicit Context(const Tensor&) {}
  cudaStream_t stream = nullptr;
  int multiprocessors = emulation::settings().multiprocessors;
};

}  // namespace vne
#else

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "common/stable.h"

namespace vne {

// Constant as long as the process lives, and asked for without creating a CUDA context.
inline int multiprocessor_count(int device) {
  static const std::vector<int> counts = [] {
    int devices = 0;
    cudaError_t error = cudaGetDeviceCount(&devices);
    std::vector<int> result(devices);
    for (int i = 0; i < devices && error == cudaSuccess; ++i) {
      error = cudaDeviceGetAttribute(&result[i], cudaDevAttrMultiProcessorCount, i);
    }
    VNE_CHECK(error == cudaSuccess, "the GPUs cannot be counted: ", cudaGetErrorString(error));
    return result;
  }();
  return counts.at(device);
}

// Makes the device of `z` the current one while it lives.
struct Context {
  explicit Context(const Tensor& z)
      : device(z.get_device_index()), multiprocessors(multiprocessor_count(device)), guard(device) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  cudaStream_t stream = nullptr;
  int device;
  int multiprocessors;

 private:
  torch::stable::accelerator::DeviceGuard guard;
};

}  // namespace vne

#endif  // VNE_EMULATION
