// The eigendecomposition, by cuSOLVER, and functions of a matrix by it.
//
// A sample that has no finite A^ is replaced by the identity, for no library is asked to converge
// on a NaN; whoever uses the result looks at its Sample first.

#include <cfloat>
#include <cmath>

#include "cuda/stages.h"
#include "cuda/vendor.h"

namespace vne {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// squares [batch, ld] <- of each row of A, a warp each.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    square_rows(const T* a, int64_t ld, int64_t count, double* squares) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (row >= count) return;
  double sum = 0;  // A may be near the end of the range of T
  for (int64_t j = threadIdx.x % 32; j < ld; j += 32) {
    const double entry = a[row * ld + j];
    sum += entry * entry;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) squares[row] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    measure_samples(const T* a, const double* squares, const double* trace, int m,
                    Sample* samples) {
  using Scratch = double[32];
  VNE_SHARED(Scratch, scratch);
  const int64_t sample = blockIdx.x;
  const int64_t ld = leading(m);
  a += sample * ld * ld;
  double diagonal = 0, square = 0;
  for (int i = threadIdx.x; i < m; i += kThreads) {
    diagonal += a[i * ld + i];
    square += squares[sample * ld + i];
  }
  const double a_trace = block_sum(diagonal, scratch);
  const double sum = block_sum(square, scratch);
  if (threadIdx.x != 0) return;
  samples[sample] =
      make_sample(make_trace<T>(a_trace, trace, sample), a_trace, sqrt(sum) / a_trace);
}

// to [batch, m, m] <- A^, or the identity.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    copy_regular(const T* a, int m, int64_t count, const Sample* samples, T* to) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  const int64_t sample = index / m / m, row = index / m % m, col = index % m, ld = leading(m);
  const Sample known = samples[sample];
  const T entry = a[(sample * ld + row) * ld + col] * static_cast<T>(known.scale);
  to[index] = is_regular(known) ? entry : row == col ? T(1) : T(0);
}

// logs <- log of the eigenvalues + shift. The smallest that is told from the rounding of the
// largest stands for all below: any finite logarithm gives the same gradient there.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    log_values(const T* values, int m, int64_t count, T shift, T* logs) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  constexpr T kEpsilon = sizeof(T) == 8 ? T(DBL_EPSILON) : T(FLT_EPSILON);
  const T largest = values[index / m * m + m - 1];
  logs[index] = log(max(values[index], kEpsilon * largest)) + shift;
}

// to <- vectors, row k or column k times f_k.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    scale_vectors(const T* vectors, bool as_rows, const T* f, int m, int64_t count, T* to) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  const int64_t row = index / m, sample = row / m;
  to[index] = vectors[index] * f[as_rows ? row : sample * m + index % m];
}

dim3 blocks_of(int64_t count) {
  return dim3(static_cast<unsigned>(ceil_div(count, int64_t{kThreads})));
}

}  // namespace

template <typename T>
Workspace<Sample> measure_matrices(const Context& context, const Problem& problem,
                                   const Tensor& like, const Normalized<T>& normalized) {
  const int m = static_cast<int>(problem.m());
  const int64_t ld = leading(m);
  const Workspace<double> squares(like, problem.batch * ld);
  Workspace<Sample> samples(like, problem.batch);
  launch("square_rows", square_rows<T>,
         dim3(static_cast<unsigned>(ceil_div(problem.batch * ld, int64_t{kWarps}))), dim3(kThreads),
         context.stream, normalized.a.data, ld, problem.batch * ld, squares.data);
  launch("measure_samples", measure_samples<T>, dim3(static_cast<unsigned>(problem.batch)),
         dim3(kThreads), context.stream, normalized.a.data, squares.data, normalized.trace.data, m,
         samples.data);
  return samples;
}

template <typename T>
Eigen<T> eigh(const Context& context, const Problem& problem, const Tensor& like,
              const Normalized<T>& normalized) {
  const int64_t m = problem.m(), count = problem.batch * m * m;
  Eigen<T> eigen;
  eigen.samples = measure_matrices(context, problem, like, normalized);
  eigen.values = Workspace<T>(like, problem.batch * m);
  eigen.vectors = Workspace<T>(like, count);
  launch("copy_regular", copy_regular<T>, blocks_of(count), dim3(kThreads), context.stream,
         normalized.a.data, static_cast<int>(m), count, eigen.samples.data, eigen.vectors.data);
  symmetric_eigen(context, like, eigen.vectors.data, eigen.values.data, problem.batch, m);
  return eigen;
}

template <typename T>
Workspace<T> spectral_function(const Context& context, const Problem& problem, const Tensor& like,
                               const T* vectors, bool as_rows, const T* f) {
  const int64_t m = problem.m(), size = m * m, count = problem.batch * size;
  const Workspace<T> scaled(like, count);
  launch("scale_vectors", scale_vectors<T>, blocks_of(count), dim3(kThreads), context.stream,
         vectors, as_rows, f, static_cast<int>(m), count, scaled.data);
  const int64_t ld = leading(m);
  Workspace<T> result(like, problem.batch * ld * ld);
  gemm<T>(context, m, m, m, T(1), {scaled.data, m, size, as_rows}, {vectors, m, size, !as_rows},
          T(0), result.data, ld, ld * ld, problem.batch);
  return result;
}

template <typename T>
MatrixFunction<T> log_by_eigh(const Context& context, const Problem& problem, const Tensor& like,
                              const Normalized<T>& normalized, double shift) {
  const int64_t m = problem.m();
  Eigen<T> eigen = eigh(context, problem, like, normalized);
  const Workspace<T> logs(like, problem.batch * m);
  launch("log_values", log_values<T>, blocks_of(problem.batch * m), dim3(kThreads), context.stream,
         eigen.values.data, static_cast<int>(m), problem.batch * m, static_cast<T>(shift),
         logs.data);
  MatrixFunction<T> w;
  w.terms = spectral_function(context, problem, like, eigen.vectors.data, true, logs.data);
  w.count = 1;
  w.samples = std::move(eigen.samples);
  combine(context, problem, like, normalized, w);  // for <A, W>
  return w;
}

#define VNE_INSTANTIATE(T)                                                                         \
  template Workspace<Sample> measure_matrices(const Context&, const Problem&, const Tensor&,       \
                                              const Normalized<T>&);                               \
  template Eigen<T> eigh(const Context&, const Problem&, const Tensor&, const Normalized<T>&);     \
  template Workspace<T> spectral_function(const Context&, const Problem&, const Tensor&, const T*, \
                                          bool, const T*);                                         \
  template MatrixFunction<T> log_by_eigh(const Context&, const Problem&, const Tensor&,            \
                                         const Normalized<T>&, double);
VNE_INSTANTIATE(float)
VNE_INSTANTIATE(double)
#undef VNE_INSTANTIATE

}  // namespace vne
