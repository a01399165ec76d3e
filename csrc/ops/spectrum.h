// The eigenvalues of rho and their gradient: what the backends share of the operators spectrum,
// spectrum_eigh, spectrum_backward.

#pragma once

#include "ops/arguments.h"

namespace vne {

// The backend's part.
//   eigenvalues [batch, m] and, unless null, eigenvectors [batch, m, m] as columns, both descending
template <typename T>
void compute_spectrum(const Batch<T>& batch, T* eigenvalues, T* eigenvectors);

// grad [batch, m] of the eigenvalues -> gradients of z [batch, n, d] and weights [batch, n] or null
template <typename T>
void compute_spectrum_backward(const Batch<T>& batch, const T* grad, const T* eigenvectors,
                               T* grad_z, T* grad_weights);

inline std::tuple<Tensor, Tensor> spectrum_of(const Samples& samples, bool with_vectors) {
  const int64_t m = samples.problem.m();
  const Tensor eigenvalues = samples.result({m}),
               eigenvectors = samples.result({m, m}, with_vectors);
  run(samples, [&](const auto& batch) {
    compute_spectrum(batch, batch.out(eigenvalues), batch.out(eigenvectors));
  });
  return {eigenvalues, eigenvectors};
}

inline Tensor spectrum(const Samples& samples) { return std::get<0>(spectrum_of(samples, false)); }

inline std::tuple<Tensor, Tensor> spectrum_eigh(const Samples& samples) {
  return spectrum_of(samples, true);
}

struct SpectrumGradient {
  Samples samples;
  Tensor grad, eigenvectors;
};

inline SpectrumGradient check_spectrum_backward(const Tensor& grad, const Tensor& z,
                                                const Tensor& eigenvectors,
                                                const std::optional<Tensor>& weights,
                                                bool normalize, double eps) {
  const Samples samples = check_samples(z, weights, normalize, eps);
  const int64_t m = samples.problem.m();
  samples.check("grad", grad, {m}, "(..., m)");
  samples.check("eigenvectors", eigenvectors, {m, m}, "(..., m, m)");
  return {samples, grad, eigenvectors};
}

inline std::tuple<Tensor, Tensor> spectrum_backward(const SpectrumGradient& arguments) {
  const Samples& samples = arguments.samples;
  const Tensor grad = as_contiguous(arguments.grad),
               eigenvectors = as_contiguous(arguments.eigenvectors);
  const Tensor grad_z = samples.grad_z(), grad_weights = samples.grad_weights();
  run(samples, [&](const auto& batch) {
    compute_spectrum_backward(batch, batch.in(grad), batch.in(eigenvectors), batch.out(grad_z),
                              batch.out(grad_weights));
  });
  return {grad_z, grad_weights};
}

}  // namespace vne

// z (..., n, d) -> eigenvalues of rho (..., m), descending
VNE_OPERATOR("spectrum", "(Tensor z, Tensor? weights, bool normalize, float eps)", "Tensor",
             vne::check_samples, vne::spectrum)

// The same, and the eigenvectors (..., m, m), as columns, of the smaller side
VNE_OPERATOR("spectrum_eigh", "(Tensor z, Tensor? weights, bool normalize, float eps)",
             "(Tensor eigenvalues, Tensor eigenvectors)", vne::check_samples, vne::spectrum_eigh)

// grad (..., m) of the eigenvalues -> gradients of z (..., n, d) and of weights (..., n) or (0,)
VNE_OPERATOR("spectrum_backward",
             "(Tensor grad, Tensor z, Tensor eigenvectors, Tensor? weights, bool normalize, "
             "float eps)",
             "(Tensor grad_z, Tensor grad_weights)", vne::check_spectrum_backward,
             vne::spectrum_backward)
