// Difference of entropies, equation (8): S of the first view and the mean cosine between the views.
//
// The launches are those of vn_entropy: the one that measures the rows of z1 measures those of z2
// and the cosines too, and the last adds them up. The backward is one pass over both views. beta is
// applied by the caller, so that it may change at every step without a new graph.

#include <cmath>

#include "cuda/stages.h"

namespace vne {
namespace {

template <typename T, typename In>
__global__ void __launch_bounds__(kThreads)
    backward(const T* grad_entropy, const T* grad_cosine, const In* z1, const In* z2,
             const T* entropy_grad, const T* row_stats, int64_t n, int64_t d, bool vector,
             T* grad_z1, T* grad_z2) {
  const int64_t index = blockIdx.x, sample = index / n;  // a row
  const T* stats = row_stats + sample * kRowStats * n + index % n;
  const double r1 = stats[kInverseNorm1 * n], r2 = stats[kInverseNorm2 * n];
  const double scale = grad_cosine[sample] / static_cast<double>(n);
  // scale r1 (r2 z2 - projection_1 r1 z1), and its mirror image. A zero row has r = 0.
  const Scale<T> cross = make_scale<T>(scale * r1, r2);
  const Scale<T> own1 = make_scale<T>(-scale * r1 * stats[kProjection1 * n], r1);
  const Scale<T> own2 = make_scale<T>(-scale * r2 * stats[kProjection2 * n], r2);
  const T of_entropy = grad_entropy[sample];
  for (int64_t j = 4 * threadIdx.x; j < d; j += 4 * kThreads) {
    const int64_t at = index * d + j;
    T x1[4], x2[4], s[4];
    load_quad(z1 + at, d - j, vector, x1);
    load_quad(z2 + at, d - j, vector, x2);
    load_quad(entropy_grad + at, d - j, false, s);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (j + q >= d) break;
      grad_z1[at + q] = own1(x1[q]) + cross(x2[q]) + of_entropy * s[q];
      grad_z2[at + q] = own2(x2[q]) + cross(x1[q]);
    }
  }
}

struct Forward {
  Tensor entropy, cosine, entropy_grad, row_stats;
};

Forward forward(const Tensor& z1, const Tensor& z2, const std::string& method, double eps,
                bool with_grad) {
  const Problem problem = make_problem(z1, std::nullopt, true, eps);
  check_views(problem, z1, z2);
  const Context context(z1);
  check_device(context, "z2", z2);
  const Method chosen = parse_method(method, fastest_method(context, problem, z1.scalar_type()));
  const ScalarType dtype = compute_dtype(z1.scalar_type());
  const std::vector<int64_t> none{0};
  const Forward result{empty(z1, problem.batch_sizes, dtype), empty(z1, problem.batch_sizes, dtype),
                       empty(z1, with_grad ? problem.sizes({problem.n, problem.d}) : none, dtype),
                       empty(z1, with_grad ? problem.sizes({kRowStats, problem.n}) : none, dtype)};
  if (problem.batch == 0) return result;
  const Input input1(z1), input2(z2);
  const Call call{context, problem, input1.tensor};
  dispatch_compute(z1.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Workspace<double> cosines(input1.tensor, problem.batch * problem.n);
    Outputs<T> out;
    SecondView<T> second{&input2, cosines.data, nullptr};
    out.entropy = static_cast<T*>(result.entropy.mutable_data_ptr());
    out.cosine = static_cast<T*>(result.cosine.mutable_data_ptr());
    if (with_grad) {
      out.grad_z = static_cast<T*>(result.entropy_grad.mutable_data_ptr());
      second.row_stats = static_cast<T*>(result.row_stats.mutable_data_ptr());
    }
    const Normalized<T> normalized = normalize<T>(call, input1, nullptr, second);
    entropy<T>(call, input1, normalized, chosen, second, out);
  });
  return result;
}

std::tuple<Tensor, Tensor> doe_loss(const Tensor& z1, const Tensor& z2, const std::string& method,
                                    double eps) {
  const Forward result = forward(z1, z2, method, eps, false);
  return {result.entropy, result.cosine};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> doe_loss_grad(const Tensor& z1, const Tensor& z2,
                                                         const std::string& method, double eps) {
  const Forward result = forward(z1, z2, method, eps, true);
  return {result.entropy, result.cosine, result.entropy_grad, result.row_stats};
}

std::tuple<Tensor, Tensor> cosine(const Tensor& z1, const Tensor& z2, double eps) {
  const Problem problem = make_problem(z1, std::nullopt, true, eps);
  check_views(problem, z1, z2);
  const Context context(z1);
  check_device(context, "z2", z2);
  const ScalarType dtype = compute_dtype(z1.scalar_type());
  const Tensor mean = empty(z1, problem.batch_sizes, dtype),
               row_stats = empty(z1, problem.sizes({kRowStats, problem.n}), dtype);
  if (problem.batch == 0) return {mean, row_stats};
  const Input input1(z1), input2(z2);
  const Call call{context, problem, input1.tensor};
  dispatch_compute(z1.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Workspace<double> cosines(input1.tensor, problem.batch * problem.n);
    const SecondView<T> second{&input2, cosines.data,
                               static_cast<T*>(row_stats.mutable_data_ptr())};
    Outputs<T> out;
    out.cosine = static_cast<T*>(mean.mutable_data_ptr());
    normalize_rows<T>(call, input1, nullptr, second);
    write_samples(call, MatrixFunction<T>{}, 0, second, out);
  });
  return {mean, row_stats};
}

// Gradients of grad_entropy S(z1) + grad_cosine mean_i cos_i in both views, in one pass.
std::tuple<Tensor, Tensor> doe_loss_backward(const Tensor& grad_entropy, const Tensor& grad_cosine,
                                             const Tensor& z1, const Tensor& z2,
                                             const Tensor& entropy_grad, const Tensor& row_stats) {
  const Problem problem = make_problem(z1, std::nullopt, true, 0);
  const Context context(z1);
  check_device(context, "z2", z2);
  const int64_t n = problem.n, d = problem.d;
  const ScalarType dtype = compute_dtype(z1.scalar_type());
  check_views(problem, z1, z2);
  check_doe_gradients(problem, dtype, grad_entropy, grad_cosine, entropy_grad, row_stats);
  check_device(context, "grad_entropy", grad_entropy);
  check_device(context, "grad_cosine", grad_cosine);
  check_device(context, "entropy_grad", entropy_grad);
  check_device(context, "row_stats", row_stats);
  const Tensor grad_z1 = empty(z1, problem.sizes({n, d}), dtype),
               grad_z2 = empty(z1, problem.sizes({n, d}), dtype);
  const Input input1(z1), input2(z2);
  const Tensor g_entropy = torch::stable::contiguous(grad_entropy),
               g_cosine = torch::stable::contiguous(grad_cosine);
  const Tensor s_grad = torch::stable::contiguous(entropy_grad),
               stats = torch::stable::contiguous(row_stats);
  const Call call{context, problem, input1.tensor};
  dispatch_input(z1.scalar_type(), [&](auto element) {
    using In = decltype(element);
    using T = std::conditional_t<std::is_same_v<In, double>, double, float>;
    const In *data1 = static_cast<const In*>(input1.data),
             *data2 = static_cast<const In*>(input2.data);
    call.launch("doe_loss_backward", backward<T, In>, problem.batch * n, kThreads,
                static_cast<const T*>(g_entropy.const_data_ptr()),
                static_cast<const T*>(g_cosine.const_data_ptr()), data1, data2,
                static_cast<const T*>(s_grad.const_data_ptr()),
                static_cast<const T*>(stats.const_data_ptr()), n, d,
                is_vector(data1, d) && is_vector(data2, d),
                static_cast<T*>(grad_z1.mutable_data_ptr()),
                static_cast<T*>(grad_z2.mutable_data_ptr()));
  });
  return {grad_z1, grad_z2};
}

}  // namespace
}  // namespace vne

STABLE_TORCH_LIBRARY_IMPL(vne_kernels, CUDA, library) {
  library.impl("doe_loss", TORCH_BOX(&vne::doe_loss));
  library.impl("doe_loss_grad", TORCH_BOX(&vne::doe_loss_grad));
  library.impl("doe_loss_backward", TORCH_BOX(&vne::doe_loss_backward));
  library.impl("cosine", TORCH_BOX(&vne::cosine));
}
