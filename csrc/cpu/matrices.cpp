// Entropies of matrices rho [m, m], real or complex: equation (15).
//
// All are functions of the eigenvalues of the Hermitian part, of which those below 0 count as 0, in
// double whatever the dtype. The gradient takes the eigenvectors too, which LAPACK finds for the
// whole batch at once. A matrix that is not finite or has a negative trace is NaN, and its
// gradient.

#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/orders.h"
#include "cpu/policy.h"
#include "cpu/stages.h"
#include "ops/arguments.h"

namespace vne {
namespace {

using Complex = std::complex<double>;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// ---- arguments ----------------------------------------------------------------------------------

struct Matrices {
  Tensor rho;  // (..., m, m)
  Problem problem;
  std::optional<Tensor> scale = std::nullopt;  // (..., m) float64: of diag(scale) rho diag(scale)

  int64_t m() const { return problem.n; }
  bool is_complex() const {
    return rho.scalar_type() == ScalarType::ComplexFloat ||
           rho.scalar_type() == ScalarType::ComplexDouble;
  }
  bool is_double() const {
    return rho.scalar_type() == ScalarType::Double ||
           rho.scalar_type() == ScalarType::ComplexDouble;
  }
  double epsilon() const {  // of the dtype of results
    return is_double() ? std::numeric_limits<double>::epsilon()
                       : std::numeric_limits<float>::epsilon();
  }
  ScalarType result_dtype() const { return is_double() ? ScalarType::Double : ScalarType::Float; }
  ScalarType gradient_dtype() const { return is_complex() ? rho.scalar_type() : result_dtype(); }
  Tensor result() const { return empty(rho, problem.batch_sizes, result_dtype()); }
  // To compute in.
  Tensor wide(const std::vector<int64_t>& sizes) const {
    return empty(rho, sizes, is_complex() ? ScalarType::ComplexDouble : ScalarType::Double);
  }
};

Matrices check_hermitian(const Tensor& rho) {
  VNE_CHECK(rho.dim() >= 2 && rho.size(rho.dim() - 1) == rho.size(rho.dim() - 2) &&
                rho.size(rho.dim() - 1) >= 1,
            "rho must be (..., m, m) with m >= 1");
  Problem problem;
  for (int64_t i = 0; i < rho.dim() - 2; ++i) {
    problem.batch_sizes.push_back(rho.size(i));
    problem.batch *= rho.size(i);
  }
  problem.n = problem.d = rho.size(rho.dim() - 1);
  return {as_contiguous(rho), std::move(problem)};
}

template <typename From>
auto widen(From x) {
  if constexpr (std::is_same_v<From, double>)
    return x;
  else if constexpr (std::is_same_v<From, std::complex<float>> || std::is_same_v<From, Complex>)
    return Complex(x);
  else
    return static_cast<double>(static_cast<float>(x));
}

double conjugate(double x) { return x; }
Complex conjugate(Complex x) { return std::conj(x); }
double real_of(double x) { return x; }
double real_of(Complex x) { return x.real(); }
bool is_finite(double x) { return std::isfinite(x); }
bool is_finite(Complex x) { return std::isfinite(x.real()) && std::isfinite(x.imag()); }

Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// a [m, m] <- (rho + rho^H) / 2, its rows and columns multiplied by scale [m] unless that is null.
// Whether it is finite. What has a scale of 0 is absent, whatever it holds.
template <typename From, typename T>
bool read_hermitian(const void* data, const double* scale, int64_t m, T* a) {
  const From* rho = static_cast<const From*>(data);
  bool finite = true;
  visit_lower(m, [&](int64_t i, int64_t j) {
    T entry = (widen(rho[i * m + j]) + conjugate(widen(rho[j * m + i]))) / 2.0;
    if (scale) entry = scale[i] == 0 || scale[j] == 0 ? T(0) : entry * scale[i] * scale[j];
    a[i * m + j] = entry;
    a[j * m + i] = conjugate(entry);
    finite &= is_finite(entry);
  });
  return finite;
}

// read(sample, a): whether a [m, m], the Hermitian part of a sample, counts.
template <typename T>
class Reader {
 public:
  explicit Reader(const Matrices& matrices)
      : scale_(matrices.scale ? static_cast<const double*>(matrices.scale->const_data_ptr())
                              : nullptr),
        m_(matrices.m()),
        data_(static_cast<const char*>(matrices.rho.const_data_ptr())),
        bytes_(m_ * m_ * matrices.rho.element_size()) {
    if constexpr (std::is_same_v<T, Complex>) {
      read_ = matrices.is_double() ? read_hermitian<Complex, T>
                                   : read_hermitian<std::complex<float>, T>;
    } else {
      switch (matrices.rho.scalar_type()) {
        case ScalarType::Double:
          read_ = read_hermitian<double, T>;
          break;
        case ScalarType::Float:
          read_ = read_hermitian<float, T>;
          break;
        case ScalarType::Half:
          read_ = read_hermitian<torch::headeronly::Half, T>;
          break;
        case ScalarType::BFloat16:
          read_ = read_hermitian<torch::headeronly::BFloat16, T>;
          break;
        default:
          VNE_CHECK(false, "rho must be of a floating or complex dtype");
      }
    }
  }
  bool operator()(int64_t sample, T* a) const {
    if (!read_(data_ + sample * bytes_, at(scale_, sample * m_), m_, a)) return false;
    double trace = 0;
    for (int64_t i = 0; i < m_; ++i) trace += real_of(a[i * m_ + i]);
    return trace >= 0;
  }

 private:
  const double* scale_;
  int64_t m_;
  const char* data_;
  int64_t bytes_;
  bool (*read_)(const void*, const double*, int64_t, T*) = nullptr;
};

template <typename F>
void run(const Matrices& matrices, F f) {
  matrices.is_complex() ? f(Complex()) : f(double());
}

void write(const Tensor& result, int64_t sample, double value) {
  if (result.scalar_type() == ScalarType::Double)
    static_cast<double*>(result.mutable_data_ptr())[sample] = value;
  else
    static_cast<float*>(result.mutable_data_ptr())[sample] = static_cast<float>(value);
}

// ---- what is computed ---------------------------------------------------------------------------

// The eigenvalues l as they are, or an entropy of some order of l over their sum.
struct Entropy {
  enum class Kind { kAsGiven, kRenyi, kTsallis };
  Kind kind;
  double order, epsilon;

  double of(const double* l, int64_t m, double* slope) const {
    if (kind == Kind::kAsGiven) return entropy_as_given(l, m, slope);
    const Family family = kind == Kind::kRenyi ? Family::kRenyi : Family::kTsallis;
    return entropy_of_order(family, order, l, m, slope, epsilon);
  }
};

Entropy::Kind parse_kind(const std::string& name) {
  if (name == "as given") return Entropy::Kind::kAsGiven;
  if (name == "renyi") return Entropy::Kind::kRenyi;
  VNE_CHECK(name == "tsallis", "kind must be 'as given', 'renyi' or 'tsallis', got '", name, "'");
  return Entropy::Kind::kTsallis;
}

// A state of the middle one of three systems: the trace over the others. It counts `factor` times.
struct Part {
  double factor;
  int64_t outer, kept, inner;
};

// visit(position in the state of the part, position in that of the whole), for all that are added.
template <typename Visit>
void visit_part(const Part& part, Visit visit) {
  const int64_t m = part.outer * part.kept * part.inner;
  for (int64_t o = 0; o < part.outer; ++o) {
    for (int64_t k = 0; k < part.kept; ++k) {
      for (int64_t l = 0; l < part.kept; ++l) {
        const int64_t row = (o * part.kept + k) * part.inner;
        const int64_t column = (o * part.kept + l) * part.inner;
        for (int64_t i = 0; i < part.inner; ++i)
          visit(k * part.kept + l, (row + i) * m + column + i);
      }
    }
  }
}

// A sum of entropies of parts of a state.
struct Sum {
  Entropy entropy;
  std::vector<Part> parts;
  Matrices matrices;
};

template <typename T>
void trace_out(const Part& part, const T* whole, T* state) {
  std::fill_n(state, part.kept * part.kept, T(0));
  visit_part(part, [=](int64_t to, int64_t from) { state[to] += whole[from]; });
}

// The eigenvalues l [m] of a [m, m]. As `eigenvalues` squares entries, those far from 1 are scaled.
template <typename T>
void eigenvalues_of_any_scale(const T* a, int64_t m, double* l) {
  double largest = 0;
  const double* parts = reinterpret_cast<const double*>(a);  // of complex entries
  for (int64_t i = 0; i < m * m * static_cast<int64_t>(sizeof(T) / sizeof(double)); ++i)
    largest = std::max(largest, std::abs(parts[i]));
  if (largest == 0 || (largest > 1e-60 && largest < 1e60)) return eigenvalues(a, m, l);
  const double scale = std::exp2(std::floor(std::log2(largest)));
  Buffer<T> scaled(m * m);
  std::transform(a, a + m * m, scaled.get(), [=](T x) { return x / scale; });
  eigenvalues(scaled.get(), m, l);
  std::for_each(l, l + m, [=](double& x) { x *= scale; });
}

template <typename T>
double value_of(const Sum& sum, const T* a) {
  double value = 0;
  for (const Part& part : sum.parts) {
    const bool is_whole = part.kept == sum.matrices.m();
    Buffer<T> state(is_whole ? 0 : part.kept * part.kept);
    if (!is_whole) trace_out(part, a, state.get());
    Buffer<double> l(part.kept);
    eigenvalues_of_any_scale(is_whole ? a : state.get(), part.kept, l.get());
    value += part.factor * sum.entropy.of(l.get(), part.kept, nullptr);
  }
  return value + 0.0;  // not -0.
}

// ---- the gradient -------------------------------------------------------------------------------

// Eigenvectors of a batch as LAPACK left them, and the parts V = P + i Q of complex ones.
MatrixView<double> vectors_of(const Tensor& vectors, int64_t sample, int64_t m) {
  return {static_cast<const double*>(vectors.const_data_ptr()) + sample * m * m, vectors.stride(1),
          vectors.stride(2)};
}
std::pair<MatrixView<double>, MatrixView<double>> parts_of_vectors(const Tensor& vectors,
                                                                   int64_t sample, int64_t m) {
  const double* data = static_cast<const double*>(vectors.const_data_ptr()) + sample * 2 * m * m;
  const int64_t row = 2 * vectors.stride(1), column = 2 * vectors.stride(2);
  return {{data, row, column}, {data + 1, row, column}};
}

// w [m, m] = V diag(scale) V^H.
void recompose(const Tensor& vectors, int64_t sample, int64_t m, const double* scale, double* w) {
  const MatrixView<double> v = vectors_of(vectors, sample, m);
  multiply<double>(m, m, m, v, transposed(v), w, Result::kSymmetric, scale);
}

// The real part is P S P^T + Q S Q^T, and the imaginary one M - M^T with M = Q S P^T.
void recompose(const Tensor& vectors, int64_t sample, int64_t m, const double* scale, Complex* w) {
  const auto [p, q] = parts_of_vectors(vectors, sample, m);
  Buffer<double> pp(m * m), qq(m * m), qp(m * m);
  multiply<double>(m, m, m, p, transposed(p), pp.get(), Result::kSymmetric, scale);
  multiply<double>(m, m, m, q, transposed(q), qq.get(), Result::kSymmetric, scale);
  multiply<double>(m, m, m, q, transposed(p), qp.get(), Result::kFull, scale);
  visit_lower(m, [&](int64_t i, int64_t j) {
    const int64_t ij = i * m + j, ji = j * m + i;
    w[ij] = {pp[ij] + qq[ij], qp[ij] - qp[ji]};
    w[ji] = std::conj(w[ij]);
  });
}

// Adds to value [batch] and to grad [batch, m, m] what one part of the states gives.
template <typename T>
void add_part(const Sum& sum, const Part& part, const Reader<T>& read, double* value, T* grad) {
  const Problem& problem = sum.matrices.problem;
  const int64_t m = problem.n, k = part.kept;
  const Tensor states = sum.matrices.wide({problem.batch, k, k});
  T* data = static_cast<T*>(states.mutable_data_ptr());
  std::vector<char> counts(problem.batch);
  for_each_sample(problem, Method::kPoles, [&](int64_t sample) {
    T* state = data + sample * k * k;
    Buffer<T> whole(k == m ? 0 : m * m);
    T* a = k == m ? state : whole.get();
    counts[sample] = read(sample, a);
    if (!counts[sample]) return std::fill_n(state, k * k, T(0)), void();
    if (k != m) trace_out(part, a, state);
  });
  const auto [values, vectors] = linalg_eigh(states);
  const Tensor ascending = as_contiguous(values);
  const double* l = static_cast<const double*>(ascending.const_data_ptr());
  for_each_sample(problem, Method::kPoles, [&](int64_t sample) {
    Buffer<double> slope(k);
    Buffer<T> w(k * k);
    const double entropy = sum.entropy.of(l + sample * k, k, slope.get());
    value[sample] += counts[sample] ? part.factor * entropy : kNaN;
    recompose(vectors, sample, k, slope.get(), w.get());
    T* to = grad + sample * m * m;
    const double factor = counts[sample] ? part.factor : kNaN;
    visit_part(part, [&](int64_t from, int64_t at) { to[at] += factor * w[from]; });
  });
}

// ---- relative entropy ---------------------------------------------------------------------------

struct Pair {
  Matrices rho, sigma;
};

constexpr double kRounding = 8 * std::numeric_limits<double>::epsilon();

// weights [m] <- w_k^H a w_k, of the columns w_k of V.
void project(const double* a, const Tensor& vectors, int64_t sample, int64_t m, double* weights) {
  const MatrixView<double> v = vectors_of(vectors, sample, m);
  Buffer<double> av(m * m);
  multiply<double>(m, m, m, row_major<double>(a, m), v, av.get());
  fill(weights, m, 0);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t k = 0; k < m; ++k)
      weights[k] += v.data[i * v.row_stride + k * v.col_stride] * av[i * m + k];
}

// With a = R + i J and w = p + i q it is p^T R p + q^T R q + 2 q^T J p.
void project(const Complex* a, const Tensor& vectors, int64_t sample, int64_t m, double* weights) {
  const auto [p, q] = parts_of_vectors(vectors, sample, m);
  const double* parts = reinterpret_cast<const double*>(a);
  const MatrixView<double> r{parts, 2 * m, 2}, j{parts + 1, 2 * m, 2};
  Buffer<double> rp(m * m), rq(m * m), jp(m * m);
  multiply<double>(m, m, m, r, p, rp.get());
  multiply<double>(m, m, m, r, q, rq.get());
  multiply<double>(m, m, m, j, p, jp.get());
  fill(weights, m, 0);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t k = 0; k < m; ++k) {
      const int64_t at = i * p.row_stride + k * p.col_stride, ik = i * m + k;
      weights[k] += p.data[at] * rp[ik] + q.data[at] * (rq[ik] + 2 * jp[ik]);
    }
  }
}

// tr(rho (log rho - log sigma)), from the eigenvalues l of rho, those mu of sigma, and the weights
// of rho in the directions of sigma. Infinite where rho has weight where sigma counts as 0.
double relative_entropy(const double* l, const double* mu, const double* weights, int64_t m,
                        double resolution) {
  double trace = 0, trace_of_sigma = 0, of_rho = 0, of_sigma = 0, outside = 0;
  for (int64_t k = 0; k < m; ++k) {
    trace += std::max(l[k], 0.0);
    trace_of_sigma += std::max(mu[k], 0.0);
    if (l[k] > 0) of_rho += l[k] * std::log(l[k]);
  }
  const double floor = std::max(resolution * trace_of_sigma, std::numeric_limits<double>::min());
  int64_t count = 0;
  for (int64_t k = 0; k < m; ++k) {
    of_sigma += weights[k] * std::log(std::max(mu[k], floor));
    if (mu[k] >= floor) continue;
    outside += weights[k];
    ++count;
  }
  if (outside > resolution * static_cast<double>(count) * trace)
    return std::numeric_limits<double>::infinity();
  return of_rho - of_sigma + 0.0;  // not -0.
}

// a <- its positive part.
template <typename T>
void keep_positive_part(const Matrices& matrices, T* a, int64_t m) {
  const Tensor copy = matrices.wide({1, m, m});
  std::copy_n(a, m * m, static_cast<T*>(copy.mutable_data_ptr()));
  const auto [values, vectors] = linalg_eigh(copy);
  const Tensor ascending = as_contiguous(values);
  const double* given = static_cast<const double*>(ascending.const_data_ptr());
  Buffer<double> l(m);
  std::transform(given, given + m, l.get(), [](double x) { return std::max(x, 0.0); });
  recompose(vectors, 0, m, l.get(), a);
}

Tensor relative_entropies(const Pair& pair) {
  const Problem& problem = pair.rho.problem;
  const int64_t m = problem.n, size = m * m;
  const Tensor result = pair.rho.result();
  if (problem.batch == 0) return result;
  run(pair.rho, [&]<typename T>(T) {
    const Reader<T> read_rho(pair.rho), read_sigma(pair.sigma);
    const Tensor states = pair.rho.wide({problem.batch, m, m}),
                 others = pair.rho.wide({problem.batch, m, m});
    T* rho = static_cast<T*>(states.mutable_data_ptr());
    T* sigma = static_cast<T*>(others.mutable_data_ptr());
    // Of both by the same solver: of rho = sigma nothing is left.
    Buffer<double> l(problem.batch * m), mu(problem.batch * m);
    std::vector<char> counts(problem.batch);
    for_each_sample(problem, Method::kPoles, [&](int64_t sample) {
      T* a = rho + sample * size;
      T* b = sigma + sample * size;
      counts[sample] = read_rho(sample, a) & read_sigma(sample, b);
      if (!counts[sample]) {
        std::fill_n(a, size, T(0));
        std::fill_n(b, size, T(0));
      }
      eigenvalues_of_any_scale(a, m, l.get() + sample * m);
      eigenvalues_of_any_scale(b, m, mu.get() + sample * m);
    });
    // What rounding left below 0 of rho does not matter; more than that has to go.
    for (int64_t sample = 0; sample < problem.batch; ++sample) {
      const double* values = l.get() + sample * m;
      const auto [least, largest] = std::minmax_element(values, values + m);
      if (*least < -kRounding * static_cast<double>(m) * *largest)
        keep_positive_part(pair.rho, rho + sample * size, m);
    }
    const Tensor vectors = std::get<1>(linalg_eigh(others));
    for_each_sample(problem, Method::kPoles, [&](int64_t sample) {
      Buffer<double> weights(m);
      project(rho + sample * size, vectors, sample, m, weights.get());
      const double value = relative_entropy(l.get() + sample * m, mu.get() + sample * m,
                                            weights.get(), m, 4 * pair.rho.epsilon());
      write(result, sample, counts[sample] ? value : kNaN);
    });
  });
  return result;
}

Pair check_pair(const Tensor& rho, const Tensor& sigma) {
  Pair pair{check_hermitian(rho), check_hermitian(sigma)};
  VNE_CHECK(pair.rho.problem.batch_sizes == pair.sigma.problem.batch_sizes &&
                pair.rho.m() == pair.sigma.m() && rho.scalar_type() == sigma.scalar_type(),
            "rho and sigma must have the same shape and dtype");
  return pair;
}

// ---- the operators ------------------------------------------------------------------------------

Tensor value(const Sum& sum) {
  const Matrices& matrices = sum.matrices;
  const int64_t m = matrices.m();
  const Tensor result = matrices.result();
  run(matrices, [&]<typename T>(T) {
    const Reader<T> read(matrices);
    for_each_sample(matrices.problem, Method::kPoles, [&](int64_t sample) {
      Buffer<T> a(m * m);
      const double value = read(sample, a.get()) ? value_of(sum, a.get()) : kNaN;
      write(result, sample, value);
    });
  });
  return result;
}

// In double precision.
std::tuple<Tensor, Tensor> gradient_in_double(const Sum& sum) {
  const Matrices& matrices = sum.matrices;
  const Problem& problem = matrices.problem;
  const int64_t m = matrices.m();
  const Tensor value = empty(matrices.rho, problem.batch_sizes, ScalarType::Double);
  const Tensor grad = matrices.wide(problem.sizes({m, m}));
  if (problem.batch == 0) return {value, grad};
  run(matrices, [&]<typename T>(T) {
    const Reader<T> read(matrices);
    double* values = static_cast<double*>(value.mutable_data_ptr());
    T* grads = static_cast<T*>(grad.mutable_data_ptr());
    std::fill_n(values, problem.batch, 0);
    std::fill_n(grads, problem.batch * m * m, T(0));
    for (const Part& part : sum.parts) add_part(sum, part, read, values, grads);
  });
  return {value, grad};
}

std::tuple<Tensor, Tensor> gradient_of(const Sum& sum) {
  const auto [value, grad] = gradient_in_double(sum);
  return {in_dtype(value, sum.matrices.result_dtype()),
          in_dtype(grad, sum.matrices.gradient_dtype())};
}

// grad [m, m], that in A = diag(scale) H diag(scale), becomes that in H; and grad_scale [m] is
// 2 sum_j Re(conj(grad_ij) H_ij) scale_j.
template <typename T>
void back_through_scale(const T* hermitian, const double* scale, int64_t m, T* grad,
                        double* grad_scale) {
  for (int64_t i = 0; i < m; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < m; ++j) {
      const int64_t ij = i * m + j;
      const bool is_absent = scale[i] == 0 || scale[j] == 0;
      if (!is_absent) sum += real_of(conjugate(grad[ij]) * hermitian[ij]) * scale[j];
      grad[ij] = is_absent ? T(0) : grad[ij] * scale[i] * scale[j];
    }
    grad_scale[i] = 2 * sum;
  }
}

std::tuple<Tensor, Tensor, Tensor> scaled_gradient_of(const Sum& sum) {
  const Matrices& matrices = sum.matrices;
  const Problem& problem = matrices.problem;
  const int64_t m = matrices.m();
  const auto [value, grad] = gradient_in_double(sum);
  const std::vector<int64_t> sizes = matrices.scale ? problem.sizes({m}) : std::vector<int64_t>{0};
  const Tensor grad_scale = empty(matrices.rho, sizes, ScalarType::Double);
  if (matrices.scale && problem.batch > 0) {
    const double* scale = static_cast<const double*>(matrices.scale->const_data_ptr());
    run(matrices, [&]<typename T>(T) {
      const Reader<T> read(Matrices{matrices.rho, problem});
      T* grads = static_cast<T*>(grad.mutable_data_ptr());
      double* results = static_cast<double*>(grad_scale.mutable_data_ptr());
      for_each_sample(problem, Method::kPoles, [&](int64_t sample) {
        Buffer<T> hermitian(m * m);
        read(sample, hermitian.get());
        back_through_scale(hermitian.get(), scale + sample * m, m, grads + sample * m * m,
                           results + sample * m);
      });
    });
  }
  return {in_dtype(value, matrices.result_dtype()), in_dtype(grad, matrices.gradient_dtype()),
          in_dtype(grad_scale, matrices.result_dtype())};
}

Sum check_entropy(const Tensor& rho, const std::optional<Tensor>& scale, const std::string& kind,
                  double order) {
  VNE_CHECK(order >= 0, "order must be at least 0, got ", order);
  Matrices matrices = check_hermitian(rho);
  if (scale) {
    VNE_CHECK(same_sizes(*scale, matrices.problem.sizes({matrices.m()})) &&
                  scale->scalar_type() == matrices.result_dtype(),
              "scale must be (..., m) in the dtype of results");
    matrices.scale = as_contiguous(in_dtype(*scale, ScalarType::Double));
  }
  const Part whole{1, 1, matrices.m(), 1};
  return {{parse_kind(kind), order, matrices.epsilon()}, {whole}, std::move(matrices)};
}

// factors[0] S(AB) + factors[1] S(A) + factors[2] S(B).
Sum check_parts(const Tensor& rho, int64_t a, int64_t b, double of_whole, double of_a,
                double of_b) {
  Matrices matrices = check_hermitian(rho);
  VNE_CHECK(a >= 1 && b >= 1 && matrices.m() / a == b && matrices.m() % a == 0,
            "the sizes of A and B must have the product ", matrices.m(), ", got ", a, " and ", b);
  std::vector<Part> parts;
  for (const Part& part : {Part{of_whole, 1, a * b, 1}, Part{of_a, 1, a, b}, Part{of_b, a, b, 1}})
    if (part.factor != 0) parts.push_back(part);
  return {{Entropy::Kind::kAsGiven, 1, matrices.epsilon()}, std::move(parts), std::move(matrices)};
}

}  // namespace
}  // namespace vne

// rho (..., m, m), of which the Hermitian part counts -> (...); and the gradients (..., m, m) and
// (..., m), or (0,) without a scale. Of diag(scale) rho diag(scale), where a scale is given. kind:
// 'as given', -sum l log l of the eigenvalues; or 'renyi' or 'tsallis' of an order, of rho over its
// trace.
VNE_OPERATOR("matrix_entropy", "(Tensor rho, Tensor? scale, str kind, float order)", "Tensor",
             vne::check_entropy, vne::value)
VNE_OPERATOR("matrix_entropy_grad", "(Tensor rho, Tensor? scale, str kind, float order)",
             "(Tensor value, Tensor grad_rho, Tensor grad_scale)", vne::check_entropy,
             vne::scaled_gradient_of)
// Of states of A and B, with a x b levels: the sum of the entropies of AB, of A and of B, each
// times its factor.
VNE_OPERATOR("parts_entropy", "(Tensor rho, int a, int b, float of_whole, float of_a, float of_b)",
             "Tensor", vne::check_parts, vne::value)
VNE_OPERATOR("parts_entropy_grad",
             "(Tensor rho, int a, int b, float of_whole, float of_a, float of_b)",
             "(Tensor value, Tensor grad_rho)", vne::check_parts, vne::gradient_of)
// tr(rho (log rho - log sigma)) (...) of rho and sigma (..., m, m).
VNE_OPERATOR("relative_entropy", "(Tensor rho, Tensor sigma)", "Tensor", vne::check_pair,
             vne::relative_entropies)
