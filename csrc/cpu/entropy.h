// S = -sum lambda log lambda, for the operators that need it: entropy.cpp, doe_loss.cpp.

#pragma once

#include "cpu/functional.h"

namespace vne {

struct Entropy : Function {
  static constexpr Lapack kLapack = Lapack::kForEigh;

  template <typename T>
  double value(const Choice& choice, const T* a, int64_t m, double tau) const;
  template <typename T>
  Slope<T> slope(Method method, Buffer<T> a, int64_t m, double tau) const;
};

}  // namespace vne
