// The emulation's only device.

#pragma once

#include <cuda_runtime.h>

#include "emulation/emulator.h"
#include "emulation/tensor.h"

namespace vne {

struct Context {
  explicit Context(const Tensor&) {}
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  cudaStream_t stream = nullptr;
  int device = 0;
  int multiprocessors = emulation::settings().multiprocessors;
};

}  // namespace vne
