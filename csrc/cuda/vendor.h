// The seam to NVIDIA's libraries: matrix products by cuBLAS, eigendecompositions by cuSOLVER.
//
// T = float or double. Everything is queued on the context's stream; pointers are device memory.

#pragma once

#include <cstdint>

#include "common/stable.h"
#include "cuda/context.h"

namespace vne {

// A batch of row-major matrices. A stride of 0 repeats one matrix for the whole batch.
template <typename T>
struct GemmOperand {
  const T* data;
  int64_t row_stride;    // elements from one row to the next, at least the row's length
  int64_t batch_stride;  // elements from one matrix to the next
  bool transposed;       // op(M) = M^T instead of M; the strides are those of M
};

// C_b <- alpha op(A_b) op(B_b) + beta C_b for row-major C_b [m, n], op(A_b) [m, k], op(B_b) [k, n].
// beta = 0 does not read C. Products of float32 are accurate to float32: the TF32 switch of torch
// has no say here.
template <typename T>
void gemm(const Context& context, int64_t m, int64_t n, int64_t k, T alpha, GemmOperand<T> a,
          GemmOperand<T> b, T beta, T* c, int64_t c_row_stride, int64_t c_batch_stride,
          int64_t batch);

// Eigendecomposition of the symmetric, finite a [batch, m, m] in place: row k of a_b becomes the
// eigenvector of values[b, k], ascending in k. Workspaces are allocated like `like`. A failure to
// converge is not reported, as that would need a look at device memory.
template <typename T>
void symmetric_eigen(const Context& context, const Tensor& like, T* a, T* values, int64_t batch,
                     int64_t m);

}  // namespace vne
