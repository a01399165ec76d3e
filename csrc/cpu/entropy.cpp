// S = -sum lambda log lambda and its gradient, of samples and of matrices.

#include "cpu/entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

namespace vne {
namespace {

// The smallest eigenvalue that can be distinguished from the rounding of the largest. Below it any
// finite logarithm gives the same gradient, for X^ has no component along those eigenvectors.
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
  const MatrixView<T> vectors = eigen.view_vectors<T>();
  multiply<T>(m, m, m, vectors, transposed(vectors), result, Result::kSymmetric, logs.get());
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

// S(tau A^) = tau S(A^) - tau log tau, of an S(A^) that rounding may have left outside of
// [0, log m]. A trace that is one but for the rounding of the weights is one.
template <typename T>
double with_trace(double value, double trace, int64_t m) {
  value = std::clamp(value, 0.0, std::log(static_cast<double>(m)));
  const double tolerance = 8 * static_cast<double>(std::numeric_limits<T>::epsilon());
  if (std::abs(trace - 1) <= tolerance) return value;
  return trace * (value - std::log(trace));
}

// S of A^, and log A^ + shift I. (5): S = -<A^, log A^>. By eigenvectors these are Rayleigh
// quotients, better than eigenvalues.
template <typename T>
double entropy_and_log(Method method, const T* a, int64_t m, double shift, T* log_a) {
  log_by(method, a, m, shift, log_a);
  return shift * trace(a, m) - simd::kernels<T>().dot(a, log_a, m * m);
}

}  // namespace

template <typename T>
double Entropy::value(const Choice& choice, const T* a, int64_t m, double tau) const {
  double value;
  if (!entropy_alone(choice.method, a, m, &value)) {
    if (choice.is_automatic) {
      value = entropy_by_eigenvalues(a, m);  // less than the sweeps where A^ lacks rank
    } else {
      Buffer<T> log_a(m * m);
      value = entropy_and_log(choice.method, a, m, centering_shift(m), log_a.get());
    }
  }
  return with_trace<T>(value, tau, m);
}

// (3): dS/dX = -2 (log A + I) X with log A = log A^ + log(tau) I
template <typename T>
Slope<T> Entropy::slope(Method method, Buffer<T> a, int64_t m, double tau) const {
  const double shift = centering_shift(m);
  Buffer<T> log_a(m * m);
  const double value = entropy_and_log(method, a.get(), m, shift, log_a.get());
  return {with_trace<T>(value, tau, m), std::move(log_a), -2, std::log(tau) + 1 - shift};
}

template double Entropy::value(const Choice&, const float*, int64_t, double) const;
template double Entropy::value(const Choice&, const double*, int64_t, double) const;
template Slope<float> Entropy::slope(Method, Buffer<float>, int64_t, double) const;
template Slope<double> Entropy::slope(Method, Buffer<double>, int64_t, double) const;

}  // namespace vne

VNE_FUNCTION(vn_entropy, vne::Entropy)
VNE_FUNCTION_OF_MATRICES(density_entropy, vne::Entropy)
