// Difference of entropies, equation (8): S of the first view and the mean cosine between the views.
//
// One normalisation of z1 serves both terms, one pass over z2 gives its norms and the cosines, and
// the backward is one pass over both. beta is applied by the caller, so that it may change at every
// step without a new graph.

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/stages.h"

namespace vne {
namespace {

constexpr int64_t kGrainElements = 1 << 14;

// u1 . u2, also where z1 . z2 is beyond the range of a double.
template <typename T>
double cosine_of_rows(const T* z1, const T* z2, int64_t size, double inverse_norm1,
                      double inverse_norm2) {
  const double product = simd::kernels<T>().dot(z1, z2, size);
  if (std::isfinite(product)) return product * inverse_norm1 * inverse_norm2;
  double sum = 0;
  for (int64_t j = 0; j < size; ++j) sum += (z1[j] * inverse_norm1) * (z2[j] * inverse_norm2);
  return sum;
}

// Mean over i of cos(z1_i, z2_i). row1_of(i, z1_i) is what is known of row i of the first view;
// `row_stats` [kRowStats, n] may be null.
template <typename T, typename RowOf>
double mean_cosine(const Problem& problem, RowOf row1_of, const Input& z1, const Input& z2,
                   int64_t sample, T* row_stats) {
  const int64_t n = problem.n, d = problem.d;
  std::vector<double> cosines(n);
  torch::stable::parallel_for(
      0, n, std::max<int64_t>(1, kGrainElements / d), [&](int64_t begin, int64_t end) {
        Buffer<T> buffer1(d), buffer2(d);
        for (int64_t i = begin; i < end; ++i) {
          const T* z1_i = z1.row(sample, i, buffer1.get());
          const T* z2_i = z2.row(sample, i, buffer2.get());
          const Row row1 = row1_of(i, z1_i), row2 = measure(problem, z2_i, row1.weight);
          // A norm that is not finite has the inverse 0: it must not pass for a zero row.
          cosines[i] = std::isfinite(row1.square_norm + row2.square_norm)
                           ? cosine_of_rows(z1_i, z2_i, d, row1.inverse_norm, row2.inverse_norm)
                           : std::numeric_limits<double>::quiet_NaN();
          if (!row_stats) continue;
          row_stats[kInverseNorm1 * n + i] = static_cast<T>(row1.inverse_norm);
          row_stats[kInverseNorm2 * n + i] = static_cast<T>(row2.inverse_norm);
          row_stats[kProjection1 * n + i] = static_cast<T>(row1.projected ? cosines[i] : 0);
          row_stats[kProjection2 * n + i] = static_cast<T>(row2.projected ? cosines[i] : 0);
        }
      });
  double sum = 0;
  for (const double value : cosines) sum += value;
  if (row_stats && std::isnan(sum))
    fill(row_stats, kRowStats * n, sum);  // NaN for the whole sample
  return sum / static_cast<double>(n);
}

struct Forward {
  Tensor entropy, cosine, entropy_grad, row_stats;
};

Forward forward(const Tensor& z1, const Tensor& z2, const std::string& method, double eps,
                bool with_grad) {
  const Problem problem = make_problem(z1, std::nullopt, true, eps);
  check_views(problem, z1, z2);
  const Method chosen = parse_method(method, fastest_method(problem, z1.scalar_type(), with_grad));
  const ScalarType dtype = compute_dtype(z1.scalar_type());
  const std::vector<int64_t> none{0};
  const Forward result{empty(z1, problem.batch_sizes, dtype), empty(z1, problem.batch_sizes, dtype),
                       empty(z1, with_grad ? problem.sizes({problem.n, problem.d}) : none, dtype),
                       empty(z1, with_grad ? problem.sizes({kRowStats, problem.n}) : none, dtype)};
  const Input input1(z1, problem), input2(z2, problem);
  dispatch_compute(z1.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* entropies = static_cast<T*>(result.entropy.mutable_data_ptr());
    T* cosines = static_cast<T*>(result.cosine.mutable_data_ptr());
    T* grads = static_cast<T*>(result.entropy_grad.mutable_data_ptr());
    T* stats = static_cast<T*>(result.row_stats.mutable_data_ptr());
    for_each_sample(problem, chosen, [&](int64_t sample) {
      const Rows<T> rows1 = normalize<T>(problem, input1, sample, nullptr);
      T* sample_grad = with_grad ? grads + sample * problem.n * problem.d : nullptr;
      T* sample_stats = with_grad ? stats + sample * kRowStats * problem.n : nullptr;
      entropies[sample] = static_cast<T>(entropy<T>(problem, rows1, chosen, sample_grad, nullptr));
      const auto row1_of = [&](int64_t i, const T*) { return rows1.row[i]; };
      cosines[sample] =
          static_cast<T>(mean_cosine(problem, row1_of, input1, input2, sample, sample_stats));
    });
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
  const ScalarType dtype = compute_dtype(z1.scalar_type());
  const Tensor mean = empty(z1, problem.batch_sizes, dtype),
               row_stats = empty(z1, problem.sizes({kRowStats, problem.n}), dtype);
  const Input input1(z1, problem), input2(z2, problem);
  dispatch_compute(z1.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* cosines = static_cast<T*>(mean.mutable_data_ptr());
    T* stats = static_cast<T*>(row_stats.mutable_data_ptr());
    const auto row1_of = [&](int64_t, const T* z1_i) { return measure(problem, z1_i, 1); };
    for_each_sample(problem, Method::kPoles, [&](int64_t sample) {
      cosines[sample] = static_cast<T>(mean_cosine(problem, row1_of, input1, input2, sample,
                                                   stats + sample * kRowStats * problem.n));
    });
  });
  return {mean, row_stats};
}

// Gradients of grad_entropy S(z1) + grad_cosine mean_i cos_i in both views, in one pass.
std::tuple<Tensor, Tensor> doe_loss_backward(const Tensor& grad_entropy, const Tensor& grad_cosine,
                                             const Tensor& z1, const Tensor& z2,
                                             const Tensor& entropy_grad, const Tensor& row_stats) {
  const Problem problem = make_problem(z1, std::nullopt, true, 0);
  const int64_t n = problem.n, d = problem.d;
  const ScalarType dtype = compute_dtype(z1.scalar_type());
  check_views(problem, z1, z2);
  check_doe_gradients(problem, dtype, grad_entropy, grad_cosine, entropy_grad, row_stats);
  const Tensor grad_z1 = empty(z1, problem.sizes({n, d}), dtype),
               grad_z2 = empty(z1, problem.sizes({n, d}), dtype);
  const Input input1(z1, problem), input2(z2, problem);
  const Tensor g_entropy = torch::stable::contiguous(grad_entropy),
               g_cosine = torch::stable::contiguous(grad_cosine);
  const Tensor s_grad = torch::stable::contiguous(entropy_grad),
               stats = torch::stable::contiguous(row_stats);
  dispatch_compute(z1.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* g_entropy_data = static_cast<const T*>(g_entropy.const_data_ptr());
    const T* g_cosine_data = static_cast<const T*>(g_cosine.const_data_ptr());
    const T* s_grad_data = static_cast<const T*>(s_grad.const_data_ptr());
    const T* stats_data = static_cast<const T*>(stats.const_data_ptr());
    T* out1 = static_cast<T*>(grad_z1.mutable_data_ptr());
    T* out2 = static_cast<T*>(grad_z2.mutable_data_ptr());
    torch::stable::parallel_for(
        0, problem.batch * n, std::max<int64_t>(1, kGrainElements / d),
        [&](int64_t begin, int64_t end) {
          Buffer<T> buffer1(d), buffer2(d);
          for (int64_t index = begin; index < end; ++index) {
            const int64_t sample = index / n, i = index % n;
            const T* row_stat = stats_data + sample * kRowStats * n + i;
            const T r1 = row_stat[kInverseNorm1 * n], r2 = row_stat[kInverseNorm2 * n];
            // scale r1 (r2 z2 - projection_1 r1 z1), and its mirror image; a zero row has r = 0.
            // First the bracket, which is of order one: r1 r2 may overflow or vanish.
            const double scale = g_cosine_data[sample] / static_cast<double>(n);
            const T q1 = row_stat[kProjection1 * n], q2 = row_stat[kProjection2 * n];
            const T* z1_i = input1.row(sample, i, buffer1.get());
            const T* z2_i = input2.row(sample, i, buffer2.get());
            const T* s_i = s_grad_data + index * d;
            T *out1_i = out1 + index * d, *out2_i = out2 + index * d;
            simd::kernels<T>().combine(r2, z2_i, -q1 * r1, z1_i, out1_i, d);
            simd::kernels<T>().combine(r1, z1_i, -q2 * r2, z2_i, out2_i, d);
            simd::kernels<T>().combine(static_cast<T>(scale * r1), out1_i, g_entropy_data[sample],
                                       s_i, out1_i, d);
            simd::kernels<T>().scale(out2_i, static_cast<T>(scale * r2), out2_i, d);
          }
        });
  });
  return {grad_z1, grad_z2};
}

}  // namespace
}  // namespace vne

STABLE_TORCH_LIBRARY_IMPL(vne_kernels, CPU, library) {
  library.impl("doe_loss", TORCH_BOX(&vne::doe_loss));
  library.impl("doe_loss_grad", TORCH_BOX(&vne::doe_loss_grad));
  library.impl("doe_loss_backward", TORCH_BOX(&vne::doe_loss_backward));
  library.impl("cosine", TORCH_BOX(&vne::cosine));
}
