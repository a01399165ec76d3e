// S = -sum lambda log lambda and its gradient: the operators vn_entropy and vn_entropy_grad.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/stages.h"

namespace vne {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The smallest eigenvalue that is told from the rounding of the largest. Below it any finite
// logarithm gives the same gradient, for X^ has no component along those eigenvectors.
template <typename T>
double resolution(const T* values, int64_t m) {
  return static_cast<double>(std::numeric_limits<T>::epsilon()) * values[m - 1];
}

// S of the trace-one A^ from its eigenvalues, ascending. Those that only rounding made keep their
// sign: they sum to nearly nothing, while without the negative ones each would add to S.
template <typename T>
double entropy_of_eigenvalues(const T* values, int64_t m) {
  const double floor = resolution(values, m);
  double sum = 0, weighted = 0;
  for (int64_t k = 0; k < m; ++k) {
    sum += values[k];
    weighted += values[k] * std::log(std::max<double>(values[k], floor));
  }
  return std::log(sum) - weighted / sum;
}

// S of the matrix a [m, m] without its logarithm. The error of an eigenvalue is of the order of the
// rounding of the largest one; where that is nearly all of the trace, S is small and float32 is not
// enough for it.
template <typename T>
double entropy_by_eigenvalues(const T* a, int64_t m) {
  constexpr double kSmallEntropy = 1;
  Buffer<T> values(m);
  eigenvalues(a, m, values.get());
  const double entropy = entropy_of_eigenvalues(values.get(), m);
  if (std::is_same_v<T, double> || entropy >= kSmallEntropy) return entropy;
  Buffer<double> wide(m * m);
  std::copy_n(a, m * m, wide.get());
  return entropy_by_eigenvalues<double>(wide.get(), m);
}

// log A^ + shift I.
template <typename T>
void log_by_eigh(const T* a, int64_t m, double shift, T* result) {
  const Eigen eigen = eigh(a, m);
  const T* values = static_cast<const T*>(eigen.values.const_data_ptr());
  const double floor = resolution(values, m);
  Buffer<T> logs(m);
  for (int64_t k = 0; k < m; ++k)
    logs[k] = static_cast<T>(std::log(std::max<double>(values[k], floor)) + shift);
  spectral_function(eigen, logs.get(), m, result);
}

constexpr int64_t kSmallestReduced = 8;  // a smaller A^ is swept as soon as reduced

// S of A^ where it is to be had for less than log A^; false if not.
template <typename T>
bool entropy_alone(Method method, const T* a, int64_t m, double* entropy) {
  if (method == Method::kEigh) {
    *entropy = entropy_by_eigenvalues(a, m);
    return true;
  }
  if constexpr (std::is_same_v<T, float>)
    return m >= kSmallestReduced && entropy_by_tridiagonal(a, m, entropy);
  return false;
}

template <typename T>
void log_by(Method method, const T* a, int64_t m, double shift, T* result) {
  if (method == Method::kEigh) return log_by_eigh(a, m, shift, result);
  if constexpr (std::is_same_v<T, float>) {
    if (m >= kSmallestReduced && log_by_tridiagonal(a, m, shift, result)) return;
  }
  log_by_sweeps(a, m, shift, result);
}

}  // namespace

// S(tau A^) = tau S(A^) - tau log tau. A trace that is one but for the rounding of the weights is
// one.
template <typename T>
double with_trace(double value, double trace, int64_t m) {
  value = std::clamp(value, 0.0, std::log(static_cast<double>(m)));
  const double tolerance = 8 * static_cast<double>(std::numeric_limits<T>::epsilon());
  if (std::abs(trace - 1) <= tolerance) return value;
  return trace * (value - std::log(trace));
}

// (5): S = -<A^, log A^>. By eigenvectors these are Rayleigh quotients, better than eigenvalues.
template <typename T>
double entropy_and_log(Method method, const T* a, int64_t m, double shift, T* log_a) {
  log_by(method, a, m, shift, log_a);
  return shift * trace(a, m) - simd::kernels<T>().dot(a, log_a, m * m);
}

// The faster method on this CPU, from the measurements of bench/NOTES.md. With the gradient
// LAPACK's blocked reduction wins beyond 512; it gains a little from threads, the poles' none. In
// float64 there are 50 poles, of A^ itself: never.
Method fastest_method(const Problem& problem, ScalarType dtype, bool with_grad) {
  if (compute_dtype(dtype) == ScalarType::Double) return Method::kEigh;
  if (!with_grad) return Method::kPoles;
  const bool alone = threads_of_sample(problem, Method::kPoles) == 1;
  return problem.m() <= (alone ? 512 : 384) ? Method::kPoles : Method::kEigh;
}

namespace {

// S of A^ alone.
template <typename T>
double entropy_of(Method method, const T* a, int64_t m) {
  double value;
  if (entropy_alone(method, a, m, &value)) return value;
  Buffer<T> log_a(m * m);
  return entropy_and_log(method, a, m, centring_shift(m), log_a.get());
}

}  // namespace

template <typename T>
double entropy(const Problem& problem, const Rows<T>& rows, Method method, T* grad_z,
               T* grad_weights) {
  const int64_t m = problem.m();
  if (!rows.valid || rows.empty()) {
    const double value = rows.valid ? 0 : kNaN;
    if (grad_z) fill(grad_z, problem.n * problem.d, value);
    if (grad_weights) fill(grad_weights, problem.n, value);
    return value;
  }

  Buffer<T> a(m * m);
  gram(problem, rows, a.get());
  if (!grad_z) return with_trace<T>(entropy_of(method, a.get(), m), rows.trace, m);

  const double shift = centring_shift(m);
  Buffer<T> log_a(m * m);
  const double value = entropy_and_log(method, a.get(), m, shift, log_a.get());
  // (3): dS/dX = -2 (log A + I) X with log A = log A^ + log(tau) I
  gradient(problem, rows, log_a.get(), -2, std::log(rows.trace) + 1 - shift, grad_z, grad_weights);
  return with_trace<T>(value, rows.trace, m);
}

template <typename T>
void entropies(const Problem& problem, const std::string& method, Method chosen,
               const UnitTrace<T>& unit_trace, T* values) {
  const int64_t m = problem.m();
  for_each_sample(problem, Method::kPoles, [&](int64_t sample) {
    Buffer<T> a(m * m);
    const double tau = unit_trace(sample, a.get());
    values[sample] = static_cast<T>(entropy_without_matrix(tau));
    if (!(tau > 0)) return;
    double value;
    if (method == "poles") {
      value = entropy_of(chosen, a.get(), m);
    } else if (!entropy_alone(chosen, a.get(), m, &value)) {
      value = entropy_by_eigenvalues(a.get(), m);  // less than the sweeps where A^ lacks rank
    }
    values[sample] = static_cast<T>(with_trace<T>(value, tau, m));
  });
}

#define VNE_INSTANTIATE(T)                                                 \
  template double with_trace<T>(double, double, int64_t);                  \
  template double entropy_and_log(Method, const T*, int64_t, double, T*);  \
  template double entropy(const Problem&, const Rows<T>&, Method, T*, T*); \
  template void entropies(const Problem&, const std::string&, Method, const UnitTrace<T>&, T*);
VNE_INSTANTIATE(float)
VNE_INSTANTIATE(double)
#undef VNE_INSTANTIATE

namespace {

struct Forward {
  Tensor entropy, grad_z, grad_weights;
};

Forward forward(const Tensor& z, const std::optional<Tensor>& weights, bool normalize,
                const std::string& method, double eps, bool with_grad) {
  const Problem problem = make_problem(z, weights, normalize, eps);
  const int64_t n = problem.n, d = problem.d;
  const Method chosen = parse_method(method, fastest_method(problem, z.scalar_type(), with_grad));
  const ScalarType dtype = compute_dtype(z.scalar_type());
  const std::vector<int64_t> none{0};
  const Forward result{empty(z, problem.batch_sizes, dtype),
                       empty(z, with_grad ? problem.sizes({n, d}) : none, dtype),
                       empty(z, with_grad && weights ? problem.sizes({n}) : none, dtype)};
  const Input input(z, problem);
  const std::optional<Tensor> p = contiguous(weights);
  dispatch_compute(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* values = static_cast<T*>(result.entropy.mutable_data_ptr());
    T* z_grads = static_cast<T*>(result.grad_z.mutable_data_ptr());
    T* p_grads = static_cast<T*>(result.grad_weights.mutable_data_ptr());
    const T* p_data = data_or_null<T>(p);
    const auto rows_of = [&](int64_t sample) {
      return vne::normalize<T>(problem, input, sample, p_data ? p_data + sample * n : nullptr);
    };
    if (!with_grad) {
      const UnitTrace<T> unit_trace = [&](int64_t sample, T* a) {
        const Rows<T> rows = rows_of(sample);
        if (!rows.valid) return kNaN;
        if (!rows.empty()) gram(problem, rows, a);
        return rows.trace;
      };
      return entropies(problem, method, chosen, unit_trace, values);
    }
    for_each_sample(problem, chosen, [&](int64_t sample) {
      values[sample] =
          static_cast<T>(entropy<T>(problem, rows_of(sample), chosen, z_grads + sample * n * d,
                                    p_data ? p_grads + sample * n : nullptr));
    });
  });
  return result;
}

Tensor vn_entropy(const Tensor& z, const std::optional<Tensor>& weights, bool normalize,
                  const std::string& method, double eps) {
  return forward(z, weights, normalize, method, eps, false).entropy;
}

std::tuple<Tensor, Tensor, Tensor> vn_entropy_grad(const Tensor& z,
                                                   const std::optional<Tensor>& weights,
                                                   bool normalize, const std::string& method,
                                                   double eps) {
  const Forward result = forward(z, weights, normalize, method, eps, true);
  return {result.entropy, result.grad_z, result.grad_weights};
}

}  // namespace
}  // namespace vne

STABLE_TORCH_LIBRARY_IMPL(vne_kernels, CPU, library) {
  library.impl("vn_entropy", TORCH_BOX(&vne::vn_entropy));
  library.impl("vn_entropy_grad", TORCH_BOX(&vne::vn_entropy_grad));
}
