// The eigenvalues of a symmetric matrix without its eigenvectors: A = Q T Q^T with T tridiagonal,
// then the eigenvalues of T. LAPACK's way (sytrd, sterf), written here because the LAPACK behind
// torch takes up to twice as long, and must not be called from several threads (stages.h).
//
// Reduction. H_k = I - tau v v^T makes the entries of row k beyond k + 1 zero; with p = tau A v and
// w = p - tau/2 (p . v) v, H A H = A - v w^T - w v^T. These updates are put off for a panel of
// steps: what a step needs of the matrix is one row, which is brought up to date by itself, and the
// product A v, which is that of the matrix before the panel, corrected. At the panel's end they are
// one product of matrices. Half of the operations are in the products A v, which are as fast as
// memory gives A: its upper triangle is read, once.
//
// Larger matrices are reduced to a band first, a panel of rows at a time. Then A is multiplied by a
// panel of vectors at once, at the speed of arithmetic, not of memory. simd/band.h reduces the band
// to a tridiagonal matrix, in comparatively few operations.
//
// Eigenvalues of T. The variant by Pal, Walker and Kahan of the QL algorithm works on the squares
// of the off-diagonal entries, without square roots; in double for either type, as T is small. Each
// step makes the entry next to one eigenvalue vanish, cubically.

#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/stages.h"

namespace vne {
namespace {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon() / 2;

// Steps whose updates are made at once: each costs corrections that grow with it.
int64_t panel_size(int64_t m) { return m <= 96 ? 8 : 16; }

// From this side on the reduction by a band takes less time (bench/NOTES.md).
template <typename T>
constexpr int64_t kByBand = sizeof(T) == 8 ? 384 : 896;

// Rows of so many numbers do not fall on the same places of the caches.
template <typename T>
int64_t leading(int64_t m) {
  const int64_t ld = ceil_div(m, simd::kPadding) * simd::kPadding;
  return ld * static_cast<int64_t>(sizeof(T)) % 1024 == 0 ? ld + simd::kPadding : ld;
}

// a -= V^T W + W^T V in the upper triangle from row and column `from` on; vw [2 size, ld] has the
// rows of V, then those of W.
template <typename T>
void update(T* a, int64_t m, int64_t ld, int64_t from, const T* vw, int64_t size) {
  const simd::Kernels<T>& simd = simd::kernels<T>();
  const int64_t tile_rows = simd.tile_rows, tile_cols = simd.tile_cols, side = m - from;
  const std::vector<T> minus(size, T(-1));
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / (size * side * tile_cols));
  torch::stable::parallel_for(0, ceil_div(side, tile_cols), grain, [&](int64_t begin, int64_t end) {
    Buffer<T> packed(2 * size * tile_cols);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t j = from + tile * tile_cols;
      const int cols = static_cast<int>(std::min(tile_cols, m - j));
      simd.pack(size, cols, {vw + size * ld + j, ld, 1}, minus.data(), packed.get());
      simd.pack(size, cols, {vw + j, ld, 1}, minus.data(), &packed[size * tile_cols]);
      for (int64_t i = from; i < j + cols; i += tile_rows) {
        const int rows = static_cast<int>(std::min(tile_rows, m - i));
        simd.multiply_tile(2 * size, {vw + i, 1, ld}, packed.get(), a + i * ld + j, ld, rows, cols,
                           true);
      }
    }
  });
}

// The sum of the squares of a's entries in the rows and columns from `from` on.
template <typename T>
double square_norm(const T* a, int64_t m, int64_t ld, int64_t from) {
  double sum = 0;
  for (int64_t i = from; i < m; ++i) {
    const T* row = a + i * ld;
    const double on = row[i];
    sum += on * on + 2 * simd::kernels<T>().sum_of_squares(row + i + 1, m - i - 1);
  }
  return sum;
}

// The square of the norm below which a remaining part is rounding: a matrix of rank r has only that
// left after little more than r steps. Then they end, as the off-diagonal entries of that part move
// no eigenvalue by more than its norm.
template <typename T>
double negligible_part(const T* a, int64_t m, int64_t ld) {
  constexpr double kRounding = 4 * std::numeric_limits<T>::epsilon();
  return kRounding * kRounding * square_norm(a, m, ld, 0);
}

// Returns whether a is that small from `from` on. For most matrices the diagonal shows that it is
// not.
template <typename T>
bool is_negligible(const T* a, int64_t m, int64_t ld, int64_t from, double negligible) {
  double sum = 0;
  for (int64_t i = from; i < m; ++i) sum += static_cast<double>(a[i * ld + i]) * a[i * ld + i];
  return sum <= negligible && square_norm(a, m, ld, from) <= negligible;
}

// T of a [m, ld], whose upper triangle is read and overwritten.
template <typename T>
void reduce(T* a, int64_t m, int64_t ld, double* diagonal, double* off_diagonal) {
  const simd::Kernels<T>& simd = simd::kernels<T>();
  const int64_t panel = panel_size(m);
  Buffer<T> vw(2 * panel * ld), y(m), of_v(panel), of_w(panel);
  T* v = vw.get();
  T* w = &vw[panel * ld];
  const double negligible = negligible_part(a, m, ld);
  for (int64_t first = 0; first < m; first += panel) {
    const int64_t size = std::min(panel, m - first);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t k = first + i, rest = m - k - 1;
      T* row = a + k * ld;
      for (int64_t l = 0; l < i; ++l) {
        of_v[l] = -w[l * ld + k];
        of_w[l] = -v[l * ld + k];
      }
      simd.add_rows(v, ld, i, k, m, of_v.get(), row);
      simd.add_rows(w, ld, i, k, m, of_w.get(), row);
      diagonal[k] = row[k];
      if (rest == 0) break;

      double tau;
      T* v_i = v + i * ld;
      T* w_i = w + i * ld;
      off_diagonal[k] = householder(row + k + 1, rest, v_i + k + 1, &tau);
      fill(&y[k + 1], rest, 0);
      simd.symmetric_multiply(a, ld, k + 1, m, v_i, y.get());
      simd.dots(w, ld, i, k + 1, m, v_i, of_v.get());
      simd.dots(v, ld, i, k + 1, m, v_i, of_w.get());
      simd.scale(of_v.get(), T(-1), of_v.get(), i);
      simd.scale(of_w.get(), T(-1), of_w.get(), i);
      simd.add_rows(v, ld, i, k + 1, m, of_v.get(), y.get());
      simd.add_rows(w, ld, i, k + 1, m, of_w.get(), y.get());
      const double half = tau * tau / 2 * simd.dot(&y[k + 1], v_i + k + 1, rest);
      simd.combine(static_cast<T>(tau), &y[k + 1], static_cast<T>(-half), v_i + k + 1, w_i + k + 1,
                   rest);
    }
    const int64_t next = first + size;
    if (next == m) return;
    // Columns up to the panel's end are done with, and those of V and W there are not set.
    update(a, m, ld, next, v, size);
    if (is_negligible(a, m, ld, next, negligible)) {
      for (int64_t k = next; k < m; ++k) diagonal[k] = a[k * ld + k];
      std::fill(off_diagonal + next, off_diagonal + m - 1, 0);
      return;
    }
  }
}

// x [m - from, kBand] <- A v^T for the A in the rows and columns of a from `from` on, v [kBand,
// ld]. Of A the upper triangle is read: above a tile of x down the columns, then along the rows.
template <typename T>
void multiply_symmetric(const T* a, int64_t m, int64_t ld, int64_t from, const T* v, T* x) {
  constexpr int64_t kBlock = 48;   // rows of x, a multiple of any tile's
  constexpr int64_t kDepth = 256;  // what is read of a stays in the caches for all tiles of a block
  const simd::Kernels<T>& simd = simd::kernels<T>();
  const int64_t tile_cols = simd.tile_cols, side = m - from;
  const int64_t tiles = ceil_div(simd::kBand, tile_cols);
  const auto cols_of = [&](int64_t tile) {
    return static_cast<int>(std::min(tile_cols, simd::kBand - tile * tile_cols));
  };
  Buffer<T> packed(tiles * side * tile_cols);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    simd.pack(side, cols_of(tile), {v + tile * tile_cols * ld + from, 1, ld}, nullptr,
              &packed[tile * side * tile_cols]);
  }
  const int64_t grain = std::max<int64_t>(1, (1 << 19) / (side * kBlock * simd::kBand));
  torch::stable::parallel_for(0, ceil_div(side, kBlock), grain, [&](int64_t begin, int64_t end) {
    Buffer<T> on_diagonal(kBlock * kBlock);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t top = block * kBlock, rows = std::min(kBlock, side - top);
      const int64_t bottom = top + rows;
      const T* own = a + (from + top) * ld + from;  // its columns count from `from` too
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = i; j < rows; ++j)
          on_diagonal[i * kBlock + j] = on_diagonal[j * kBlock + i] = own[i * ld + top + j];
      }
      bool accumulate = false;
      const auto add = [&](MatrixView<T> view, int64_t first, int64_t size) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          multiply_column(rows, cols_of(tile), size, view,
                          &packed[(tile * side + first) * tile_cols],
                          x + top * simd::kBand + tile * tile_cols, simd::kBand, accumulate);
        }
        accumulate = true;
      };
      add({on_diagonal.get(), kBlock, 1}, top, rows);
      for (int64_t k = 0; k < top; k += kDepth)
        add({a + (from + k) * ld + from + top, 1, ld}, k, std::min(kDepth, top - k));
      for (int64_t k = bottom; k < side; k += kDepth)
        add({own + k, ld, 1}, k, std::min(kDepth, side - k));
    }
  });
}

// The band of Q^T A Q for a [m, ld], whose upper triangle is read and overwritten. A panel of kBand
// rows at a time is made triangular beyond the band, by reflectors I - V^T S V; with X = A V^T and
// W = S^T (X^T - 1/2 V X S V) the rest becomes A - V^T W - W^T V. X is a product of matrices: what
// takes the time here is not memory.
//
// Returns the row from which on off-diagonal entries do not count, or m.
template <typename T>
int64_t reduce_to_band(T* a, int64_t m, int64_t ld) {
  constexpr int64_t kBand = simd::kBand;
  const simd::Kernels<T>& simd = simd::kernels<T>();
  Buffer<T> vw(2 * kBand * ld), x(m * kBand), product(kBand * m);
  Buffer<T> s(kBand * kBand), gram(kBand * kBand), inner(kBand * kBand), of_v(kBand), tau(kBand);
  T* v = vw.get();
  T* w = &vw[kBand * ld];
  const double negligible = negligible_part(a, m, ld);
  for (int64_t first = 0; first + kBand < m; first += kBand) {
    const int64_t from = first + kBand, rest = m - from;
    for (int64_t i = 0; i < kBand; ++i) {
      T* row = a + (first + i) * ld;
      T* v_i = v + i * ld;
      const int64_t start = std::min(from + i, m - 1);  // of one entry nothing is left to do
      fill(v_i + from, start - from, 0);
      double factor_of_v;
      row[start] = static_cast<T>(householder(row + start, m - start, v_i + start, &factor_of_v));
      tau[i] = static_cast<T>(factor_of_v);
      const int64_t others = kBand - 1 - i;
      simd.dots(row + ld, ld, others, start, m, v_i, of_v.get());
      for (int64_t j = 0; j < others; ++j) {
        T* other = row + (1 + j) * ld;
        const T factor = -tau[i] * of_v[j];
        simd.add_rows(v_i, ld, 1, start, m, &factor, other);
      }
    }
    const MatrixView<T> of_rows = {v + from, ld, 1};
    multiply<T>(kBand, kBand, rest, of_rows, transposed(of_rows), gram.get());
    triangular_factor(gram.get(), tau.get(), kBand, s.get());
    multiply_symmetric(a, m, ld, from, v, x.get());
    const MatrixView<T> s_transposed = {s.get(), 1, kBand};
    multiply<T>(kBand, rest, kBand, s_transposed, {x.get(), 1, kBand}, product.get());  // S^T X^T
    multiply<T>(kBand, kBand, rest, of_rows, {product.get(), 1, rest}, gram.get());     // V X S
    multiply<T>(kBand, kBand, kBand, s_transposed, row_major<T>(gram.get(), kBand), inner.get());
    simd.scale(inner.get(), T(-0.5), inner.get(), kBand * kBand);
    for (int64_t i = 0; i < kBand; ++i) {
      std::copy_n(&product[i * rest], rest, w + i * ld + from);
      simd.add_rows(v, ld, kBand, from, m, &inner[i * kBand], w + i * ld);
    }
    update(a, m, ld, from, v, kBand);
    if (is_negligible(a, m, ld, from, negligible)) return from;
  }
  return m;
}

// T of a [m, ld] by way of a band.
template <typename T>
void reduce_by_band(T* a, int64_t m, int64_t ld, double* diagonal, double* off_diagonal) {
  constexpr int64_t kBand = simd::kBand, kRow = simd::kBandRow, kOn = kBand - 1;
  const int64_t end = reduce_to_band(a, m, ld), rows = std::min(m, end + kBand);
  Buffer<double> band((rows + 2 * kBand) * kRow);
  fill(band.get(), (rows + 2 * kBand) * kRow, 0);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t last = i < end ? std::min(rows - 1, i + kBand) : i;
    for (int64_t j = i; j <= last; ++j) {
      const double entry = a[i * ld + j];
      band[i * kRow + kOn + j - i] = entry;
      if (j < i + kBand) band[j * kRow + kOn + i - j] = entry;
    }
  }
  simd::tables().reduction.tridiagonalize_band(band.get(), rows, diagonal, off_diagonal);
  for (int64_t i = rows; i < m; ++i) {
    diagonal[i] = a[i * ld + i];
    off_diagonal[i - 1] = 0;
  }
}

// The eigenvalues of [[a, b], [b, c]].
std::pair<double, double> of_two_by_two(double a, double square_b, double c) {
  const double sum = a + c, root = std::sqrt((a - c) * (a - c) + 4 * square_b);
  const double larger = (sum + std::copysign(root, sum)) / 2;  // in size
  if (larger == 0) return {0, 0};
  const double high = std::abs(a) > std::abs(c) ? a : c, low = std::abs(a) > std::abs(c) ? c : a;
  return {larger, high / larger * low - square_b / larger};
}

// One step of QL on the rows first .. last of T, d its diagonal and e2 the squares of its
// off-diagonal. With c = p / r and s = square / r, a row is gamma <- c (d - sigma) - s gamma and
// p <- gamma^2 / c. Of these divisions, one after the other, the rows would spend their time
// waiting: p is found without gamma.
void ql_step(double* d, double* e2, int64_t first, int64_t last) {
  constexpr double kTooSmall = 1e-200;  // to divide by
  const double root = std::sqrt(e2[first]), theta = (d[first + 1] - d[first]) / (2 * root);
  const double sigma =
      d[first] - root / (theta + std::copysign(std::sqrt(theta * theta + 1), theta));
  double c = 1, s = 0, gamma = d[last] - sigma, p = gamma * gamma;
  for (int64_t i = last - 1; i >= first; --i) {
    const double square = e2[i], r = p + square, inverse = 1 / r, old_gamma = gamma, old_c = c;
    const double of_gamma = p * (d[i] - sigma) - square * gamma, of_p = p * r;
    e2[i + 1] = s * r;
    c = p * inverse;
    s = square * inverse;
    gamma = of_gamma * inverse;
    p = of_p > kTooSmall ? of_gamma * of_gamma / of_p : old_c * square;
    d[i + 1] = old_gamma + (d[i] - gamma);
  }
  e2[first] = s * p;
  d[first] = sigma + gamma;
}

// d [m] <- the eigenvalues of T, in no order; false if they were not found.
bool diagonalize(double* d, double* e2, int64_t m) {
  double largest = 0;
  for (int64_t i = 0; i < m; ++i) {
    largest = std::max(largest, std::abs(d[i]));
    if (i + 1 < m) largest = std::max(largest, std::sqrt(e2[i]));
  }
  // What is lost by leaving it out is within the rounding of the reduction.
  const double vanishing = kEpsilon * kEpsilon / 4 * largest * largest;
  const auto negligible = [&](int64_t i) {
    return e2[i] <= vanishing || e2[i] <= kEpsilon * kEpsilon * std::abs(d[i] * d[i + 1]);
  };
  int64_t steps = 30 * m;
  for (int64_t begin = 0; begin < m;) {
    int64_t end = begin;
    while (end + 1 < m && !negligible(end)) ++end;
    // QL finds the eigenvalue at the beginning first: small ones are best found before large.
    if (std::abs(d[end]) < std::abs(d[begin])) {
      std::reverse(d + begin, d + end + 1);
      std::reverse(e2 + begin, e2 + end);
    }
    while (begin <= end) {
      int64_t last = begin;
      while (last < end && !negligible(last)) ++last;
      if (last == begin) {
        ++begin;
      } else if (last == begin + 1) {
        std::tie(d[begin], d[last]) = of_two_by_two(d[begin], e2[begin], d[last]);
        begin += 2;
      } else {
        if (steps-- == 0) return false;
        ql_step(d, e2, begin, last);
      }
    }
  }
  return true;
}

// values [m] <- the eigenvalues of T, ascending; its diagonal and off-diagonal are overwritten.
template <typename T>
void of_tridiagonal(double* diagonal, double* off_diagonal, int64_t m, T* values) {
  for (int64_t i = 0; i + 1 < m; ++i) off_diagonal[i] *= off_diagonal[i];
  VNE_CHECK(diagonalize(diagonal, off_diagonal, m), "the eigenvalues were not found");
  std::sort(diagonal, diagonal + m);
  for (int64_t i = 0; i < m; ++i) values[i] = static_cast<T>(diagonal[i]);
}

}  // namespace

// What is too small to divide by, or its square to be exact, is left out: the trace is one.
template <typename T>
double householder(const T* x, int64_t size, T* v, double* tau) {
  constexpr double kNegligible = sizeof(T) == 8 ? 1e-290 : 1e-74;
  const double alpha = x[0];
  const double rest = size > 1 ? simd::kernels<T>().sum_of_squares(x + 1, size - 1) : 0;
  v[0] = 1;
  if (rest <= kNegligible) {
    *tau = 0;
    fill(v + 1, size - 1, 0);
    return alpha;
  }
  const double beta = -std::copysign(std::sqrt(alpha * alpha + rest), alpha);
  *tau = (beta - alpha) / beta;
  simd::kernels<T>().scale(x + 1, static_cast<T>(1 / (alpha - beta)), v + 1, size - 1);
  return beta;
}

template <typename T>
void triangular_factor(const T* gram, const T* tau, int64_t size, T* s) {
  fill(s, size * size, 0);
  for (int64_t j = 0; j < size; ++j) {
    for (int64_t i = 0; i < j; ++i) {
      T sum = 0;
      for (int64_t k = i; k < j; ++k) sum += s[i * size + k] * gram[k * size + j];
      s[i * size + j] = -tau[j] * sum;
    }
    s[j * size + j] = tau[j];
  }
}

template <typename T>
void tridiagonalize(const T* a, int64_t m, double* diagonal, double* off_diagonal) {
  const int64_t ld = leading<T>(m);
  Buffer<T> work(m * ld);
  for (int64_t i = 0; i < m; ++i) std::copy_n(a + i * m + i, m - i, &work[i * ld + i]);
  if (m < kByBand<T>) {
    reduce(work.get(), m, ld, diagonal, off_diagonal);
  } else {
    reduce_by_band(work.get(), m, ld, diagonal, off_diagonal);
  }
}

template <typename T>
void eigenvalues(const T* a, int64_t m, T* values) {
  std::vector<double> diagonal(m), off_diagonal(m);
  tridiagonalize(a, m, diagonal.data(), off_diagonal.data());
  of_tridiagonal(diagonal.data(), off_diagonal.data(), m, values);
}

template <typename T>
void eigenvalues(const std::complex<T>* a, int64_t m, T* values) {
  constexpr double kRounding = 4 * std::numeric_limits<T>::epsilon();
  const int64_t stride = leading<T>(m);
  Buffer<T> work((m + 4) * 2 * stride);
  double square_norm = 0;
  for (int64_t i = 0; i < m; ++i) {
    T* real = &work[i * 2 * stride];
    T* imaginary = real + stride;
    // The upper triangle, and what the kernel reads whole.
    for (int64_t j = i / simd::kPadding * simd::kPadding; j < i; ++j) {
      real[j] = work[j * 2 * stride + i];
      imaginary[j] = -work[(j * 2 + 1) * stride + i];
    }
    for (int64_t j = i; j < m; ++j) {
      real[j] = a[i * m + j].real();
      imaginary[j] = j == i ? T(0) : a[i * m + j].imag();
    }
    fill(real + m, stride - m, 0);
    fill(imaginary + m, stride - m, 0);
    const simd::Kernels<T>& simd = simd::kernels<T>();
    square_norm += static_cast<double>(real[i]) * real[i] +
                   2 * (simd.sum_of_squares(real + i + 1, m - i - 1) +
                        simd.sum_of_squares(imaginary + i + 1, m - i - 1));
  }
  std::vector<double> diagonal(m), off_diagonal(m);
  simd::kernels<T>().tridiagonalize_hermitian(
      work.get(), m, stride, kRounding * kRounding * square_norm, &work[m * 2 * stride],
      diagonal.data(), off_diagonal.data());
  of_tridiagonal(diagonal.data(), off_diagonal.data(), m, values);
}

template double householder(const float*, int64_t, float*, double*);
template void triangular_factor(const float*, const float*, int64_t, float*);
template void tridiagonalize(const float*, int64_t, double*, double*);
template void eigenvalues(const float*, int64_t, float*);
template void eigenvalues(const double*, int64_t, double*);
template void eigenvalues(const std::complex<float>*, int64_t, float*);
template void eigenvalues(const std::complex<double>*, int64_t, double*);

}  // namespace vne
