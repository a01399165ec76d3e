// The eigenvalues of rho and their gradient.

#include "ops/spectrum.h"

#include <algorithm>

#include "cpu/policy.h"
#include "cpu/stages.h"

namespace vne {
namespace {

// `eigenvectors`, if not null, [m, m], row-major, in the order of `eigenvalues` [m].
template <typename T>
void spectrum_of_sample(const Problem& problem, const Rows<T>& rows, T* eigenvalues,
                        T* eigenvectors) {
  const int64_t m = problem.m();
  if (!rows.has_matrix()) {
    fill(eigenvalues, m, rows.without_matrix());
    fill(eigenvectors, m * m, rows.without_matrix());
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
  const MatrixView<T> v = eigen.view_vectors<T>();
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t k = 0; k < m; ++k)
      eigenvectors[i * m + k] = v.data[i * v.row_stride + (m - 1 - k) * v.col_stride];
  }
}

}  // namespace

template <typename T>
void compute_spectrum(const Batch<T>& batch, T* eigenvalues, T* eigenvectors) {
  const int64_t m = batch.problem.m();
  // Eigenvectors are LAPACK's.
  const Method method = eigenvectors ? Method::kEigh : Method::kPoles;
  for_each_sample(batch.problem, method, [&](int64_t sample) {
    spectrum_of_sample(batch.problem, normalize(batch, sample), eigenvalues + sample * m,
                       at(eigenvectors, sample * m * m));
  });
}

// d lambda_k = v_k^T dA v_k, so W = V diag(grad) V^T takes the place of -(log A + I).
template <typename T>
void compute_spectrum_backward(const Batch<T>& batch, const T* grad, const T* eigenvectors,
                               T* grad_z, T* grad_weights) {
  const Problem& problem = batch.problem;
  const int64_t m = problem.m();
  for_each_sample(problem, Method::kEigh, [&](int64_t sample) {
    T* sample_grad = grad_z + sample * problem.n * problem.d;
    T* sample_p_grad = at(grad_weights, sample * problem.n);
    const Rows<T> rows = normalize(batch, sample);
    if (fill_without_matrix(problem, rows, sample_grad, sample_p_grad)) return;
    Buffer<T> w(m * m);
    const MatrixView<T> vectors = row_major<T>(eigenvectors + sample * m * m, m);
    multiply<T>(m, m, m, vectors, transposed(vectors), w.get(), Result::kSymmetric,
                grad + sample * m);
    gradient<T>(problem, rows, w.get(), 2, 0, sample_grad, sample_p_grad);
  });
}

}  // namespace vne
