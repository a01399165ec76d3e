// A function of the spectrum on a GPU: what all have in common, from z to the results.
//
// Beside what ops/functional.h asks for, a function F has
//
//   // Launches what computes F [batch], out.entropy, and unless out.grad_z is null the gradients.
//   template <typename T>
//   void run(const Call& call, const Input& z, const Normalized<T>& normalized, Method method,
//            const Outputs<T>& out) const;
//
// Its kernels decide what a sample gives that is not regular (stages.h): F of zeros, or NaN.

#pragma once

#include "cuda/policy.h"
#include "cuda/stages.h"
#include "ops/functional.h"

namespace vne {

template <typename T, typename F>
void evaluate(const F& f, const std::string& method, const Batch<T>& batch, const Results<T>& out) {
  const Call call(batch);
  check_side(batch.problem);
  const Method fastest = fastest_method(call.context, batch.problem, batch.z.dtype);
  const Normalized<T> normalized = batch.problem.of_matrices
                                       ? divide(call, static_cast<const T*>(batch.z.data))
                                       : normalize(call, batch.z, batch.weights);
  f.run(call, batch.z, normalized, parse_method(method, fastest),
        Outputs<T>{.entropy = out.value, .grad_z = out.grad_z, .grad_weights = out.grad_weights});
}

}  // namespace vne
