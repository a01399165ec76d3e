// rho of a part of a batch, and the gradient of its rows.

#include "ops/density.h"

#include "cpu/policy.h"
#include "cpu/stages.h"

namespace vne {

template <typename T>
void compute_density(const Batch<T>& batch, T* matrices) {
  const Problem& problem = batch.problem;
  const int64_t size = problem.d * problem.d;
  for_each_sample(problem, Method::kPoles, [&](int64_t sample) {
    T* rho = matrices + sample * size;
    const Rows<T> rows = normalize(batch, sample);
    if (!rows.has_matrix()) return fill(rho, size, rows.without_matrix());
    gram(problem, rows, rho);
    for (int64_t i = 0; i < size; ++i) rho[i] = static_cast<T>(rows.trace * rho[i]);
  });
}

template <typename T>
void compute_density_backward(const Batch<T>& batch, const T* grad_rho, T* grad_z,
                              T* grad_weights) {
  const Problem& problem = batch.problem;
  const int64_t n = problem.n, d = problem.d;
  for_each_sample(problem, Method::kPoles, [&](int64_t sample) {
    T* sample_grad = grad_z + sample * n * d;
    T* sample_p_grad = at(grad_weights, sample * n);
    Rows<T> rows = normalize(batch, sample);
    Buffer<T> w(d * d);
    // A gradient that is not finite comes from the part of another process that is not.
    if (!add_transpose(grad_rho + sample * d * d, d, 2, w.get())) rows.valid = false;
    if (fill_without_matrix(problem, rows, sample_grad, sample_p_grad)) return;
    gradient<T>(problem, rows, w.get(), 2, 0, sample_grad, sample_p_grad);
  });
}

}  // namespace vne
