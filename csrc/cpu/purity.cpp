// tr(rho^2) of rho over its trace, and its gradient: the operators purity and purity_grad. The
// entropy of order two, equation (13), without an eigenvalue.

#include <algorithm>
#include <limits>

#include "cpu/stages.h"

namespace vne {
namespace {

// The purity of one sample; its gradients unless grad_z is null.
template <typename T>
double purity_of_sample(const Problem& problem, const Rows<T>& rows, T* grad_z, T* grad_weights) {
  if (!rows.valid || rows.empty()) {
    const double slope = rows.valid ? 0 : std::numeric_limits<double>::quiet_NaN();
    if (grad_z) fill(grad_z, problem.n * problem.d, slope);
    if (grad_weights) fill(grad_weights, problem.n, slope);
    return slope + 1;  // no samples are taken for a pure state, as their entropy is 0
  }
  const int64_t m = problem.m();
  Buffer<T> a(m * m);
  gram(problem, rows, a.get());
  const double value = simd::kernels<T>().dot(a.get(), a.get(), m * m);
  // dP/dX = 4 / tau (A^ - P I) X: the trace moves with X
  if (grad_z) gradient(problem, rows, a.get(), 4 / rows.trace, -value, grad_z, grad_weights);
  return std::clamp(value, 1.0 / static_cast<double>(m), 1.0);  // rounding may leave the interval
}

std::tuple<Tensor, Tensor, Tensor> compute(const Tensor& z, const std::optional<Tensor>& weights,
                                           bool normalize, const std::string& method, double eps,
                                           bool with_grad) {
  const Problem problem = make_problem(z, weights, normalize, eps);
  parse_method(method, Method::kEigh);  // checked; there is one way
  const int64_t n = problem.n, d = problem.d;
  const ScalarType dtype = compute_dtype(z.scalar_type());
  const std::vector<int64_t> none{0};
  const Tensor purity = empty(z, problem.batch_sizes, dtype);
  const Tensor grad_z = empty(z, with_grad ? problem.sizes({n, d}) : none, dtype);
  const Tensor grad_weights = empty(z, with_grad && weights ? problem.sizes({n}) : none, dtype);
  const Input input(z, problem);
  const std::optional<Tensor> p = contiguous(weights);
  dispatch_compute(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* values = static_cast<T*>(purity.mutable_data_ptr());
    T* z_grads = with_grad ? static_cast<T*>(grad_z.mutable_data_ptr()) : nullptr;
    T* p_grads = static_cast<T*>(grad_weights.mutable_data_ptr());
    const T* p_data = data_or_null<T>(p);
    for_each_sample(problem, Method::kPoles, [&](int64_t sample) {
      const Rows<T> rows =
          vne::normalize<T>(problem, input, sample, p_data ? p_data + sample * n : nullptr);
      values[sample] = static_cast<T>(
          purity_of_sample(problem, rows, z_grads ? z_grads + sample * n * d : nullptr,
                           z_grads && p_data ? p_grads + sample * n : nullptr));
    });
  });
  return {purity, grad_z, grad_weights};
}

Tensor purity(const Tensor& z, const std::optional<Tensor>& weights, bool normalize,
              const std::string& method, double eps) {
  return std::get<0>(compute(z, weights, normalize, method, eps, false));
}

std::tuple<Tensor, Tensor, Tensor> purity_grad(const Tensor& z,
                                               const std::optional<Tensor>& weights, bool normalize,
                                               const std::string& method, double eps) {
  return compute(z, weights, normalize, method, eps, true);
}

}  // namespace
}  // namespace vne

STABLE_TORCH_LIBRARY_IMPL(vne_kernels, CPU, library) {
  library.impl("purity", TORCH_BOX(&vne::purity));
  library.impl("purity_grad", TORCH_BOX(&vne::purity_grad));
}
