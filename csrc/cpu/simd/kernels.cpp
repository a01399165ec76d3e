// The inner loops, written with the compiler's vector types; see kernels.h.
//
// This file, and with it those that it includes in its anonymous namespace, is compiled several
// times with different instruction sets. The linker could merge what they emit outside of that
// namespace with the copy of another instruction set, which would then run on a processor that
// lacks it: nothing here includes or instantiates library code.

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

// The numbers 0 .. kCount - 1 as a type, FirstLanes<kCount>::Type, for shuffles of vectors.
template <int... kLanes>
struct Lanes {};
template <int kCount, int... kLanes>
struct FirstLanes : FirstLanes<kCount - 1, kCount - 1, kLanes...> {};
template <int... kLanes>
struct FirstLanes<0, kLanes...> {
  using Type = Lanes<kLanes...>;
};

// The lanes of these numbers out of a, and of b from its size on.
template <int... kLanes, typename V>
V shuffled(V a, V b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, kLanes...);
#else  // GCC 11
  return __builtin_shuffle(a, b, decltype(a < b){kLanes...});
#endif
}

// Adds the lanes to each other whose numbers differ by kBit.
template <int kBit, typename V, int... kLanes>
V fold(V v, Lanes<kLanes...>) {
  return v + shuffled<(kLanes ^ kBit)...>(v, v);
}

template <typename T, int kBit = Vector<T>::kSize / 2>
T sum_of(typename Vector<T>::Type v) {
  v = fold<kBit>(v, typename FirstLanes<Vector<T>::kSize>::Type{});
  if constexpr (kBit == 1) {
    return v[0];
  } else {
    return sum_of<T, kBit / 2>(v);
  }
}

// Sixteen partial sums hide the latency of the addition.
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
  for (int lane = 0; i + lane < size; ++lane) {
    sums[lane] += static_cast<double>(x[i + lane]) * static_cast<double>(y[i + lane]);
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <typename T>
double sum_of_squares(const T* x, int64_t size) {
  return dot(x, x, size);
}

template <typename T>
void scale(const T* x, T factor, T* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = factor * x[i];
}

#include "cpu/simd/gemm.h"
#include "cpu/simd/reduction.h"
#include "cpu/simd/sweep.h"

template <typename T>
constexpr Kernels<T> kKernels = {.tile_rows = kTileRows,
                                 .tile_cols = kTileCols<T>,
                                 .multiply_tile = multiply_tile<T>,
                                 .pack = pack<T>,
                                 .mirror_lower = mirror_lower<T>,
                                 .sweep_panel = sweep_panel<T>,
                                 .sum_of_squares = sum_of_squares<T>,
                                 .dot = dot<T>,
                                 .scale = scale<T>,
                                 .combine = combine<T>,
                                 .tridiagonalize_symmetric = tridiagonalize<T, 1>,
                                 .tridiagonalize_hermitian = tridiagonalize<T, 2>};

}  // namespace

extern const Tables kTables;
const Tables kTables = {
    .float32 = kKernels<float>,
    .float64 = kKernels<double>,
    .reduction = {.reflect = reflect, .next_pivots = next_pivots, .advance = advance},
};

}  // namespace vne::simd::VNE_SIMD
