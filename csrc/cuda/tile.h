// A part of a matrix in the registers of one thread.

#pragma once

#include "cuda/load.h"

namespace vne {

template <typename T, int kRows, int kCols = kRows>
struct Tile {
  T v[kRows][kCols];

  // Calls f(i, j, entry) for every entry. The loops unroll, so that entries stay in registers.
  template <typename F>
  __device__ __forceinline__ void for_each(const F& f) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j) f(i, j, v[i][j]);
  }

  __device__ __forceinline__ void set_zero() {
    for_each([](int, int, T& entry) { entry = 0; });
  }

  __device__ __forceinline__ void add(const Tile& other) {
    for_each([&](int i, int j, T& entry) { entry += other.v[i][j]; });
  }

  __device__ __forceinline__ void add_product(const Quad<T>& a, const Quad<T>& b) {
    static_assert(kRows == 4 && kCols == 4);
    for_each([&](int i, int j, T& entry) { entry += a.v[i] * b.v[j]; });
  }

  // The 4 x 4 entries from (row, col) on -= a b^T.
  __device__ __forceinline__ void subtract_product(const Quad<T>& a, const Quad<T>& b, int row,
                                                   int col) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) v[row + i][col + j] -= a.v[i] * b.v[j];
  }
};

}  // namespace vne
