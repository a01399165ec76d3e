// Difference of entropies, equation (8). One pass over z2 gives its norms and the cosines, and the
// backward is one pass over both views.

#include "ops/doe_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/entropy.h"

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
          const T* z1_i = row_of(problem, z1, sample, i, buffer1.get());
          const T* z2_i = row_of(problem, z2, sample, i, buffer2.get());
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

}  // namespace

template <typename T>
void compute_doe_loss(const Batch<T>& batch, const Input& z2, const std::string& method,
                      const DoeResults<T>& out) {
  const Problem& problem = batch.problem;
  const int64_t n = problem.n;
  const bool with_grad = out.entropy_grad != nullptr;
  const Choice choice{parse_method(method, fastest_method(problem, z2.dtype, with_grad)), false};
  for_each_sample(problem, out.entropy ? choice.method : Method::kPoles, [&](int64_t sample) {
    const auto cosine_with = [&](const auto& row1_of) {
      out.cosine[sample] = static_cast<T>(mean_cosine(problem, row1_of, batch.z, z2, sample,
                                                      at(out.row_stats, sample * kRowStats * n)));
    };
    if (!out.entropy)
      return cosine_with([&](int64_t, const T* z1_i) { return measure(problem, z1_i, 1); });
    const Rows<T> rows1 = normalize(batch, sample);
    out.entropy[sample] = static_cast<T>(of_rows<T>(
        Entropy(), choice, problem, rows1, at(out.entropy_grad, sample * n * problem.d), nullptr));
    cosine_with([&](int64_t i, const T*) { return rows1.row[i]; });
  });
}

template <typename T>
void compute_doe_loss_backward(const Batch<T>& batch, const Input& z2, const T* grad_entropy,
                               const T* grad_cosine, const T* entropy_grad, const T* row_stats,
                               T* grad_z1, T* grad_z2) {
  const Problem& problem = batch.problem;
  const int64_t n = problem.n, d = problem.d;
  torch::stable::parallel_for(
      0, problem.batch * n, std::max<int64_t>(1, kGrainElements / d),
      [&](int64_t begin, int64_t end) {
        Buffer<T> buffer1(d), buffer2(d);
        for (int64_t index = begin; index < end; ++index) {
          const int64_t sample = index / n, i = index % n;
          const T* row_stat = row_stats + sample * kRowStats * n + i;
          const T r1 = row_stat[kInverseNorm1 * n], r2 = row_stat[kInverseNorm2 * n];
          // scale r1 (r2 z2 - projection_1 r1 z1), and its mirror image; a zero row has r = 0.
          // First the bracket, which is of order one: r1 r2 may overflow or vanish.
          const double scale = grad_cosine[sample] / static_cast<double>(n);
          const T q1 = row_stat[kProjection1 * n], q2 = row_stat[kProjection2 * n];
          const T* z1_i = row_of(problem, batch.z, sample, i, buffer1.get());
          const T* z2_i = row_of(problem, z2, sample, i, buffer2.get());
          const T* s_i = entropy_grad + index * d;
          T *out1_i = grad_z1 + index * d, *out2_i = grad_z2 + index * d;
          simd::kernels<T>().combine(r2, z2_i, -q1 * r1, z1_i, out1_i, d);
          simd::kernels<T>().combine(r1, z1_i, -q2 * r2, z2_i, out2_i, d);
          simd::kernels<T>().combine(static_cast<T>(scale * r1), out1_i, grad_entropy[sample], s_i,
                                     out1_i, d);
          simd::kernels<T>().scale(out2_i, static_cast<T>(scale * r2), out2_i, d);
        }
      });
}

}  // namespace vne
