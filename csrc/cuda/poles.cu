// log A^ = c0 I - sum_k w_k (A^ + t_k I)^-1, equation (6), for m <= 256: one block a pole.
//
// The poles do not depend on each other, and one sample of 16 poles occupies 16 multiprocessors for
// the time of one inverse, m pivots that do depend on each other: see sweep.h. Each block writes
// its term -w_k (A^ + t_k I)^-1 and what S needs of it, <A^, term>; summing the terms is left to
// the kernel that multiplies with them. The inverse never leaves the registers before it is done,
// so a block reads m^2 and writes m^2 numbers.

#include "common/pole_table.h"
#include "cuda/pole_list.h"
#include "cuda/sweep.h"

namespace vne {
namespace {

// t/2 is below every pivot that exact arithmetic meets, 4 u |A^|_F below all that rounding hides.
constexpr int kNoise = 4;

// The same number, as far as the compiler knows another: addresses computed from it after the sweep
// it cannot compute before, and keep in registers all the while. The tile needs them.
__device__ __forceinline__ int forget(int value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

template <typename T, int kSize, int kTile>
__global__ void __launch_bounds__(SweepShape<kSize, kTile>::kThreads,
                                  kSize == 128 && sizeof(T) == 4 ? 3 : 1)
    sweep_poles(const T* __restrict__ matrices, int m, const double* trace,
                const __grid_constant__ PoleList<T> poles, T* terms, double* inner,
                Sample* samples) {
  using S = Sweep<T, kSize, kTile>;
  using Shared = typename S::Shared;
  using Scratch = double[32];
  using NormScratch = T[32];
  VNE_SHARED(Shared, s);
  VNE_SHARED(Scratch, scratch);
  VNE_SHARED(NormScratch, norm_scratch);
  using Kept = T[2];
  VNE_SHARED(Kept, kept);  // by thread 0, until the tile needs no registers any more
  const int lane = threadIdx.x % 32;
  const int64_t sample = blockIdx.x / PoleList<T>::kCount;
  const int pole = blockIdx.x % PoleList<T>::kCount;
  const int ld = static_cast<int>(leading(m));
  const T* a = matrices + sample * ld * ld;

  S sweep(s);
  double sum = 0;
#pragma unroll(S::kInShared ? 1 : S::kOfLane)
  for (int i = 0; i < S::kOfLane; ++i) {
    const int place = 32 * i + lane;
    sweep.diagonal(i) = place < m ? a[place * ld + place] : T(0);
    sum += sweep.diagonal(i);
  }
  const T a_trace = static_cast<T>(warp_sum(sum));
  const T scale = reciprocal(a_trace);
  T squares = 0;
  const bool inside = sweep.has_tile && (sweep.tile_row + 1) * kTile <= ld;  // then all of the tile
  const int below = sweep.tile_row * kTile * ld + sweep.tile_col * kTile;
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    if (i % (S::kInShared ? 2 : 4) == 0) __syncthreads();  // bounds the loads in flight: registers
#pragma unroll
    for (int j = 0; j < kTile; j += 4) {
      Quad<T> quad{};
      if (inside) quad = *reinterpret_cast<const Quad<T>*>(a + below + i * ld + j);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        sweep.a[i][j + q] = quad.v[q] * scale;
        squares += sweep.a[i][j + q] * sweep.a[i][j + q];
      }
    }
  }
  const T norm = sqrt(block_sum(squares * sweep.count(), norm_scratch));
  const double tau = make_trace<T>(a_trace, trace, sample);
  if (threadIdx.x == 0) {
    kept[0] = a_trace;
    kept[1] = norm;
  }
  if (!is_regular(tau)) {  // the same for the whole block; nobody will read the terms
    if (pole == 0 && threadIdx.x == 0) samples[sample] = make_sample(tau, a_trace, norm);
    return;
  }

  const T t = poles.t[pole], w = poles.w[pole];
#pragma unroll(S::kInShared ? 1 : S::kOfLane)
  for (int i = 0; i < S::kOfLane; ++i) sweep.diagonal(i) = sweep.diagonal(i) * scale + t;
  constexpr T kRoundoff = sizeof(T) == 8 ? T(0x1p-53) : T(0x1p-24);
  const T noise = kNoise * kRoundoff * norm;
  sweep.run(m, max(t / 2, noise), noise, NoRecord());
  sweep.restore_diagonal();

  const int width = static_cast<int>(leading(forget(m))), block = forget(blockIdx.x);
  const int row = forget(sweep.tile_row * kTile), col = forget(sweep.tile_col * kTile);
  T* term = terms + static_cast<int64_t>(block) * width * width;
  const T* again = matrices + static_cast<int64_t>(block / PoleList<T>::kCount) * width * width;
  T product = 0;
  const bool writes = sweep.has_tile && row + kTile <= width;
  constexpr int kStep = S::kInShared ? 1 : 2;  // rows between barriers, as above
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    if (i % kStep == 0) __syncthreads();
    if (!writes) continue;
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const int at = (row + i) * width + col + j;
      sweep.a[i][j] *= w;
      product += again[at] * sweep.a[i][j];
      term[at] = sweep.a[i][j];
    }
  }
#pragma unroll
  for (int j = 0; j < kTile; ++j) {  // above the diagonal
    if (j % kStep == 0) __syncthreads();
    if (!writes) continue;
#pragma unroll
    for (int i = 0; i < kTile; ++i) term[(col + j) * width + row + i] = sweep.a[i][j];
  }
  const double total = block_sum(static_cast<double>(product * sweep.count()), scratch);
  if (threadIdx.x != 0) return;
  inner[block] = total;
  if (block % PoleList<T>::kCount == 0) {
    const int first = block / PoleList<T>::kCount;
    samples[first] = make_sample(make_trace<T>(kept[0], trace, first), kept[0], kept[1]);
  }
}

template <typename T, int kSize, int kTile>
void launch_sweep(const Call& call, const Normalized<T>& normalized, const MatrixFunction<T>& w) {
  call.launch("sweep_poles", sweep_poles<T, kSize, kTile>, call.problem.batch * PoleList<T>::kCount,
              SweepShape<kSize, kTile>::kThreads, normalized.a.data,
              static_cast<int>(call.problem.m()), normalized.trace.data, pole_list<T>(),
              w.terms.data, w.inner.data, w.samples.data);
}

}  // namespace

template <typename T>
MatrixFunction<T> log_by_poles(const Call& call, const Normalized<T>& normalized, double shift) {
  constexpr int kCount = PoleList<T>::kCount;
  const int64_t m = call.problem.m(), batch = call.problem.batch;
  if (m > kLargestSweep<T>) {
    return log_by_blocked_poles(call, normalized, shift);
  }
  MatrixFunction<T> w;
  w.count = kCount;
  w.identity = w.terms_identity = pole_constant<T>() + shift;
  w.terms = call.workspace<T>(batch * kCount * leading(m) * leading(m));
  w.inner = call.workspace<double>(batch * kCount);
  w.parts = kCount;
  w.samples = call.workspace<Sample>(batch);
  if (m <= 32) {
    launch_sweep<T, 32, 4>(call, normalized, w);
  } else if (m <= 64) {
    launch_sweep<T, 64, 4>(call, normalized, w);
  } else if (m <= 128) {
    launch_sweep<T, 128, 8>(call, normalized, w);
  } else if constexpr (kLargestSweep<T> > 128) {
    launch_sweep<T, 256, 8>(call, normalized, w);
  }
  return w;
}

template MatrixFunction<float> log_by_poles(const Call&, const Normalized<float>&, double);
template MatrixFunction<double> log_by_poles(const Call&, const Normalized<double>&, double);

}  // namespace vne
