// The operator check_arguments: what every backend demands of the arguments of an operator, for one
// that is not written in C++. Nothing of a tensor's data is read.

#include <map>

#include "common/problem.h"

namespace vne {
namespace {

using Tensors = std::vector<Tensor>;
using Weights = std::optional<Tensor>;

struct Rule {
  std::vector<const char*> names;  // of the tensors but for the weights
  void (*check)(const Tensors& tensors, const Weights& weights, double eps);
};

void check_samples(const Tensors& tensors, const Weights& weights, double eps) {
  make_problem(tensors[0], weights, true, eps);
}

void check_pair(const Tensors& tensors, const Weights&, double eps) {
  check_views(make_problem(tensors[0], std::nullopt, true, eps), tensors[0], tensors[1]);
}

void check_doe_backward(const Tensors& tensors, const Weights&, double) {
  const Tensor &z1 = tensors[2], &z2 = tensors[3];
  const Problem problem = make_problem(z1, std::nullopt, true, 0);
  check_views(problem, z1, z2);
  check_doe_gradients(problem, compute_dtype(z1.scalar_type()), tensors[0], tensors[1], tensors[4],
                      tensors[5]);
}

void check_spectrum_backward(const Tensors& tensors, const Weights& weights, double eps) {
  const Tensor& z = tensors[1];
  check_spectrum_gradient(make_problem(z, weights, true, eps), compute_dtype(z.scalar_type()),
                          tensors[0], tensors[2]);
}

void check_density_backward(const Tensors& tensors, const Weights& weights, double eps) {
  const Tensor& z = tensors[1];
  check_density_gradient(make_density_problem(z, weights, true, eps),
                         compute_dtype(z.scalar_type()), tensors[0]);
}

void check_matrix(const Tensors& tensors, const Weights&, double) {
  make_matrix_problem(tensors[0]);
}

const Rule& rule_of(const std::string& name) {
  static const std::map<std::string, Rule> rules{
      {"vn_entropy", {{"z"}, check_samples}},
      {"vn_entropy_grad", {{"z"}, check_samples}},
      {"spectrum", {{"z"}, check_samples}},
      {"spectrum_eigh", {{"z"}, check_samples}},
      {"spectrum_backward", {{"grad", "z", "eigenvectors"}, check_spectrum_backward}},
      {"purity", {{"z"}, check_samples}},
      {"purity_grad", {{"z"}, check_samples}},
      {"doe_loss", {{"z1", "z2"}, check_pair}},
      {"doe_loss_grad", {{"z1", "z2"}, check_pair}},
      {"doe_loss_backward",
       {{"grad_entropy", "grad_cosine", "z1", "z2", "entropy_grad", "row_stats"},
        check_doe_backward}},
      {"cosine", {{"z1", "z2"}, check_pair}},
      {"density", {{"z"}, check_samples}},
      {"density_backward", {{"grad_rho", "z"}, check_density_backward}},
      {"density_entropy", {{"rho"}, check_matrix}},
      {"density_entropy_grad", {{"rho"}, check_matrix}},
  };
  const auto found = rules.find(name);
  VNE_CHECK(found != rules.end(), "there is no operator ", name, " with kernels of its own");
  return found->second;
}

bool is_beside(const Tensor& tensor, const Tensor& other) {
  return tensor.is_cuda() == other.is_cuda() &&
         tensor.get_device_index() == other.get_device_index();
}

void check_arguments(const std::string& name, const Tensors& tensors, const Weights& weights,
                     const std::string& method, double eps) {
  const Rule& rule = rule_of(name);
  VNE_CHECK(tensors.size() == rule.names.size(), name, " takes ", rule.names.size(),
            " tensors besides the weights, got ", tensors.size());
  rule.check(tensors, weights, eps);
  parse_method(method, Method::kEigh);
  const Tensor& first = tensors.front();
  for (size_t i = 1; i < tensors.size(); ++i)
    check_held(is_beside(tensors[i], first), rule.names[i]);
  if (weights) check_held(is_beside(*weights, first), "weights");
}

}  // namespace
}  // namespace vne

STABLE_TORCH_LIBRARY_IMPL(vne_kernels, CompositeExplicitAutograd, library) {
  library.impl("check_arguments", TORCH_BOX(&vne::check_arguments));
}
