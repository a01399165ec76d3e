// The stages that every CUDA operator is made of, in the order they run:
//
//   normalize   z -> A^ = X^ X^T on the smaller side, what is known of rows   normalize.cu
//   poles       A^ -> the terms whose sum is log A^: m <= 256, one block each  poles.cu
//               the same in panels, beyond                                     blocked.cu
//   eigh        A^ -> eigenvalues, eigenvectors, V f(L) V^T                    eigh.cu
//   gradient    S; (log A^) X^ -> dS/dz, dS/dp                                 gradient.cu
//   matrices    rho -> A^, and W -> dF/drho                                    matrices.cu
//
// Equation numbers: csrc/README.md.
//
// Every stage works on a whole batch, in T = float or double. X^ = X / sqrt(tau), tau = tr A, as on
// the CPU: A = tau A^, log A = log A^ + log(tau) I. Nothing is read back to the host: what depends
// on the data (a sample that is not finite, a trace of zero) is decided on the device.

#pragma once

#include <cmath>
#include <optional>
#include <utility>

#include "common/pole_table.h"
#include "common/problem.h"
#include "cuda/context.h"
#include "cuda/load.h"
#include "cuda/runtime.h"

namespace vne {

// Device memory for `count` elements, from torch's allocator. It is given back with the tensor,
// which is safe while kernels still run: the allocator reuses it on the same stream only.
template <typename Element>
struct Workspace {
  Workspace() = default;
  Workspace(const Tensor& like, int64_t count)
      : tensor(empty(like, {ceil_div(count * static_cast<int64_t>(sizeof(Element)), int64_t{8})},
                     ScalarType::Double)),
        data(static_cast<Element*>(tensor->mutable_data_ptr())) {}
  std::optional<Tensor> tensor;
  Element* data = nullptr;
};

// What the stages of one call of an operator have in common.
struct Call {
  template <typename T>
  explicit Call(const Batch<T>& batch)
      : context(batch.z.tensor), problem(batch.problem), like(batch.z.tensor) {}

  const Context context;
  const Problem& problem;
  Tensor like;  // on the device of the call: workspaces are allocated like it

  template <typename Element>
  Workspace<Element> workspace(int64_t count) const {
    return Workspace<Element>(like, count);
  }

  // Runs a kernel on the call's stream, in `blocks` blocks of `threads` threads.
  template <typename... Parameters, typename... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
              Arguments&&... arguments) const {
    vne::launch(name, kernel, blocks, threads, context.stream,
                std::forward<Arguments>(arguments)...);
  }
};

// What is remembered of row i: u_i = inverse_norm z_i.
struct Row {
  double inverse_norm;  // 1 / max(|z_i|, eps); 1 without normalization; 0 for a zero row
  double root_weight;   // sqrt(p_i)
  double square_norm;   // |u_i|^2
  bool projected;       // u_i moves on the sphere: equation (4) applies
};

// What is known of a sample once its A has been seen. Roots and logarithm are taken once, by one
// thread: float64 has 1/64 of the rate of float32 on most GPUs.
struct Sample {
  double trace;  // tau of the weighted rows; 0 if all are zero, not finite if an entry is not
  double root_trace, log_trace;
  double scale, root_scale;  // A^ = scale A has trace one
  double norm;               // |A^|_F
};

// Rows of X are this much too long in A, unless a trace was divided out of them: rows far shorter
// than eps would vanish in float32 where they are all there is.
template <typename T>
constexpr double kStretch = sizeof(T) == 8 ? 1.0 : 0x1p60;

// tau of a sample from the trace of A in memory; `trace` as in Normalized.
template <typename T>
__device__ __forceinline__ double make_trace(double a_trace, const double* trace, int64_t sample) {
  if (a_trace < (sizeof(T) == 8 ? 1e-300 : 1e-30)) return 0;  // T cannot divide by it
  return trace ? trace[sample] * a_trace : a_trace * (1 / (kStretch<T> * kStretch<T>));
}

// `norm` of A^.
__device__ __forceinline__ Sample make_sample(double tau, double a_trace, double norm) {
  const double scale = 1 / a_trace;
  return {tau, sqrt(tau), log(tau), scale, sqrt(scale), norm};
}

// Whether a sample has an entropy to speak of, given its trace; otherwise S = 0, or NaN.
__device__ __forceinline__ bool is_regular(double trace) { return isfinite(trace) && trace > 0; }
__device__ __forceinline__ bool is_regular(const Sample& sample) {
  return is_regular(sample.trace);
}

constexpr int64_t kLargestSide = 32767;  // of A: its rows and columns are counted in int

inline void check_side(const Problem& problem) {
  VNE_CHECK(problem.m() <= kLargestSide, "a matrix can have at most ", kLargestSide,
            " rows on CUDA, got ", problem.m());
}

// Leading dimension of an m x m matrix in a workspace: a multiple of the register tiles, so that no
// thread has to ask whether an entry of its tile exists. A is zero beyond m.
__host__ __device__ __forceinline__ int64_t leading(int64_t m) { return (m + 7) / 8 * 8; }

// The second view of the DoE loss and what is wanted of it.
template <typename T>
struct SecondView {
  const Input* z = nullptr;
  double* cosines = nullptr;  // [batch, n]
  T* row_stats = nullptr;     // [batch, 4, n] or null
};

template <typename T>
struct Normalized {
  Workspace<Row> rows;  // [batch, n]
  Workspace<Scale<T>>
      scales;  // [batch, n]: row i of kStretch X (of X^ where `trace` is given) over z_i
  Workspace<double> trace;  // [batch]: the tau that the scales already contain; null: none
  Workspace<T> a;           // [batch, ld, ld], ld = leading(m)
};

// Equations (1), (2). `weights` [batch, n] may be null: 1/n each.
template <typename T>
Normalized<T> normalize(const Call& call, const Input& z, const T* weights,
                        const SecondView<T>& second = {});

// X^ alone, and the cosines to a second view: the same without `a`, its trace divided out.
template <typename T>
Normalized<T> normalize_rows(const Call& call, const Input& z, const T* weights,
                             const SecondView<T>& second = {});

// Trace and norm of each A. The register sweeps compute them themselves.
template <typename T>
Workspace<Sample> measure_matrices(const Call& call, const Normalized<T>& normalized);

// A symmetric W = identity I + sum of terms, for each sample, and <A, sum of terms>.
template <typename T>
struct MatrixFunction {
  Workspace<T> terms;         // [batch, count, m, m]
  int count = 0;              // terms of a sample
  double identity = 0;        // see above
  double terms_identity = 0;  // the part of it that the terms do not contain yet
  Workspace<double> inner;    // [batch, parts]: their sum is <A, sum of terms>
  int64_t parts = 0;
  Workspace<Sample> samples;  // [batch]
};

// The poles of equation (6) as a kernel takes them: by value, in the constant bank.
template <typename T>
struct PoleList {
  static constexpr int kCount = PoleTable<T>::kSize;
  PoleList() {
    for (int k = 0; k < kCount; ++k) {
      t[k] = static_cast<T>(PoleTable<T>::kPoles[k].t);
      w[k] = static_cast<T>(PoleTable<T>::kPoles[k].w);
    }
  }
  T t[kCount], w[kCount];
};

// The largest m of which one block holds the triangle in registers.
template <typename T>
constexpr int kLargestSweep = sizeof(T) == 8 ? 128 : 256;

// Equation (6): log A^ + shift I.
template <typename T>
MatrixFunction<T> log_by_poles(const Call& call, const Normalized<T>& normalized, double shift);
template <typename T>
MatrixFunction<T> log_by_blocked_poles(const Call& call, const Normalized<T>& normalized,
                                       double shift);
template <typename T>
MatrixFunction<T> log_by_eigh(const Call& call, const Normalized<T>& normalized, double shift);

template <typename T>
MatrixFunction<T> log_by(const Call& call, const Normalized<T>& normalized, Method method,
                         double shift) {
  return method == Method::kPoles ? log_by_poles(call, normalized, shift)
                                  : log_by_eigh(call, normalized, shift);
}

template <typename T>
struct Eigen {
  Workspace<T> values;   // [batch, m], ascending, of A^
  Workspace<T> vectors;  // [batch, m, m], as rows
  Workspace<Sample> samples;
};
template <typename T>
Eigen<T> eigh(const Call& call, const Normalized<T>& normalized);

// V diag(f) V^T [batch, ld, ld], for f [batch, m] and eigenvectors as rows or as columns.
template <typename T>
Workspace<T> spectral_function(const Call& call, const T* vectors, bool as_rows, const T* f);

// w [batch, m, m] <- identity I + sum of terms [batch, count, m, m], each times its pole's weight
// if `weighted`; of the terms only the lower triangle is read. inner [batch, inner_parts(m)].
template <typename T>
void sum_terms_of(const Call& call, int64_t batch, int64_t m, const T* a, const T* terms, int count,
                  double identity, bool weighted, const Sample* samples, T* w, double* inner);
int64_t inner_parts(int64_t m);

// One term, the sum of all with the identity, instead of many.
template <typename T>
void combine(const Call& call, const Normalized<T>& normalized, MatrixFunction<T>& w);

// Where results go; any of them may be null.
template <typename T>
struct Outputs {
  T* entropy = nullptr;       // [batch]
  T* cosine = nullptr;        // [batch]
  T* grad_z = nullptr;        // [batch, n, d]
  T* grad_weights = nullptr;  // [batch, n]
};

// S of W = log A^ + shift I, and the mean cosine to a second view, as far as asked for.
template <typename T>
void write_samples(const Call& call, const MatrixFunction<T>& w, double shift,
                   const SecondView<T>& second, const Outputs<T>& out);

// S and, unless grad_z is null, its gradients: W = log A^ + shift I.
template <typename T>
void entropy_from_log(const Call& call, const Input& z, const Normalized<T>& normalized,
                      MatrixFunction<T>& w, double shift, const SecondView<T>& second,
                      const Outputs<T>& out);

// Equation (4) and its like: the gradients of a scalar whose gradient in X is
// factor (W + identity I) X.
template <typename T>
void gradient(const Call& call, const Input& z, const Normalized<T>& normalized,
              MatrixFunction<T>& w, double factor, double identity, const Outputs<T>& out);

// A^ of matrices rho [batch, m, m].
template <typename T>
Normalized<T> divide(const Call& call, const T* rho);

// W = (G + G^T) / 2 of matrices G [batch, m, m], whose samples have the traces of the rows.
template <typename T>
MatrixFunction<T> symmetric_part(const Call& call, const T* matrices, const Normalized<T>& rows);

// S of matrices and, unless out.grad_z is null, dS/drho = -(log rho + I): W = log A^ + shift I.
template <typename T>
void matrix_entropy_from_log(const Call& call, const Normalized<T>& normalized,
                             MatrixFunction<T>& w, double shift, const Outputs<T>& out);

// Row and column of the t-th tile of a lower triangle, counted row by row.
__host__ __device__ __forceinline__ int triangle_row(int t) {
  int row = static_cast<int>((sqrtf(8.0f * static_cast<float>(t) + 1.0f) - 1.0f) / 2.0f);
  while (row * (row + 1) / 2 > t) --row;  // the square root was rounded
  while ((row + 1) * (row + 2) / 2 <= t) ++row;
  return row;
}

}  // namespace vne
