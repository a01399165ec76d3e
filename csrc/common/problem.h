// What an operator was asked for, checked: sizes, side, method. Shared by all backends.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "common/stable.h"

namespace vne {

enum class Method { kEigh, kPoles };

// "auto" is a decision of the backend: `fallback` is what it takes.
inline Method parse_method(const std::string& name, Method fallback) {
  if (name == "auto") return fallback;
  if (name == "eigh") return Method::kEigh;
  VNE_CHECK(name == "poles", "method must be 'auto', 'poles' or 'eigh', got '", name, "'");
  return Method::kPoles;
}

// A batch of samples z (..., n, d).
struct Problem {
  std::vector<int64_t> batch_sizes;
  int64_t batch = 1;
  int64_t n = 0;
  int64_t d = 0;
  bool normalize = true;
  double eps = 0;
  bool smaller_side = true;  // equation (2); otherwise the d side, whatever n is

  int64_t m() const { return gram_side() ? n : d; }
  bool gram_side() const { return smaller_side && n <= d; }  // A is n x n; otherwise rho, d x d
  std::vector<int64_t> sizes(std::initializer_list<int64_t> tail) const {
    std::vector<int64_t> result = batch_sizes;
    result.insert(result.end(), tail);
    return result;
  }
};

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

// Half precisions are computed, and their results returned, in float32.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool same_sizes(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (tensor.size(static_cast<int64_t>(i)) != sizes[i]) return false;
  }
  return true;
}

inline Problem make_problem(const Tensor& z, const std::optional<Tensor>& weights, bool normalize,
                            double eps) {
  VNE_CHECK(z.dim() >= 2, "z must be (..., n, d), got ", z.dim(), " dimensions");
  VNE_CHECK(is_supported(z.scalar_type()), "z must be float16, bfloat16, float32 or float64");
  VNE_CHECK(std::isfinite(eps) && eps >= 0, "eps must be finite and not negative, got ", eps);
  Problem problem;
  for (int64_t i = 0; i < z.dim() - 2; ++i) {
    problem.batch_sizes.push_back(z.size(i));
    problem.batch *= z.size(i);
  }
  problem.n = z.size(z.dim() - 2);
  problem.d = z.size(z.dim() - 1);
  problem.normalize = normalize;
  // Below it 1 / eps is not finite.
  problem.eps = std::max(eps, std::numeric_limits<double>::min());
  VNE_CHECK(problem.n >= 1 && problem.d >= 1,
            "z must be (..., n, d) with n, d >= 1, got n = ", problem.n, ", d = ", problem.d);
  if (weights) {
    VNE_CHECK(same_sizes(*weights, problem.sizes({problem.n})),
              "weights must have the shape (..., n) of z");
    VNE_CHECK(weights->scalar_type() == compute_dtype(z.scalar_type()),
              "weights must be float64 for a float64 z, otherwise float32");
  }
  return problem;
}

// The same on the d side: rho itself, which parts of a batch have in common.
inline Problem make_density_problem(const Tensor& z, const std::optional<Tensor>& weights,
                                    bool normalize, double eps) {
  Problem problem = make_problem(z, weights, normalize, eps);
  problem.smaller_side = false;
  return problem;
}

// A batch of matrices rho (..., m, m): there are no samples, n = d = m.
inline Problem make_matrix_problem(const Tensor& rho) {
  VNE_CHECK(rho.dim() >= 2 && rho.size(rho.dim() - 1) == rho.size(rho.dim() - 2) &&
                rho.size(rho.dim() - 1) >= 1,
            "rho must be (..., m, m) with m >= 1");
  VNE_CHECK(rho.scalar_type() == compute_dtype(rho.scalar_type()),
            "rho must be float32 or float64");
  return make_problem(rho, std::nullopt, false, 0);
}

// What the backward of the DoE loss needs of row i. With u = inverse_norm z,
//   d cos_i / d z1 = inverse_norm_1 (u2 - projection_1 u1), and the same with 1 and 2 exchanged;
// projection is cos_i, or 0 for a row shorter than eps, which is divided by a constant.
enum RowStat { kInverseNorm1, kInverseNorm2, kProjection1, kProjection2, kRowStats };

// Of the two views of the DoE loss.
inline void check_views(const Problem& problem, const Tensor& z1, const Tensor& z2) {
  VNE_CHECK(
      same_sizes(z2, problem.sizes({problem.n, problem.d})) && z2.scalar_type() == z1.scalar_type(),
      "z1 and z2 must have the same shape and dtype");
}

// Of doe_loss_backward; `dtype` is that of results.
inline void check_doe_gradients(const Problem& problem, ScalarType dtype,
                                const Tensor& grad_entropy, const Tensor& grad_cosine,
                                const Tensor& entropy_grad, const Tensor& row_stats) {
  VNE_CHECK(same_sizes(grad_entropy, problem.batch_sizes) &&
                same_sizes(grad_cosine, problem.batch_sizes) &&
                same_sizes(entropy_grad, problem.sizes({problem.n, problem.d})) &&
                same_sizes(row_stats, problem.sizes({kRowStats, problem.n})),
            "doe_loss_backward takes what doe_loss_grad gave");
  VNE_CHECK(grad_entropy.scalar_type() == dtype && grad_cosine.scalar_type() == dtype &&
                entropy_grad.scalar_type() == dtype && row_stats.scalar_type() == dtype,
            "doe_loss_backward takes what doe_loss_grad gave, in its dtype");
}

// Of spectrum_backward.
inline void check_spectrum_gradient(const Problem& problem, ScalarType dtype, const Tensor& grad,
                                    const Tensor& eigenvectors) {
  const int64_t m = problem.m();
  VNE_CHECK(same_sizes(grad, problem.sizes({m})) && grad.scalar_type() == dtype,
            "grad must be (..., m) in the dtype of the eigenvalues");
  VNE_CHECK(same_sizes(eigenvectors, problem.sizes({m, m})) && eigenvectors.scalar_type() == dtype,
            "eigenvectors must be (..., m, m) in the dtype of the eigenvalues");
}

// Of density_backward.
inline void check_density_gradient(const Problem& problem, ScalarType dtype,
                                   const Tensor& grad_rho) {
  VNE_CHECK(same_sizes(grad_rho, problem.sizes({problem.d, problem.d})) &&
                grad_rho.scalar_type() == dtype,
            "grad_rho must be (..., d, d) in the dtype of rho");
}

// A pointer into another memory would be an illegal access on the GPU, which nothing survives.
inline void check_held(bool is_held, const char* name) {
  VNE_CHECK(is_held, name, " must be on the GPU of the other arguments");
}

}  // namespace vne
