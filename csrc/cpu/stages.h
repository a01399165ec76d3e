// The stages that every CPU operator is made of, in the order they run:
//
//   normalize   z -> rows X^ with trace-one A = X^ X^T         normalize.cpp
//   gram        X^ -> A, on the smaller side                   normalize.cpp
//   eigh        A -> eigenvalues, eigenvectors (LAPACK)        eigh.cpp
//   eigenvalues A -> eigenvalues alone                         eigenvalues.cpp
//   poles       A -> log A as a sum of inverses                poles.cpp, tridiagonal.cpp
//   gradient    (log A) X^ -> dS/dz, dS/dp                     gradient.cpp
//
// and the operators: entropy.cpp, spectrum.cpp, doe_loss.cpp, density.cpp. Equation numbers:
// csrc/README.md.
//
// Every stage works on one sample, in T = float or double. X^ = X / sqrt(tau) with tau = tr A makes
// the trace one whatever the norms and weights are, so that nothing overflows and the poles, fitted
// on [0, 1], always apply: A = tau A^, log A = log A^ + log(tau) I.

#pragma once

#include <cmath>
#include <functional>
#include <limits>

#include "common/problem.h"
#include "cpu/gemm.h"

namespace vne {

// A contiguous z, (batch, n, d), in the dtype it came in.
class Input {
 public:
  Input(const Tensor& z, const Problem& problem)
      : z_(torch::stable::contiguous(z)),
        data_(z_.const_data_ptr()),
        dtype_(z_.scalar_type()),
        problem_(problem) {}

  // Row i of a sample as T: in place, or converted into `buffer` [d].
  template <typename T>
  const T* row(int64_t sample, int64_t i, T* buffer) const;
  bool is_half() const { return dtype_ == ScalarType::Half || dtype_ == ScalarType::BFloat16; }

 private:
  Tensor z_;
  const void* data_;
  ScalarType dtype_;
  const Problem& problem_;
};

// What is remembered of row i: u_i = inverse_norm z_i.
struct Row {
  double weight = 0;        // p_i
  double inverse_norm = 0;  // 1 / max(|z_i|, eps); 1 without normalisation; 0 for a zero row
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
  bool empty() const { return trace == 0; }
};

// The norm of one row z [d], and what follows from it. A row of weight 0 counts as a zero row.
template <typename T>
Row measure(const Problem& problem, const T* z, double weight);

// Equation (1). `weights` [n] may be null: 1/n each.
template <typename T>
Rows<T> normalize(const Problem& problem, const Input& z, int64_t sample, const T* weights);

// Equation (2): A^ [m, m], of the smaller side unless the problem wants rho.
template <typename T>
void gram(const Problem& problem, const Rows<T>& rows, T* a);

struct Eigen {
  Tensor values;   // [m], ascending
  Tensor vectors;  // [m, m], as columns
};
template <typename T>
Eigen eigh(const T* a, int64_t m);

// v [size] with v_0 = 1 and tau, such that (I - tau v v^T) x = (beta, 0, ...); returns beta.
template <typename T>
double householder(const T* x, int64_t size, T* v, double* tau);

// s [size, size], upper triangular, such that H_0 H_1 ... = I - V^T S V: of reflectors I - tau_i
// v_i v_i^T, the rows of V, whose products gram [size, size] holds.
template <typename T>
void triangular_factor(const T* gram, const T* tau, int64_t size, T* s);

// A = Q T Q^T, T tridiagonal: its diagonal [m] and the entries beside it [m - 1].
template <typename T>
void tridiagonalize(const T* a, int64_t m, double* diagonal, double* beside);

// values [m], ascending, of a [m, m]. Unlike eigh it may be called from within a parallel region.
template <typename T>
void eigenvalues(const T* a, int64_t m, T* values);

// V diag(f) V^T, for f [m].
template <typename T>
void spectral_function(const Eigen& eigen, const T* f, int64_t m, T* result);

// Equation (6): log A^ + shift I for a trace-one A^, from inverses of A^ that threads share out.
template <typename T>
void log_by_sweeps(const T* a, int64_t m, double shift, T* result);

// The same by inverses of the tridiagonal matrix that A^ is first reduced to, which one thread does
// faster; and S of A^ alone, in much less. False where rounding stands in the way (A^ lacks rank):
// the result is then not set.
bool log_by_tridiagonal(const float* a, int64_t m, double shift, float* result);
bool entropy_by_tridiagonal(const float* a, int64_t m, double* entropy);

// Equation (4) and its like. With W a matrix function on the smaller side and product = W X^, the
// gradient of a scalar whose gradient in X is factor (W + identity I) X.
//   grad_z [n, d], grad_weights [n] or null.
template <typename T>
void gradient(const Problem& problem, const Rows<T>& rows, const T* w, double factor,
              double identity, T* grad_z, T* grad_weights);

// What method="auto" means here.
Method fastest_method(const Problem& problem, ScalarType dtype, bool with_grad);

// log A of a flat spectrum is -log m I: with this added it is 0, and little is left to cancel.
inline double centring_shift(int64_t m) { return std::log(static_cast<double>(m)); }

// The middle stages of one sample: S of A^ [m, m] and log A^ + shift I.
template <typename T>
double entropy_and_log(Method method, const T* a, int64_t m, double shift, T* log_a);

// S of A = trace A^ from that of A^, which rounding may have left outside of [0, log m].
template <typename T>
double with_trace(double value, double trace, int64_t m);

// S of a sample that has no A^, given its trace.
inline double entropy_without_matrix(double trace) {
  return trace == 0 ? 0 : std::numeric_limits<double>::quiet_NaN();
}

// Computes a sample's A^ [m, m] and returns tau. A sample that has none, which leaves `a`
// undefined, has a trace of 0 if there are but zeros in it, otherwise NaN or a negative one.
template <typename T>
using UnitTrace = std::function<double(int64_t sample, T* a)>;

// S [batch] alone, which costs less than with log A^. `chosen` is what `method` means.
template <typename T>
void entropies(const Problem& problem, const std::string& method, Method chosen,
               const UnitTrace<T>& unit_trace, T* values);

// S, and unless grad_z is null its gradients: all stages of one sample.
template <typename T>
double entropy(const Problem& problem, const Rows<T>& rows, Method method, T* grad_z,
               T* grad_weights);

// Calls f(sample) for each sample of the batch. With kPoles in parallel, where that uses the
// threads better than the products within one sample do. With kEigh one by one: LAPACK must not be
// called from within a parallel region. MKL's syevd, from m = 768 on, shares its work out over
// threads that it does not get there, and its result is wrong, or it says that it did not converge.
void for_each_sample(const Problem& problem, Method method, const std::function<void(int64_t)>& f);

// How many threads the work on one sample has then.
int64_t threads_of_sample(const Problem& problem, Method method);

// Runs f(T{}) with the type that `dtype` is computed in.
template <typename F>
auto dispatch_compute(ScalarType dtype, F f) {
  return dtype == ScalarType::Double ? f(double{}) : f(float{});
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

template <typename T>
double trace(const T* a, int64_t m) {
  double sum = 0;
  for (int64_t i = 0; i < m; ++i) sum += a[i * m + i];
  return sum;
}

template <typename T>
void fill(T* data, int64_t size, double value) {
  for (int64_t i = 0; i < size; ++i) data[i] = static_cast<T>(value);
}

}  // namespace vne
