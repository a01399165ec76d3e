// tr(rho^2) of rho over its trace, and its gradient: the operators purity and purity_grad. The
// entropy of order two, equation (13), without an eigenvalue.
//
// The purity is the square of the norm of A^, which measure_matrices takes. A^ itself stands in the
// gradient where the entropy has its logarithm, so that the gradient stage does the rest; the only
// kernel here centres A^, each entry by itself.

#include <cmath>

#include "cuda/stages.h"

namespace vne {
namespace {

__device__ __forceinline__ double purity_of(const Sample& sample) {
  return sample.norm * sample.norm;
}

// Of each sample, within [1/m, 1], which rounding may have left. One of zeros is taken for a pure
// state, as its entropy is 0.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    write_purity(const Sample* samples, int m, int64_t count, T* purity) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  const Sample known = samples[index];
  const T irregular = known.trace == 0 ? T(1) : T(NAN);
  const double clamped = min(max(purity_of(known), 1.0 / m), 1.0);
  purity[index] = is_regular(known) ? static_cast<T>(clamped) : irregular;
}

// w [batch, ld, ld] <- (A^ - P I) / tau: the trace moves with X.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    centre_matrices(const T* a, const Sample* samples, int m, int64_t count, T* w) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  const int64_t ld = leading(m), row = index / ld % ld, col = index % ld;
  const Sample known = samples[index / ld / ld];
  const double on_diagonal = row == col && row < m ? purity_of(known) : 0;
  w[index] = static_cast<T>((known.scale * a[index] - on_diagonal) / known.trace);
}

std::tuple<Tensor, Tensor, Tensor> compute(const Tensor& z, const std::optional<Tensor>& weights,
                                           bool normalize, const std::string& method, double eps,
                                           bool with_grad) {
  const Problem problem = make_problem(z, weights, normalize, eps);
  parse_method(method, Method::kEigh);  // checked; there is one way
  const Context context(z);
  check_device(context, "weights", weights);
  check_side(problem);
  const int64_t n = problem.n, d = problem.d, ld = leading(problem.m());
  const ScalarType dtype = compute_dtype(z.scalar_type());
  const std::vector<int64_t> none{0};
  const Tensor purity = empty(z, problem.batch_sizes, dtype);
  const Tensor grad_z = empty(z, with_grad ? problem.sizes({n, d}) : none, dtype);
  const Tensor grad_weights = empty(z, with_grad && weights ? problem.sizes({n}) : none, dtype);
  if (problem.batch == 0) return {purity, grad_z, grad_weights};
  const Input input(z);
  const std::optional<Tensor> p = contiguous(weights);
  const Call call{context, problem, input.tensor};
  dispatch_compute(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Normalized<T> normalized = vne::normalize<T>(call, input, data_or_null<T>(p));
    MatrixFunction<T> w;
    w.samples = measure_matrices(call, normalized);
    call.launch("write_purity", write_purity<T>, grid_for(problem.batch), kThreads, w.samples.data,
                static_cast<int>(problem.m()), problem.batch,
                static_cast<T*>(purity.mutable_data_ptr()));
    if (!with_grad) return;
    const int64_t count = problem.batch * ld * ld;
    w.count = 1;
    w.terms = call.workspace<T>(count);
    call.launch("centre_matrices", centre_matrices<T>, grid_for(count), kThreads, normalized.a.data,
                w.samples.data, static_cast<int>(problem.m()), count, w.terms.data);
    Outputs<T> out;
    out.grad_z = static_cast<T*>(grad_z.mutable_data_ptr());
    if (weights) out.grad_weights = static_cast<T*>(grad_weights.mutable_data_ptr());
    gradient<T>(call, input, normalized, w, 4, out);
  });
  return {purity, grad_z, grad_weights};
}

Tensor purity(const Tensor& z, const std::optional<Tensor>& weights, bool normalize,
              const std::string& method, double eps) {
  return std::get<0>(compute(z, weights, normalize, method, eps, false));
}

std::tuple<Tensor, Tensor, Tensor> purity_grad(const Tensor& z,
                                               const std::optional<Tensor>& weights, bool normalize,
                                               const std::string& method, double eps) {
  return compute(z, weights, normalize, method, eps, true);
}

}  // namespace
}  // namespace vne

STABLE_TORCH_LIBRARY_IMPL(vne_kernels, CUDA, library) {
  library.impl("purity", TORCH_BOX(&vne::purity));
  library.impl("purity_grad", TORCH_BOX(&vne::purity_grad));
}
