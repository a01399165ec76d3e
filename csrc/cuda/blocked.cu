// log A^ by poles, equation (6), where a matrix does not fit the registers of a block.
//
// The symmetric sweep of csrc/README.md (7), 64 pivots (a panel) at a time, for all poles of a
// sample at once, on lower triangles in device memory. A panel is three launches:
//
//   sweep_panels   sweeps the 64 x 64 diagonal block in the registers of one block a matrix, and
//                  writes down each pivot and its column: order, 1 / p, history
//   apply_panels   repeats those pivots on every other row of the panel's columns, one thread a
//                  row, in registers: c_i, c_i / p of each pivot
//   gemm           subtracts c c^T / p, summed over the panel, from the rest: nearly all the work
//
// It would be half the work on the panel to invert the diagonal block first and multiply with it;
// but the rounding of that grows with the block's condition number: csrc/README.md, (7).
//
// Pivots are ordered largest first within a panel only. What makes low rank harmless all the same
// is a bound that each row can keep by itself: exactly, c_i^2 <= p a_ii for a row not swept yet. A
// c_i that is larger is rounding and is cut down to that: then sum_k c_ik^2 / p_k never exceeds
// a_ii, and nothing that has not been swept can grow.

#include <algorithm>
#include <cmath>

#include "cuda/sweep.h"
#include "cuda/vendor.h"

namespace vne {
namespace {

constexpr int kPanel = 64;
constexpr int kRowsOfBlock = 128;  // that apply_panels repeats pivots on, a thread each
constexpr int kNoise = 4;          // a pivot below 4 u |A^|_F is rounding

// What a panel's pivots did, and for the product c and c / p of every row: [matrices, kPanel, m].
template <typename T>
struct Panels {
  T* history;  // [matrices, kPanel, kPanel]: column of the panel's rows at each pivot
  T* inverse;  // [matrices, kPanel]: 1 / p, zero beyond the matrix
  int* order;  // [matrices, kPanel]: which row of the panel
  T* c;
  T* y;
};

// matrices [batch, poles, ld, ld] <- A^ + t I.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    shift_poles(const T* a, int m, const Sample* samples, const __grid_constant__ PoleList<T> poles,
                int64_t count, T* matrices) {
  const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (index >= count) return;
  const int64_t ld = leading(m), size = ld * ld, matrix = index / size, at = index % size;
  const int64_t b = matrix / PoleList<T>::kCount;
  const Sample sample = samples[b];
  // A sample without a finite A^ gets the identity; nobody reads its result.
  const bool regular = is_regular(sample), diagonal = at / ld == at % ld;
  const T value = regular ? a[b * size + at] * static_cast<T>(sample.scale) : T(diagonal);
  matrices[index] = value + (diagonal ? poles.t[matrix % PoleList<T>::kCount] : T(0));
}

template <typename T>
__device__ __forceinline__ T noise_of(const Sample& sample) {
  constexpr double kRoundoff = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24;
  return static_cast<T>(kNoise * kRoundoff * (is_regular(sample) ? sample.norm : 1.0));
}

template <typename T>
struct Recorder {
  T* history;
  T* inverse;
  int* order;
  __device__ __forceinline__ void operator()(int step, int k, T inverse_pivot,
                                             const T* column) const {
    if (threadIdx.x < kPanel) history[step * kPanel + threadIdx.x] = column[threadIdx.x];
    if (threadIdx.x == 0) {
      inverse[step] = inverse_pivot;
      order[step] = k;
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(SweepShape<kPanel, 4>::kThreads)
    sweep_panels(T* matrices, int m, int first, const Sample* samples,
                 const __grid_constant__ PoleList<T> poles, Panels<T> panels) {
  constexpr int kTile = 4;
  using S = Sweep<T, kPanel, kTile>;
  VNE_SHARED(typename S::Shared, s);
  const int64_t matrix = blockIdx.x;
  const int size = min(kPanel, m - first), lane = threadIdx.x % 32;
  const int64_t ld = leading(m);
  T* corner = matrices + (matrix * ld + first) * ld + first;
  S sweep(s);
  const int row = sweep.tile_row * kTile, col = sweep.tile_col * kTile;
  sweep.a.for_each([&](int i, int j, T& entry) {
    // Of a tile on the diagonal, too, only the lower triangle is in memory.
    const int64_t low = max(row + i, col + j), left = min(row + i, col + j);
    entry = sweep.has_tile && low < size ? corner[low * ld + left] : T(0);
  });
#pragma unroll
  for (int i = 0; i < S::kOfLane; ++i) {
    const int64_t place = 32 * i + lane;
    sweep.diagonal(i) = place < size ? corner[place * ld + place] : T(0);
  }
  const T noise = noise_of<T>(samples[matrix / PoleList<T>::kCount]);
  const T half_t = poles.t[matrix % PoleList<T>::kCount] / 2;
  const Recorder<T> recorder{panels.history + matrix * kPanel * kPanel,
                             panels.inverse + matrix * kPanel, panels.order + matrix * kPanel};
  sweep.run(size, max(half_t, noise), noise, recorder);
  sweep.restore_diagonal();

  sweep.a.for_each([&](int i, int j, T entry) {
    const int64_t at = row + i;
    if (sweep.has_tile && at < size && col + j <= at) corner[at * ld + col + j] = entry;
  });
  // The panel's own rows take no part in the product; a short panel has no further pivots.
  for (int i = threadIdx.x; i < kPanel * size; i += blockDim.x) {
    const int64_t at = (matrix * kPanel + i / size) * m + first + i % size;
    panels.c[at] = panels.y[at] = 0;
  }
  for (int i = size + threadIdx.x; i < kPanel; i += blockDim.x) {
    recorder.inverse[i] = 0;
    recorder.order[i] = i;
  }
}

template <typename T>
struct PanelShared {
  alignas(16) T column[kPanel][kPanel];  // of each pivot, in the order of the pivots, rotated
  T inverse[kPanel];
  int order[kPanel];
};

template <typename T>
__global__ void __launch_bounds__(kRowsOfBlock)
    apply_panels(T* matrices, int m, int first, Panels<T> panels) {
  VNE_SHARED(PanelShared<T>, s);
  const int row_blocks = ceil_div(m, kRowsOfBlock);
  const int64_t matrix = blockIdx.x / row_blocks;
  const int row = static_cast<int>(blockIdx.x % row_blocks) * kRowsOfBlock + threadIdx.x;
  const int size = min(kPanel, m - first);
  for (int i = threadIdx.x; i < kPanel; i += kRowsOfBlock) {
    s.inverse[i] = panels.inverse[matrix * kPanel + i];
    s.order[i] = panels.order[matrix * kPanel + i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kPanel * kPanel; i += kRowsOfBlock) {
    const int step = i / kPanel, place = s.order[(step + 1 + i % kPanel) % kPanel];
    const int64_t from = (matrix * kPanel + step) * kPanel + place;
    s.column[step][i % kPanel] = step < size && place < size ? panels.history[from] : T(0);
  }
  __syncthreads();
  const bool in_panel = row >= first && row < first + size;
  if (row >= m || in_panel) return;

  // The row's entries in the panel, in the order of the pivots. Swept rows, above the panel, are
  // columns of the triangle in memory.
  const bool open = row > first;
  const int64_t ld = leading(m);
  T* a = matrices + matrix * ld * ld;
  const auto place = [&](int k) {
    const int64_t in_panel_row = first + s.order[k];
    return open ? row * ld + in_panel_row : in_panel_row * ld + row;
  };
  T x[kPanel];
#pragma unroll
  for (int k = 0; k < kPanel; ++k) x[k] = k < size ? a[place(k)] : T(0);
  T diagonal = open ? max(a[row * ld + row], T(0)) : T(0);

  // Each pivot moves all entries one register down: the next one is always in x[0].
  int64_t at = matrix * kPanel * m + row;
#pragma unroll 1
  for (int step = 0; step < kPanel; ++step, at += m) {
    const T inverse = s.inverse[step];
    T c = x[0];
    if (open && c * c * inverse > diagonal) {
      const T limit = sqrt(diagonal / inverse);
      c = min(max(c, -limit), limit);
    }
    const T y = c * inverse;
    diagonal = max(diagonal - c * y, T(0));
    panels.c[at] = c;
    panels.y[at] = y;
#pragma unroll
    for (int k = 0; k < kPanel; k += 4) {
      const Quad<T> column = read_quad(&s.column[step][k]);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        x[k + q] = (k + q == kPanel - 1 ? c : x[(k + q + 1) % kPanel]) - y * column.v[q];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kPanel; ++k) {
    if (k < size) a[place(k)] = x[k];
  }
}

// The lower triangles of `count` matrices <- -(matrix)^-1.
template <typename T>
void sweep_matrices(const Call& call, int m, int64_t count, const Sample* samples,
                    const Panels<T>& panels, T* matrices) {
  const int64_t ld = leading(m), panel_size = int64_t{kPanel} * m;
  // The product is done on rectangles that cover the lower triangle.
  const int64_t width = std::max<int64_t>(512, ceil_div(m, 8 * kPanel) * kPanel);
  for (int first = 0; first < m; first += kPanel) {
    call.launch("sweep_panels", sweep_panels<T>, count, SweepShape<kPanel, 4>::kThreads, matrices,
                m, first, samples, PoleList<T>(), panels);
    call.launch("apply_panels", apply_panels<T>, count * ceil_div(m, kRowsOfBlock), kRowsOfBlock,
                matrices, m, first, panels);
    for (int64_t col = 0; col < m; col += width) {
      gemm<T>(call.context, m - col, std::min<int64_t>(width, m - col), kPanel, T(-1),
              {panels.c + col, m, panel_size, true}, {panels.y + col, m, panel_size, false}, T(1),
              matrices + col * ld + col, ld, ld * ld, count);
    }
  }
}

}  // namespace

template <typename T>
MatrixFunction<T> log_by_blocked_poles(const Call& call, const Normalized<T>& normalized,
                                       double shift) {
  constexpr int kCount = PoleList<T>::kCount;
  constexpr int64_t kWorkspaceBytes = int64_t{1} << 30;
  const int m = static_cast<int>(call.problem.m());
  const int64_t ld = leading(m), size = ld * ld, batch = call.problem.batch;
  const int64_t sample_bytes = kCount * size * static_cast<int64_t>(sizeof(T));
  const int64_t wave = std::clamp<int64_t>(kWorkspaceBytes / sample_bytes, 1, batch);

  MatrixFunction<T> w;
  w.count = 1;
  w.identity = PoleTable<T>::kConstant + shift;  // W contains it; <A, W> is counted without
  w.terms = call.workspace<T>(batch * size);
  w.parts = inner_parts(m);
  w.inner = call.workspace<double>(batch * w.parts);
  w.samples = measure_matrices(call, normalized);

  const int64_t most = wave * kCount;
  const Workspace<T> matrices = call.workspace<T>(most * size),
                     history = call.workspace<T>(most * kPanel * kPanel),
                     inverse = call.workspace<T>(most * kPanel),
                     c = call.workspace<T>(most * kPanel * m),
                     y = call.workspace<T>(most * kPanel * m);
  const Workspace<int> order = call.workspace<int>(most * kPanel);
  const Panels<T> panels{history.data, inverse.data, order.data, c.data, y.data};
  for (int64_t first = 0; first < batch; first += wave) {
    const int64_t samples_of_wave = std::min(wave, batch - first);
    const int64_t count = samples_of_wave * kCount;
    const T* a = normalized.a.data + first * size;
    const Sample* samples = w.samples.data + first;
    call.launch("shift_poles", shift_poles<T>, grid_for(count * size), kThreads, a, m, samples,
                PoleList<T>(), count * size, matrices.data);
    sweep_matrices(call, m, count, samples, panels, matrices.data);
    sum_terms_of(call, samples_of_wave, m, a, matrices.data, kCount, w.identity, true, samples,
                 w.terms.data + first * size, w.inner.data + first * w.parts);
  }
  return w;
}

template MatrixFunction<float> log_by_blocked_poles(const Call&, const Normalized<float>&, double);
template MatrixFunction<double> log_by_blocked_poles(const Call&, const Normalized<double>&,
                                                     double);

}  // namespace vne
