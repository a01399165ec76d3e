// S = -sum lambda log lambda and its gradient, of samples and of matrices.

#include "cuda/functional.h"

namespace vne {
namespace {

struct Entropy : Function {
  template <typename T>
  void run(const Call& call, const Input& z, const Normalized<T>& normalized, Method method,
           const Outputs<T>& out) const {
    const double shift = centering_shift(call.problem.m());
    MatrixFunction<T> w = log_by(call, normalized, method, shift);
    if (call.problem.of_matrices) {
      matrix_entropy_from_log(call, normalized, w, shift, out);
    } else {
      entropy_from_log(call, z, normalized, w, shift, {}, out);
    }
  }
};

}  // namespace
}  // namespace vne

VNE_FUNCTION(vn_entropy, vne::Entropy)
VNE_FUNCTION_OF_MATRICES(density_entropy, vne::Entropy)
