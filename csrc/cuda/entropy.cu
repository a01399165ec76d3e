// S = -sum lambda log lambda and its gradient: the operators vn_entropy and vn_entropy_grad.

#include "cuda/stages.h"

namespace vne {

// What "auto" takes, from the first row of the table that a problem fits:
//
//   dtype     m           method
//   float64   any         eigh: 50 poles in float64, at 1/32 or 1/64 of the rate on RTX cards
//   float32   to 256      poles: one launch, about m dependent pivots, against milliseconds
//   float32   to 4096     poles if a multiprocessor has at most kMatrices of the batch's matrices
//   to
//                         do, else eigh, which then has the batched solver on its side
//   float32   beyond      eigh: 16 m^2 numbers of workspace a sample would be gigabytes
//
// The limits are estimates from operation counts and published solver times (csrc/README.md): no
// GPU has measured them yet.
Method fastest_method(const Context& context, const Problem& problem, ScalarType dtype) {
  constexpr int64_t kOneBlock = 256, kWorkspace = 4096, kMatrices = 16;
  const int64_t m = problem.m();
  if (compute_dtype(dtype) == ScalarType::Double) return Method::kEigh;
  if (m <= kOneBlock) return Method::kPoles;
  const bool few = problem.batch <= kMatrices * context.multiprocessors;
  return m <= kWorkspace && few ? Method::kPoles : Method::kEigh;
}

template <typename T>
MatrixFunction<T> log_by(const Call& call, const Normalized<T>& normalized, Method method,
                         double shift) {
  return method == Method::kPoles ? log_by_poles(call, normalized, shift)
                                  : log_by_eigh(call, normalized, shift);
}

template <typename T>
void entropy(const Call& call, const Input& z, const Normalized<T>& normalized, Method method,
             const SecondView<T>& second, const Outputs<T>& out) {
  const double shift = centring_shift(call.problem.m());
  MatrixFunction<T> w = log_by(call, normalized, method, shift);
  entropy_from_log(call, z, normalized, w, shift, second, out);
}

#define VNE_INSTANTIATE(T)                                                              \
  template MatrixFunction<T> log_by(const Call&, const Normalized<T>&, Method, double); \
  template void entropy(const Call&, const Input&, const Normalized<T>&, Method,        \
                        const SecondView<T>&, const Outputs<T>&);
VNE_INSTANTIATE(float)
VNE_INSTANTIATE(double)
#undef VNE_INSTANTIATE

namespace {

struct Forward {
  Tensor entropy, grad_z, grad_weights;
};

Forward forward(const Tensor& z, const std::optional<Tensor>& weights, bool normalize,
                const std::string& method, double eps, bool with_grad) {
  const Problem problem = make_problem(z, weights, normalize, eps);
  const Context context(z);
  check_device(context, "weights", weights);
  const Method chosen = parse_method(method, fastest_method(context, problem, z.scalar_type()));
  const ScalarType dtype = compute_dtype(z.scalar_type());
  const std::vector<int64_t> none{0};
  const Forward result{empty(z, problem.batch_sizes, dtype),
                       empty(z, with_grad ? problem.sizes({problem.n, problem.d}) : none, dtype),
                       empty(z, with_grad && weights ? problem.sizes({problem.n}) : none, dtype)};
  if (problem.batch == 0) return result;
  const Input input(z);
  const std::optional<Tensor> p = contiguous(weights);
  const Call call{context, problem, input.tensor};
  dispatch_compute(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Outputs<T> out;
    out.entropy = static_cast<T*>(result.entropy.mutable_data_ptr());
    if (with_grad) out.grad_z = static_cast<T*>(result.grad_z.mutable_data_ptr());
    if (with_grad && weights)
      out.grad_weights = static_cast<T*>(result.grad_weights.mutable_data_ptr());
    const Normalized<T> normalized = vne::normalize<T>(call, input, data_or_null<T>(p));
    entropy<T>(call, input, normalized, chosen, {}, out);
  });
  return result;
}

Tensor vn_entropy(const Tensor& z, const std::optional<Tensor>& weights, bool normalize,
                  const std::string& method, double eps) {
  return forward(z, weights, normalize, method, eps, false).entropy;
}

std::tuple<Tensor, Tensor, Tensor> vn_entropy_grad(const Tensor& z,
                                                   const std::optional<Tensor>& weights,
                                                   bool normalize, const std::string& method,
                                                   double eps) {
  const Forward result = forward(z, weights, normalize, method, eps, true);
  return {result.entropy, result.grad_z, result.grad_weights};
}

}  // namespace
}  // namespace vne

STABLE_TORCH_LIBRARY_IMPL(vne_kernels, CUDA, library) {
  library.impl("vn_entropy", TORCH_BOX(&vne::vn_entropy));
  library.impl("vn_entropy_grad", TORCH_BOX(&vne::vn_entropy_grad));
}
