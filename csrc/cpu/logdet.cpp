// log det(I + a A) = sum_k log(1 + a lambda_k), with the parameter a = scale.
//
// Its gradient is 2 a (I + a A)^-1 X. One Cholesky factorization I + a A = L L^T, in double, gives
// both, whatever the method is. Nothing is lost where a A is small: the pivots are 1 + x_i with
// x_i = a A_ii - sum_k L_ik^2, and I is taken out of the inverse before it is rounded.

#include <algorithm>
#include <cmath>

#include "cpu/functional.h"

namespace vne {
namespace {

struct Logdet : Function {
  static constexpr std::array kParameters{"scale"};
  static constexpr Lapack kLapack = Lapack::kNever;
  double scale;

  void check() const {
    VNE_CHECK(std::isfinite(scale) && scale > 0, "scale must be finite and positive, got ", scale);
  }

  // l [m, m], its lower triangle, <- L of I + factor A^; returns log det.
  template <typename T>
  static double factorize(const T* a, int64_t m, double factor, double* l) {
    const auto dot = simd::kernels<double>().dot;
    double sum = 0;
    for (int64_t i = 0; i < m; ++i) {
      double* row = l + i * m;
      for (int64_t j = 0; j < i; ++j)
        row[j] = (factor * a[i * m + j] - dot(row, l + j * m, j)) / l[j * m + j];
      const double x = std::max(factor * a[i * m + i] - dot(row, row, i), 0.0);
      row[i] = std::sqrt(1 + x);
      sum += std::log1p(x);
    }
    return sum;
  }

  template <typename T>
  double value(const Choice&, const T* a, int64_t m, double tau) const {
    Buffer<double> l(m * m);
    return factorize(a, m, scale * tau, l.get());
  }

  template <typename T>
  Slope<T> slope(Method, Buffer<T> a, int64_t m, double tau) const {
    Buffer<double> l(m * m), inverse(m * m), product(m * m);
    const double value = factorize(a.get(), m, scale * tau, l.get());
    const auto& simd = simd::kernels<double>();
    for (int64_t i = 0; i < m; ++i) {  // row i of L^-1
      double* row = &inverse[i * m];
      fill(row, m, 0);
      for (int64_t k = 0; k < i; ++k)
        simd.combine(1, row, -l[i * m + k], &inverse[k * m], row, k + 1);
      row[i] = 1;
      simd.scale(row, 1 / l[i * m + i], row, i + 1);
    }
    const MatrixView<double> view = row_major<double>(inverse.get(), m);
    multiply<double>(m, m, m, transposed(view), view, product.get(), Result::kSymmetric);
    const double identity = scale * tau <= 1 ? 1 : 0;
    for (int64_t i = 0; i < m; ++i) product[i * m + i] -= identity;
    std::copy_n(product.get(), m * m, a.get());
    return {value, std::move(a), 2 * scale, identity};
  }
};

}  // namespace
}  // namespace vne

VNE_FUNCTION(logdet, vne::Logdet)
