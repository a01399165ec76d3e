// What a backend is asked for: sizes, smaller side, method, and where the data is.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "common/stable.h"

namespace vne {

enum class Method { kEigh, kPoles };

// "auto" is a decision of the backend: `fallback` is what it takes.
inline Method parse_method(const std::string& name, Method fallback) {
  if (name == "auto") return fallback;
  if (name == "eigh") return Method::kEigh;
  VNE_CHECK(name == "poles", "method must be 'auto', 'poles' or 'eigh', got '", name, "'");
  return Method::kPoles;
}

// A batch of samples z (..., n, d), or of matrices.
struct Problem {
  std::vector<int64_t> batch_sizes;
  int64_t batch = 1;
  int64_t n = 0;
  int64_t d = 0;
  bool normalize = true;
  double eps = 0;
  bool smaller_side = true;  // equation (2); otherwise the d side, whatever n is
  bool of_matrices = false;  // z is rho itself, (..., m, m)

  int64_t m() const { return gram_side() ? n : d; }
  bool gram_side() const { return smaller_side && n <= d; }  // A is n x n; otherwise rho, d x d
  std::vector<int64_t> sizes(std::initializer_list<int64_t> tail) const {
    std::vector<int64_t> result = batch_sizes;
    result.insert(result.end(), tail);
    return result;
  }
};

// Half precisions are computed, and their results returned, in float32.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A contiguous z, (batch, n, d), in the dtype it came in.
struct Input {
  explicit Input(const Tensor& z)
      : tensor(as_contiguous(z)), data(tensor.const_data_ptr()), dtype(tensor.scalar_type()) {}
  bool is_half() const { return dtype == ScalarType::Half || dtype == ScalarType::BFloat16; }

  Tensor tensor;
  const void* data;
  ScalarType dtype;
};

// What the backends compute on, in T = float or double.
template <typename T>
struct Batch {
  const Problem& problem;
  const Input& z;
  const T* weights;  // [batch, n]; null: 1/n each

  // The data of a contiguous tensor in T; null for one of (0,), which is not wanted.
  static const T* in(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
  }
  static T* out(const Tensor& tensor) {
    return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.mutable_data_ptr());
  }
};

// log A of a flat spectrum is -log m I: with this added it is 0, and little is left to cancel.
inline double centering_shift(int64_t m) { return std::log(static_cast<double>(m)); }

// What the backward of the DoE loss needs of row i. With u = inverse_norm z,
//   d cos_i / d z1 = inverse_norm_1 (u2 - projection_1 u1), and the same with 1 and 2 exchanged;
// projection is cos_i, or 0 for a row shorter than eps, which is divided by a constant.
enum RowStat { kInverseNorm1, kInverseNorm2, kProjection1, kProjection2, kRowStats };

}  // namespace vne
