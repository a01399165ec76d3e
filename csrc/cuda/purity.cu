// tr(rho^2) of rho over its trace: the entropy of order two, equation (13), without an eigenvalue.
//
// The purity is the square of the norm of A^, which measure_matrices takes. A^ itself stands in the
// gradient where the entropy has its logarithm, so that the gradient stage does the rest; the only
// kernel here centers A^, each entry by itself.

#include <cmath>

#include "cuda/functional.h"

namespace vne {
namespace {

__device__ __forceinline__ double purity_of(const Sample& sample) {
  return sample.norm * sample.norm;
}

// Of each sample, within [1/m, 1], which rounding may have left. One of zeros is taken for a pure
// state, as its entropy is 0.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    write_purity(const Sample* samples, int m, int64_t count, T* purity) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  const Sample known = samples[index];
  const T irregular = known.trace == 0 ? T(1) : T(NAN);
  const double clamped = min(max(purity_of(known), 1.0 / m), 1.0);
  purity[index] = is_regular(known) ? static_cast<T>(clamped) : irregular;
}

// w [batch, ld, ld] <- (A^ - P I) / tau: the trace moves with X.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    center_matrices(const T* a, const Sample* samples, int m, int64_t count, T* w) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  const int64_t ld = leading(m), row = index / ld % ld, col = index % ld;
  const Sample known = samples[index / ld / ld];
  const double on_diagonal = row == col && row < m ? purity_of(known) : 0;
  w[index] = static_cast<T>((known.scale * a[index] - on_diagonal) / known.trace);
}

struct Purity : Function {
  template <typename T>
  void run(const Call& call, const Input& z, const Normalized<T>& normalized, Method,
           const Outputs<T>& out) const {
    const int m = static_cast<int>(call.problem.m());
    MatrixFunction<T> w{.samples = measure_matrices(call, normalized)};
    call.launch("write_purity", write_purity<T>, grid_for(call.problem.batch), kThreads,
                w.samples.data, m, call.problem.batch, out.entropy);
    if (!out.grad_z) return;
    const int64_t count = call.problem.batch * leading(m) * leading(m);
    w.count = 1;
    w.terms = call.workspace<T>(count);
    call.launch("center_matrices", center_matrices<T>, grid_for(count), kThreads, normalized.a.data,
                w.samples.data, m, count, w.terms.data);
    gradient<T>(call, z, normalized, w, 4, 0, out);
  }
};

}  // namespace
}  // namespace vne

VNE_FUNCTION(purity, vne::Purity)
