// The form that all functions of the spectrum share: a value F(A), and a gradient
//
//   dF/dX = factor (W + identity I) X,   W a function of A: equations (3), (4), (10), (11), (13).
//
// A function is a struct per backend. It derives from Function, and its parameters are members of
// type double. csrc/cpu/functional.h and csrc/cuda/functional.h say what else each backend asks of
// it. At the foot of its file
//
//   VNE_FUNCTION(NAME, Struct)              makes the operators NAME and NAME_grad of samples z,
//   VNE_FUNCTION_OF_MATRICES(NAME, Struct)  the same of matrices rho.

#pragma once

#include <array>
#include <utility>

#include "ops/arguments.h"

namespace vne {

// Defaults of what a function says of itself.
struct Function {
  static constexpr std::array<const char*, 0> kParameters{};  // names of its parameters
  double of_zeros(int64_t /*m*/) const { return 0; }          // F of a sample of zeros
  void check() const {}                                       // throws for bad parameters
  bool in_double() const { return false; }  // whether the CPU computes float32 z in double
};

// The results of a batch; a pointer is null where its result is not wanted.
template <typename T>
struct Results {
  T* value;         // [batch]
  T* grad_z;        // [batch, n, d]
  T* grad_weights;  // [batch, n]
};

// The backend's part.
template <typename T, typename F>
void evaluate(const F& f, const std::string& method, const Batch<T>& batch, const Results<T>& out);

template <typename F>
struct FunctionCall {
  F f;
  Samples samples;
  std::string method;
};

template <typename F>
FunctionCall<F> check_function(const F& f, Samples samples, const std::string& method) {
  f.check();
  parse_method(method, Method::kEigh);
  return {f, std::move(samples), method};
}

// The gradients may be null.
template <typename F>
void evaluate(const FunctionCall<F>& call, const Tensor& value, const Tensor* grad_z,
              const Tensor* grad_weights) {
  run(call.samples, [&]<typename T>(const Batch<T>& batch) {
    const auto out = [&](const Tensor* grad) { return grad ? batch.out(*grad) : nullptr; };
    const Results<T> results{batch.out(value), out(grad_z), out(grad_weights)};
    evaluate(call.f, call.method, batch, results);
  });
}

// The operators' signatures, with as many parameters as F has.
template <typename F, typename = std::make_index_sequence<F::kParameters.size()>>
struct FunctionOperators;

template <typename F, size_t... I>
struct FunctionOperators<F, std::index_sequence<I...>> {
  template <size_t>
  using Parameter = double;

  static FunctionCall<F> check(const Tensor& z, const std::optional<Tensor>& weights,
                               Parameter<I>... parameters, bool normalize,
                               const std::string& method, double eps) {
    return check_function(F{{}, parameters...}, check_samples(z, weights, normalize, eps), method);
  }
  static FunctionCall<F> check_rho(const Tensor& rho, Parameter<I>... parameters,
                                   const std::string& method) {
    return check_function(F{{}, parameters...}, check_matrices(rho), method);
  }
  static std::string schema(const char* before, const char* after) {
    std::string text = before;
    for (const char* name : F::kParameters) text += std::string("float ") + name + ", ";
    return text + after;
  }
  static std::string schema() {
    return schema("(Tensor z, Tensor? weights, ", "bool normalize, str method, float eps)");
  }
  static std::string schema_of_rho() { return schema("(Tensor rho, ", "str method)"); }

  static Tensor value(const FunctionCall<F>& call) {
    const Tensor value = call.samples.result({});
    evaluate(call, value, nullptr, nullptr);
    return value;
  }
  static std::tuple<Tensor, Tensor, Tensor> grad(const FunctionCall<F>& call) {
    const Tensor value = call.samples.result({}), grad_z = call.samples.grad_z(),
                 grad_weights = call.samples.grad_weights();
    evaluate(call, value, &grad_z, &grad_weights);
    return {value, grad_z, grad_weights};
  }
  static std::tuple<Tensor, Tensor> grad_of_rho(const FunctionCall<F>& call) {
    const Tensor value = call.samples.result({}), grad_rho = call.samples.grad_z();
    evaluate(call, value, &grad_rho, nullptr);
    return {value, grad_rho};
  }
};

}  // namespace vne

// z (..., n, d), weights (..., n) -> F (...); and its gradients in z (..., n, d) and in weights
// (..., n), or (0,) without weights.
#define VNE_FUNCTION(name, F)                                                      \
  VNE_OPERATOR(#name, vne::FunctionOperators<F>::schema(), "Tensor",               \
               vne::FunctionOperators<F>::check, vne::FunctionOperators<F>::value) \
  VNE_OPERATOR(#name "_grad", vne::FunctionOperators<F>::schema(),                 \
               "(Tensor value, Tensor grad_z, Tensor grad_weights)",               \
               vne::FunctionOperators<F>::check, vne::FunctionOperators<F>::grad)

// rho (..., m, m), float32 or float64, of any trace, of which the symmetric part counts -> F (...);
// and dF/drho (..., m, m).
#define VNE_FUNCTION_OF_MATRICES(name, F)                                               \
  VNE_OPERATOR(#name, vne::FunctionOperators<F>::schema_of_rho(), "Tensor",             \
               vne::FunctionOperators<F>::check_rho, vne::FunctionOperators<F>::value)  \
  VNE_OPERATOR(#name "_grad", vne::FunctionOperators<F>::schema_of_rho(),               \
               "(Tensor value, Tensor grad_rho)", vne::FunctionOperators<F>::check_rho, \
               vne::FunctionOperators<F>::grad_of_rho)
