// The stages that every CPU operator is made of, in the order they run:
//
//   normalize   z -> rows X^ with trace-one A = X^ X^T         normalize.cpp
//   gram        X^ -> A, on the smaller side                   normalize.cpp
//   eigh        A -> eigenvalues, eigenvectors (LAPACK)        eigh.cpp
//   eigenvalues A -> eigenvalues alone                         eigenvalues.cpp
//   poles       A -> log A as a sum of inverses                poles.cpp, tridiagonal.cpp
//   gradient    (log A) X^ -> dS/dz, dS/dp                     gradient.cpp
//
// Equation numbers: csrc/README.md.
//
// Every stage works on one sample, in T = float or double. X^ = X / sqrt(tau) with tau = tr A makes
// the trace one whatever the norms and weights are, so that nothing overflows and the poles, fitted
// on [0, 1], always apply: A = tau A^, log A = log A^ + log(tau) I.

#pragma once

#include <complex>
#include <limits>
#include <vector>

#include "common/problem.h"
#include "cpu/gemm.h"

namespace vne {

// Row i of a sample of z as T: in place, or converted into `buffer` [d]. A float32 z may be
// computed in double.
template <typename T>
const T* row_of(const Problem& problem, const Input& z, int64_t sample, int64_t i, T* buffer);

// What is remembered of row i: u_i = inverse_norm z_i.
struct Row {
  double weight = 0;        // p_i
  double inverse_norm = 0;  // 1 / max(|z_i|, eps); 1 without normalization; 0 for a zero row
  double square_norm = 0;   // |u_i|^2
  bool projected = false;   // u_i moves on the sphere: equation (4) applies
};

template <typename T>
struct Rows {
  Rows(int64_t n, int64_t d) : x(n * d), row(n) {}
  Buffer<T> x;  // [n, d], rows sqrt(p_i / tau) u_i
  std::vector<Row> row;
  double trace = 0;   // tau; 0 if every row is zero: then x is not set
  bool valid = true;  // every entry finite, no weight negative; otherwise x is not set

  bool has_matrix() const { return valid && trace != 0; }
  // Replaces its functions where it has none.
  double without_matrix() const { return valid ? 0 : std::numeric_limits<double>::quiet_NaN(); }
};

// The norm of one row z [d], and what follows from it. A row of weight 0 counts as a zero row.
template <typename T>
Row measure(const Problem& problem, const T* z, double weight);

// Equation (1), of one sample.
template <typename T>
Rows<T> normalize(const Batch<T>& batch, int64_t sample);

// Equation (2): A^ [m, m], of the smaller side unless the problem wants rho.
template <typename T>
void gram(const Problem& problem, const Rows<T>& rows, T* a);

struct Eigen {
  Tensor values;   // [m], ascending
  Tensor vectors;  // [m, m], as columns

  template <typename T>
  MatrixView<T> view_vectors() const {
    return {static_cast<const T*>(vectors.const_data_ptr()), vectors.stride(0), vectors.stride(1)};
  }
};
template <typename T>
Eigen eigh(const T* a, int64_t m);

// v [size] with v_0 = 1 and tau, such that (I - tau v v^T) x = (beta, 0, ...); returns beta. v may
// be x.
template <typename T>
double householder(const T* x, int64_t size, T* v, double* tau);

// s [size, size], upper triangular, such that H_0 H_1 ... = I - V^T S V: of reflectors I - tau_i
// v_i v_i^T, the rows of V, whose products gram [size, size] holds.
template <typename T>
void triangular_factor(const T* gram, const T* tau, int64_t size, T* s);

// A = Q T Q^H, A real or complex, T real and tridiagonal: its diagonal [m] and off-diagonal [m -
// 1].
template <typename Entry>
void tridiagonalize(const Entry* a, int64_t m, double* diagonal, double* off_diagonal);

// values [m], ascending, of the symmetric or Hermitian a [m, m]: its upper triangle is read. Unlike
// eigh it may be called from within a parallel region.
template <typename T>
void eigenvalues(const T* a, int64_t m, T* values);
template <typename T>
void eigenvalues(const std::complex<T>* a, int64_t m, T* values);

// Equation (6): log A^ + shift I for a trace-one A^, from inverses of A^ that threads share out.
template <typename T>
void log_by_sweeps(const T* a, int64_t m, double shift, T* result);

// The same by inverses of the tridiagonal matrix that A^ is first reduced to, which one thread does
// faster; and S of A^ alone, in much less. False where rounding stands in the way (A^ lacks rank):
// the result is then not set.
bool log_by_tridiagonal(const float* a, int64_t m, double shift, float* result);
bool entropy_by_tridiagonal(const float* a, int64_t m, double* entropy);

// to [m, m] <- (from + from^T) / divisor. A sum over processes is symmetric only but for rounding:
// they add different entries in different orders. Whether all entries are finite.
template <typename T>
bool add_transpose(const T* from, int64_t m, double divisor, T* to);

// Equation (4) and its like. With W a matrix function on the smaller side and product = W X^, the
// gradient of a scalar whose gradient in X is factor (W + identity I) X.
//   grad_z [n, d], grad_weights [n] or null.
template <typename T>
void gradient(const Problem& problem, const Rows<T>& rows, const T* w, double factor,
              double identity, T* grad_z, T* grad_weights);

template <typename T>
double trace(const T* a, int64_t m) {
  double sum = 0;
  for (int64_t i = 0; i < m; ++i) sum += a[i * m + i];
  return sum;
}

// A pointer to a result that is not wanted is null, and stays it.
template <typename T>
T* at(T* data, int64_t offset) {
  return data ? data + offset : nullptr;
}

template <typename T>
void fill(T* data, int64_t size, double value) {
  if (!data) return;
  for (int64_t i = 0; i < size; ++i) data[i] = static_cast<T>(value);
}

// Whether a sample has no A^; its gradients are then filled.
template <typename T>
bool fill_without_matrix(const Problem& problem, const Rows<T>& rows, T* grad_z, T* grad_weights) {
  if (rows.has_matrix()) return false;
  fill(grad_z, problem.n * problem.d, rows.without_matrix());
  fill(grad_weights, problem.n, rows.without_matrix());
  return true;
}

}  // namespace vne
