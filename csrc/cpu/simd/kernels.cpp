// The inner loops, written with the compiler's vector types; see kernels.h.
//
// This file is compiled several times with different instruction sets. Whatever it emits outside of
// its anonymous namespace could be merged by the linker with the copy of another instruction set
// and then run on a processor that lacks it: so nothing here includes or instantiates library code.

#include "cpu/simd/kernels.h"

#include <cmath>

#ifndef VNE_SIMD
#define VNE_SIMD baseline
#endif

namespace vne::simd::VNE_SIMD {
namespace {

// Bytes of a vector register and rows of a tile of C. A tile is tile_rows x 2 vectors of
// accumulators: at least 8, so that the latency of a fused multiply-add is hidden, and few enough
// to leave registers for two vectors of B and one broadcast of A.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 8;  // 16 of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 6;  // 12 of 16
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileRows = 8;  // 16 of 32
#else
constexpr int kVectorBytes = 16, kTileRows = 4;  // 8 of 16
#endif

template <typename T>
struct Vector {
  typedef T Type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  static constexpr int kSize = kVectorBytes / static_cast<int>(sizeof(T));
};

template <typename T>
constexpr int kTileCols = 2 * Vector<T>::kSize;

template <typename T>
typename Vector<T>::Type load(const T* from) {
  return *reinterpret_cast<const typename Vector<T>::Unaligned*>(from);
}

template <typename T>
void store(T* to, typename Vector<T>::Type value) {
  *reinterpret_cast<typename Vector<T>::Unaligned*>(to) = value;
}

// A tile of exactly kRows rows, its accumulators in registers for the whole of k.
template <typename T, int kRows>
void multiply_rows(int64_t k, MatrixView<T> a, const T* packed_b, T* c, int64_t c_stride, int cols,
                   bool accumulate) {
  using V = typename Vector<T>::Type;
  constexpr int kWidth = Vector<T>::kSize;
  V left[kRows], right[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) left[r] = right[r] = V{};
  for (int64_t i = 0; i < k; ++i) {
    const V b_left = load(packed_b), b_right = load(packed_b + kWidth);
    const T* column = a.data + i * a.col_stride;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      left[r] += column[r * a.row_stride] * b_left;
      right[r] += column[r * a.row_stride] * b_right;
    }
    packed_b += kTileCols<T>;
  }
  if (cols == kTileCols<T>) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      T* row = c + r * c_stride;
      store(row, accumulate ? load(row) + left[r] : left[r]);
      store(row + kWidth, accumulate ? load(row + kWidth) + right[r] : right[r]);
    }
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    T tile[kTileCols<T>];
    store(tile, left[r]);
    store(tile + kWidth, right[r]);
    T* row = c + r * c_stride;
    for (int j = 0; j < cols; ++j) row[j] = accumulate ? row[j] + tile[j] : tile[j];
  }
}

template <typename T>
void multiply_tile(int64_t k, MatrixView<T> a, const T* packed_b, T* c, int64_t c_stride, int rows,
                   int cols, bool accumulate) {
  switch (rows) {
    case 1:
      return multiply_rows<T, 1>(k, a, packed_b, c, c_stride, cols, accumulate);
    case 2:
      return multiply_rows<T, 2>(k, a, packed_b, c, c_stride, cols, accumulate);
    case 3:
      return multiply_rows<T, 3>(k, a, packed_b, c, c_stride, cols, accumulate);
    case 4:
      return multiply_rows<T, 4>(k, a, packed_b, c, c_stride, cols, accumulate);
    case 5:
      return multiply_rows<T, 5>(k, a, packed_b, c, c_stride, cols, accumulate);
    case 6:
      return multiply_rows<T, 6>(k, a, packed_b, c, c_stride, cols, accumulate);
    case 7:
      return multiply_rows<T, 7>(k, a, packed_b, c, c_stride, cols, accumulate);
    case 8:
      return multiply_rows<T, 8>(k, a, packed_b, c, c_stride, cols, accumulate);
  }
}

template <typename T>
void pack(int64_t k, int cols, MatrixView<T> b, const T* row_scale, T* packed) {
  constexpr int kCols = kTileCols<T>;
  if (b.col_stride == 1 && cols == kCols) {
    for (int64_t i = 0; i < k; ++i) {
      const T* row = b.data + i * b.row_stride;
      const T factor = row_scale ? row_scale[i] : T(1);
      for (int j = 0; j < kCols; ++j) packed[i * kCols + j] = factor * row[j];
    }
    return;
  }
  for (int64_t i = 0; i < k; ++i) {
    const T factor = row_scale ? row_scale[i] : T(1);
    const T* row = b.data + i * b.row_stride;
    for (int j = 0; j < cols; ++j) packed[i * kCols + j] = factor * row[j * b.col_stride];
    for (int j = cols; j < kCols; ++j) packed[i * kCols + j] = T(0);
  }
}

template <typename T>
void combine(T a, const T* x, T b, const T* y, T* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = a * x[i] + b * y[i];
}

// How many rows to come violate c_i^2 <= pivot a_ii, which holds for a positive semidefinite
// matrix, by more than what is below `floor`. They, and whoever violates it by less, are cut down
// to it.
template <typename T>
int cut_column(T pivot, T* c, const T* diagonal, int64_t begin, int64_t end, T floor) {
  int violations = 0, beyond = 0;
  for (int64_t i = begin; i < end; ++i) {
    const T square = c[i] * c[i];
    violations += square > pivot * (diagonal[i] < floor ? floor : diagonal[i]);
    beyond += square > pivot * (diagonal[i] < 0 ? T(0) : diagonal[i]);
  }
  if (beyond == 0) return 0;
  for (int64_t i = begin; i < end; ++i) {
    const T limit = pivot * (diagonal[i] < 0 ? T(0) : diagonal[i]);
    if (c[i] * c[i] > limit) c[i] = std::copysign(std::sqrt(limit), c[i]);
  }
  return violations;
}

// One pivot after the other, each applied to the whole panel before the next is read. An inverse of
// the pivot block, multiplied on, would save half of the work and lose all accuracy where A is
// rank deficient: its rounding is of the order of 1 / floor.
template <typename T>
int64_t sweep_panel(T* panel, T* diagonal, T* c, T* y, int64_t size, int64_t m, int64_t first,
                    T floor) {
  int64_t repaired = 0;
  for (int64_t k = 0; k < size; ++k) {
    T* column = panel + k * m;
    T* c_k = c + k * m;
    T* y_k = y + k * m;
    const T pivot = column[first + k] < floor ? floor : column[first + k];
    const int cut = cut_column(pivot, column, diagonal, first + k + 1, m, floor);
    repaired += pivot != column[first + k] || cut > 0;
    const T inverse = T(1) / pivot;
    for (int64_t i = 0; i < m; ++i) {
      c_k[i] = column[i];
      column[i] *= inverse;
      y_k[i] = -column[i];
      diagonal[i] += y_k[i] * c_k[i];
    }
    for (int64_t j = 0; j < size; ++j) {
      if (j == k) continue;
      combine(T(1), panel + j * m, y_k[first + j], c_k, panel + j * m, m);
      panel[j * m + first + k] = column[first + j];
    }
    column[first + k] = -inverse;
  }
  return repaired;
}

template <int kRows>
void reflect_rows(float* a, int64_t stride, int64_t i, int64_t first, const float* v,
                  const float* w, const float* next, float* y) {
  using V = typename Vector<float>::Type;
  constexpr int kWidth = Vector<float>::kSize;
  static_assert(kPadding % kWidth == 0);
  V sum[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r] = V{};
  float* row = a + i * stride;
  for (int64_t j = first / kWidth * kWidth; j < stride; j += kWidth) {
    const V v_j = load(v + j), w_j = load(w + j), next_j = load(next + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V entry = load(row + r * stride + j) - v[i + r] * w_j - w[i + r] * v_j;
      store(row + r * stride + j, entry);
      sum[r] += entry * next_j;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float total = 0;
    for (int lane = 0; lane < kWidth; ++lane) total += sum[r][lane];
    y[i + r] = total;
  }
}

void reflect(float* a, int64_t stride, int64_t begin, int64_t end, int64_t first, const float* v,
             const float* w, const float* next, float* y) {
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) reflect_rows<4>(a, stride, i, first, v, w, next, y);
  for (; i < end; ++i) reflect_rows<1>(a, stride, i, first, v, w, next, y);
}

void next_pivots(int poles, double diagonal, const double* t, double square, double* pivot) {
  for (int k = 0; k < poles; ++k) pivot[k] = diagonal + t[k] - square / pivot[k];
}

void advance(int poles, const float* ratio, float* running, int64_t stride, float* row,
             int64_t size) {
  using V = typename Vector<float>::Type;
  constexpr float kTooSmall = 1e-20F;
  for (int64_t i = 0; i < size; i += Vector<float>::kSize) {
    V sum = load(row + i);
    for (int k = 0; k < poles; ++k) {
      V entry = ratio[k] * load(running + k * stride + i);
      entry = ((entry > kTooSmall) | (entry < -kTooSmall)) ? entry : V{};
      store(running + k * stride + i, entry);
      sum += entry;
    }
    store(row + i, sum);
  }
}

template <typename T>
T sum_of(typename Vector<T>::Type v) {
  T total = 0;
  for (int lane = 0; lane < Vector<T>::kSize; ++lane) total += v[lane];
  return total;
}

// kRows rows at a time: x and y are loaded once for all of them.
template <typename T, int kRows>
void symmetric_multiply_rows(const T* a, int64_t stride, int64_t i, int64_t end, const T* x, T* y) {
  using V = typename Vector<T>::Type;
  constexpr int kWidth = Vector<T>::kSize;
  const T* row = a + i * stride;
  T own[kRows] = {};
  for (int r = 0; r < kRows; ++r) {
    own[r] += row[r * stride + i + r] * x[i + r];
    for (int c = r + 1; c < kRows; ++c) {
      own[r] += row[r * stride + i + c] * x[i + c];
      own[c] += row[r * stride + i + c] * x[i + r];
    }
  }
  V sum[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r] = V{};
  int64_t j = i + kRows;
  for (; j + kWidth <= end; j += kWidth) {
    const V x_j = load(x + j);
    V y_j = load(y + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V entry = load(row + r * stride + j);
      sum[r] += entry * x_j;
      y_j += entry * x[i + r];
    }
    store(y + j, y_j);
  }
  for (; j < end; ++j) {
    for (int r = 0; r < kRows; ++r) {
      own[r] += row[r * stride + j] * x[j];
      y[j] += row[r * stride + j] * x[i + r];
    }
  }
  for (int r = 0; r < kRows; ++r) y[i + r] += own[r] + sum_of<T>(sum[r]);
}

template <typename T>
void symmetric_multiply(const T* a, int64_t stride, int64_t begin, int64_t end, const T* x, T* y) {
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) symmetric_multiply_rows<T, 4>(a, stride, i, end, x, y);
  for (; i < end; ++i) symmetric_multiply_rows<T, 1>(a, stride, i, end, x, y);
}

template <typename T, int kRows>
void dots_of_rows(const T* rows, int64_t stride, int64_t begin, int64_t end, const T* x, T* dots) {
  using V = typename Vector<T>::Type;
  constexpr int kWidth = Vector<T>::kSize;
  V sum[kRows];
  T rest[kRows] = {};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r] = V{};
  int64_t j = begin;
  for (; j + kWidth <= end; j += kWidth) {
    const V x_j = load(x + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r] += load(rows + r * stride + j) * x_j;
  }
  for (; j < end; ++j) {
    for (int r = 0; r < kRows; ++r) rest[r] += rows[r * stride + j] * x[j];
  }
  for (int r = 0; r < kRows; ++r) dots[r] = rest[r] + sum_of<T>(sum[r]);
}

template <typename T>
void dots(const T* rows, int64_t stride, int64_t count, int64_t begin, int64_t end, const T* x,
          T* dots) {
  int64_t l = 0;
  for (; l + 4 <= count; l += 4)
    dots_of_rows<T, 4>(rows + l * stride, stride, begin, end, x, dots + l);
  for (; l < count; ++l) dots_of_rows<T, 1>(rows + l * stride, stride, begin, end, x, dots + l);
}

template <typename T, int kRows>
void add_few_rows(const T* rows, int64_t stride, int64_t begin, int64_t end, const T* f, T* y) {
  constexpr int kWidth = Vector<T>::kSize;
  int64_t j = begin;
  for (; j + kWidth <= end; j += kWidth) {
    typename Vector<T>::Type y_j = load(y + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) y_j += f[r] * load(rows + r * stride + j);
    store(y + j, y_j);
  }
  for (; j < end; ++j) {
    for (int r = 0; r < kRows; ++r) y[j] += f[r] * rows[r * stride + j];
  }
}

template <typename T>
void add_rows(const T* rows, int64_t stride, int64_t count, int64_t begin, int64_t end, const T* f,
              T* y) {
  int64_t l = 0;
  for (; l + 4 <= count; l += 4)
    add_few_rows<T, 4>(rows + l * stride, stride, begin, end, f + l, y);
  for (; l < count; ++l) add_few_rows<T, 1>(rows + l * stride, stride, begin, end, f + l, y);
}

// Sixteen partial sums: enough to hide latency.
template <typename T>
double dot(const T* x, const T* y, int64_t size) {
  constexpr int kLanes = 16;
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] += static_cast<double>(x[i + lane]) * static_cast<double>(y[i + lane]);
    }
  }
  double total = 0;
  for (; i < size; ++i) total += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
  return total;
}

template <typename T>
double sum_of_squares(const T* x, int64_t size) {
  return dot(x, x, size);
}

template <typename T>
void scale(const T* x, T factor, T* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = factor * x[i];
}

}  // namespace

#define VNE_STRINGIZE_(name) #name
#define VNE_STRINGIZE(name) VNE_STRINGIZE_(name)

extern const Kernels<float> kFloat;
extern const Kernels<double> kDouble;
extern const ReductionKernels kReduction;

const Kernels<float> kFloat = {VNE_STRINGIZE(VNE_SIMD),
                               kTileRows,
                               kTileCols<float>,
                               multiply_tile<float>,
                               pack<float>,
                               sweep_panel<float>,
                               sum_of_squares<float>,
                               dot<float>,
                               scale<float>,
                               combine<float>,
                               symmetric_multiply<float>,
                               dots<float>,
                               add_rows<float>};
const Kernels<double> kDouble = {VNE_STRINGIZE(VNE_SIMD),
                                 kTileRows,
                                 kTileCols<double>,
                                 multiply_tile<double>,
                                 pack<double>,
                                 sweep_panel<double>,
                                 sum_of_squares<double>,
                                 dot<double>,
                                 scale<double>,
                                 combine<double>,
                                 symmetric_multiply<double>,
                                 dots<double>,
                                 add_rows<double>};
const ReductionKernels kReduction = {reflect, next_pivots, advance};

}  // namespace vne::simd::VNE_SIMD
