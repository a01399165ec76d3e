// S = -sum lambda log lambda and its gradient: the operators vn_entropy and vn_entropy_grad.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>

#include "cpu/stages.h"

namespace vne {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kEntriesAtOnce = 65536;  // of A^ in one call of eigenvalues: they stay in L2

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

// S of the matrices a [count, m, m] without their logarithms. The error of an eigenvalue is of the
// order of the rounding of the largest one; where that is nearly all of the trace, S is small and
// float32 is not enough for it.
template <typename T>
void entropy_by_eigenvalues(const T* a, int64_t count, int64_t m, double* entropies) {
  constexpr double kSmallEntropy = 1;
  Buffer<T> of_all(count * m);
  eigenvalues(a, count, m, of_all.get());
  const T* values = of_all.get();
  for (int64_t k = 0; k < count; ++k) {
    entropies[k] = entropy_of_eigenvalues(values + k * m, m);
    if (std::is_same_v<T, double> || entropies[k] >= kSmallEntropy) continue;
    Buffer<double> wide(m * m);
    std::copy_n(a + k * m * m, m * m, wide.get());
    entropy_by_eigenvalues<double>(wide.get(), 1, m, entropies + k);
  }
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
    entropy_by_eigenvalues(a, 1, m, entropy);
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

namespace {

// S by the tridiagonal matrix where that is to be had; returns the samples where it is not.
template <typename T>
std::vector<int64_t> entropies_by_tridiagonal(const Problem& problem,
                                              const UnitTrace<T>& unit_trace, T* entropies) {
  const int64_t m = problem.m();
  std::vector<char> found(problem.batch, 1);
  for_each_sample(problem, Method::kPoles, [&](int64_t sample) {
    Buffer<T> a(m * m);
    const double tau = unit_trace(sample, a.get());
    entropies[sample] = static_cast<T>(entropy_without_matrix(tau));
    if (!(tau > 0)) return;
    double value;
    found[sample] = entropy_alone(Method::kPoles, a.get(), m, &value);
    if (found[sample]) entropies[sample] = static_cast<T>(with_trace<T>(value, tau, m));
  });
  std::vector<int64_t> left;
  for (int64_t sample = 0; sample < problem.batch; ++sample) {
    if (!found[sample]) left.push_back(sample);
  }
  return left;
}

// S by eigenvalues. For a small matrix a call of the dispatcher takes as long as its eigenvalues:
// one call serves several samples.
template <typename T>
void entropies_by_eigenvalues(const Problem& problem, const UnitTrace<T>& unit_trace,
                              const std::vector<int64_t>& samples, T* entropies) {
  const int64_t m = problem.m(), count = static_cast<int64_t>(samples.size());
  const int64_t at_once =
      std::clamp<int64_t>(kEntriesAtOnce / (m * m), 1, std::max<int64_t>(count, 1));
  Buffer<T> a(at_once * m * m);
  std::vector<int64_t> waiting;
  std::vector<double> traces, values(at_once);
  for (int64_t index = 0; index < count; ++index) {
    const int64_t sample = samples[index];
    const double tau = unit_trace(sample, a.get() + static_cast<int64_t>(waiting.size()) * m * m);
    entropies[sample] = static_cast<T>(entropy_without_matrix(tau));
    if (tau > 0) {
      waiting.push_back(sample);
      traces.push_back(tau);
    }
    const int64_t size = static_cast<int64_t>(waiting.size());
    if (size == 0 || (size < at_once && index + 1 < count)) continue;
    entropy_by_eigenvalues(a.get(), size, m, values.data());
    for (int64_t k = 0; k < size; ++k)
      entropies[waiting[k]] = static_cast<T>(with_trace<T>(values[k], traces[k], m));
    waiting.clear();
    traces.clear();
  }
}

}  // namespace

template <typename T>
void entropies(const Problem& problem, const std::string& method, Method chosen,
               const UnitTrace<T>& unit_trace, T* values) {
  const int64_t m = problem.m();
  if (method == "poles") {
    for_each_sample(problem, chosen, [&](int64_t sample) {
      Buffer<T> a(m * m);
      const double tau = unit_trace(sample, a.get());
      const double value = tau > 0 ? with_trace<T>(entropy_of(chosen, a.get(), m), tau, m)
                                   : entropy_without_matrix(tau);
      values[sample] = static_cast<T>(value);
    });
    return;
  }
  std::vector<int64_t> samples(problem.batch);
  std::iota(samples.begin(), samples.end(), 0);
  // Where A^ lacks rank, eigenvalues alone cost less than the sweeps.
  if (chosen == Method::kPoles) samples = entropies_by_tridiagonal(problem, unit_trace, values);
  entropies_by_eigenvalues(problem, unit_trace, samples, values);
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
