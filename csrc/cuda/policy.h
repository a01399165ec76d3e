// Decisions of the CUDA backend: what method="auto" takes.

#pragma once

#include "common/problem.h"
#include "cuda/context.h"

namespace vne {

// What "auto" takes, from the first row of the table that a problem fits:
//
//   dtype     m           method
//   float64   any         eigh: 50 poles in float64, at 1/32 or 1/64 of the rate on RTX cards
//   float32   to 256      poles: one launch, about m dependent pivots, against milliseconds
//   float32   to 4096     poles if a multiprocessor has at most kMatrices of the batch's matrices
//                         to do, else eigh, which then has the batched solver on its side
//   float32   beyond      eigh: 16 m^2 numbers of workspace a sample would be gigabytes
//
// The limits are estimates from operation counts and published solver times (csrc/README.md): no
// GPU has measured them yet.
inline Method fastest_method(const Context& context, const Problem& problem, ScalarType dtype) {
  constexpr int64_t kOneBlock = 256, kWorkspace = 4096, kMatrices = 16;
  const int64_t m = problem.m();
  if (compute_dtype(dtype) == ScalarType::Double) return Method::kEigh;
  if (m <= kOneBlock) return Method::kPoles;
  const bool few = problem.batch <= kMatrices * context.multiprocessors;
  return m <= kWorkspace && few ? Method::kPoles : Method::kEigh;
}

}  // namespace vne
