// Rows to the unit sphere, and the Gram matrix or covariance of the smaller side: equations (1),
// (2).
//
// Norms are summed in double: for float32 input nothing can overflow or vanish. The rows are scaled
// once, by sqrt(p_i / tau) / |z_i|, so that the matrix product needs no factor and has trace one. A
// row of weight 0 is absent: what it holds, a NaN for example, is not read.

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/stages.h"

namespace vne {
namespace {

constexpr int64_t kGrainElements = 1 << 15;  // below this, a thread costs more than it gains

template <typename From, typename T>
const T* convert(const void* data, int64_t offset, int64_t size, T* buffer) {
  const From* from = static_cast<const From*>(data) + offset;
  for (int64_t j = 0; j < size; ++j) buffer[j] = static_cast<T>(static_cast<float>(from[j]));
  return buffer;
}

// Whether row_of converts the rows of z into its buffer.
template <typename T>
bool is_converted(const Input& z) {
  return z.is_half() || (sizeof(T) == 8 && z.dtype == ScalarType::Float);
}

template <typename T>
double norm(const T* x, int64_t size) {
  const double squares = simd::kernels<T>().sum_of_squares(x, size);
  if (squares > 1e-280 && squares < 1e300) return std::sqrt(squares);
  double largest = 0;  // zero, not finite, or a float64 beyond the range of its square
  for (int64_t j = 0; j < size; ++j) {
    const double entry = std::abs(static_cast<double>(x[j]));
    if (!(entry <= largest)) largest = entry;
    if (std::isnan(largest)) return largest;
  }
  if (largest == 0 || std::isinf(largest)) return largest;
  double scaled = 0;
  for (int64_t j = 0; j < size; ++j) scaled += (x[j] / largest) * (x[j] / largest);
  return largest * std::sqrt(scaled);
}

// to = from inverse_norm root. The product of the factors may be beyond the range of T, or of a
// double.
template <typename T>
void scale_row(const T* from, double inverse_norm, double root, T* to, int64_t size) {
  const double factor = inverse_norm * root;
  const double tiny = 0x1p20 * std::numeric_limits<T>::min();
  if (factor == 0 || (factor > tiny && factor < 1 / tiny)) {
    simd::kernels<T>().scale(from, static_cast<T>(factor), to, size);
  } else {
    for (int64_t j = 0; j < size; ++j) to[j] = static_cast<T>(from[j] * inverse_norm * root);
  }
}

}  // namespace

template <typename T>
const T* row_of(const Problem& problem, const Input& z, int64_t sample, int64_t i, T* buffer) {
  const int64_t offset = (sample * problem.n + i) * problem.d;
  if (z.dtype == ScalarType::Half)
    return convert<torch::headeronly::Half>(z.data, offset, problem.d, buffer);
  if (z.dtype == ScalarType::BFloat16)
    return convert<torch::headeronly::BFloat16>(z.data, offset, problem.d, buffer);
  if (is_converted<T>(z)) return convert<float>(z.data, offset, problem.d, buffer);
  return static_cast<const T*>(z.data) + offset;
}

template <typename T>
Row measure(const Problem& problem, const T* z, double weight) {
  Row row;
  if (weight == 0) return row;
  const double length = norm(z, problem.d);
  row.weight = weight;
  row.projected = problem.normalize && length > problem.eps;
  if (length != 0) row.inverse_norm = problem.normalize ? 1 / std::max(length, problem.eps) : 1.0;
  const double u_norm = length * row.inverse_norm;
  row.square_norm = row.projected ? 1.0 : u_norm * u_norm;
  if (!std::isfinite(length)) row.square_norm = std::numeric_limits<double>::quiet_NaN();
  return row;
}

template <typename T>
Rows<T> normalize(const Batch<T>& batch, int64_t sample) {
  const Problem& problem = batch.problem;
  const int64_t n = problem.n, d = problem.d;
  const T* weights = at(batch.weights, sample * n);
  Rows<T> rows(n, d);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / d);
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double weight =
          weights ? static_cast<double>(weights[i]) : 1.0 / static_cast<double>(n);
      rows.row[i] = measure(problem, row_of(problem, batch.z, sample, i, &rows.x[i * d]), weight);
    }
  });

  for (const Row& row : rows.row) {
    rows.trace += row.weight * row.square_norm;
    rows.valid = rows.valid && row.weight >= 0;
  }
  rows.valid = rows.valid && std::isfinite(rows.trace);
  if (!rows.has_matrix()) return rows;

  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Row& row = rows.row[i];
      T* x = &rows.x[i * d];
      if (row.weight == 0) {
        fill(x, d, 0);
        continue;
      }
      // A converted row is in x already.
      const T* z_i = is_converted<T>(batch.z) ? x : row_of(problem, batch.z, sample, i, x);
      scale_row(z_i, row.inverse_norm, std::sqrt(row.weight / rows.trace), x, d);
    }
  });
  return rows;
}

template <typename T>
void gram(const Problem& problem, const Rows<T>& rows, T* a) {
  const MatrixView<T> x = row_major<T>(rows.x.get(), problem.d);
  if (problem.gram_side()) {
    multiply<T>(problem.n, problem.n, problem.d, x, transposed(x), a, Result::kSymmetric);
  } else {
    multiply<T>(problem.d, problem.d, problem.n, transposed(x), x, a, Result::kSymmetric);
  }
}

#define VNE_INSTANTIATE(T)                                                      \
  template const T* row_of(const Problem&, const Input&, int64_t, int64_t, T*); \
  template Row measure(const Problem&, const T*, double);                       \
  template Rows<T> normalize(const Batch<T>&, int64_t);                         \
  template void gram(const Problem&, const Rows<T>&, T*);
VNE_INSTANTIATE(float)
VNE_INSTANTIATE(double)
#undef VNE_INSTANTIATE

}  // namespace vne
