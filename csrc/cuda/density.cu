// rho of a part of a batch, and the gradient of its rows. The stages are those of vn_entropy with
// the d side chosen.

#include "cuda/stages.h"
#include "ops/density.h"

namespace vne {
namespace {

// rho [batch, m, m] <- tau A^; `trace` as in Normalized. Of a sample that is not finite, A is NaN
// throughout; of zeros it is zero.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    write_density(const T* a, const double* trace, int m, int64_t count, T* rho) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  const int64_t row = index / m, sample = row / m, ld = leading(m);
  const double factor = trace ? trace[sample] : 1 / (kStretch<T> * kStretch<T>);
  rho[index] = static_cast<T>(factor * a[(sample * ld + row % m) * ld + index % m]);
}

}  // namespace

template <typename T>
void compute_density(const Batch<T>& batch, T* rho) {
  const Call call(batch);
  const int64_t d = batch.problem.d, count = batch.problem.batch * d * d;
  const Normalized<T> normalized = normalize(call, batch.z, batch.weights);
  call.launch("write_density", write_density<T>, grid_for(count), kThreads, normalized.a.data,
              normalized.trace.data, static_cast<int>(d), count, rho);
}

template <typename T>
void compute_density_backward(const Batch<T>& batch, const T* grad_rho, T* grad_z,
                              T* grad_weights) {
  const Call call(batch);
  check_side(batch.problem);
  const Normalized<T> rows = normalize_rows(call, batch.z, batch.weights);
  MatrixFunction<T> w = symmetric_part(call, grad_rho, rows);
  gradient<T>(call, batch.z, rows, w, 2, 0, {.grad_z = grad_z, .grad_weights = grad_weights});
}

}  // namespace vne
