// log det(I + a A) = sum_k log(1 + a lambda_k), with the parameter a = scale, by eigenvalues.
//
// Its gradient is 2 a (I + a A)^-1 X. The projection (4) of normalized rows removes I, so that it
// is taken out of the inverse before it is rounded.

#include <cmath>

#include "cuda/functional.h"

namespace vne {
namespace {

// a lambda. An eigenvalue below 0 is rounding.
template <typename T>
__device__ __forceinline__ double scaled(T value, double scale, const Sample& sample) {
  return max(scale * sample.trace * value, 0.0);
}

// A block adds up log(1 + x), x = a lambda, of each sample: as a tr(A) + sum of log(1 + x) - x. The
// trace is known, whereas each eigenvalue is off by the rounding of the largest: small ones, which
// are many, then count with their squares only.
template <typename T>
__global__ void __launch_bounds__(kThreads) write_logdet(const T* values,  // [batch, m], of A^
                                                         const Sample* samples,  // [batch]
                                                         int m, double scale,
                                                         T* logdet) {  // [batch]
  VNE_SHARED_ARRAY(double, scratch, 32);
  const Sample sample = samples[blockIdx.x];
  values += blockIdx.x * static_cast<int64_t>(m);
  double sum = 0;
  for (int k = threadIdx.x; k < m; k += kThreads) {
    const double x = scaled(values[k], scale, sample);
    sum += log1p(x) - x;
  }
  sum = scale * sample.trace + block_sum(sum, scratch);
  const T irregular = sample.trace == 0 ? T(0) : T(NAN);
  if (threadIdx.x == 0) logdet[blockIdx.x] = is_regular(sample) ? static_cast<T>(sum) : irregular;
}

// A thread computes each eigenvalue of (I + a A)^-1 - identity I.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    centered_inverse(const T* values,        // [batch, m], of A^
                     const Sample* samples,  // [batch]
                     int m, int64_t count, double scale, double identity,
                     T* f) {  // [batch, m]
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  const double x = scaled(values[index], scale, samples[index / m]);
  f[index] = static_cast<T>((identity == 0 ? 1 : -x) / (1 + x));
}

struct Logdet : Function {
  static constexpr std::array kParameters{"scale"};
  double scale;

  void check() const {
    VNE_CHECK(std::isfinite(scale) && scale > 0, "scale must be finite and positive, got ", scale);
  }

  template <typename T>
  void run(const Call& call, const Input& z, const Normalized<T>& normalized, Method,
           const Outputs<T>& out) const {
    const int m = static_cast<int>(call.problem.m());
    const int64_t count = call.problem.batch * m;
    Eigen<T> eigen = eigh(call, normalized);
    call.launch("write_logdet", write_logdet<T>, call.problem.batch, kThreads, eigen.values.data,
                eigen.samples.data, m, scale, out.entropy);
    if (!out.grad_z) return;
    const double identity = call.problem.normalize && scale <= 1 ? 1 : 0;
    const Workspace<T> inverse = call.workspace<T>(count);
    call.launch("centered_inverse", centered_inverse<T>, grid_for(count), kThreads,
                eigen.values.data, eigen.samples.data, m, count, scale, identity, inverse.data);
    MatrixFunction<T> w{.terms = spectral_function(call, eigen.vectors.data, true, inverse.data),
                        .count = 1,
                        .samples = std::move(eigen.samples)};
    gradient<T>(call, z, normalized, w, 2 * scale, identity, out);
  }
};

}  // namespace
}  // namespace vne

VNE_FUNCTION(logdet, vne::Logdet)
