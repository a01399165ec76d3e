// A function of the spectrum on the CPU: what all have in common, from z to the results.
//
// Beside what ops/functional.h asks for, a function F has
//
//   // Whether slope() calls LAPACK for kEigh: then the samples run one by one.
//   static constexpr bool kCallsLapack;
//
//   // F(tau A^), from A^ [m, m] of trace one. Samples run in parallel: without LAPACK.
//   template <typename T>
//   double value(const Choice& choice, const T* a, int64_t m, double tau) const;
//
//   // The same with its gradient in X.
//   template <typename T>
//   Slope<T> slope(Method method, Buffer<T> a, int64_t m, double tau) const;

#pragma once

#include <utility>

#include "cpu/policy.h"
#include "cpu/stages.h"
#include "ops/functional.h"

namespace vne {

// dF/dX = factor (W + identity I) X, with X^ = X / sqrt(tau) in the place of X.
template <typename T>
struct Slope {
  double value;  // of F
  Buffer<T> w;   // [m, m]
  double factor, identity;
};

// F of rows, and unless grad_z is null its gradients.
template <typename T, typename F>
double of_rows(const F& f, const Choice& choice, const Problem& problem, const Rows<T>& rows,
               T* grad_z, T* grad_weights) {
  if (fill_without_matrix(problem, rows, grad_z, grad_weights))
    return rows.without_matrix() + F::kOfZeros;
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
    return value + F::kOfZeros;
  }
  if (!grad) return f.value(choice, a.get(), m, tau);
  const Slope<T> slope = f.slope(choice.method, std::move(a), m, tau);
  const double half = slope.factor / 2;
  for (int64_t i = 0; i < m * m; ++i) grad[i] = static_cast<T>(half) * slope.w[i];
  for (int64_t i = 0; i < m; ++i) grad[i * m + i] += static_cast<T>(half * slope.identity);
  return slope.value;
}

template <typename T, typename F>
void evaluate(const F& f, const std::string& method, const Batch<T>& batch, const Results<T>& out) {
  const Problem& problem = batch.problem;
  const int64_t n = problem.n, size = n * problem.d;
  const bool with_grad = out.grad_z != nullptr;
  const Method automatic =
      F::kCallsLapack ? fastest_method(problem, batch.z.dtype, with_grad) : Method::kPoles;
  const Choice choice{parse_method(method, automatic), method == "auto"};
  const bool with_lapack = F::kCallsLapack && with_grad;
  for_each_sample(problem, with_lapack ? choice.method : Method::kPoles, [&](int64_t sample) {
    T* grad_z = at(out.grad_z, sample * size);
    const double value =
        problem.of_matrices
            ? of_matrix(f, choice, n, static_cast<const T*>(batch.z.data) + sample * size, grad_z)
            : of_rows(f, choice, problem, normalize(batch, sample), grad_z,
                      at(out.grad_weights, sample * n));
    out.value[sample] = static_cast<T>(value);
  });
}

}  // namespace vne
