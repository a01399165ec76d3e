// The stages of an entropy whose batch is spread over processes, equation (12): the operators
// density, density_backward, density_entropy, density_entropy_grad.
//
// Parts of a batch have the d side in common: rho of the whole is the sum of their rho. The stages
// are those of vn_entropy with that side chosen. What is left for the kernels here is to carry
// matrices of d x d numbers between the rows as torch lays them out and workspaces of leading(d)
// columns, tau times or divided by tau: each entry is read once or twice and written once, so a
// thread takes an entry, or a block a row where it needs the trace as well.
//
// Sums over processes are symmetric only but for rounding, as different entries are added in
// different orders: a matrix that comes in is replaced by its symmetric part.

#include <cmath>

#include "cuda/stages.h"

namespace vne {
namespace {

// ---- kernels ----------------------------------------------------------------------------------

// rho [batch, m, m] <- tau A^; `trace` as in Normalized. Of a sample that is not finite, A is NaN
// throughout; of zeros it is zero.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    write_density(const T* a, const double* trace, int m, int64_t count, T* rho) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  const int64_t row = index / m, sample = row / m, ld = leading(m);
  const double factor = trace ? trace[sample] : 1 / (kStretch<T> * kStretch<T>);
  rho[index] = static_cast<T>(factor * a[(sample * ld + row % m) * ld + index % m]);
}

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

// ---- launchers --------------------------------------------------------------------------------

template <typename T>
Workspace<double> diagonal_of(const Call& call, const T* matrices) {
  const Problem& problem = call.problem;
  const int64_t m = problem.m(), rows = problem.batch * m;
  Workspace<double> diagonal = call.workspace<double>(rows);
  call.launch("take_diagonal", take_diagonal<T>, grid_for(rows, kWarps), kThreads, matrices,
              static_cast<int>(m), rows, diagonal.data);
  return diagonal;
}

// A^ of matrices rho [batch, m, m].
template <typename T>
Normalized<T> divide(const Call& call, const Tensor& rho) {
  const Problem& problem = call.problem;
  check_side(problem);
  const int64_t m = problem.m(), ld = leading(m);
  const T* data = static_cast<const T*>(rho.const_data_ptr());
  const Workspace<double> diagonal = diagonal_of(call, data);
  Normalized<T> result;
  result.trace = call.workspace<double>(problem.batch);
  result.a = call.workspace<T>(problem.batch * ld * ld);
  call.launch("divide_matrices", divide_matrices<T>, problem.batch * ld, kThreads, data,
              diagonal.data, static_cast<int>(m), result.a.data, result.trace.data);
  return result;
}

// W = (G + G^T) / 2 of matrices G [batch, m, m].
template <typename T>
MatrixFunction<T> symmetric_part(const Call& call, const Tensor& grad_rho,
                                 const Normalized<T>& normalized) {
  const int64_t m = call.problem.m(), ld = leading(m);
  const T* data = static_cast<const T*>(grad_rho.const_data_ptr());
  const Workspace<double> diagonal = diagonal_of(call, data);
  MatrixFunction<T> w;
  w.count = 1;
  w.terms = call.workspace<T>(call.problem.batch * ld * ld);
  w.samples = call.workspace<Sample>(call.problem.batch);
  call.launch("symmetrize", symmetrize<T>, call.problem.batch * m, kThreads, data, diagonal.data,
              normalized.trace.data, static_cast<int>(m), w.terms.data, w.samples.data);
  return w;
}

// ---- rows <-> rho -----------------------------------------------------------------------------

Tensor density(const Tensor& z, const std::optional<Tensor>& weights, bool normalize, double eps) {
  const Problem problem = make_density_problem(z, weights, normalize, eps);
  const Context context(z);
  check_device(context, "weights", weights);
  const int64_t d = problem.d, count = problem.batch * d * d;
  const Tensor rho = empty(z, problem.sizes({d, d}), compute_dtype(z.scalar_type()));
  if (problem.batch == 0) return rho;
  const Input input(z);
  const std::optional<Tensor> p = contiguous(weights);
  const Call call{context, problem, input.tensor};
  dispatch_compute(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Normalized<T> normalized = vne::normalize<T>(call, input, data_or_null<T>(p));
    call.launch("write_density", write_density<T>, grid_for(count), kThreads, normalized.a.data,
                normalized.trace.data, static_cast<int>(d), count,
                static_cast<T*>(rho.mutable_data_ptr()));
  });
  return rho;
}

// d<G, rho> = 2 <diag(p) U G, dU>: G takes the place of log A in (3).
std::tuple<Tensor, Tensor> density_backward(const Tensor& grad_rho, const Tensor& z,
                                            const std::optional<Tensor>& weights, bool normalize,
                                            double eps) {
  const Problem problem = make_density_problem(z, weights, normalize, eps);
  const Context context(z);
  check_device(context, "grad_rho", grad_rho);
  check_device(context, "weights", weights);
  check_side(problem);
  const int64_t n = problem.n, d = problem.d;
  const ScalarType dtype = compute_dtype(z.scalar_type());
  check_density_gradient(problem, dtype, grad_rho);
  const Tensor grad_z = empty(z, problem.sizes({n, d}), dtype);
  const Tensor grad_weights =
      empty(z, weights ? problem.sizes({n}) : std::vector<int64_t>{0}, dtype);
  if (problem.batch == 0) return {grad_z, grad_weights};
  const Input input(z);
  const std::optional<Tensor> p = contiguous(weights);
  const Tensor g = torch::stable::contiguous(grad_rho);
  const Call call{context, problem, input.tensor};
  dispatch_compute(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Normalized<T> rows = normalize_rows<T>(call, input, data_or_null<T>(p));
    MatrixFunction<T> w = symmetric_part(call, g, rows);
    Outputs<T> out;
    out.grad_z = static_cast<T*>(grad_z.mutable_data_ptr());
    if (weights) out.grad_weights = static_cast<T*>(grad_weights.mutable_data_ptr());
    gradient<T>(call, input, rows, w, 2, out);
  });
  return {grad_z, grad_weights};
}

// ---- rho -> S, dS/drho ------------------------------------------------------------------------

// W = log A^ + shift I as one term, written out as dS/drho = -(log rho + I).
template <typename T>
void gradient_from_log(const Call& call, const Normalized<T>& normalized, MatrixFunction<T>& w,
                       double shift, T* grad) {
  const int64_t m = call.problem.m(), count = call.problem.batch * m * m;
  if (w.count > 1) combine(call, normalized, w);
  call.launch("write_gradient", write_gradient<T>, grid_for(count), kThreads, w.terms.data,
              w.samples.data, 1 - shift, static_cast<int>(m), count, grad);
}

std::tuple<Tensor, Tensor> forward(const Tensor& rho, const std::string& method, bool with_grad) {
  const Problem problem = make_matrix_problem(rho);
  const Context context(rho);
  const Method chosen = parse_method(method, fastest_method(context, problem, rho.scalar_type()));
  const int64_t m = problem.m();
  const Tensor entropy = empty(rho, problem.batch_sizes, rho.scalar_type());
  const Tensor grad_rho =
      empty(rho, with_grad ? problem.sizes({m, m}) : std::vector<int64_t>{0}, rho.scalar_type());
  if (problem.batch == 0) return {entropy, grad_rho};
  const Tensor matrices = torch::stable::contiguous(rho);
  const Call call{context, problem, matrices};
  dispatch_compute(rho.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const double shift = centring_shift(m);
    const Normalized<T> normalized = divide<T>(call, matrices);
    MatrixFunction<T> w = log_by(call, normalized, chosen, shift);
    Outputs<T> out;
    out.entropy = static_cast<T*>(entropy.mutable_data_ptr());
    if (with_grad)
      gradient_from_log(call, normalized, w, shift, static_cast<T*>(grad_rho.mutable_data_ptr()));
    write_samples(call, w, shift, {}, out);
  });
  return {entropy, grad_rho};
}

Tensor density_entropy(const Tensor& rho, const std::string& method) {
  return std::get<0>(forward(rho, method, false));
}

std::tuple<Tensor, Tensor> density_entropy_grad(const Tensor& rho, const std::string& method) {
  return forward(rho, method, true);
}

}  // namespace
}  // namespace vne

STABLE_TORCH_LIBRARY_IMPL(vne_kernels, CUDA, library) {
  library.impl("density", TORCH_BOX(&vne::density));
  library.impl("density_backward", TORCH_BOX(&vne::density_backward));
  library.impl("density_entropy", TORCH_BOX(&vne::density_entropy));
  library.impl("density_entropy_grad", TORCH_BOX(&vne::density_entropy_grad));
}
