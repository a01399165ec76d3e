// torch on the CPU in the place of cuBLAS and cuSOLVER.

#include "cuda/vendor.h"

#include <utility>

namespace vne {
namespace {

// A batch of matrices in memory that is not torch's.
template <typename T>
Tensor view(const T* data, int64_t batch, int64_t rows, int64_t columns, int64_t row_stride,
            int64_t batch_stride) {
  return torch::stable::from_blob(const_cast<T*>(data), {batch, rows, columns},
                                  {batch_stride, row_stride, 1}, torch::headeronly::DeviceType::CPU,
                                  sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
}

// op(M) [batch, rows, columns], a copy: what a product is rounded to must not depend on where its
// operands lie.
template <typename T>
Tensor copy(GemmOperand<T> m, int64_t batch, int64_t rows, int64_t columns) {
  if (m.transposed) std::swap(rows, columns);
  const Tensor result =
      torch::stable::clone(view(m.data, batch, rows, columns, m.row_stride, m.batch_stride));
  return m.transposed ? torch::stable::transpose(result, 1, 2) : result;
}

}  // namespace

template <typename T>
void gemm(const Context&, int64_t m, int64_t n, int64_t k, T alpha, GemmOperand<T> a,
          GemmOperand<T> b, T beta, T* c, int64_t c_row_stride, int64_t c_batch_stride,
          int64_t batch) {
  if (m == 0 || n == 0 || batch == 0) return;
  emulation::settings().launches.push_back("gemm");
  const Tensor product = torch::stable::matmul(copy(a, batch, m, k), copy(b, batch, k, n));
  const T* ab = static_cast<const T*>(product.const_data_ptr());
  for (int64_t i = 0; i < batch; ++i) {
    for (int64_t row = 0; row < m; ++row) {
      T* c_row = c + i * c_batch_stride + row * c_row_stride;
      for (int64_t column = 0; column < n; ++column) {
        const T old = beta == 0 ? T(0) : beta * c_row[column];
        c_row[column] = alpha * *ab++ + old;
      }
    }
  }
}

// torch calls LAPACK's ?syevd in T: the algorithm of cusolverDnXsyevd.
template <typename T>
void symmetric_eigen(const Context&, const Tensor&, T* a, T* values, int64_t batch, int64_t m) {
  if (batch == 0) return;
  emulation::settings().launches.push_back("symmetric_eigen");
  Tensor matrices = view(a, batch, m, m, m, m * m), rows = view(values, 1, batch, m, m, 0);
  const auto [eigenvalues, eigenvectors] = linalg_eigh(matrices);
  torch::stable::copy_(rows, eigenvalues);
  torch::stable::copy_(matrices, torch::stable::transpose(eigenvectors, 1, 2));
}

#define VNE_INSTANTIATE(T)                                                                         \
  template void gemm(const Context&, int64_t, int64_t, int64_t, T, GemmOperand<T>, GemmOperand<T>, \
                     T, T*, int64_t, int64_t, int64_t);                                            \
  template void symmetric_eigen(const Context&, const Tensor&, T*, T*, int64_t, int64_t);
VNE_INSTANTIATE(float)
VNE_INSTANTIATE(double)

}  // namespace vne
