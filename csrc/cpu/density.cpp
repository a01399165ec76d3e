// The stages of an entropy whose batch is spread over processes, equation (12): the operators
// density, density_backward, density_entropy, density_entropy_grad.
//
// Parts of a batch have the d side in common: each process computes its part of rho, the sum of the
// parts is rho of the whole, and from dS/drho each takes the gradient of its own rows.

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/stages.h"

namespace vne {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// to [m, m] <- (from + from^T) / divisor. A sum over processes is symmetric only but for rounding:
// they add different entries in different orders. Whether all entries are finite.
template <typename T>
bool add_transpose(const T* from, int64_t m, double divisor, T* to) {
  constexpr int64_t kBlock = 32;  // both of a pair stay in the cache
  T residue = 0;                  // stays 0; x - x is NaN for a NaN and for an infinity
  for (int64_t row = 0; row < m; row += kBlock) {
    for (int64_t col = 0; col <= row; col += kBlock) {
      for (int64_t i = row; i < std::min(row + kBlock, m); ++i) {
        for (int64_t j = col; j < std::min(col + kBlock, i + 1); ++j) {
          const double sum = static_cast<double>(from[i * m + j]) + from[j * m + i];
          const T entry = static_cast<T>(sum / divisor);
          to[i * m + j] = to[j * m + i] = entry;
          residue += entry - entry;
        }
      }
    }
  }
  return residue == 0;
}

// ---- rows <-> rho -----------------------------------------------------------------------------

Tensor density(const Tensor& z, const std::optional<Tensor>& weights, bool normalize, double eps) {
  const Problem problem = make_density_problem(z, weights, normalize, eps);
  const int64_t size = problem.d * problem.d;
  const Tensor result =
      empty(z, problem.sizes({problem.d, problem.d}), compute_dtype(z.scalar_type()));
  const Input input(z, problem);
  const std::optional<Tensor> p = contiguous(weights);
  dispatch_compute(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* p_data = data_or_null<T>(p);
    T* matrices = static_cast<T*>(result.mutable_data_ptr());
    for_each_sample(problem, Method::kPoles, [&](int64_t sample) {
      T* rho = matrices + sample * size;
      const Rows<T> rows =
          vne::normalize<T>(problem, input, sample, p_data ? p_data + sample * problem.n : nullptr);
      if (!rows.valid || rows.empty()) return fill(rho, size, rows.valid ? 0 : kNaN);
      gram(problem, rows, rho);
      for (int64_t i = 0; i < size; ++i) rho[i] = static_cast<T>(rows.trace * rho[i]);
    });
  });
  return result;
}

// d<G, rho> = 2 <diag(p) U G, dU>: G takes the place of log A in (3).
std::tuple<Tensor, Tensor> density_backward(const Tensor& grad_rho, const Tensor& z,
                                            const std::optional<Tensor>& weights, bool normalize,
                                            double eps) {
  const Problem problem = make_density_problem(z, weights, normalize, eps);
  const int64_t n = problem.n, d = problem.d;
  const ScalarType dtype = compute_dtype(z.scalar_type());
  check_density_gradient(problem, dtype, grad_rho);
  const Tensor grad_z = empty(z, problem.sizes({n, d}), dtype);
  const Tensor grad_weights =
      empty(z, weights ? problem.sizes({n}) : std::vector<int64_t>{0}, dtype);
  const Input input(z, problem);
  const std::optional<Tensor> p = contiguous(weights);
  const Tensor g = torch::stable::contiguous(grad_rho);
  dispatch_compute(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* g_data = static_cast<const T*>(g.const_data_ptr());
    const T* p_data = data_or_null<T>(p);
    T* z_grads = static_cast<T*>(grad_z.mutable_data_ptr());
    T* p_grads = static_cast<T*>(grad_weights.mutable_data_ptr());
    for_each_sample(problem, Method::kPoles, [&](int64_t sample) {
      T* sample_grad = z_grads + sample * n * d;
      T* sample_p_grad = p_data ? p_grads + sample * n : nullptr;
      const Rows<T> rows =
          vne::normalize<T>(problem, input, sample, p_data ? p_data + sample * n : nullptr);
      Buffer<T> w(d * d);
      // A gradient that is not finite comes from the part of another process that is not.
      const bool valid = add_transpose(g_data + sample * d * d, d, 2, w.get()) && rows.valid;
      if (!valid || rows.empty()) {
        const double value = valid ? 0 : kNaN;
        fill(sample_grad, n * d, value);
        if (sample_p_grad) fill(sample_p_grad, n, value);
        return;
      }
      gradient<T>(problem, rows, w.get(), 2, 0, sample_grad, sample_p_grad);
    });
  });
  return {grad_z, grad_weights};
}

// ---- rho -> S, dS/drho ------------------------------------------------------------------------

// A^ of the matrices rho [batch, m, m].
template <typename T>
UnitTrace<T> unit_trace_of(const T* rho, int64_t m) {
  return [=](int64_t sample, T* a) {
    const T* matrix = rho + sample * m * m;
    const double tau = trace(matrix, m);
    const bool finite = add_transpose(matrix, m, tau == 0 ? 1 : 2 * tau, a);
    return finite ? tau : kNaN;
  };
}

Tensor density_entropy(const Tensor& rho, const std::string& method) {
  const Problem problem = make_matrix_problem(rho);
  const Method chosen = parse_method(method, fastest_method(problem, rho.scalar_type(), false));
  const Tensor entropy = empty(rho, problem.batch_sizes, rho.scalar_type());
  const Tensor matrices = torch::stable::contiguous(rho);
  dispatch_compute(rho.scalar_type(), [&](auto type) {
    using T = decltype(type);
    entropies<T>(problem, method, chosen,
                 unit_trace_of(static_cast<const T*>(matrices.const_data_ptr()), problem.m()),
                 static_cast<T*>(entropy.mutable_data_ptr()));
  });
  return entropy;
}

// S, and grad [m, m] <- -(log rho + I), of rho = tau A^.
template <typename T>
double entropy_and_grad(Method method, const T* a, int64_t m, double tau, T* grad) {
  const double shift = centring_shift(m);
  const double value = entropy_and_log(method, a, m, shift, grad);
  const T identity = static_cast<T>(std::log(tau) + 1 - shift);
  for (int64_t i = 0; i < m * m; ++i) grad[i] = -grad[i];
  for (int64_t i = 0; i < m; ++i) grad[i * m + i] -= identity;
  return with_trace<T>(value, tau, m);
}

std::tuple<Tensor, Tensor> density_entropy_grad(const Tensor& rho, const std::string& method) {
  const Problem problem = make_matrix_problem(rho);
  const int64_t m = problem.m(), size = m * m;
  const Method chosen = parse_method(method, fastest_method(problem, rho.scalar_type(), true));
  const Tensor entropy = empty(rho, problem.batch_sizes, rho.scalar_type());
  const Tensor grad_rho = empty(rho, problem.sizes({m, m}), rho.scalar_type());
  const Tensor matrices = torch::stable::contiguous(rho);
  dispatch_compute(rho.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const UnitTrace<T> unit_trace =
        unit_trace_of(static_cast<const T*>(matrices.const_data_ptr()), m);
    T* values = static_cast<T*>(entropy.mutable_data_ptr());
    T* grads = static_cast<T*>(grad_rho.mutable_data_ptr());
    for_each_sample(problem, chosen, [&](int64_t sample) {
      T* grad = grads + sample * size;
      Buffer<T> a(size);
      const double tau = unit_trace(sample, a.get());
      const double without = entropy_without_matrix(tau);
      if (!(tau > 0)) fill(grad, size, without);
      values[sample] =
          static_cast<T>(tau > 0 ? entropy_and_grad(chosen, a.get(), m, tau, grad) : without);
    });
  });
  return {entropy, grad_rho};
}

}  // namespace
}  // namespace vne

STABLE_TORCH_LIBRARY_IMPL(vne_kernels, CPU, library) {
  library.impl("density", TORCH_BOX(&vne::density));
  library.impl("density_backward", TORCH_BOX(&vne::density_backward));
  library.impl("density_entropy", TORCH_BOX(&vne::density_entropy));
  library.impl("density_entropy_grad", TORCH_BOX(&vne::density_entropy_grad));
}
