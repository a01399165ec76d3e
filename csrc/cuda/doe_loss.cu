// Difference of entropies, equation (8). The launches are those of vn_entropy: the one that
// measures the rows of z1 measures those of z2 and the cosines too, and the last adds them up. The
// backward is one pass over both views.

#include "cuda/policy.h"
#include "cuda/stages.h"
#include "ops/doe_loss.h"

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

}  // namespace

template <typename T>
void compute_doe_loss(const Batch<T>& batch, const Input& z2, const std::string& method,
                      const DoeResults<T>& out) {
  const Call call(batch);
  const Problem& problem = batch.problem;
  const Workspace<double> cosines = call.workspace<double>(problem.batch * problem.n);
  const SecondView<T> second{&z2, cosines.data, out.row_stats};
  const Outputs<T> outputs{
      .entropy = out.entropy, .cosine = out.cosine, .grad_z = out.entropy_grad};
  if (!out.entropy) {
    normalize_rows(call, batch.z, batch.weights, second);
    return write_samples(call, MatrixFunction<T>{}, 0, second, outputs);
  }
  const Method chosen = parse_method(method, fastest_method(call.context, problem, z2.dtype));
  const Normalized<T> normalized = normalize(call, batch.z, batch.weights, second);
  const double shift = centering_shift(problem.m());
  MatrixFunction<T> w = log_by(call, normalized, chosen, shift);
  entropy_from_log(call, batch.z, normalized, w, shift, second, outputs);
}

template <typename T>
void compute_doe_loss_backward(const Batch<T>& batch, const Input& z2, const T* grad_entropy,
                               const T* grad_cosine, const T* entropy_grad, const T* row_stats,
                               T* grad_z1, T* grad_z2) {
  const Call call(batch);
  const int64_t n = batch.problem.n, d = batch.problem.d;
  dispatch_elements<T>(z2.dtype, [&](auto element) {
    using In = decltype(element);
    const In *data1 = static_cast<const In*>(batch.z.data),
             *data2 = static_cast<const In*>(z2.data);
    call.launch("doe_loss_backward", backward<T, In>, batch.problem.batch * n, kThreads,
                grad_entropy, grad_cosine, data1, data2, entropy_grad, row_stats, n, d,
                is_vector(data1, d) && is_vector(data2, d), grad_z1, grad_z2);
  });
}

}  // namespace vne
