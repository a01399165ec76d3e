// Entropies of every order, (13), and RankMe, (14): by the eigenvalues, and the gradient by the
// eigenvectors; orders 3 and 4 by products of matrices, without either.

#include "common/orders.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "cpu/functional.h"

namespace vne {
namespace {

// A function of the eigenvalues: F has of(l, m, slope), with l [m] those of A^, descending.
template <typename F>
struct OfEigenvalues : Function {
  static constexpr Lapack kLapack = Lapack::kAlways;

  template <typename T>
  double value(const Choice&, const T* a, int64_t m, double) const {
    Buffer<T> ascending(m);
    eigenvalues(a, m, ascending.get());
    return of(ascending.get(), m, nullptr);
  }

  // d lambda_k = v_k^T dA v_k: W = V diag(dF/dl) V^T.
  template <typename T>
  Slope<T> slope(Method, Buffer<T> a, int64_t m, double tau) const {
    const Eigen eigen = eigh(a.get(), m);
    std::vector<double> descending(m);
    const double value =
        of(static_cast<const T*>(eigen.values.const_data_ptr()), m, descending.data());
    Buffer<T> ascending(m);
    std::transform(descending.rbegin(), descending.rend(), ascending.get(),
                   [](double x) { return static_cast<T>(x); });
    const MatrixView<T> vectors = eigen.view_vectors<T>();
    multiply<T>(m, m, m, vectors, transposed(vectors), a.get(), Result::kSymmetric,
                ascending.get());
    return {value, std::move(a), 2 / tau, 0};
  }

 private:
  template <typename T>
  double of(const T* ascending, int64_t m, double* slope) const {
    const std::vector<double> l(std::reverse_iterator(ascending + m),
                                std::reverse_iterator(ascending));
    return static_cast<const F*>(this)->of(l.data(), m, slope);
  }
};

template <Family family>
struct OrderEntropy : OfEigenvalues<OrderEntropy<family>> {
  using Base = OfEigenvalues<OrderEntropy<family>>;
  static constexpr std::array kParameters{"order"};
  double order;

  void check() const { VNE_CHECK(order >= 0, "order must be at least 0, got ", order); }
  // Steep at 0.
  bool in_double() const { return order < 2; }

  double of(const double* l, int64_t m, double* slope) const {
    return entropy_of_order(family, order, l, m, slope);
  }

  template <typename T>
  double value(const Choice& choice, const T* a, int64_t m, double tau) const {
    if (!by_products()) return Base::value(choice, a, m, tau);
    Buffer<T> square(m * m);
    return of_powers(sum_of_powers(a, m, square.get()), m);
  }

  // With P = tr A^q, dT/dX = -2 q / (q - 1) / tau (A^(q - 1) - P I) X; R follows from P.
  template <typename T>
  Slope<T> slope(Method method, Buffer<T> a, int64_t m, double tau) const {
    if (!by_products()) return Base::slope(method, std::move(a), m, tau);
    Buffer<T> power(m * m);
    const double sum = sum_of_powers(a.get(), m, power.get());
    if (order == 4) {
      Buffer<T> cube(m * m);
      multiply_symmetric(a.get(), power.get(), m, cube.get());
      power = std::move(cube);
    }
    const double divisor = family == Family::kRenyi ? sum * tau : tau;
    return {of_powers(sum, m), std::move(power), 2 * order / (1 - order) / divisor, -sum};
  }

 private:
  bool by_products() const { return order == 3 || order == 4; }

  template <typename T>
  static void multiply_symmetric(const T* a, const T* b, int64_t m, T* c) {
    multiply<T>(m, m, m, row_major<T>(a, m), row_major<T>(b, m), c, Result::kSymmetric);
  }

  // tr A^q, and A^2.
  template <typename T>
  double sum_of_powers(const T* a, int64_t m, T* square) const {
    multiply_symmetric(a, a, m, square);
    return simd::kernels<T>().dot(order == 3 ? a : square, square, m * m);
  }

  // Rounding may leave the interval.
  double of_powers(double sum, int64_t m) const {
    sum = std::clamp(sum, std::pow(static_cast<double>(m), 1 - order), 1.0);
    return (family == Family::kRenyi ? -std::log(sum) : 1 - sum) / (order - 1) + 0.0;  // not -0.
  }
};

struct RankMe : OfEigenvalues<RankMe> {
  static constexpr std::array kParameters{"added"};
  double added;
  int64_t count = 0;

  void check() const {
    VNE_CHECK(std::isfinite(added) && added >= 0, "added must be finite and not negative, got ",
              added);
  }
  // The root of a rounding is much of the largest root.
  bool in_double() const { return true; }
  double of_zeros(int64_t m) const {
    const std::vector<double> zeros(m);
    return of(zeros.data(), m, nullptr);
  }

  double of(const double* l, int64_t m, double* slope) const {
    return rankme_of(added, count, l, m, slope);
  }
};

}  // namespace
}  // namespace vne

VNE_FUNCTION(renyi_entropy, vne::OrderEntropy<vne::Family::kRenyi>)
VNE_FUNCTION(tsallis_entropy, vne::OrderEntropy<vne::Family::kTsallis>)
VNE_FUNCTION(rankme, vne::RankMe)
