// From a function W of A^ to the gradient in z: equations (3) and (4).
//
// With product = W X^ and x = sqrt(tau) X^, row i of z receives
//
//   sqrt(p_i tau) |z_i|^-1 factor (h_i - (h_i . u) u),   h = row i of W X^, u = X^_i / |X^_i|;
//
// the projection removes every multiple of the identity from W, which is why a centered W may be
// used. A row that was not divided by its own norm is not projected and gets `identity` back.

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/stages.h"

namespace vne {
namespace {

// A factor beyond it, of a row all but zero, would make NaN of an entry that is 0.
template <typename T>
bool is_in_range(double factor) {
  return std::abs(factor) <= std::numeric_limits<T>::max();
}

}  // namespace

template <typename T>
void gradient(const Problem& problem, const Rows<T>& rows, const T* w, double factor,
              double identity, T* grad_z, T* grad_weights) {
  const int64_t n = problem.n, d = problem.d;
  const MatrixView<T> x = row_major<T>(rows.x.get(), d), w_view = row_major<T>(w, problem.m());
  if (problem.gram_side()) {
    multiply<T>(n, d, n, w_view, x, grad_z);
  } else {
    multiply<T>(n, d, d, x, w_view, grad_z);
  }

  const simd::Kernels<T>& simd = simd::kernels<T>();
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / d);
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Row& row = rows.row[i];
      const T* x_i = &rows.x[i * d];
      T* h_i = grad_z + i * d;
      if (row.weight == 0 || row.inverse_norm == 0) {  // an absent sample, or a zero row
        fill(h_i, d, 0);
        if (grad_weights) grad_weights[i] = 0;
        continue;
      }
      const double radial = simd.dot(h_i, x_i, d);
      const double outer = factor * std::sqrt(row.weight * rows.trace) * row.inverse_norm;
      const double inner = row.projected ? -radial / simd.sum_of_squares(x_i, d) : identity;
      if (problem.m() == 1 && row.projected) {
        fill(h_i, d, 0);  // W is a number: exactly 0, without the rounding of the projection
      } else if (!is_in_range<T>(outer) || !is_in_range<T>(outer * inner)) {
        for (int64_t j = 0; j < d; ++j) h_i[j] = static_cast<T>(outer * (h_i[j] + inner * x_i[j]));
      } else {
        simd.combine(static_cast<T>(outer), h_i, static_cast<T>(outer * inner), x_i, h_i, d);
      }
      if (grad_weights) {
        // d/dp_i = factor / 2 * u_i^T (W + identity I) u_i
        grad_weights[i] = static_cast<T>(
            factor / 2 * (radial * rows.trace / row.weight + identity * row.square_norm));
      }
    }
  });
}

template <typename T>
bool add_transpose(const T* from, int64_t m, double divisor, T* to) {
  T residue = 0;  // stays 0; x - x is NaN for a NaN and for an infinity
  visit_lower(m, [&](int64_t i, int64_t j) {
    const double sum = static_cast<double>(from[i * m + j]) + from[j * m + i];
    const T entry = static_cast<T>(sum / divisor);
    to[i * m + j] = to[j * m + i] = entry;
    residue += entry - entry;
  });
  return residue == 0;
}

#define VNE_INSTANTIATE(T)                                                                  \
  template void gradient(const Problem&, const Rows<T>&, const T*, double, double, T*, T*); \
  template bool add_transpose(const T*, int64_t, double, T*);
VNE_INSTANTIATE(float)
VNE_INSTANTIATE(double)
#undef VNE_INSTANTIATE

}  // namespace vne
