// Matrices that come from outside: rho in the place of samples, and a gradient in rho.
//
// Kernels here carry matrices of m x m numbers between the rows as torch lays them out and
// workspaces of leading(m) columns, tau times or divided by tau: each entry is read once or twice
// and written once, so a thread takes an entry, or a block a row where it needs the trace as well.
//
// Sums over processes are symmetric only but for rounding, as different entries are added in
// different orders: a matrix that comes in is replaced by its symmetric part.

#include <cmath>

#include "cuda/stages.h"

namespace vne {
namespace {

// diagonal [batch, m] <- of each matrix [m, m], a warp each row; NaN if the row is not finite.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    take_diagonal(const T* matrices, int m, int64_t rows, double* diagonal) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (row >= rows) return;
  T residue = 0;  // stays 0; x - x is NaN for a NaN and for an infinity
  for (int j = threadIdx.x % 32; j < m; j += 32) {
    const T entry = matrices[row * m + j];
    residue += entry - entry;
  }
  residue = warp_sum(residue);
  if (threadIdx.x % 32 == 0) diagonal[row] = matrices[row * m + row % m] + residue;
}

__device__ __forceinline__ double sum_diagonal(const double* diagonal, int m, double* scratch) {
  double sum = 0;
  for (int i = threadIdx.x; i < m; i += kThreads) sum += diagonal[i];
  return block_sum(sum, scratch);
}

template <typename T>
__device__ __forceinline__ double with_transpose(const T* matrix, int m, int64_t row, int64_t col) {
  return static_cast<double>(matrix[row * m + col]) + matrix[col * m + row];
}

// a [batch, ld, ld] <- A^ = (rho + rho^T) / (2 tau), trace [batch] <- tau. A block each row of a.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    divide_matrices(const T* rho, const double* diagonal, int m, T* a, double* trace) {
  using Scratch = double[32];
  VNE_SHARED(Scratch, scratch);
  const int64_t ld = leading(m), sample = blockIdx.x / ld, row = blockIdx.x % ld;
  const double sum = sum_diagonal(diagonal + sample * m, m, scratch);
  const double tau = sum < 0 ? NAN : sum;
  const double factor = tau < 1e-300 ? 0 : 0.5 / tau;
  rho += sample * m * m;
  for (int64_t col = threadIdx.x; col < ld; col += kThreads) {
    const bool inside = row < m && col < m;
    a[(sample * ld + row) * ld + col] =
        inside ? static_cast<T>(factor * with_transpose(rho, m, row, col)) : T(0);
  }
  if (row == 0 && threadIdx.x == 0) trace[sample] = tau;
}

// w [batch, ld, ld] <- (G + G^T) / 2, and what the gradient stage wants to know of a sample. A
// block each row of G. A G that is not finite comes from the part of another process that is not.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    symmetrize(const T* grad_rho, const double* diagonal, const double* trace, int m, T* w,
               Sample* samples) {
  using Scratch = double[32];
  VNE_SHARED(Scratch, scratch);
  const int64_t ld = leading(m), sample = blockIdx.x / m, row = blockIdx.x % m;
  const double sum = sum_diagonal(diagonal + sample * m, m, scratch);
  grad_rho += sample * m * m;
  for (int64_t col = threadIdx.x; col < m; col += kThreads)
    w[(sample * ld + row) * ld + col] = static_cast<T>(0.5 * with_transpose(grad_rho, m, row, col));
  // X^ has trace one, so that no A^ has to be divided by its own.
  if (row == 0 && threadIdx.x == 0)
    samples[sample] = make_sample(isfinite(sum) ? trace[sample] : NAN, 1, 0);
}

// grad [batch, m, m] <- -(log rho + I) = -(W + (identity + log tau) I).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    write_gradient(const T* w, const Sample* samples, double identity, int m, int64_t count,
                   T* grad) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  const int64_t sample = index / m / m, row = index / m % m, col = index % m, ld = leading(m);
  const Sample known = samples[sample];
  const T entry = w[(sample * ld + row) * ld + col];
  const T on_diagonal = row == col ? static_cast<T>(identity + known.log_trace) : T(0);
  const T irregular = known.trace == 0 ? T(0) : T(NAN);
  grad[index] = is_regular(known) ? -(entry + on_diagonal) : irregular;
}

template <typename T>
Workspace<double> diagonal_of(const Call& call, const T* matrices) {
  const Problem& problem = call.problem;
  const int64_t m = problem.m(), rows = problem.batch * m;
  Workspace<double> diagonal = call.workspace<double>(rows);
  call.launch("take_diagonal", take_diagonal<T>, grid_for(rows, kWarps), kThreads, matrices,
              static_cast<int>(m), rows, diagonal.data);
  return diagonal;
}

}  // namespace

template <typename T>
Normalized<T> divide(const Call& call, const T* rho) {
  const Problem& problem = call.problem;
  check_side(problem);
  const int64_t m = problem.m(), ld = leading(m);
  const Workspace<double> diagonal = diagonal_of(call, rho);
  Normalized<T> result{.trace = call.workspace<double>(problem.batch),
                       .a = call.workspace<T>(problem.batch * ld * ld)};
  call.launch("divide_matrices", divide_matrices<T>, problem.batch * ld, kThreads, rho,
              diagonal.data, static_cast<int>(m), result.a.data, result.trace.data);
  return result;
}

template <typename T>
MatrixFunction<T> symmetric_part(const Call& call, const T* matrices, const Normalized<T>& rows) {
  const int64_t m = call.problem.m(), ld = leading(m);
  const Workspace<double> diagonal = diagonal_of(call, matrices);
  MatrixFunction<T> w{.terms = call.workspace<T>(call.problem.batch * ld * ld),
                      .count = 1,
                      .samples = call.workspace<Sample>(call.problem.batch)};
  call.launch("symmetrize", symmetrize<T>, call.problem.batch * m, kThreads, matrices,
              diagonal.data, rows.trace.data, static_cast<int>(m), w.terms.data, w.samples.data);
  return w;
}

template <typename T>
void matrix_entropy_from_log(const Call& call, const Normalized<T>& normalized,
                             MatrixFunction<T>& w, double shift, const Outputs<T>& out) {
  const int64_t m = call.problem.m(), count = call.problem.batch * m * m;
  if (out.grad_z) {
    if (w.count > 1) combine(call, normalized, w);
    call.launch("write_gradient", write_gradient<T>, grid_for(count), kThreads, w.terms.data,
                w.samples.data, 1 - shift, static_cast<int>(m), count, out.grad_z);
  }
  write_samples(call, w, shift, {}, out);
}

#define VNE_INSTANTIATE(T)                                                                     \
  template Normalized<T> divide(const Call&, const T*);                                        \
  template MatrixFunction<T> symmetric_part(const Call&, const T*, const Normalized<T>&);      \
  template void matrix_entropy_from_log(const Call&, const Normalized<T>&, MatrixFunction<T>&, \
                                        double, const Outputs<T>&);
VNE_INSTANTIATE(float)
VNE_INSTANTIATE(double)
#undef VNE_INSTANTIATE

}  // namespace vne
