// The eigenvalues of rho and their gradient.

#include <cmath>

#include "cuda/stages.h"
#include "ops/spectrum.h"

namespace vne {
namespace {

// [batch, m] and, if not null, [batch, m, m] with the eigenvectors as columns, both descending.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    write_spectrum(const T* values, const T* vectors, const Sample* samples, int m, int64_t count,
                   T* eigenvalues, T* eigenvectors) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;  // an entry of a matrix
  const int64_t sample = index / m / m;
  const int i = static_cast<int>(index / m % m), k = static_cast<int>(index % m);
  const Sample known = samples[sample];
  const T irregular = known.trace == 0 ? T(0) : T(NAN);
  if (i == 0) {
    const double value = values[sample * m + m - 1 - k];
    eigenvalues[sample * m + k] =
        is_regular(known) ? static_cast<T>(known.trace * max(value, 0.0)) : irregular;
  }
  if (eigenvectors) {
    const T entry = vectors[(sample * m + m - 1 - k) * m + i];
    eigenvectors[index] = is_regular(known) ? entry : irregular;
  }
}

}  // namespace

template <typename T>
void compute_spectrum(const Batch<T>& batch, T* eigenvalues, T* eigenvectors) {
  const Call call(batch);
  const int64_t m = batch.problem.m(), count = batch.problem.batch * m * m;
  const Eigen<T> eigen = eigh(call, normalize(call, batch.z, batch.weights));
  call.launch("write_spectrum", write_spectrum<T>, grid_for(count), kThreads, eigen.values.data,
              eigen.vectors.data, eigen.samples.data, static_cast<int>(m), count, eigenvalues,
              eigenvectors);
}

// d lambda_k = v_k^T dA v_k, so W = V diag(grad) V^T takes the place of -(log A + I).
template <typename T>
void compute_spectrum_backward(const Batch<T>& batch, const T* grad, const T* eigenvectors,
                               T* grad_z, T* grad_weights) {
  const Call call(batch);
  const Normalized<T> normalized = normalize(call, batch.z, batch.weights);
  MatrixFunction<T> w{.terms = spectral_function(call, eigenvectors, false, grad), .count = 1};
  w.samples = measure_matrices(call, normalized);
  gradient<T>(call, batch.z, normalized, w, 2, 0, {.grad_z = grad_z, .grad_weights = grad_weights});
}

}  // namespace vne
