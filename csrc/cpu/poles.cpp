// log A^ = c0 I - sum_k w_k (A^ + t_k I)^-1: equation (6), for a trace-one A^.
//
// The poles are independent: threads share them out, and their sum is taken in a fixed order, so the
// result does not depend on the number of threads. One inverse is a blocked symmetric sweep on the
// lower triangle: for a block of pivots K with D = A_KK, C = A_:K and Y = C D^-1,
//
//   A <- A - Y C^T,   A_:K <- Y,   A_KK <- -D^-1,
//
// whose first product holds nearly all of the work; after all blocks A has become -A^-1. A pivot is
// a Schur complement of A^ + t I, so exactly it is at least t; what rounding leaves below
// max(t / 2, 4 u |A^|_F) is raised to that (u the unit roundoff): without the floor a matrix of low
// rank grows to infinity.

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/pole_table.h"
#include "cpu/stages.h"

namespace vne {
namespace {

constexpr int kBlock = simd::kMaxBlock;  // pivots at a time

template <typename T>
struct PoleTable;
template <>
struct PoleTable<float> {
  static constexpr int kSize = kPoles32;
  static constexpr const Pole* kPoles = kPoleTable32;
  static constexpr double kConstant = kPoleConstant32;
};
template <>
struct PoleTable<double> {
  static constexpr int kSize = kPoles64;
  static constexpr const Pole* kPoles = kPoleTable64;
  static constexpr double kConstant = kPoleConstant64;
};

// What the sweeps of one thread need besides the matrix.
template <typename T>
struct Workspace {
  explicit Workspace(int64_t m)
      : inverse(kBlock * kBlock), c(kBlock * m), y(kBlock * m), packed(kBlock * (m + simd::kernels<T>().tile_cols)) {}
  Buffer<T> inverse;  // D, then -D^-1 [size, size]
  Buffer<T> c;        // C^T [size, m]
  Buffer<T> y;        // -Y^T [size, m]
  Buffer<T> packed;   // C^T as the tile kernel wants it
};

// Lower triangle of a [m, m] <- -(a + shift I)^-1; the upper triangle is neither read nor set.
template <typename T>
void sweep(T* a, int64_t m, T shift, T floor, Workspace<T>& work) {
  const simd::Kernels<T>& simd = simd::kernels<T>();
  const int64_t tile_rows = simd.tile_rows, tile_cols = simd.tile_cols;
  for (int64_t i = 0; i < m; ++i) a[i * m + i] += shift;

  for (int64_t first = 0; first < m; first += kBlock) {
    const int size = static_cast<int>(std::min<int64_t>(kBlock, m - first));
    const int64_t last = first + size;
    T *inverse = work.inverse.get(), *c = work.c.get(), *y = work.y.get(), *packed = work.packed.get();

    // C^T, whose part left of the block is stored as rows, the part below it as columns.
    for (int k = 0; k < size; ++k) {
      const T* row = a + (first + k) * m;
      std::copy_n(row, first + k + 1, c + k * m);
      for (int j = 0; j < k; ++j) c[j * m + first + k] = row[first + j];
    }
    for (int64_t i = last; i < m; ++i) {
      for (int k = 0; k < size; ++k) c[k * m + i] = a[i * m + first + k];
    }
    for (int k = 0; k < size; ++k) std::copy_n(c + k * m + first, size, inverse + k * size);
    simd.invert_block(inverse, size, size, floor);
    for (int i = 0; i < size * size; ++i) inverse[i] = -inverse[i];

    for (int64_t j = 0; j < m; j += tile_cols) {
      const int cols = static_cast<int>(std::min(tile_cols, m - j));
      simd.pack(size, cols, {c + j, m, 1}, nullptr, packed + j * size);
      for (int64_t i = 0; i < size; i += tile_rows) {
        simd.multiply_tile(size, {inverse + i * size, size, 1}, packed + j * size, y + i * m + j, m,
                           static_cast<int>(std::min(tile_rows, size - i)), cols, false);
      }
    }
    for (int64_t j = 0; j < m; j += tile_cols) {
      const int cols = static_cast<int>(std::min(tile_cols, m - j));
      for (int64_t i = j / tile_rows * tile_rows; i < m; i += tile_rows) {
        simd.multiply_tile(size, {y + i, 1, m}, packed + j * size, a + i * m + j, m,
                           static_cast<int>(std::min(tile_rows, m - i)), cols, true);
      }
    }

    for (int k = 0; k < size; ++k) {
      T* row = a + (first + k) * m;
      for (int64_t j = 0; j < first; ++j) row[j] = -y[k * m + j];
      std::copy_n(inverse + k * size, k + 1, row + first);
    }
    for (int64_t i = last; i < m; ++i) {
      for (int k = 0; k < size; ++k) a[i * m + first + k] = -y[k * m + i];
    }
  }
}

}  // namespace

template <typename T>
void log_by_poles(const T* a, int64_t m, double shift, T* result) {
  using Table = PoleTable<T>;
  const int64_t size = m * m;
  const double frobenius = std::sqrt(simd::kernels<T>().sum_of_squares(a, size));
  const double noise = 2 * static_cast<double>(std::numeric_limits<T>::epsilon()) * frobenius;  // epsilon = 2 u

  // A wave of inverses at a time bounds the workspace; it has the same poles on any machine.
  constexpr int64_t kWaveBytes = int64_t{256} << 20;
  const int64_t wave =
      std::clamp<int64_t>(kWaveBytes / (size * static_cast<int64_t>(sizeof(T))), 4, Table::kSize);
  Buffer<T> swept(wave * size);
  for (int64_t i = 0; i < m; ++i) {
    fill(result + i * m, i, 0);
    result[i * m + i] = static_cast<T>(Table::kConstant + shift);
  }

  for (int64_t first = 0; first < Table::kSize; first += wave) {
    const int64_t count = std::min<int64_t>(wave, Table::kSize - first);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      Workspace<T> work(m);
      for (int64_t k = begin; k < end; ++k) {
        const double t = Table::kPoles[first + k].t;
        T* matrix = &swept[k * size];
        for (int64_t i = 0; i < m; ++i) std::copy_n(a + i * m, i + 1, matrix + i * m);
        sweep(matrix, m, static_cast<T>(t), static_cast<T>(std::max(t / 2, noise)), work);
      }
    });
    torch::stable::parallel_for(0, m, std::max<int64_t>(1, (1 << 14) / m), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* row = result + i * m;
        for (int64_t k = 0; k < count; ++k) {
          const T w = static_cast<T>(Table::kPoles[first + k].w);
          simd::kernels<T>().combine(T(1), row, w, &swept[k * size + i * m], row, i + 1);
        }
      }
    });
  }
  mirror_lower(result, m);
}

template void log_by_poles(const float*, int64_t, double, float*);
template void log_by_poles(const double*, int64_t, double, double*);

}  // namespace vne
