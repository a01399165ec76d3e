// NumPy in the place of cuBLAS, and torch on the CPU in the place of cuSOLVER.

#include "cuda/vendor.h"

#include <pybind11/numpy.h>

#include <algorithm>

namespace py = pybind11;

namespace vne {
namespace {

// A batch of matrices in memory that is not NumPy's.
template <typename T>
py::array_t<T> view(T* data, int64_t batch, int64_t rows, int64_t columns, int64_t row_stride,
                    int64_t batch_stride) {
  constexpr int64_t kItem = sizeof(T);
  return py::array_t<T>({batch, rows, columns}, {batch_stride * kItem, row_stride * kItem, kItem},
                        data, py::none());
}

// op(M) [batch, rows, columns], a copy: what a product is rounded to must not depend on where its
// operands lie.
template <typename T>
py::array_t<T> copy(GemmOperand<T> m, int64_t batch, int64_t rows, int64_t columns) {
  if (m.transposed) std::swap(rows, columns);
  py::object array =
      view(const_cast<T*>(m.data), batch, rows, columns, m.row_stride, m.batch_stride);
  if (m.transposed) array = array.attr("swapaxes")(1, 2);
  return py::array_t<T>(array.attr("copy")("C"));
}

void record(const char* name, const Context& context) {
  emulation::settings().launches.push_back({name, {0, 0, 0}, {0, 0, 0}, context.stream});
}

}  // namespace

template <typename T>
void gemm(const Context& context, int64_t m, int64_t n, int64_t k, T alpha, GemmOperand<T> a,
          GemmOperand<T> b, T beta, T* c, int64_t c_row_stride, int64_t c_batch_stride,
          int64_t batch) {
  if (m == 0 || n == 0 || batch == 0) return;
  record("gemm", context);
  const py::array_t<T> product =
      py::module_::import("numpy").attr("matmul")(copy(a, batch, m, k), copy(b, batch, k, n));
  const auto ab = product.template unchecked<3>();
  for (int64_t i = 0; i < batch; ++i) {
    for (int64_t row = 0; row < m; ++row) {
      T* c_row = c + i * c_batch_stride + row * c_row_stride;
      for (int64_t column = 0; column < n; ++column) {
        const T old = beta == 0 ? T(0) : beta * c_row[column];
        c_row[column] = alpha * ab(i, row, column) + old;
      }
    }
  }
}

template <typename T>
void symmetric_eigen(const Context& context, const Tensor&, T* a, T* values, int64_t batch,
                     int64_t m) {
  if (batch == 0) return;
  record("symmetric_eigen", context);
  // LAPACK's ?syevd in T: the algorithm of cusolverDnXsyevd. NumPy's eigh computes in float64.
  const py::module_ torch = py::module_::import("torch");
  const py::object matrices = torch.attr("from_numpy")(py::array_t<T>({batch, m, m}, a));
  const py::tuple eigen = torch.attr("linalg").attr("eigh")(matrices);
  const py::array_t<T> value_array = eigen[0].attr("numpy")();
  const py::array_t<T> vector_array = eigen[1].attr("numpy")();
  const auto eigenvalues = value_array.template unchecked<2>();
  const auto eigenvectors = vector_array.template unchecked<3>();
  for (int64_t i = 0; i < batch; ++i) {
    for (int64_t k = 0; k < m; ++k) {
      values[i * m + k] = eigenvalues(i, k);
      for (int64_t j = 0; j < m; ++j) a[(i * m + k) * m + j] = eigenvectors(i, j, k);
    }
  }
}

#define VNE_INSTANTIATE(T)                                                                         \
  template void gemm(const Context&, int64_t, int64_t, int64_t, T, GemmOperand<T>, GemmOperand<T>, \
                     T, T*, int64_t, int64_t, int64_t);                                            \
  template void symmetric_eigen(const Context&, const Tensor&, T*, T*, int64_t, int64_t);
VNE_INSTANTIATE(float)
VNE_INSTANTIATE(double)

}  // namespace vne
