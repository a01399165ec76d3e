// The vectorized inner loops of the CPU backend.
//
// kernels.cpp is compiled once per instruction set (VNE_SIMD = baseline, avx2, avx512) and gives
// its Tables each time; dispatch.cpp chooses the best that the processor runs. Everything above
// this folder is ordinary C++ that calls through the tables.

#pragma once

#include <cstdint>

namespace vne::simd {

// A matrix by pointer and strides, so that a transpose costs nothing.
template <typename T>
struct MatrixView {
  const T* data;
  int64_t row_stride;
  int64_t col_stride;
};

// Rows of a matrix being reduced are padded to a multiple of kPadding numbers, which holds a whole
// number of any processor's vectors.
constexpr int64_t kPadding = 16;

// Runs body(context, item) for the items 0 .. count, which threads share out.
using Share = void (*)(int64_t count, void (*body)(const void* context, int64_t item),
                       const void* context);
constexpr int64_t kShares = 8, kWorkRows = 3 + kShares;

template <typename T>
struct Kernels {
  int tile_rows;  // C is computed in tiles of tile_rows x tile_cols
  int tile_cols;

  // One tile: C[rows, cols] (+)= A[rows, k] B[k, cols]. rows <= tile_rows, cols <= tile_cols.
  // B comes packed: k rows of tile_cols numbers.
  void (*multiply_tile)(int64_t k, MatrixView<T> a, const T* packed_b, T* c, int64_t c_stride,
                        int rows, int cols, bool accumulate);

  // Packs B[k, cols], cols <= tile_cols, into rows of tile_cols numbers, padded by zeros; row i is
  // multiplied by row_scale[i] unless that is null.
  void (*pack)(int64_t k, int cols, MatrixView<T> b, const T* row_scale, T* packed);

  // Copies the lower triangle of c [size, size] to the upper one.
  void (*mirror_lower)(T* c, int64_t size);

  // Sweeps the pivots first .. first + size of a symmetric A [m, m] in its columns of that range,
  // panel [size, m] (a column a row), and returns how many of them needed repair (see
  // poles.cpp). Gives for each pivot what the other columns need, A += y^T c: its column as it was
  // when its turn came, c [size, m], and y = -c / pivot. diagonal [m] is that of A, kept up to date
  // from there on.
  int64_t (*sweep_panel)(T* panel, T* diagonal, T* c, T* y, int64_t size, int64_t m, int64_t first,
                         T floor);

  double (*sum_of_squares)(const T* x, int64_t size);         // in double: no overflow in fp32
  double (*dot)(const T* x, const T* y, int64_t size);        // in double
  void (*scale)(const T* x, T factor, T* out, int64_t size);  // out = factor x
  void (*combine)(T a, const T* x, T b, const T* y, T* out, int64_t size);  // out = a x + b y

  // T = Q^H A Q, tridiagonal: its diagonal [m] and the sizes of its off-diagonal [m - 1]. Of A the
  // upper triangle and the blocks of kPadding rows and columns on its diagonal are read, and
  // overwritten: a row is its real parts [stride], of a Hermitian A followed by its imaginary parts
  // [stride], zeros behind its m entries; stride is a multiple of kPadding. work has room for
  // kWorkRows rows. The steps end where a part is left whose square norm is negligible.
  void (*tridiagonalize_symmetric)(T* a, int64_t m, int64_t stride, double negligible, Share share,
                                   T* work, double* diagonal, double* off_diagonal);
  void (*tridiagonalize_hermitian)(T* a, int64_t m, int64_t stride, double negligible, Share share,
                                   T* work, double* diagonal, double* off_diagonal);
};

struct ReductionKernels {
  // One step of Householder's reduction, in the rows and columns begin .. end of a symmetric
  // a [., stride]: a -= v w^T + w v^T, then y = a next. Of a the upper triangle counts, and is read
  // and written once. v, w and next [stride] are 0 before `begin` and behind the matrix; y
  // [stride].
  void (*reflect)(float* a, int64_t stride, int64_t begin, int64_t end, const float* v,
                  const float* w, const float* next, float* y);

  // For every pole at once: pivot <- diagonal + t - square / pivot.
  void (*next_pivots)(int poles, double diagonal, const double* t, double square, double* pivot);

  // For every pole: running <- ratio running, running [poles, stride] and ratio [poles]; row [size]
  // += their sum. Entries too small to matter become 0, so that nothing is denormal.
  void (*advance)(int poles, const float* ratio, float* running, int64_t stride, float* row,
                  int64_t size);
};

struct Tables {
  Kernels<float> float32;
  Kernels<double> float64;
  ReductionKernels reduction;
};

const Tables& tables();  // the best for this processor

template <typename T>
const Kernels<T>& kernels() {
  if constexpr (sizeof(T) == 8) {
    return tables().float64;
  } else {
    return tables().float32;
  }
}

}  // namespace vne::simd
