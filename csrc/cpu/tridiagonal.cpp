// log A^ by way of a tridiagonal matrix, A^ = Q T Q^T: csrc/README.md, (7).
//
// A pole of T takes m^2 operations. Householder's reduction takes 2 m^3 and the way back 4 m^3,
// while 16 sweeps of A^ itself (poles.cpp) take 16 m^3. Threads could share out the sweeps, but not
// the reduction, whose steps wait for each other.
//
// Reduction: H_k = I - tau_k v_k v_k^T makes the entries of row k beyond k + 1 zero. With
// p = tau A v and w = p - tau/2 (p . v) v, H A H = A - v w^T - w v^T. The update of one step and
// the product A v of the next are one pass over the matrix.
//
// All is float32 but the pivots of the poles. Where one cannot be distinguished from rounding the
// inverse means nothing, and the sweeps take over.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "common/pole_table.h"
#include "cpu/stages.h"

namespace vne {
namespace {

using Table = PoleTable<float>;
constexpr int kPoles = Table::kSize;

int64_t padded(int64_t m) { return ceil_div(m, simd::kPadding) * simd::kPadding; }

struct Tridiagonal {
  explicit Tridiagonal(int64_t m) : diagonal(m), off_diagonal(std::max<int64_t>(m - 1, 0)) {}
  std::vector<double> diagonal, off_diagonal;
};

// A^ = Q T Q^T with Q = H_0 ... H_{m-2}.
struct Reduction : Tridiagonal {
  explicit Reduction(int64_t m) : Tridiagonal(m), tau(m), v(m * padded(m)) {}
  std::vector<float> tau;
  Buffer<float> v;  // [m, padded]: row k is 0 up to k, 1 at k + 1
};

Reduction reduce(const float* matrix, int64_t m) {
  const simd::Kernels<float>& simd = simd::kernels<float>();
  const simd::ReductionKernels& reduction = simd::tables().reduction;
  const int64_t stride = padded(m);
  Reduction result(m);
  float* a = result.v.get();  // a row is not read again once its reflector is made
  Buffer<float> zero(stride), w(stride), y(stride);
  for (int64_t i = 0; i < m; ++i) {
    std::copy_n(matrix + i * m, m, &a[i * stride]);
    fill(&a[i * stride + m], stride - m, 0);
  }
  fill(zero.get(), stride, 0);
  fill(w.get(), stride, 0);
  const float* before = zero.get();  // the v whose update is still to be made
  for (int64_t k = 0; k + 1 < m; ++k) {
    float* v = &a[k * stride];
    result.diagonal[k] = v[k];
    fill(v, k + 1, 0);
    double tau;
    result.off_diagonal[k] = householder(v + k + 1, m - k - 1, v + k + 1, &tau);
    result.tau[k] = static_cast<float>(tau);
    reduction.reflect(a, stride, k + 1, m, k, before, w.get(), v, y.get());

    const double half = tau * tau / 2 * simd.dot(&y[k + 1], v + k + 1, m - k - 1);
    fill(w.get(), k + 1, 0);
    simd.combine(static_cast<float>(tau), &y[k + 1], static_cast<float>(-half), v + k + 1,
                 &w[k + 1], m - k - 1);
    // The row that the next reflector is made of is wanted at once.
    reduction.reflect(a, stride, k + 1, k + 2, k + 1, v, w.get(), zero.get(), y.get());
    before = v;
  }
  result.diagonal[m - 1] = a[(m - 1) * stride + m - 1];
  return result;
}

// f <- Q f for f [m, m].
void multiply_by_q(const Reduction& q, int64_t m, float* f) {
  const simd::Kernels<float>& simd = simd::kernels<float>();
  const int64_t stride = padded(m), reflectors = m - 1;
  // Reflectors multiplied on at a time: many make few passes over f, and waste a larger triangle.
  const int64_t panel = m <= 256 ? 32 : 64;
  const int64_t tile_cols = simd.tile_cols;
  Buffer<float> gram(panel * panel), s(panel * panel), product(panel * m), weighted(panel * m);
  Buffer<float> packed(ceil_div(m, tile_cols) * panel * tile_cols);
  for (int64_t first = (reflectors - 1) / panel * panel; first >= 0; first -= panel) {
    // H_first ... = I - V^T S V on the rows from first + 1 on; S is upper triangular.
    const int64_t size = std::min(panel, reflectors - first), from = first + 1, rows = m - from;
    const MatrixView<float> v = row_major<float>(&q.v[first * stride + from], stride);
    multiply<float>(size, size, rows, v, transposed(v), gram.get());
    triangular_factor(gram.get(), &q.tau[first], size, s.get());
    simd.scale(s.get(), -1.0F, s.get(), size * size);
    multiply<float>(size, m, rows, v, row_major<float>(f + from * m, m), product.get());
    multiply<float>(size, m, size, row_major<float>(s.get(), size),
                    row_major<float>(product.get(), m), weighted.get());
    torch::stable::parallel_for(
        0, ceil_div(m, tile_cols), std::max<int64_t>(1, (1 << 19) / (size * rows * tile_cols)),
        [&](int64_t begin, int64_t end) {
          for (int64_t column = begin; column < end; ++column) {
            const int64_t j = column * tile_cols;
            const int cols = static_cast<int>(std::min(tile_cols, m - j));
            float* part = &packed[column * panel * tile_cols];
            simd.pack(size, cols, {&weighted[j], m, 1}, nullptr, part);
            multiply_column(rows, cols, size, transposed(v), part, f + from * m + j, m);
          }
        });
  }
}

// What the poles of T need: for pole k and place i, [m, poles].
struct Pivots {
  std::vector<double> inverse;  // (T + t)^-1_ii
  std::vector<double> ratio;    // (T + t)^-1_ij / (T + t)^-1_{i,j-1}, at j
};

// False if T + t is not safely positive definite for the smallest t, and so for one of them.
bool eliminate(const Tridiagonal& q, int64_t m, double floor, Pivots* pivots) {
  const auto next = simd::tables().reduction.next_pivots;
  double t[kPoles], pivot[kPoles];
  for (int k = 0; k < kPoles; ++k) t[k] = Table::kPoles[k].t;
  const auto square = [&](int64_t i) { return q.off_diagonal[i] * q.off_diagonal[i]; };
  pivots->inverse.resize(m * kPoles);
  pivots->ratio.resize(m * kPoles);

  std::fill_n(pivot, kPoles, 1);
  for (int64_t i = 0; i < m; ++i) {
    next(kPoles, q.diagonal[i], t, i == 0 ? 0 : square(i - 1), pivot);
    if (!(pivot[0] >= floor)) return false;
    std::copy_n(pivot, kPoles, &pivots->inverse[i * kPoles]);
  }
  std::fill_n(pivot, kPoles, 1);
  for (int64_t i = m - 1; i >= 0; --i) {
    next(kPoles, q.diagonal[i], t, i == m - 1 ? 0 : square(i), pivot);
    if (!(pivot[0] >= floor)) return false;
    double* inverse = &pivots->inverse[i * kPoles];
    double* ratio = &pivots->ratio[i * kPoles];
    const double off_diagonal = i == 0 ? 0 : -q.off_diagonal[i - 1];
    for (int k = 0; k < kPoles; ++k) {
      inverse[k] = 1 / (inverse[k] + pivot[k] - q.diagonal[i] - t[k]);
      ratio[k] = off_diagonal / pivot[k];
    }
  }
  return true;
}

// f [m, m] <- log T + shift I, whole.
void log_of_tridiagonal(const Pivots& pivots, int64_t m, double shift, float* f) {
  constexpr double kNoRatio = 1e-10;  // the product with what `advance` keeps is not denormal
  const int64_t stride = padded(m);
  Buffer<float> running(kPoles * stride), row(stride);
  fill(running.get(), kPoles * stride, 0);
  float ratio[kPoles];
  for (int64_t j = 0; j < m; ++j) {
    for (int k = 0; k < kPoles; ++k) {
      const double exact = pivots.ratio[j * kPoles + k];
      ratio[k] = static_cast<float>(std::abs(exact) < kNoRatio ? 0 : exact);
    }
    fill(row.get(), stride, 0);
    simd::tables().reduction.advance(kPoles, ratio, running.get(), stride, row.get(), j);
    double sum = Table::kConstant + shift;
    for (int k = 0; k < kPoles; ++k) {
      const double entry = -Table::kPoles[k].w * pivots.inverse[j * kPoles + k];
      running[k * stride + j] = static_cast<float>(entry);
      sum += entry;
    }
    std::copy_n(row.get(), j, f + j * m);
    f[j * m + j] = static_cast<float>(sum);
  }
  mirror_lower(f, m);
}

// A smaller pivot of T + t may be rounding: 4 u |A^|_F.
double least_pivot(const float* a, int64_t m) {
  constexpr double kEpsilon = std::numeric_limits<float>::epsilon();  // 2 u
  return 2 * kEpsilon * std::sqrt(simd::kernels<float>().sum_of_squares(a, m * m));
}

// T alone. A pass that reads and writes the matrix is the faster one while it stays in the caches.
Tridiagonal tridiagonal(const float* a, int64_t m) {
  constexpr int64_t kInCaches = 768;
  if (m <= kInCaches) return reduce(a, m);
  Tridiagonal result(m);
  tridiagonalize(a, m, result.diagonal.data(), result.off_diagonal.data());
  return result;
}

}  // namespace

bool log_by_tridiagonal(const float* a, int64_t m, double shift, float* result) {
  const Reduction q = reduce(a, m);
  Pivots pivots;
  if (!eliminate(q, m, least_pivot(a, m), &pivots)) return false;
  log_of_tridiagonal(pivots, m, shift, result);
  multiply_by_q(q, m, result);
  // Q (Q f)^T = Q f Q^T, as f is symmetric.
  visit_lower(m, [=](int64_t i, int64_t j) { std::swap(result[i * m + j], result[j * m + i]); });
  multiply_by_q(q, m, result);
  return true;
}

bool entropy_by_tridiagonal(const float* a, int64_t m, double* entropy) {
  const Tridiagonal q = tridiagonal(a, m);
  Pivots pivots;
  if (!eliminate(q, m, least_pivot(a, m), &pivots)) return false;
  // -<T, log T>, which needs no more of log T than T has.
  double sum = 0;
  for (int64_t i = 0; i < m; ++i) {
    double on = Table::kConstant, off_diagonal = 0;
    for (int k = 0; k < kPoles; ++k) {
      const double entry = -Table::kPoles[k].w * pivots.inverse[i * kPoles + k];
      on += entry;
      if (i + 1 < m) off_diagonal += entry * pivots.ratio[(i + 1) * kPoles + k];
    }
    sum += q.diagonal[i] * on + (i + 1 < m ? 2 * q.off_diagonal[i] * off_diagonal : 0);
  }
  *entropy = -sum;
  return true;
}

}  // namespace vne
