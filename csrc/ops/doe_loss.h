// Difference of entropies, equation (8): what the backends share of the operators doe_loss,
// doe_loss_grad, doe_loss_backward and cosine. One normalization of z1 serves both terms. The
// caller applies beta, so that it may change at every step without a new graph.

#pragma once

#include "ops/arguments.h"

namespace vne {

// Results of the two views; any but `cosine` may be null. Without `entropy` there is none to
// compute.
template <typename T>
struct DoeResults {
  T* entropy;       // [batch], of z1
  T* cosine;        // [batch], the mean over rows
  T* entropy_grad;  // [batch, n, d]
  T* row_stats;     // [batch, kRowStats, n]
};

// The backend's part. Of the batch's z, which is z1, and of z2.
template <typename T>
void compute_doe_loss(const Batch<T>& batch, const Input& z2, const std::string& method,
                      const DoeResults<T>& out);

// Gradients of grad_entropy S(z1) + grad_cosine mean_i cos_i in both views, in one pass.
template <typename T>
void compute_doe_loss_backward(const Batch<T>& batch, const Input& z2, const T* grad_entropy,
                               const T* grad_cosine, const T* entropy_grad, const T* row_stats,
                               T* grad_z1, T* grad_z2);

struct Views {
  Samples samples;  // z1
  Tensor z2;
  std::string method;
};

inline Views check_views(const Tensor& z1, const Tensor& z2, const std::string& method,
                         double eps) {
  const Samples samples = check_samples(z1, std::nullopt, true, eps);
  const Problem& problem = samples.problem;
  VNE_CHECK(
      same_sizes(z2, problem.sizes({problem.n, problem.d})) && z2.scalar_type() == z1.scalar_type(),
      "z1 and z2 must have the same shape and dtype");
  check_beside(z1, "z2", z2);
  parse_method(method, Method::kEigh);
  return {samples, z2, method};
}

inline Views check_cosine(const Tensor& z1, const Tensor& z2, double eps) {
  return check_views(z1, z2, "auto", eps);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> doe_loss_of(const Views& views, bool with_entropy,
                                                              bool with_grad) {
  const Samples& samples = views.samples;
  const Tensor entropy = samples.result({}, with_entropy), cosine = samples.result({}),
               entropy_grad = samples.result({samples.problem.n, samples.problem.d},
                                             with_entropy && with_grad),
               row_stats = samples.result({kRowStats, samples.problem.n}, with_grad);
  run(samples, [&]<typename T>(const Batch<T>& batch) {
    const DoeResults<T> out{batch.out(entropy), batch.out(cosine), batch.out(entropy_grad),
                            batch.out(row_stats)};
    compute_doe_loss(batch, Input(views.z2), views.method, out);
  });
  return {entropy, cosine, entropy_grad, row_stats};
}

inline std::tuple<Tensor, Tensor> doe_loss(const Views& views) {
  const auto results = doe_loss_of(views, true, false);
  return {std::get<0>(results), std::get<1>(results)};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> doe_loss_grad(const Views& views) {
  return doe_loss_of(views, true, true);
}

inline std::tuple<Tensor, Tensor> cosine(const Views& views) {
  const auto results = doe_loss_of(views, false, true);
  return {std::get<1>(results), std::get<3>(results)};
}

struct DoeGradient {
  Views views;
  Tensor grad_entropy, grad_cosine, entropy_grad, row_stats;
};

inline DoeGradient check_doe_loss_backward(const Tensor& grad_entropy, const Tensor& grad_cosine,
                                           const Tensor& z1, const Tensor& z2,
                                           const Tensor& entropy_grad, const Tensor& row_stats) {
  const Views views = check_cosine(z1, z2, 0);
  const Samples& samples = views.samples;
  samples.check("grad_entropy", grad_entropy, {}, "(...)");
  samples.check("grad_cosine", grad_cosine, {}, "(...)");
  samples.check("entropy_grad", entropy_grad, {samples.problem.n, samples.problem.d},
                "(..., n, d)");
  samples.check("row_stats", row_stats, {kRowStats, samples.problem.n}, "(..., 4, n)");
  return {views, grad_entropy, grad_cosine, entropy_grad, row_stats};
}

inline std::tuple<Tensor, Tensor> doe_loss_backward(const DoeGradient& arguments) {
  const Samples& samples = arguments.views.samples;
  const Tensor grad_entropy = as_contiguous(arguments.grad_entropy),
               grad_cosine = as_contiguous(arguments.grad_cosine),
               entropy_grad = as_contiguous(arguments.entropy_grad),
               row_stats = as_contiguous(arguments.row_stats);
  const Tensor grad_z1 = samples.grad_z(), grad_z2 = samples.grad_z();
  run(samples, [&](const auto& batch) {
    compute_doe_loss_backward(batch, Input(arguments.views.z2), batch.in(grad_entropy),
                              batch.in(grad_cosine), batch.in(entropy_grad), batch.in(row_stats),
                              batch.out(grad_z1), batch.out(grad_z2));
  });
  return {grad_z1, grad_z2};
}

}  // namespace vne

// z1, z2 (..., n, d) -> S of z1 (...), mean cosine similarity (...)
VNE_OPERATOR("doe_loss", "(Tensor z1, Tensor z2, str method, float eps)",
             "(Tensor entropy, Tensor cosine)", vne::check_views, vne::doe_loss)

// The same, dS/dz1 (..., n, d), and what the gradient of the cosine needs of each row (..., 4, n)
VNE_OPERATOR("doe_loss_grad", "(Tensor z1, Tensor z2, str method, float eps)",
             "(Tensor entropy, Tensor cosine, Tensor entropy_grad, Tensor row_stats)",
             vne::check_views, vne::doe_loss_grad)

// grad_entropy, grad_cosine (...) -> gradients of z1 and z2 (..., n, d)
VNE_OPERATOR("doe_loss_backward",
             "(Tensor grad_entropy, Tensor grad_cosine, Tensor z1, Tensor z2, "
             "Tensor entropy_grad, Tensor row_stats)",
             "(Tensor grad_z1, Tensor grad_z2)", vne::check_doe_loss_backward,
             vne::doe_loss_backward)

// The mean cosine and row_stats of doe_loss_grad alone
VNE_OPERATOR("cosine", "(Tensor z1, Tensor z2, float eps)", "(Tensor cosine, Tensor row_stats)",
             vne::check_cosine, vne::cosine)
