// What the CUDA module was compiled with: the CUDA release and the GPU architectures.
// The operator exists where this module is loaded.

#include <torch/csrc/stable/library.h>

#include <string>

namespace {

// "CUDA <release of nvcc>, sm: <CMAKE_CUDA_ARCHITECTURES>"
std::string cuda_build_info() { return "CUDA " VNE_CUDA_VERSION ", sm: " VNE_CUDA_ARCHITECTURES; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vne_kernels, m) { m.def("cuda_build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(vne_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&cuda_build_info));
}
