// The corner of libtorch's stable ABI that this package uses, and every quirk of it, in one place.
//
// * Errors raised here become RuntimeError in Python, whatever their type: arguments of the public
//   functions are validated in Python, and VNE_CHECK guards only against misuse of the raw
//   operators.
// * There is no wrapper for linear algebra; linalg_eigh calls the dispatcher by name.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#define VNE_CHECK(condition, ...)                                                                 \
  if (!(condition)) {                                                                             \
    throw std::runtime_error(torch::headeronly::detail::stdTorchCheckMsgImpl("", ##__VA_ARGS__)); \
  }

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.10 has only this one
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace vne {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Eigenvalues (ascending) of the symmetric a [m, m] and, if wanted, its eigenvectors as columns.
inline std::tuple<Tensor, Tensor> linalg_eigh(const Tensor& a) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a),
                                    torch::stable::detail::from(std::string("L")),
                                    torch::stable::detail::from(true)};  // with the eigenvectors
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::_linalg_eigh", "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// torch::stable::contiguous looks for the operator by its name, which costs a microsecond.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Uninitialized, on the device of `like`; NaN in the emulation of CUDA.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor result = torch::stable::new_empty(like, sizes, dtype);
#ifdef VNE_EMULATION
  char* data = static_cast<char*>(result.mutable_data_ptr());
  std::fill_n(data, result.numel() * result.element_size(), '\xff');
#endif
  return result;
}

}  // namespace vne
