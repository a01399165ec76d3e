// The eigendecomposition, by LAPACK's syevd behind torch's dispatcher.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/stages.h"

namespace vne {
namespace {

// The dispatcher copies its input before LAPACK overwrites it: `a` is only read.
template <typename T>
Tensor view(const T* a, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  const ScalarType dtype = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(const_cast<T*>(a), sizes, strides, cpu, dtype);
}

// By double, in the place of what float gave.
Eigen eigh_in_double(const float* a, int64_t m) {
  Buffer<double> wide(m * m);
  std::copy_n(a, m * m, wide.get());
  const Eigen eigen = eigh(wide.get(), m);
  const auto to_float = [](const Tensor& x) { return torch::stable::to(x, ScalarType::Float); };
  return {to_float(eigen.values), to_float(eigen.vectors)};
}

// The rows of a trace-one a [m, m] that are not lost in the rounding of the others: not those
// of zero or absent samples, and of dead features.
template <typename T>
std::vector<int64_t> rows_that_count(const T* a, int64_t m) {
  constexpr T kEpsilon = std::numeric_limits<T>::epsilon(), kSmall = kEpsilon * kEpsilon;
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < m; ++i) {
    const T* row = a + i * m;
    const bool is_small = std::abs(row[i]) <= kSmall * kSmall &&
                          std::all_of(row, row + m, [](T x) { return std::abs(x) <= kSmall; });
    if (!is_small) rows.push_back(i);
  }
  return rows;
}

// By the matrix of those rows alone. The others are eigenvectors by themselves.
template <typename T>
Eigen eigh_of_rows(const T* a, int64_t m, const std::vector<int64_t>& rows) {
  const int64_t size = static_cast<int64_t>(rows.size());
  Buffer<T> part(size * size);
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j) part[i * size + j] = a[rows[i] * m + rows[j]];
  const Eigen of_part = eigh(part.get(), size);
  const T* part_values = static_cast<const T*>(of_part.values.const_data_ptr());
  const MatrixView<T> v = of_part.view_vectors<T>();

  const Eigen result = {empty(of_part.values, {m}, of_part.values.scalar_type()),
                        empty(of_part.values, {m, m}, of_part.values.scalar_type())};
  T* values = static_cast<T*>(result.values.mutable_data_ptr());
  T* vectors = static_cast<T*>(result.vectors.mutable_data_ptr());
  fill(vectors, m * m, 0);
  // Ascending: what rounding made negative, the zeros of the other rows, the rest.
  const int64_t negative =
      std::count_if(part_values, part_values + size, [](T x) { return x < 0; });
  const int64_t others = m - size;
  for (int64_t k = 0; k < size; ++k) {
    const int64_t column = k < negative ? k : k + others;
    values[column] = part_values[k];
    for (int64_t i = 0; i < size; ++i)
      vectors[rows[i] * m + column] = v.data[i * v.row_stride + k * v.col_stride];
  }
  for (int64_t i = 0, k = negative; i < m; ++i) {
    if (std::binary_search(rows.begin(), rows.end(), i)) continue;
    values[k] = 0;
    vectors[i * m + k++] = 1;
  }
  return result;
}

}  // namespace

// MKL's ssyevd does not converge, or gives NaN and says nothing, for some matrices of low rank that
// have rows of zeros: it does not get these.
template <typename T>
Eigen eigh(const T* a, int64_t m) {
  const std::vector<int64_t> rows = rows_that_count(a, m);
  if (!rows.empty() && static_cast<int64_t>(rows.size()) < m) return eigh_of_rows(a, m, rows);
  const auto [values, vectors] = linalg_eigh(view(a, {m, m}, {m, 1}));
  if constexpr (std::is_same_v<T, float>) {
    const float* data = static_cast<const float*>(vectors.const_data_ptr());
    if (!std::all_of(data, data + m * m, [](float entry) { return std::isfinite(entry); }))
      return eigh_in_double(a, m);
  }
  return {as_contiguous(values), vectors};
}

template Eigen eigh(const float*, int64_t);
template Eigen eigh(const double*, int64_t);

}  // namespace vne
