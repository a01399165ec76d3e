// The eigenvalues of rho and their gradient: the operators spectrum, spectrum_eigh,
// spectrum_backward.

#include <cmath>

#include "cuda/stages.h"

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

std::tuple<Tensor, Tensor> compute(const Tensor& z, const std::optional<Tensor>& weights,
                                   bool normalize, double eps, bool want_vectors) {
  const Problem problem = make_problem(z, weights, normalize, eps);
  const Context context(z);
  check_device(context, "weights", weights);
  const int64_t m = problem.m();
  const ScalarType dtype = compute_dtype(z.scalar_type());
  const Tensor eigenvalues = empty(z, problem.sizes({m}), dtype);
  const Tensor eigenvectors =
      empty(z, want_vectors ? problem.sizes({m, m}) : std::vector<int64_t>{0}, dtype);
  if (problem.batch == 0) return {eigenvalues, eigenvectors};
  const Input input(z);
  const std::optional<Tensor> p = contiguous(weights);
  const Call call{context, problem, input.tensor};
  dispatch_compute(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Normalized<T> normalized = vne::normalize<T>(call, input, data_or_null<T>(p));
    const Eigen<T> eigen = eigh(call, normalized);
    const int64_t count = problem.batch * m * m;
    call.launch("write_spectrum", write_spectrum<T>, grid_for(count), kThreads, eigen.values.data,
                eigen.vectors.data, eigen.samples.data, static_cast<int>(m), count,
                static_cast<T*>(eigenvalues.mutable_data_ptr()),
                want_vectors ? static_cast<T*>(eigenvectors.mutable_data_ptr()) : nullptr);
  });
  return {eigenvalues, eigenvectors};
}

Tensor spectrum(const Tensor& z, const std::optional<Tensor>& weights, bool normalize, double eps) {
  return std::get<0>(compute(z, weights, normalize, eps, false));
}

std::tuple<Tensor, Tensor> spectrum_eigh(const Tensor& z, const std::optional<Tensor>& weights,
                                         bool normalize, double eps) {
  return compute(z, weights, normalize, eps, true);
}

// d lambda_k = v_k^T dA v_k, so W = V diag(grad) V^T takes the place of -(log A + I).
std::tuple<Tensor, Tensor> spectrum_backward(const Tensor& grad, const Tensor& z,
                                             const Tensor& eigenvectors,
                                             const std::optional<Tensor>& weights, bool normalize,
                                             double eps) {
  const Problem problem = make_problem(z, weights, normalize, eps);
  const Context context(z);
  check_device(context, "weights", weights);
  const int64_t m = problem.m();
  const ScalarType dtype = compute_dtype(z.scalar_type());
  check_spectrum_gradient(problem, dtype, grad, eigenvectors);
  check_device(context, "grad", grad);
  check_device(context, "eigenvectors", eigenvectors);
  const Tensor grad_z = empty(z, problem.sizes({problem.n, problem.d}), dtype);
  const Tensor grad_weights =
      empty(z, weights ? problem.sizes({problem.n}) : std::vector<int64_t>{0}, dtype);
  if (problem.batch == 0) return {grad_z, grad_weights};
  const Input input(z);
  const std::optional<Tensor> p = contiguous(weights);
  const Tensor g = torch::stable::contiguous(grad), v = torch::stable::contiguous(eigenvectors);
  const Call call{context, problem, input.tensor};
  dispatch_compute(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Normalized<T> normalized = vne::normalize<T>(call, input, data_or_null<T>(p));
    MatrixFunction<T> w;
    w.terms = spectral_function<T>(call, static_cast<const T*>(v.const_data_ptr()), false,
                                   static_cast<const T*>(g.const_data_ptr()));
    w.count = 1;
    w.samples = measure_matrices(call, normalized);
    Outputs<T> out;
    out.grad_z = static_cast<T*>(grad_z.mutable_data_ptr());
    if (weights) out.grad_weights = static_cast<T*>(grad_weights.mutable_data_ptr());
    gradient<T>(call, input, normalized, w, 2, out);
  });
  return {grad_z, grad_weights};
}

}  // namespace
}  // namespace vne

STABLE_TORCH_LIBRARY_IMPL(vne_kernels, CUDA, library) {
  library.impl("spectrum", TORCH_BOX(&vne::spectrum));
  library.impl("spectrum_eigh", TORCH_BOX(&vne::spectrum_eigh));
  library.impl("spectrum_backward", TORCH_BOX(&vne::spectrum_backward));
}
