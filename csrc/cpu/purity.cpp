// tr(rho^2) of rho over its trace: the entropy of order two, equation (13), without an eigenvalue.

#include <algorithm>

#include "cpu/functional.h"

namespace vne {
namespace {

struct Purity : Function {
  static constexpr Lapack kLapack = Lapack::kNever;

  double of_zeros(int64_t) const { return 1; }  // taken for a pure state, as their entropy is 0

  template <typename T>
  double value(const Choice&, const T* a, int64_t m, double) const {
    return clamp(simd::kernels<T>().dot(a, a, m * m), m);
  }

  // dP/dX = 4 / tau (A^ - P I) X: the trace moves with X
  template <typename T>
  Slope<T> slope(Method, Buffer<T> a, int64_t m, double tau) const {
    const double value = simd::kernels<T>().dot(a.get(), a.get(), m * m);
    return {clamp(value, m), std::move(a), 4 / tau, -value};
  }

  static double clamp(double value, int64_t m) {  // rounding may leave the interval
    return std::clamp(value, 1.0 / static_cast<double>(m), 1.0);
  }
};

}  // namespace
}  // namespace vne

VNE_FUNCTION(purity, vne::Purity)
