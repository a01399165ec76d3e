// A function of the spectrum on the CPU: what all have in common, from z to the results.
//
// Beside what ops/functional.h asks for, a function F has
//
//   // When slope() calls LAPACK: then the samples run one by one.
//   static constexpr Lapack kLapack;
//
//   // F(tau A^), from A^ [m, m] of trace one. Samples run in parallel: without LAPACK.
//   template <typename T>
//   double value(const Choice& choice, const T* a, int64_t m, double tau) const;
//
//   // The same with its gradient in X.
//   template <typename T>
//   Slope<T> slope(Method method, Buffer<T> a, int64_t m, double tau) const;

#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu/policy.h"
#include "cpu/stages.h"
#include "ops/functional.h"

namespace vne {

enum class Lapack { kNever, kForEigh, kAlways };

// dF/dX = factor (W + identity I) X, with X^ = X / sqrt(tau) in the place of X.
template <typename T>
struct Slope {
  double value;  // of F
  Buffer<T> w;   // [m, m]
  double factor, identity;
};

// F with the number of rows that are present in its member `count`, if it has one.
template <typename F, typename T>
F counting(F f, const Rows<T>& rows) {
  if constexpr (requires { f.count; }) {
    f.count = std::count_if(rows.row.begin(), rows.row.end(),
                            [](const Row& row) { return row.weight != 0; });
  }
  return f;
}

// F of rows, and unless grad_z is null its gradients.
template <typename T, typename F>
double of_rows(const F& of_any, const Choice& choice, const Problem& problem, const Rows<T>& rows,
               T* grad_z, T* grad_weights) {
  const F f = counting(of_any, rows);
  if (fill_without_matrix(problem, rows, grad_z, grad_weights))
    return rows.without_matrix() + f.of_zeros(problem.m());
  const int64_t m = problem.m();
  Buffer<T> a(m * m);
  gram(problem, rows, a.get());
  if (!grad_z) return f.value(choice, a.get(), m, rows.trace);
  const Slope<T> slope = f.slope(choice.method, std::move(a), m, rows.trace);
  gradient(problem, rows, slope.w.get(), slope.factor, slope.identity, grad_z, grad_weights);
  return slope.value;
}

// F of a matrix rho [m, m], and unless grad is null dF/drho = factor / 2 (W + identity I).
template <typename T, typename F>
double of_matrix(const F& f, const Choice& choice, int64_t m, const T* rho, T* grad) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  Buffer<T> a(m * m);
  double tau = trace(rho, m);
  if (!add_transpose(rho, m, tau == 0 ? 1 : 2 * tau, a.get())) tau = kNaN;
  if (!(tau > 0)) {
    const double value = tau == 0 ? 0 : kNaN;
    fill(grad, m * m, value);
    return value + f.of_zeros(m);
  }
  if (!grad) return f.value(choice, a.get(), m, tau);
  const Slope<T> slope = f.slope(choice.method, std::move(a), m, tau);
  const double half = slope.factor / 2;
  for (int64_t i = 0; i < m * m; ++i) grad[i] = static_cast<T>(half) * slope.w[i];
  for (int64_t i = 0; i < m; ++i) grad[i * m + i] += static_cast<T>(half * slope.identity);
  return slope.value;
}

// A gradient [size] of a result in T that is computed in C; null where it is not wanted.
template <typename C, typename T>
class Gradient {
 public:
  Gradient(T* result, int64_t size)
      : result_(result), size_(result ? size : 0), buffer_(kIsSame ? 0 : size_) {}
  C* get() const {
    if constexpr (kIsSame) return result_;
    return result_ ? buffer_.get() : nullptr;
  }
  void write() const {
    if (!kIsSame)
      std::transform(get(), get() + size_, result_, [](C x) { return static_cast<T>(x); });
  }

 private:
  static constexpr bool kIsSame = std::is_same_v<C, T>;
  T* result_;
  int64_t size_;
  Buffer<C> buffer_;
};

template <typename C, typename T, typename F>
void evaluate_in(const F& f, const std::string& method, const Batch<C>& batch,
                 const Results<T>& out) {
  const Problem& problem = batch.problem;
  const int64_t n = problem.n, size = n * problem.d;
  const bool with_grad = out.grad_z != nullptr;
  const Method automatic = F::kLapack == Lapack::kNever
                               ? Method::kPoles
                               : fastest_method(problem, batch.z.dtype, with_grad);
  const Choice choice{parse_method(method, automatic), method == "auto"};
  const bool with_lapack =
      with_grad && (F::kLapack == Lapack::kAlways ||
                    (F::kLapack == Lapack::kForEigh && choice.method == Method::kEigh));
  for_each_sample(problem, with_lapack ? Method::kEigh : Method::kPoles, [&](int64_t sample) {
    const Gradient<C, T> grad_z(at(out.grad_z, sample * size), size);
    const Gradient<C, T> grad_weights(at(out.grad_weights, sample * n), n);
    const double value =
        problem.of_matrices
            ? of_matrix(f, choice, n, static_cast<const C*>(batch.z.data) + sample * size,
                        grad_z.get())
            : of_rows(f, choice, problem, normalize(batch, sample), grad_z.get(),
                      grad_weights.get());
    grad_z.write();
    grad_weights.write();
    out.value[sample] = static_cast<T>(value);
  });
}

template <typename T, typename F>
void evaluate(const F& f, const std::string& method, const Batch<T>& batch, const Results<T>& out) {
  if constexpr (std::is_same_v<T, float>) {
    if (f.in_double()) {
      const int64_t count = batch.weights ? batch.problem.batch * batch.problem.n : 0;
      Buffer<double> weights(count);
      std::copy_n(batch.weights, count, weights.get());
      const double* const given = batch.weights ? weights.get() : nullptr;
      return evaluate_in(f, method, Batch<double>{batch.problem, batch.z, given}, out);
    }
  }
  evaluate_in(f, method, batch, out);
}

}  // namespace vne
