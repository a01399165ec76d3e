// C = A B on the CPU, threaded, over the tiles of simd/kernels.h.
//
// Why not the BLAS behind torch: a product of which only one triangle is wanted costs half here,
// the views of transposed operands are free, no dispatcher call is paid, and a process-wide matmul
// precision below float32 (torch.set_float32_matmul_precision) cannot reach in.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/stable.h"
#include "cpu/simd/kernels.h"

namespace vne {

using simd::MatrixView;

// Uninitialized memory, aligned for vectors. Of malloc, and aligned here: freed blocks of an
// aligned allocation are not reused by the next one, which then goes through the whole of the
// allocator.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : block_(std::malloc(size * sizeof(T) + kAlignment)) {
    if (!block_) throw std::bad_alloc();
    const auto address = reinterpret_cast<std::uintptr_t>(block_.get());
    data_ = reinterpret_cast<T*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::uintptr_t kAlignment = 64;
  struct Free {
    void operator()(void* block) const { std::free(block); }
  };
  std::unique_ptr<void, Free> block_;
  T* data_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
MatrixView<T> row_major(const T* data, int64_t cols) {
  return {data, cols, 1};
}

template <typename T>
MatrixView<T> transposed(MatrixView<T> a) {
  return {a.data, a.col_stride, a.row_stride};
}

enum class Result { kFull, kSymmetric };  // symmetric: compute one triangle, mirror it

// c [rows, cols], row-major = a [rows, k] diag(scale) b [k, cols]; a null scale is 1.
template <typename T>
void multiply(int64_t rows, int64_t cols, int64_t k, MatrixView<T> a, MatrixView<T> b, T* c,
              Result result = Result::kFull, const T* scale = nullptr);

// visit(i, j) for each entry of the lower triangle of a matrix [size, size], the diagonal included.
template <typename Visit>
void visit_lower(int64_t size, Visit visit) {
  constexpr int64_t kBlock = 32;  // both of a pair stay in the cache
  for (int64_t row = 0; row < size; row += kBlock) {
    for (int64_t col = 0; col <= row; col += kBlock) {
      for (int64_t i = row; i < std::min(row + kBlock, size); ++i) {
        for (int64_t j = col; j < std::min(col + kBlock, i + 1); ++j) visit(i, j);
      }
    }
  }
}

// c [rows, cols] (+)= a b for one column of tiles, cols <= tile_cols: b [k, cols] comes packed.
template <typename T>
void multiply_column(int64_t rows, int cols, int64_t k, MatrixView<T> a, const T* packed, T* c,
                     int64_t stride, bool accumulate = true) {
  const simd::Kernels<T>& simd = simd::kernels<T>();
  const int64_t tile_rows = simd.tile_rows;
  for (int64_t i = 0; i < rows; i += tile_rows) {
    simd.multiply_tile(k, {a.data + i * a.row_stride, a.row_stride, a.col_stride}, packed,
                       c + i * stride, stride, static_cast<int>(std::min(tile_rows, rows - i)),
                       cols, accumulate);
  }
}

}  // namespace vne
