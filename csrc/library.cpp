// Every operator of the package, its schema once. Backends register kernels at the foot of their
// own files; fake kernels and autograd formulas are in vne_kernels/_core/ops.py. No argument has a
// default: vne_kernels/functional/entropy.py is the public face.
//
// n samples of d features, m = min(n, d), leading dimensions are a batch. Half precisions are read
// as they are; results are float32 for them and for float32, float64 for float64. `weights` is
// (..., n).

#include "common/stable.h"

STABLE_TORCH_LIBRARY(vne_kernels, library) {
  // z (..., n, d) -> S (...)
  library.def(
      "vn_entropy(Tensor z, Tensor? weights, bool normalize, str method, float eps) -> Tensor");

  // z (..., n, d) -> S (...), dS/dz (..., n, d), dS/dweights (..., n), or (0,) without weights
  library.def(
      "vn_entropy_grad(Tensor z, Tensor? weights, bool normalize, str method, float eps)"
      " -> (Tensor entropy, Tensor grad_z, Tensor grad_weights)");

  // The Hessian of S times a direction: d/dt of dS/dz (..., n, d) and of dS/dweights (..., n), or
  // (0,) without weights, at z + t direction_z, weights + t direction_weights and t = 0
  library.def(
      "vn_entropy_hvp(Tensor z, Tensor direction_z, Tensor? weights, Tensor? direction_weights, "
      "bool normalize, float eps) -> (Tensor product_z, Tensor product_weights)");

  // z (..., n, d) -> eigenvalues of rho (..., m), descending
  library.def("spectrum(Tensor z, Tensor? weights, bool normalize, float eps) -> Tensor");

  // The same, and the eigenvectors (..., m, m), as columns, of the smaller side
  library.def(
      "spectrum_eigh(Tensor z, Tensor? weights, bool normalize, float eps)"
      " -> (Tensor eigenvalues, Tensor eigenvectors)");

  // grad (..., m) of the eigenvalues -> gradients of z (..., n, d) and of weights (..., n) or (0,)
  library.def(
      "spectrum_backward(Tensor grad, Tensor z, Tensor eigenvectors, Tensor? weights, bool "
      "normalize, float eps)"
      " -> (Tensor grad_z, Tensor grad_weights)");

  // z (..., n, d) -> tr(rho^2) of rho over its trace (...). Every method is the same
  library.def("purity(Tensor z, Tensor? weights, bool normalize, str method, float eps) -> Tensor");

  // The same, and its gradients in z (..., n, d) and in weights (..., n), or (0,) without weights
  library.def(
      "purity_grad(Tensor z, Tensor? weights, bool normalize, str method, float eps)"
      " -> (Tensor purity, Tensor grad_z, Tensor grad_weights)");

  // z1, z2 (..., n, d) -> S of z1 (...), mean cosine similarity (...)
  library.def(
      "doe_loss(Tensor z1, Tensor z2, str method, float eps) -> (Tensor entropy, Tensor cosine)");

  // The same, dS/dz1 (..., n, d), and what the gradient of the cosine needs of each row (..., 4, n)
  library.def(
      "doe_loss_grad(Tensor z1, Tensor z2, str method, float eps)"
      " -> (Tensor entropy, Tensor cosine, Tensor entropy_grad, Tensor row_stats)");

  // grad_entropy, grad_cosine (...) -> gradients of z1 and z2 (..., n, d)
  library.def(
      "doe_loss_backward(Tensor grad_entropy, Tensor grad_cosine, Tensor z1, Tensor z2, Tensor "
      "entropy_grad,"
      " Tensor row_stats) -> (Tensor grad_z1, Tensor grad_z2)");

  // The mean cosine and row_stats of doe_loss_grad alone
  library.def("cosine(Tensor z1, Tensor z2, float eps) -> (Tensor cosine, Tensor row_stats)");

  // Equation (12), the stages of a batch that is spread over processes. z (..., n, d) -> the part
  // rho = U^T diag(p) U (..., d, d) of it; the weights of a part need not sum to 1
  library.def("density(Tensor z, Tensor? weights, bool normalize, float eps) -> Tensor");

  // grad_rho (..., d, d), of which the symmetric part counts -> gradients of z (..., n, d) and of
  // weights (..., n) or (0,)
  library.def(
      "density_backward(Tensor grad_rho, Tensor z, Tensor? weights, bool normalize, float eps)"
      " -> (Tensor grad_z, Tensor grad_weights)");

  // rho (..., m, m), float32 or float64, of any trace; its symmetric part counts -> S (...)
  library.def("density_entropy(Tensor rho, str method) -> Tensor");

  // The same, and dS/drho (..., m, m)
  library.def("density_entropy_grad(Tensor rho, str method) -> (Tensor entropy, Tensor grad_rho)");

  // What backends outside of this library share with those of it. The poles of equation (6) for
  // the dtype of `like`, a tensor of the host -> (c0, 0), then (t, w) of each; (1 + poles, 2)
  library.def("pole_table(Tensor like) -> Tensor");

  // The errors that the operator of this name raises for these arguments: its tensors in the order
  // of its schema but for the weights; "auto" and 0 where it has no method and no eps
  library.def(
      "check_arguments(str operator, Tensor[] tensors, Tensor? weights, str method, float eps)"
      " -> ()");
}
