// The eigendecomposition, by LAPACK's syevd behind torch's dispatcher, and functions of a matrix by
// it.

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

}  // namespace

template <typename T>
Eigen eigh(const T* a, int64_t m, bool vectors) {
  auto [values, eigenvectors] = linalg_eigh(view(a, {m, m}, {m, 1}), vectors);
  return {torch::stable::contiguous(values), eigenvectors};
}

template <typename T>
Tensor eigenvalues(const T* a, int64_t count, int64_t m) {
  const Tensor matrices = view(a, {count, m, m}, {m * m, m, 1});
  return torch::stable::contiguous(std::get<0>(linalg_eigh(matrices, false)));
}

template <typename T>
void spectral_function(const Eigen& eigen, const T* f, int64_t m, T* result) {
  const MatrixView<T> v = {static_cast<const T*>(eigen.vectors.const_data_ptr()),
                           eigen.vectors.stride(0), eigen.vectors.stride(1)};
  multiply<T>(m, m, m, v, f, transposed(v), result, Result::kSymmetric);
}

template Eigen eigh(const float*, int64_t, bool);
template Eigen eigh(const double*, int64_t, bool);
template Tensor eigenvalues(const float*, int64_t, int64_t);
template Tensor eigenvalues(const double*, int64_t, int64_t);
template void spectral_function(const Eigen&, const float*, int64_t, float*);
template void spectral_function(const Eigen&, const double*, int64_t, double*);

}  // namespace vne
