// The eigenvalues of rho and their gradient: the operators spectrum, spectrum_eigh,
// spectrum_backward.

#include <algorithm>
#include <limits>

#include "cpu/stages.h"

namespace vne {
namespace {

// `eigenvectors`, if not null, [m, m], row-major, in the order of `eigenvalues` [m].
template <typename T>
void spectrum_of_sample(const Problem& problem, const Rows<T>& rows, T* eigenvalues,
                        T* eigenvectors) {
  const int64_t m = problem.m();
  if (!rows.valid || rows.empty()) {
    const double value = rows.valid ? 0 : std::numeric_limits<double>::quiet_NaN();
    fill(eigenvalues, m, value);
    if (eigenvectors) fill(eigenvectors, m * m, value);
    return;
  }
  Buffer<T> a(m * m);
  gram(problem, rows, a.get());
  const auto write_values = [&](const T* ascending) {
    for (int64_t k = 0; k < m; ++k)
      eigenvalues[k] = static_cast<T>(rows.trace * std::max<double>(ascending[m - 1 - k], 0));
  };
  if (!eigenvectors) {
    Buffer<T> ascending(m);
    vne::eigenvalues(a.get(), m, ascending.get());
    return write_values(ascending.get());
  }
  const Eigen eigen = eigh(a.get(), m);
  write_values(static_cast<const T*>(eigen.values.const_data_ptr()));
  const T* columns = static_cast<const T*>(eigen.vectors.const_data_ptr());
  const int64_t row_stride = eigen.vectors.stride(0), col_stride = eigen.vectors.stride(1);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t k = 0; k < m; ++k) {
      eigenvectors[i * m + k] = columns[i * row_stride + (m - 1 - k) * col_stride];
    }
  }
}

std::tuple<Tensor, Tensor> compute(const Tensor& z, const std::optional<Tensor>& weights,
                                   bool normalize, double eps, bool want_vectors) {
  const Problem problem = make_problem(z, weights, normalize, eps);
  const int64_t m = problem.m();
  const ScalarType dtype = compute_dtype(z.scalar_type());
  const Tensor eigenvalues = empty(z, problem.sizes({m}), dtype);
  const Tensor eigenvectors =
      empty(z, want_vectors ? problem.sizes({m, m}) : std::vector<int64_t>{0}, dtype);
  const Input input(z, problem);
  const std::optional<Tensor> p = contiguous(weights);
  dispatch_compute(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* values = static_cast<T*>(eigenvalues.mutable_data_ptr());
    T* vectors = want_vectors ? static_cast<T*>(eigenvectors.mutable_data_ptr()) : nullptr;
    const T* p_data = data_or_null<T>(p);
    // Eigenvectors are LAPACK's.
    const Method method = want_vectors ? Method::kEigh : Method::kPoles;
    for_each_sample(problem, method, [&](int64_t sample) {
      const Rows<T> rows =
          vne::normalize<T>(problem, input, sample, p_data ? p_data + sample * problem.n : nullptr);
      spectrum_of_sample(problem, rows, values + sample * m,
                         vectors ? vectors + sample * m * m : nullptr);
    });
  });
  return {eigenvalues, eigenvectors};
}

Tensor spectrum(const Tensor& z, const std::optional<Tensor>& weights, bool normalize, double eps) {
  return std::get<0>(compute(z, weights, normalize, eps, false));
}

std::tuple<Tensor, Tensor> spectrum_eigh(const Tensor& z, const std::optional<Tensor>& weights,
                                         bool normalize, double eps) {
  return compute(z, weights, normalize, eps, true);
}

// d lambda_k = v_k^T dA v_k, so W = V diag(grad) V^T takes the place of -(log A + I).
std::tuple<Tensor, Tensor> spectrum_backward(const Tensor& grad, const Tensor& z,
                                             const Tensor& eigenvectors,
                                             const std::optional<Tensor>& weights, bool normalize,
                                             double eps) {
  const Problem problem = make_problem(z, weights, normalize, eps);
  const int64_t m = problem.m();
  const ScalarType dtype = compute_dtype(z.scalar_type());
  check_spectrum_gradient(problem, dtype, grad, eigenvectors);
  const Tensor grad_z = empty(z, problem.sizes({problem.n, problem.d}), dtype);
  const Tensor grad_weights =
      empty(z, weights ? problem.sizes({problem.n}) : std::vector<int64_t>{0}, dtype);
  const Input input(z, problem);
  const std::optional<Tensor> p = contiguous(weights);
  const Tensor g = torch::stable::contiguous(grad), v = torch::stable::contiguous(eigenvectors);
  dispatch_compute(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* g_data = static_cast<const T*>(g.const_data_ptr());
    const T* v_data = static_cast<const T*>(v.const_data_ptr());
    const T* p_data = data_or_null<T>(p);
    T* z_grads = static_cast<T*>(grad_z.mutable_data_ptr());
    T* p_grads = static_cast<T*>(grad_weights.mutable_data_ptr());
    for_each_sample(problem, Method::kEigh, [&](int64_t sample) {
      T* sample_grad = z_grads + sample * problem.n * problem.d;
      T* sample_p_grad = p_data ? p_grads + sample * problem.n : nullptr;
      const Rows<T> rows =
          vne::normalize<T>(problem, input, sample, p_data ? p_data + sample * problem.n : nullptr);
      if (!rows.valid || rows.empty()) {
        const double value = rows.valid ? 0 : std::numeric_limits<double>::quiet_NaN();
        fill(sample_grad, problem.n * problem.d, value);
        if (sample_p_grad) fill(sample_p_grad, problem.n, value);
        return;
      }
      Buffer<T> w(m * m);
      const MatrixView<T> vectors = row_major<T>(v_data + sample * m * m, m);
      multiply<T>(m, m, m, vectors, g_data + sample * m, transposed(vectors), w.get(),
                  Result::kSymmetric);
      gradient<T>(problem, rows, w.get(), 2, 0, sample_grad, sample_p_grad);
    });
  });
  return {grad_z, grad_weights};
}

}  // namespace
}  // namespace vne

STABLE_TORCH_LIBRARY_IMPL(vne_kernels, CPU, library) {
  library.impl("spectrum", TORCH_BOX(&vne::spectrum));
  library.impl("spectrum_eigh", TORCH_BOX(&vne::spectrum_eigh));
  library.impl("spectrum_backward", TORCH_BOX(&vne::spectrum_backward));
}
