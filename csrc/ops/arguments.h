// The arguments that operators share: their checks, the results' memory, and the way to a backend.

#pragma once

#include <utility>

#include "common/problem.h"
#include "ops/operator.h"

namespace vne {

// A pointer into another memory would be an illegal access on the GPU, which nothing survives.
inline void check_beside(const Tensor& first, const char* name, const Tensor& tensor) {
  VNE_CHECK(
      tensor.is_cuda() == first.is_cuda() && tensor.get_device_index() == first.get_device_index(),
      name, " must be on the GPU of the other arguments");
}

inline bool same_sizes(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (tensor.size(static_cast<int64_t>(i)) != sizes[i]) return false;
  }
  return true;
}

// A batch of samples z (..., n, d) and their weights (..., n), checked.
struct Samples {
  Problem problem;
  Tensor z;
  std::optional<Tensor> weights;

  ScalarType dtype() const { return compute_dtype(z.scalar_type()); }

  // Throws unless a tensor has the sizes (..., tail), `shape` in words, and the dtype of results.
  void check(const char* name, const Tensor& tensor, std::initializer_list<int64_t> tail,
             const char* shape) const {
    VNE_CHECK(same_sizes(tensor, problem.sizes(tail)) && tensor.scalar_type() == dtype(), name,
              " must be ", shape, " in the dtype of results");
    check_beside(z, name, tensor);
  }
  // A result (..., tail), not initialized; (0,) if it is not wanted.
  Tensor result(std::initializer_list<int64_t> tail, bool is_wanted = true) const {
    return empty(z, is_wanted ? problem.sizes(tail) : std::vector<int64_t>{0}, dtype());
  }
  Tensor grad_z() const { return result({problem.n, problem.d}); }
  Tensor grad_weights() const { return result({problem.n}, weights.has_value()); }
};

inline Samples check_samples(const Tensor& z, const std::optional<Tensor>& weights, bool normalize,
                             double eps) {
  VNE_CHECK(z.dim() >= 2, "z must be (..., n, d), got ", z.dim(), " dimensions");
  const ScalarType dtype = z.scalar_type();
  VNE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
            "z must be float16, bfloat16, float32 or float64");
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
    VNE_CHECK(weights->scalar_type() == compute_dtype(dtype),
              "weights must be float64 for a float64 z, otherwise float32");
    check_beside(z, "weights", *weights);
  }
  return {std::move(problem), z, weights};
}

// A batch of matrices rho (..., m, m) in the place of samples: n = d = m.
inline Samples check_matrices(const Tensor& rho) {
  VNE_CHECK(rho.dim() >= 2 && rho.size(rho.dim() - 1) == rho.size(rho.dim() - 2) &&
                rho.size(rho.dim() - 1) >= 1,
            "rho must be (..., m, m) with m >= 1");
  VNE_CHECK(rho.scalar_type() == ScalarType::Float || rho.scalar_type() == ScalarType::Double,
            "rho must be float32 or float64");
  Samples matrices = check_samples(rho, std::nullopt, false, 0);
  matrices.problem.of_matrices = true;
  return matrices;
}

// Calls the backend, f(Batch<T>), with the type T that z is computed in; not for an empty batch.
template <typename F>
void run(const Samples& samples, F f) {
  if (samples.problem.batch == 0) return;
  const Input z(samples.z);
  const Tensor weights = samples.weights ? as_contiguous(*samples.weights) : z.tensor;
  const auto run_as = [&](auto type) {
    using T = decltype(type);
    f(Batch<T>{samples.problem, z, samples.weights ? Batch<T>::in(weights) : nullptr});
  };
  samples.dtype() == ScalarType::Double ? run_as(double{}) : run_as(float{});
}

}  // namespace vne
