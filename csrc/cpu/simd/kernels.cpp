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

// A tile of exactly kRows rows and at most kVectors vectors of columns, its accumulators in
// registers for the whole of k.
template <typename T, int kRows, int kVectors>
void multiply_rows(int64_t k, MatrixView<T> a, const T* packed_b, T* c, int64_t c_stride, int cols,
                   bool accumulate) {
  using V = typename Vector<T>::Type;
  constexpr int kWidth = Vector<T>::kSize, kCols = kVectors * kWidth;
  V sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kVectors; ++p) sum[r][p] = V{};
  }
  for (int64_t i = 0; i < k; ++i) {
    V b[kVectors];
    for (int p = 0; p < kVectors; ++p) b[p] = load(packed_b + p * kWidth);
    const T* column = a.data + i * a.col_stride;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kVectors; ++p) sum[r][p] += column[r * a.row_stride] * b[p];
    }
    packed_b += kTileCols<T>;
  }
  if (cols == kCols) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kVectors; ++p) {
        T* to = c + r * c_stride + p * kWidth;
        store(to, accumulate ? load(to) + sum[r][p] : sum[r][p]);
      }
    }
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    T tile[kCols];
    for (int p = 0; p < kVectors; ++p) store(tile + p * kWidth, sum[r][p]);
    T* row = c + r * c_stride;
    for (int j = 0; j < cols; ++j) row[j] = accumulate ? row[j] + tile[j] : tile[j];
  }
}

template <typename T, int kVectors>
void multiply_columns(int64_t k, MatrixView<T> a, const T* packed_b, T* c, int64_t c_stride,
                      int rows, int cols, bool accumulate) {
  switch (rows) {
    case 1:
      return multiply_rows<T, 1, kVectors>(k, a, packed_b, c, c_stride, cols, accumulate);
    case 2:
      return multiply_rows<T, 2, kVectors>(k, a, packed_b, c, c_stride, cols, accumulate);
    case 3:
      return multiply_rows<T, 3, kVectors>(k, a, packed_b, c, c_stride, cols, accumulate);
    case 4:
      return multiply_rows<T, 4, kVectors>(k, a, packed_b, c, c_stride, cols, accumulate);
    case 5:
      return multiply_rows<T, 5, kVectors>(k, a, packed_b, c, c_stride, cols, accumulate);
    case 6:
      return multiply_rows<T, 6, kVectors>(k, a, packed_b, c, c_stride, cols, accumulate);
    case 7:
      return multiply_rows<T, 7, kVectors>(k, a, packed_b, c, c_stride, cols, accumulate);
    case 8:
      return multiply_rows<T, 8, kVectors>(k, a, packed_b, c, c_stride, cols, accumulate);
  }
}

template <typename T>
void multiply_tile(int64_t k, MatrixView<T> a, const T* packed_b, T* c, int64_t c_stride, int rows,
                   int cols, bool accumulate) {
  const auto columns = cols <= Vector<T>::kSize ? multiply_columns<T, 1> : multiply_columns<T, 2>;
  columns(k, a, packed_b, c, c_stride, rows, cols, accumulate);
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

// ---- a band -------------------------------------------------------------------------------------

// Sixteen numbers in registers: a row of a block of the band.
struct BandRow {
  using V = Vector<double>::Type;
  static constexpr int kWidth = Vector<double>::kSize, kCount = kBand / kWidth;
  V part[kCount];

  static BandRow zero() {
    BandRow row;
    for (V& part : row.part) part = V{};
    return row;
  }
  static BandRow from(const double* at) {
    BandRow row;
    for (int c = 0; c < kCount; ++c) row.part[c] = load(at + c * kWidth);
    return row;
  }
  void to(double* at) const {
    for (int c = 0; c < kCount; ++c) store(at + c * kWidth, part[c]);
  }
  void add(double factor, const BandRow& other) {
    for (int c = 0; c < kCount; ++c) part[c] += factor * other.part[c];
  }
  double dot(const BandRow& other) const {
    V sum = part[0] * other.part[0];
    for (int c = 1; c < kCount; ++c) sum += part[c] * other.part[c];
    return sum_of<double>(sum);
  }
};

// x = (beta, 0, ...) under I - tau v v^T, v_0 = 1; returns beta. Squares that would not be exact
// are left out: the trace is one.
double reflector(const double* x, double* v, double* tau) {
  constexpr double kNegligible = 1e-290;
  const BandRow row = BandRow::from(x);
  row.to(v);
  const double alpha = x[0];
  v[0] = 0;
  const BandRow others = BandRow::from(v);
  const double rest = others.dot(others);
  if (!(rest > kNegligible)) {
    BandRow::zero().to(v);
    v[0] = 1;
    *tau = 0;
    return alpha;
  }
  const double norm = std::sqrt(alpha * alpha + rest), beta = alpha > 0 ? -norm : norm;
  const double factor = 1 / (alpha - beta);
  BandRow scaled = BandRow::zero();
  scaled.add(factor, others);
  scaled.to(v);
  v[0] = 1;
  *tau = (beta - alpha) / beta;
  return beta;
}

// D <- H D H for the symmetric D [kBand, kBand] of a row stride, H = I - tau v v^T.
void reflect_block(double* d, int64_t stride, const double* v, double tau) {
  BandRow even = BandRow::zero(), odd = BandRow::zero();
  for (int r = 0; r < kBand; r += 2) {
    even.add(v[r], BandRow::from(d + r * stride));
    odd.add(v[r + 1], BandRow::from(d + (r + 1) * stride));
  }
  even.add(1, odd);  // D v
  const BandRow of_v = BandRow::from(v);
  BandRow w = BandRow::zero();
  w.add(tau, even);
  w.add(-tau * tau / 2 * even.dot(of_v), of_v);
  double entries[kBand];
  w.to(entries);
  for (int r = 0; r < kBand; ++r) {
    BandRow row = BandRow::from(d + r * stride);
    row.add(-v[r], w);
    row.add(-entries[r], of_v);
    row.to(d + r * stride);
  }
}

// E <- H E H' for the block E to the right of D, with the H' that makes the first row of H E zero
// beyond its first entry; gives the v and tau of H' in place of those of H.
void chase_block(double* e, int64_t stride, double* v, double* tau) {
  BandRow even = BandRow::zero(), odd = BandRow::zero();
  for (int r = 0; r < kBand; r += 2) {
    even.add(v[r], BandRow::from(e + r * stride));
    odd.add(v[r + 1], BandRow::from(e + (r + 1) * stride));
  }
  even.add(1, odd);  // v^T E
  BandRow first = BandRow::from(e);
  first.add(-*tau, even);
  double row_0[kBand], next[kBand], next_tau;
  first.to(row_0);
  const double beta = reflector(row_0, next, &next_tau);
  BandRow::zero().to(e);
  e[0] = beta;
  const BandRow of_next = BandRow::from(next);
  for (int r = 1; r < kBand; ++r) {
    BandRow row = BandRow::from(e + r * stride);
    row.add(-*tau * v[r], even);
    row.add(-next_tau * row.dot(of_next), of_next);
    row.to(e + r * stride);
  }
  of_next.to(v);
  *tau = next_tau;
}

void tridiagonalize_band(double* band, int64_t m, double* diagonal, double* beside) {
  constexpr int64_t kOn = kBand - 1;         // where the diagonal is in a row
  constexpr int64_t kStride = kBandRow - 1;  // from a row of a block to the next one
  for (int64_t k = 0; k < m; ++k) {
    double* row = band + k * kBandRow + kOn;
    diagonal[k] = row[0];
    if (k + 1 == m) return;
    double v[kBand], tau;
    beside[k] = reflector(row + 1, v, &tau);
    for (int64_t first = k + 1; first < m; first += kBand) {
      double* d = band + first * kBandRow + kOn;
      reflect_block(d, kStride, v, tau);
      if (first + kBand >= m) break;
      double* e = d + kBand;
      chase_block(e, kStride, v, &tau);
      // The first column of E is a row of the next step's D.
      double* mirrored = d + kBand * kStride;
      for (int r = 1; r < kBand; ++r) mirrored[r] = e[r * kStride];
    }
  }
}

}  // namespace

#define VNE_STRINGIZE_(name) #name
#define VNE_STRINGIZE(name) VNE_STRINGIZE_(name)

extern const Kernels<float> kFloat;
extern const Kernels<double> kDouble;
extern const ReductionKernels kReduction;
extern const BandKernels kBands;

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
const BandKernels kBands = {tridiagonalize_band};

}  // namespace vne::simd::VNE_SIMD
