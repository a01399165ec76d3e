// The eigenvalues of a symmetric or Hermitian matrix without its eigenvectors: A = Q T Q^H with T
// real and tridiagonal, then the eigenvalues of T. LAPACK's way (sytrd, sterf), written here
// because the LAPACK behind torch takes up to three times as long, and must not be called from
// several threads (stages.h).
//
// Reduction. H = I - v v^H makes the entries of a row beyond the off-diagonal zero; with p = A v
// and w = p - 1/2 (v^H p) v, H A H = A - v w^H - w v^H. This update and the product A v of the next
// step are one pass over the upper triangle: LAPACK's two read it twice, as a panel's updates at
// once do not help the products. A row is brought up to date ahead of the pass, to make the next v
// of.
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

// Rows of so many numbers do not fall on the same places of the caches.
template <typename T>
int64_t leading(int64_t m) {
  const int64_t ld = ceil_div(m, simd::kPadding) * simd::kPadding;
  return ld * static_cast<int64_t>(sizeof(T)) % 1024 == 0 ? ld + simd::kPadding : ld;
}

void share(int64_t count, void (*body)(const void*, int64_t), const void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) body(context, item);
  });
}

// The real (part 0) or imaginary part of an entry.
template <typename T>
T part_of(T entry, int) {
  return entry;
}
template <typename T>
T part_of(std::complex<T> entry, int part) {
  return part == 0 ? entry.real() : entry.imag();
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

template <typename Entry>
void tridiagonalize(const Entry* a, int64_t m, double* diagonal, double* off_diagonal) {
  using T = decltype(std::real(Entry()));
  constexpr int kParts = sizeof(Entry) / sizeof(T);
  const simd::Kernels<T>& simd = simd::kernels<T>();
  const int64_t stride = leading<T>(m), row_size = kParts * stride;
  Buffer<T> rows((m + simd::kWorkRows) * row_size);
  double square_norm = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int part = 0; part < kParts; ++part) {
      T* row = &rows[i * row_size + part * stride];
      for (int64_t j = i / simd::kPadding * simd::kPadding; j < i; ++j) {
        const T mirrored = rows[j * row_size + part * stride + i];
        row[j] = part == 0 ? mirrored : -mirrored;
      }
      for (int64_t j = i; j < m; ++j) row[j] = part_of(a[i * m + j], part);
      if (part == 1) row[i] = 0;
      fill(row + m, stride - m, 0);
      const double on = row[i];
      square_norm += on * on + 2 * simd.sum_of_squares(row + i + 1, m - i - 1);
    }
  }
  // A matrix of rank r has only rounding left after little more than r steps. They end there, as
  // the off-diagonal entries of that part move no eigenvalue by more than its norm.
  constexpr double kRounding = 4 * std::numeric_limits<T>::epsilon();
  const auto run = kParts == 2 ? simd.tridiagonalize_hermitian : simd.tridiagonalize_symmetric;
  run(rows.get(), m, stride, kRounding * kRounding * square_norm, share, &rows[m * row_size],
      diagonal, off_diagonal);
}

template <typename T>
void eigenvalues(const T* a, int64_t m, T* values) {
  std::vector<double> diagonal(m), off_diagonal(m);
  tridiagonalize(a, m, diagonal.data(), off_diagonal.data());
  of_tridiagonal(diagonal.data(), off_diagonal.data(), m, values);
}

template <typename T>
void eigenvalues(const std::complex<T>* a, int64_t m, T* values) {
  std::vector<double> diagonal(m), off_diagonal(m);
  tridiagonalize(a, m, diagonal.data(), off_diagonal.data());
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
