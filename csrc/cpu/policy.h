// Decisions of the CPU backend: what method="auto" takes, and how threads share a batch.

#pragma once

#include <functional>

#include "common/problem.h"

namespace vne {

// Whether a caller left the method to us counts where a value alone has a third way.
struct Choice {
  Method method;
  bool is_automatic;
};

// The faster method for an entropy.
Method fastest_method(const Problem& problem, ScalarType dtype, bool with_grad);

// Calls f(sample) for each sample of the batch. With kPoles in parallel, where that uses the
// threads better than the products within one sample do. With kEigh one by one: LAPACK must not be
// called from within a parallel region. MKL's syevd, from m = 768 on, shares its work out over
// threads that it does not get there, and its result is wrong, or it says that it did not converge.
void for_each_sample(const Problem& problem, Method method, const std::function<void(int64_t)>& f);

}  // namespace vne
