// The stages of an entropy whose batch is spread over processes, equation (12): what the backends
// share of the operators density and density_backward. Parts of a batch have the d side in common:
// each process computes its part of rho, the sum of the parts is rho of the whole, and from dS/drho
// each takes the gradient of its own rows.

#pragma once

#include "ops/arguments.h"

namespace vne {

// The backend's part.
template <typename T>
void compute_density(const Batch<T>& batch, T* rho);  // [batch, d, d]

// grad_rho [batch, d, d] -> gradients of z [batch, n, d] and weights [batch, n] or null.
// d<G, rho> = 2 <diag(p) U G, dU>: G replaces log A in (3).
template <typename T>
void compute_density_backward(const Batch<T>& batch, const T* grad_rho, T* grad_z, T* grad_weights);

inline Samples check_density(const Tensor& z, const std::optional<Tensor>& weights, bool normalize,
                             double eps) {
  Samples samples = check_samples(z, weights, normalize, eps);
  samples.problem.smaller_side = false;
  return samples;
}

inline Tensor density(const Samples& samples) {
  const Tensor rho = samples.result({samples.problem.d, samples.problem.d});
  run(samples, [&](const auto& batch) { compute_density(batch, batch.out(rho)); });
  return rho;
}

struct DensityGradient {
  Samples samples;
  Tensor grad_rho;
};

inline DensityGradient check_density_backward(const Tensor& grad_rho, const Tensor& z,
                                              const std::optional<Tensor>& weights, bool normalize,
                                              double eps) {
  const Samples samples = check_density(z, weights, normalize, eps);
  samples.check("grad_rho", grad_rho, {samples.problem.d, samples.problem.d}, "(..., d, d)");
  return {samples, grad_rho};
}

inline std::tuple<Tensor, Tensor> density_backward(const DensityGradient& arguments) {
  const Samples& samples = arguments.samples;
  const Tensor grad_rho = as_contiguous(arguments.grad_rho);
  const Tensor grad_z = samples.grad_z(), grad_weights = samples.grad_weights();
  run(samples, [&](const auto& batch) {
    compute_density_backward(batch, batch.in(grad_rho), batch.out(grad_z), batch.out(grad_weights));
  });
  return {grad_z, grad_weights};
}

}  // namespace vne

// z (..., n, d) -> the part rho = U^T diag(p) U (..., d, d) of it; the weights of a part need not
// sum to 1
VNE_OPERATOR("density", "(Tensor z, Tensor? weights, bool normalize, float eps)", "Tensor",
             vne::check_density, vne::density)

// grad_rho (..., d, d), of which the symmetric part counts -> gradients of z (..., n, d) and of
// weights (..., n) or (0,)
VNE_OPERATOR("density_backward",
             "(Tensor grad_rho, Tensor z, Tensor? weights, bool normalize, float eps)",
             "(Tensor grad_z, Tensor grad_weights)", vne::check_density_backward,
             vne::density_backward)
