// log A^ = c0 I - sum_k w_k (A^ + t_k I)^-1, equation (6), for m <= 256: one block a pole.
//
// The poles do not depend on each other. One sample of 16 poles occupies 16 multiprocessors for the
// time of one inverse, m pivots that do depend on each other: see sweep.h. Each block writes its
// term -w_k (A^ + t_k I)^-1 and what S needs of it, <A^, term>. The kernel that multiplies with the
// terms adds them up. The inverse stays in registers until it is done, so that a block reads m^2
// and writes m^2 numbers.

#include "cuda/sweep.h"

namespace vne {
namespace {

// In exact arithmetic every pivot is above t / 2. A pivot below 4 u |A^|_F is rounding.
constexpr int kNoise = 4;

template <typename T, int kSize, int kTile>
__global__ void __launch_bounds__(SweepShape<kSize, kTile>::kThreads,
                                  kSize == 128 && sizeof(T) == 4 ? 3 : 1)
    sweep_poles(const T* __restrict__ matrices,  // [batch, ld, ld]
                int m, const double* trace,      // [batch] or null, as in Normalized
                const __grid_constant__ PoleList<T> poles,
                T* terms,         // [batch, poles, ld, ld]
                double* inner,    // [batch, poles]
                Sample* samples)  // [batch]
{
  using S = Sweep<T, kSize, kTile>;
  VNE_SHARED(typename S::Shared, s);
  VNE_SHARED_ARRAY(double, scratch, 32);
  VNE_SHARED_ARRAY(T, norm_scratch, 32);
  VNE_SHARED_ARRAY(T, saved, 2);  // by thread 0, until the tile needs no registers any more
  const int64_t b = blockIdx.x / PoleList<T>::kCount;
  const int pole = blockIdx.x % PoleList<T>::kCount;

  // 1. load A^, measure it
  S sweep(s);
  T squares;
  const T a_trace = sweep.load(matrices + b * leading(m) * leading(m), m, squares);
  const T norm = sqrt(block_sum(squares, norm_scratch));
  const double tau = make_trace<T>(a_trace, trace, b);
  if (threadIdx.x == 0) {
    saved[0] = a_trace;
    saved[1] = norm;
  }
  if (!is_regular(tau)) {  // the same for the whole block; nobody reads the terms
    if (pole == 0 && threadIdx.x == 0) samples[b] = make_sample(tau, a_trace, norm);
    return;
  }

  // 2. sweep A^ + t I
  const T t = poles.t[pole], w = poles.w[pole];
  sweep.shift_diagonal(a_trace, t);
  constexpr T kRoundoff = sizeof(T) == 8 ? T(0x1p-53) : T(0x1p-24);
  const T noise = kNoise * kRoundoff * norm;
  sweep.run(m, max(t / 2, noise), noise, NoRecord());
  sweep.restore_diagonal();

  // 3. store the term and <A, term>
  const int rows = opaque(m), block = opaque(blockIdx.x), first = block / PoleList<T>::kCount;
  const int64_t size = leading(rows) * leading(rows);
  const T product = sweep.store(w, matrices + first * size, terms + block * size, rows);
  const double total = block_sum(static_cast<double>(product), scratch);
  if (threadIdx.x != 0) return;
  inner[block] = total;
  if (block % PoleList<T>::kCount == 0)
    samples[first] = make_sample(make_trace<T>(saved[0], trace, first), saved[0], saved[1]);
}

template <typename T, int kSize, int kTile>
void launch_sweep(const Call& call, const Normalized<T>& normalized, const MatrixFunction<T>& w) {
  call.launch("sweep_poles", sweep_poles<T, kSize, kTile>, call.problem.batch * PoleList<T>::kCount,
              SweepShape<kSize, kTile>::kThreads, normalized.a.data,
              static_cast<int>(call.problem.m()), normalized.trace.data, PoleList<T>(),
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
  w.identity = w.terms_identity = PoleTable<T>::kConstant + shift;
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
