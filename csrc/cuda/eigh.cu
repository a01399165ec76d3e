// The eigendecomposition by cuSOLVER, and functions of a matrix by it.
//
// The identity replaces a sample that has no finite A^, so that no library has to converge on a
// NaN. Users of the result look at its Sample first.

#include <cfloat>
#include <cmath>

#include "cuda/stages.h"
#include "cuda/vendor.h"

namespace vne {
namespace {

// squares [batch, ld] <- |row|^2 of A [batch, ld, ld], a warp each row.
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
  VNE_SHARED_ARRAY(double, scratch, 32);
  const int64_t b = blockIdx.x, ld = leading(m);
  a += b * ld * ld;
  double diagonal = 0, square = 0;
  for (int i = threadIdx.x; i < m; i += kThreads) {
    diagonal += a[i * ld + i];
    square += squares[b * ld + i];
  }
  const double a_trace = block_sum(diagonal, scratch);
  const double sum = block_sum(square, scratch);
  if (threadIdx.x != 0) return;
  samples[b] = make_sample(make_trace<T>(a_trace, trace, b), a_trace, sqrt(sum) / a_trace);
}

// to [batch, m, m] <- A^, or the identity.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    copy_regular(const T* a, int m, int64_t count, const Sample* samples, T* to) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  const int64_t b = index / m / m, row = index / m % m, col = index % m, ld = leading(m);
  const Sample sample = samples[b];
  const T entry = a[(b * ld + row) * ld + col] * static_cast<T>(sample.scale);
  to[index] = is_regular(sample) ? entry : row == col ? T(1) : T(0);
}

// logs [batch, m] <- log of the eigenvalues + shift. Eigenvalues are raised to the rounding of the
// largest one: any finite logarithm gives the same gradient there.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    log_values(const T* values, int m, int64_t count, T shift, T* logs) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  constexpr T kEpsilon = sizeof(T) == 8 ? T(DBL_EPSILON) : T(FLT_EPSILON);
  const T largest = values[index / m * m + m - 1];
  logs[index] = log(max(values[index], kEpsilon * largest)) + shift;
}

// to [batch, m, m] <- vectors, row k or column k times f_k.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    scale_vectors(const T* vectors, bool as_rows, const T* f, int m, int64_t count, T* to) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  const int64_t row = index / m, sample = row / m;
  to[index] = vectors[index] * f[as_rows ? row : sample * m + index % m];
}

}  // namespace

template <typename T>
Workspace<Sample> measure_matrices(const Call& call, const Normalized<T>& normalized) {
  const int m = static_cast<int>(call.problem.m());
  const int64_t ld = leading(m);
  const Workspace<double> squares = call.workspace<double>(call.problem.batch * ld);
  Workspace<Sample> samples = call.workspace<Sample>(call.problem.batch);
  call.launch("square_rows", square_rows<T>, grid_for(call.problem.batch * ld, kWarps), kThreads,
              normalized.a.data, ld, call.problem.batch * ld, squares.data);
  call.launch("measure_samples", measure_samples<T>, call.problem.batch, kThreads,
              normalized.a.data, squares.data, normalized.trace.data, m, samples.data);
  return samples;
}

template <typename T>
Eigen<T> eigh(const Call& call, const Normalized<T>& normalized) {
  const int64_t m = call.problem.m(), count = call.problem.batch * m * m;
  Eigen<T> eigen;
  eigen.samples = measure_matrices(call, normalized);
  eigen.values = call.workspace<T>(call.problem.batch * m);
  eigen.vectors = call.workspace<T>(count);
  call.launch("copy_regular", copy_regular<T>, grid_for(count), kThreads, normalized.a.data,
              static_cast<int>(m), count, eigen.samples.data, eigen.vectors.data);
  symmetric_eigen(call.context, call.like, eigen.vectors.data, eigen.values.data,
                  call.problem.batch, m);
  return eigen;
}

template <typename T>
Workspace<T> spectral_function(const Call& call, const T* vectors, bool as_rows, const T* f) {
  const int64_t m = call.problem.m(), size = m * m, count = call.problem.batch * size;
  const Workspace<T> scaled = call.workspace<T>(count);
  call.launch("scale_vectors", scale_vectors<T>, grid_for(count), kThreads, vectors, as_rows, f,
              static_cast<int>(m), count, scaled.data);
  const int64_t ld = leading(m);
  Workspace<T> result = call.workspace<T>(call.problem.batch * ld * ld);
  gemm<T>(call.context, m, m, m, T(1), {scaled.data, m, size, as_rows},
          {vectors, m, size, !as_rows}, T(0), result.data, ld, ld * ld, call.problem.batch);
  return result;
}

template <typename T>
MatrixFunction<T> log_by_eigh(const Call& call, const Normalized<T>& normalized, double shift) {
  const int64_t m = call.problem.m();
  Eigen<T> eigen = eigh(call, normalized);
  const Workspace<T> logs = call.workspace<T>(call.problem.batch * m);
  call.launch("log_values", log_values<T>, grid_for(call.problem.batch * m), kThreads,
              eigen.values.data, static_cast<int>(m), call.problem.batch * m, static_cast<T>(shift),
              logs.data);
  MatrixFunction<T> w;
  w.terms = spectral_function(call, eigen.vectors.data, true, logs.data);
  w.count = 1;
  w.samples = std::move(eigen.samples);
  combine(call, normalized, w);  // for <A, W>
  return w;
}

#define VNE_INSTANTIATE(T)                                                        \
  template Workspace<Sample> measure_matrices(const Call&, const Normalized<T>&); \
  template Eigen<T> eigh(const Call&, const Normalized<T>&);                      \
  template Workspace<T> spectral_function(const Call&, const T*, bool, const T*); \
  template MatrixFunction<T> log_by_eigh(const Call&, const Normalized<T>&, double);
VNE_INSTANTIATE(float)
VNE_INSTANTIATE(double)
#undef VNE_INSTANTIATE

}  // namespace vne
