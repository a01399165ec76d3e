// log A^ by way of a tridiagonal matrix, A^ = Q T Q^T: csrc/README.md, (7).
//
// A pole of T takes m^2 operations. Householder's reduction takes 4/3 m^3 and the way back 2 m^3,
// while 16 sweeps of A^ itself (poles.cpp) take 16 m^3. Threads could share out the sweeps, but not
// the reduction, whose steps wait for each other.
//
// Reduction: H_k = I - tau_k v_k v_k^T makes the entries of row k beyond k + 1 zero. With
// p = tau A v and w = p - tau/2 (p . v) v, H A H = A - v w^T - w v^T. The update of one step and
// the product A v of the next are one pass over the upper triangle.
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

// Rows of so many numbers do not fall on the same places of the caches.
int64_t padded(int64_t m) {
  const int64_t size = ceil_div(m, simd::kPadding) * simd::kPadding;
  return size % 256 == 0 ? size + simd::kPadding : size;
}

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
  Buffer<float> w(stride), y(stride);
  for (int64_t i = 0; i < m; ++i) {
    std::copy_n(matrix + i * m, m, &a[i * stride]);
    fill(&a[i * stride + m], stride - m, 0);
  }
  fill(w.get(), stride, 0);
  const float* before = w.get();  // the v whose update is still to be made; at first 0
  for (int64_t k = 0; k + 1 < m; ++k) {
    float* v = &a[k * stride];
    result.diagonal[k] = v[k];
    fill(v, k + 1, 0);
    double tau;
    result.off_diagonal[k] = householder(v + k + 1, m - k - 1, v + k + 1, &tau);
    result.tau[k] = static_cast<float>(tau);
    reduction.reflect(a, stride, k + 1, m, before, w.get(), v, y.get());

    const double half = tau * tau / 2 * simd.dot(&y[k + 1], v + k + 1, m - k - 1);
    fill(w.get(), k + 1, 0);
    simd.combine(static_cast<float>(tau), &y[k + 1], static_cast<float>(-half), v + k + 1,
                 &w[k + 1], m - k - 1);
    // The row that the next reflector is made of is wanted at once.
    float* next = v + stride;
    const float of_v = -w[k + 1], of_w = -v[k + 1];
    simd.combine(1, next + k + 1, of_v, v + k + 1, next + k + 1, m - k - 1);
    simd.combine(1, next + k + 1, of_w, &w[k + 1], next + k + 1, m - k - 1);
    before = v;
  }
  result.diagonal[m - 1] = a[(m - 1) * stride + m - 1];
  return result;
}

// f <- Q f Q^T for a symmetric f [m, m], whole. Of both sides at once, and of one triangle: half of
// the operations that Q f and then (Q f) Q^T take. A panel of reflectors is P = I - V^T S V on the
// places from `from` on. With U = S V, M = f U^T and W = M - 1/2 V^T (U M),
//
//   P f P^T = f - V^T W^T - W V,
//
// where M and W have the places before `from`, too. V is zero there.
void conjugate_by_q(const Reduction& q, int64_t m, float* f) {
  const simd::Kernels<float>& simd = simd::kernels<float>();
  const int64_t stride = padded(m), reflectors = m - 1;
  const int64_t tile_rows = simd.tile_rows, tile_cols = simd.tile_cols;
  // A multiple of tile_rows: then the blocks on the diagonal that are kept whole, of tile_rows rows
  // from `from` on, are the same for every panel. More reflectors are fewer passes over f, and more
  // operations on the panel.
  const int64_t panel = (m <= 256 ? 16 : 32) / tile_rows * tile_rows;
  Buffer<float> gram(panel * panel), s(panel * panel), u(panel * m), inner(panel * panel);
  Buffer<float> vw(m * 2 * panel);  // row i: column i of V, then row i of -W
  Buffer<float> packed_u(ceil_div(panel, tile_cols) * m * tile_cols);
  Buffer<float> packed((ceil_div(m, tile_cols) + 1) * 2 * panel * tile_cols);
  for (int64_t first = (reflectors - 1) / panel * panel; first >= 0; first -= panel) {
    const int64_t size = std::min(panel, reflectors - first), from = first + 1, rows = m - from;
    const int64_t width = 2 * size;
    float* w = &vw[size];
    const MatrixView<float> v = row_major<float>(&q.v[first * stride + from], stride);
    multiply<float>(size, size, rows, v, transposed(v), gram.get());
    triangular_factor(gram.get(), &q.tau[first], size, s.get());
    simd.scale(s.get(), -1.0F, s.get(), size * size);
    multiply<float>(size, rows, size, row_major<float>(s.get(), size), v, u.get());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < size; ++k) vw[(from + i) * width + k] = v.data[k * stride + i];
    }

    // -M, of the lower triangle of f: along the rows up to the diagonal, then down the columns
    for (int64_t column = 0; column * tile_cols < size; ++column) {
      const int64_t j = column * tile_cols;
      simd.pack(rows, static_cast<int>(std::min(tile_cols, size - j)), {&u[j * rows], 1, rows},
                nullptr, &packed_u[column * m * tile_cols]);
    }
    const int64_t grain = std::max<int64_t>(1, (1 << 19) / (size * rows * tile_rows));
    const int64_t before = ceil_div(from, tile_rows);  // tiles in the places before `from`
    torch::stable::parallel_for(
        0, before + ceil_div(rows, tile_rows), grain, [&](int64_t begin, int64_t end) {
          for (int64_t tile = begin; tile < end; ++tile) {
            const bool outside = tile < before;
            const int64_t i = outside ? tile * tile_rows : from + (tile - before) * tile_rows;
            const int count = static_cast<int>(std::min(tile_rows, (outside ? from : m) - i));
            const int64_t along = outside ? 0 : i + count - from;  // places along the rows
            for (int64_t j = 0; j < size; j += tile_cols) {
              const int cols = static_cast<int>(std::min(tile_cols, size - j));
              const float* part = &packed_u[j * m];
              float* to = w + i * width + j;
              if (along > 0)
                simd.multiply_tile(along, {f + i * m + from, m, 1}, part, to, width, count, cols,
                                   false);
              if (along < rows)
                simd.multiply_tile(rows - along, {f + (from + along) * m + i, 1, m},
                                   part + along * tile_cols, to, width, count, cols, along > 0);
            }
          }
        });

    // -W
    multiply<float>(size, size, rows, row_major<float>(u.get(), rows),
                    row_major<float>(w + from * width, width), inner.get());
    simd.scale(inner.get(), 0.5F, inner.get(), size * size);
    for (int64_t j = 0; j < size; j += tile_cols) {
      const int cols = static_cast<int>(std::min(tile_cols, size - j));
      simd.pack(size, cols, {&inner[j], size, 1}, nullptr, packed.get());
      multiply_column(rows, cols, size, {&vw[from * width], width, 1}, packed.get(),
                      w + from * width + j, width);
    }

    // f, of whose lower triangle each column of tiles is one product
    const int64_t columns = ceil_div(from, tile_cols), all = columns + ceil_div(rows, tile_cols);
    torch::stable::parallel_for(
        0, all, std::max<int64_t>(1, (1 << 19) / (2 * size * rows * tile_cols)),
        [&](int64_t begin, int64_t end) {
          for (int64_t column = begin; column < end; ++column) {
            const bool outside = column < columns;
            const int64_t j = outside ? column * tile_cols : from + (column - columns) * tile_cols;
            const int cols = static_cast<int>(std::min(tile_cols, (outside ? from : m) - j));
            float* part = &packed[column * 2 * panel * tile_cols];
            simd.pack(size, cols, {w + j * width, 1, width}, nullptr, part);
            const int64_t i = outside ? from : from + (j - from) / tile_rows * tile_rows;
            if (!outside)
              simd.pack(size, cols, {&vw[j * width], 1, width}, nullptr, part + size * tile_cols);
            multiply_column(m - i, cols, outside ? size : width, {&vw[i * width], width, 1}, part,
                            f + i * m + j, m);
          }
        });
  }
  simd.mirror_lower(f, m);
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
  simd::kernels<float>().mirror_lower(f, m);
}

// A smaller pivot of T + t may be rounding: 4 u |A^|_F.
double least_pivot(const float* a, int64_t m) {
  constexpr double kEpsilon = std::numeric_limits<float>::epsilon();  // 2 u
  return 2 * kEpsilon * std::sqrt(simd::kernels<float>().sum_of_squares(a, m * m));
}

// T alone. A pass that reads and writes the matrix is the faster one while it stays in the caches.
Tridiagonal tridiagonal(const float* a, int64_t m) {
  constexpr int64_t kInCaches = 896;
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
  conjugate_by_q(q, m, result);
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
