// Decisions of the CPU backend, from the measurements of bench/NOTES.md.

#include "cpu/policy.h"

namespace vne {
namespace {

// From here on the products within one sample fill the threads.
constexpr int64_t kThreadedSize = 512;

bool one_by_one(const Problem& problem, Method method) {
  return method == Method::kEigh || problem.batch == 1 ||
         (problem.batch < torch::stable::get_num_threads() && problem.m() > kThreadedSize);
}

}  // namespace

// With the gradient LAPACK's blocked reduction wins beyond 1024. In float64 there are 50 poles, of
// A^ itself: never.
Method fastest_method(const Problem& problem, ScalarType dtype, bool with_grad) {
  if (compute_dtype(dtype) == ScalarType::Double) return Method::kEigh;
  return with_grad && problem.m() > 1024 ? Method::kEigh : Method::kPoles;
}

void for_each_sample(const Problem& problem, Method method, const std::function<void(int64_t)>& f) {
  if (one_by_one(problem, method)) {
    for (int64_t sample = 0; sample < problem.batch; ++sample) f(sample);
    return;
  }
  torch::stable::parallel_for(0, problem.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) f(sample);
  });
}

}  // namespace vne
