// The eigendecomposition, by LAPACK's syevd behind torch's dispatcher, and functions of a matrix by
// it.

#include "cpu/stages.h"

namespace vne {

template <typename T>
Eigen eigh(const T* a, int64_t m, bool vectors) {
  const ScalarType dtype = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  // The dispatcher copies its input before LAPACK overwrites it: `a` is only read.
  const Tensor matrix = torch::stable::from_blob(const_cast<T*>(a), {m, m}, {m, 1}, cpu, dtype);
  auto [values, eigenvectors] = linalg_eigh(matrix, vectors);
  return {torch::stable::contiguous(values), eigenvectors};
}

template <typename T>
void spectral_function(const Eigen& eigen, const T* f, int64_t m, T* result) {
  const MatrixView<T> v = {static_cast<const T*>(eigen.vectors.const_data_ptr()),
                           eigen.vectors.stride(0), eigen.vectors.stride(1)};
  multiply<T>(m, m, m, v, f, transposed(v), result, Result::kSymmetric);
}

template Eigen eigh(const float*, int64_t, bool);
template Eigen eigh(const double*, int64_t, bool);
template void spectral_function(const Eigen&, const float*, int64_t, float*);
template void spectral_function(const Eigen&, const double*, int64_t, double*);

}  // namespace vne
