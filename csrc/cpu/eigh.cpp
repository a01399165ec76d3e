// The eigendecomposition, by LAPACK's syevd behind torch's dispatcher, and functions of a matrix by
// it.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/stages.h"

namespace vne {
namespace {

// The dispatcher copies its input before LAPACK overwrites it: `a` is only read.
template <typename T>
Tensor view(const T* a, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  const ScalarType dtype = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(const_cast<T*>(a), sizes, strides, cpu, dtype);
}

template <typename T>
bool all_finite(const Tensor& square) {
  const T* data = static_cast<const T*>(square.const_data_ptr());
  const int64_t m = square.size(0);
  return std::all_of(data, data + m * m, [](T entry) { return std::isfinite(entry); });
}

// By double, in the place of what float gave.
Eigen eigh_in_double(const float* a, int64_t m) {
  Buffer<double> wide(m * m);
  std::copy_n(a, m * m, wide.get());
  const Eigen eigen = eigh(wide.get(), m);
  const Eigen result = {empty(eigen.values, {m}, ScalarType::Float),
                        empty(eigen.vectors, {m, m}, ScalarType::Float)};
  const double* values = static_cast<const double*>(eigen.values.const_data_ptr());
  const double* vectors = static_cast<const double*>(eigen.vectors.const_data_ptr());
  float* to = static_cast<float*>(result.vectors.mutable_data_ptr());
  std::copy_n(values, m, static_cast<float*>(result.values.mutable_data_ptr()));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t k = 0; k < m; ++k) {
      to[i * m + k] =
          static_cast<float>(vectors[i * eigen.vectors.stride(0) + k * eigen.vectors.stride(1)]);
    }
  }
  return result;
}

}  // namespace

// MKL's ssyevd gives NaN for eigenvectors of some matrices of rank one, and says nothing.
template <typename T>
Eigen eigh(const T* a, int64_t m) {
  auto [values, eigenvectors] = linalg_eigh(view(a, {m, m}, {m, 1}));
  if constexpr (std::is_same_v<T, float>) {
    if (!all_finite<float>(eigenvectors)) return eigh_in_double(a, m);
  }
  return {torch::stable::contiguous(values), eigenvectors};
}

template <typename T>
void spectral_function(const Eigen& eigen, const T* f, int64_t m, T* result) {
  const MatrixView<T> v = {static_cast<const T*>(eigen.vectors.const_data_ptr()),
                           eigen.vectors.stride(0), eigen.vectors.stride(1)};
  multiply<T>(m, m, m, v, f, transposed(v), result, Result::kSymmetric);
}

template Eigen eigh(const float*, int64_t);
template Eigen eigh(const double*, int64_t);
template void spectral_function(const Eigen&, const float*, int64_t, float*);
template void spectral_function(const Eigen&, const double*, int64_t, double*);

}  // namespace vne
