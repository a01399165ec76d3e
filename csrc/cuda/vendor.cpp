// Matrix products by cuBLAS and eigendecompositions by cuSOLVER.
//
// Both libraries are column-major. A row-major C = A B is a column-major C^T = B^T A^T, so products
// are asked for with operands exchanged. A symmetric matrix is its own transpose, and eigenvectors
// that cuSOLVER writes as columns are rows here.

#include "cuda/vendor.h"

#include <cublas_v2.h>
#include <cusolverDn.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace vne {
namespace {

// ---- cuBLAS ----------------------------------------------------------------------------------

void check_cublas(cublasStatus_t status, const char* call) {
  VNE_CHECK(status == CUBLAS_STATUS_SUCCESS, call, " failed: ", cublasGetStatusString(status));
}

// torch's cuBLAS handle of this thread and the current device, for products in full precision.
//
// torch sets it up whenever it is asked for: the current stream, a workspace from its allocator
// (without one cuBLAS would allocate by itself, also during graph capture), and the math mode:
// CUBLAS_TF32_TENSOR_OP_MATH where float32_matmul_precision or allow_tf32 say so. The latter lets
// float32 products take TF32, hence CUBLAS_DEFAULT_MATH here, and afterwards what was there. The
// stream is not set again: that would take the workspace away.
class FullPrecisionBlas {
 public:
  FullPrecisionBlas() {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&current));
    handle = static_cast<cublasHandle_t>(current);
    check_cublas(cublasGetMathMode(handle, &mode_), "cublasGetMathMode");
    check_cublas(cublasSetMathMode(handle, CUBLAS_DEFAULT_MATH), "cublasSetMathMode");
  }
  ~FullPrecisionBlas() { cublasSetMathMode(handle, mode_); }
  FullPrecisionBlas(const FullPrecisionBlas&) = delete;
  FullPrecisionBlas& operator=(const FullPrecisionBlas&) = delete;

  cublasHandle_t handle = nullptr;

 private:
  cublasMath_t mode_ = CUBLAS_DEFAULT_MATH;
};

template <typename T>
struct Blas;
template <>
struct Blas<float> {
  static constexpr auto gemm = cublasSgemm_64;
  static constexpr auto gemm_batched = cublasSgemmStridedBatched_64;
};
template <>
struct Blas<double> {
  static constexpr auto gemm = cublasDgemm_64;
  static constexpr auto gemm_batched = cublasDgemmStridedBatched_64;
};

// ---- cuSOLVER --------------------------------------------------------------------------------

void check_cusolver(cusolverStatus_t status, const char* call) {
  VNE_CHECK(status == CUSOLVER_STATUS_SUCCESS, call, " failed: cusolverStatus_t ",
            static_cast<int>(status));
}

// What cuSOLVER needs besides the matrices. Used by one thread, for one device.
struct Solver {
  Solver() {
    check_cusolver(cusolverDnCreate(&handle), "cusolverDnCreate");
    check_cusolver(cusolverDnCreateParams(&params), "cusolverDnCreateParams");
    check_cusolver(cusolverDnCreateSyevjInfo(&jacobi), "cusolverDnCreateSyevjInfo");
    check_cusolver(cusolverDnXsyevjSetSortEig(jacobi, 1), "cusolverDnXsyevjSetSortEig");
  }
  cusolverDnHandle_t handle = nullptr;
  cusolverDnParams_t params = nullptr;
  syevjInfo_t jacobi = nullptr;  // its tolerance is machine precision, ascending order
  std::vector<char> host_workspace;
};

// Solvers of threads that ended, by device, for threads to come. None is ever destroyed: when a
// process ends, CUDA may be gone before.
struct SpareSolvers {
  std::mutex mutex;
  std::unordered_multimap<int, Solver*> of_device;
};

SpareSolvers& spare_solvers() {
  static SpareSolvers& spare = *new SpareSolvers;
  return spare;
}

struct SolversOfThread {
  std::unordered_map<int, Solver*> of_device;
  ~SolversOfThread() {
    SpareSolvers& spare = spare_solvers();
    const std::lock_guard<std::mutex> lock(spare.mutex);
    spare.of_device.merge(of_device);
  }
};

Solver* take_solver(int device) {
  SpareSolvers& spare = spare_solvers();
  {
    const std::lock_guard<std::mutex> lock(spare.mutex);
    if (const auto found = spare.of_device.extract(device)) return found.mapped();
  }
  return new Solver;
}

// This thread's solver, set to the context's stream.
Solver& current_solver(const Context& context) {
  thread_local SolversOfThread mine;
  Solver*& solver = mine.of_device[context.device];
  if (solver == nullptr) solver = take_solver(context.device);
  check_cusolver(cusolverDnSetStream(solver->handle, context.stream), "cusolverDnSetStream");
  return *solver;
}

// Which routine, by size. Facts: one float32 matrix on an RTX 4080 takes syevd 3.7 ms at m = 513
// and 8.2 ms at 1024, and 64 of them take XsyevBatched 0.67, 1.83, 6.4, 38.9 and 258 ms at 64, 128,
// 256, 512 and 1024 (pytorch#175585); syevjBatched is one kernel where m <= 32, and at that size
// what torch takes. The batches below are estimates from these, to be replaced by measurements.
//
//   m            batch    routine           matrices per call
//   <= 32        any      syevjBatched      the batch
//   <= 128       any      XsyevBatched      the batch
//   <= 256       >= 2     XsyevBatched      the batch
//   <= 512       >= 8     XsyevBatched      the batch
//   <= 1024      >= 24    XsyevBatched      the batch
//   otherwise             Xsyevd            one
//
// NVIDIA documents none of the three as fit for stream capture, and only "prefers" asynchronous
// execution. syevd is known to fail under capture (pytorch#188355: torch keeps linalg.eigh out of
// CUDA graphs) as its divide and conquer looks at device memory from the host. Of the batched ones
// no such report was found, which is no promise. method="poles" needs none of them.
enum class Routine { kJacobi, kBatched, kSingle };

// XsyevBatched came with CUDA 12.6.2.
#define VNE_HAS_XSYEV_BATCHED (CUSOLVER_VERSION >= 11701)

Routine choose(int64_t m, int64_t batch) {
  if (m <= 32) return Routine::kJacobi;
#if VNE_HAS_XSYEV_BATCHED
  if (m <= 128 || (m <= 256 && batch >= 2) || (m <= 512 && batch >= 8) ||
      (m <= 1024 && batch >= 24)) {
    return Routine::kBatched;
  }
#endif
  return Routine::kSingle;
}

// Matrices that one call may be given. cuSOLVER refuses batches from about 32 thousand (mjlab#732)
// and counts elements of workspaces in 32 bits (cupy#7261); and workspaces, which grow with the
// elements, should stay small against the memory of a GPU.
int64_t matrices_per_call(Routine routine, int64_t m) {
  if (routine == Routine::kSingle) return 1;
  constexpr int64_t kMatrices = 16384;
  constexpr int64_t kElements = int64_t{1} << 27;
  return std::clamp<int64_t>(kElements / (m * m), 1, kMatrices);
}

// Never empty, so that its address is one.
Tensor bytes(const Tensor& like, int64_t size) {
  return empty(like, {std::max<int64_t>(size, 1)}, ScalarType::Byte);
}

constexpr cusolverEigMode_t kVectors = CUSOLVER_EIG_MODE_VECTOR;
constexpr cublasFillMode_t kHalf = CUBLAS_FILL_MODE_LOWER;

template <typename T>
struct Lapack;
template <>
struct Lapack<float> {
  static constexpr auto type = CUDA_R_32F;
  static constexpr auto jacobi_size = cusolverDnSsyevjBatched_bufferSize;
  static constexpr auto jacobi = cusolverDnSsyevjBatched;
};
template <>
struct Lapack<double> {
  static constexpr auto type = CUDA_R_64F;
  static constexpr auto jacobi_size = cusolverDnDsyevjBatched_bufferSize;
  static constexpr auto jacobi = cusolverDnDsyevjBatched;
};

// One call for `batch` matrices, by each routine; info [batch].

template <typename T>
void by_jacobi(Solver& solver, const Tensor& like, T* a, T* values, int* info, int64_t batch,
               int64_t m) {
  const int size = static_cast<int>(m), count = static_cast<int>(batch);
  int elements = 0;
  check_cusolver(Lapack<T>::jacobi_size(solver.handle, kVectors, kHalf, size, a, size, values,
                                        &elements, solver.jacobi, count),
                 "cusolverDnXsyevjBatched_bufferSize");
  Tensor workspace = bytes(like, elements * static_cast<int64_t>(sizeof(T)));
  check_cusolver(Lapack<T>::jacobi(solver.handle, kVectors, kHalf, size, a, size, values,
                                   static_cast<T*>(workspace.mutable_data_ptr()), elements, info,
                                   solver.jacobi, count),
                 "cusolverDnXsyevjBatched");
}

#if VNE_HAS_XSYEV_BATCHED
template <typename T>
void by_batched(const Context& context, Solver& solver, const Tensor& like, T* a, T* values,
                int* info, int64_t batch, int64_t m) {
  constexpr cudaDataType type = Lapack<T>::type;
  size_t on_device = 0, on_host = 0;
  check_cusolver(
      cusolverDnXsyevBatched_bufferSize(solver.handle, solver.params, kVectors, kHalf, m, type, a,
                                        m, type, values, type, &on_device, &on_host, batch),
      "cusolverDnXsyevBatched_bufferSize");
  Tensor workspace = bytes(like, static_cast<int64_t>(on_device));
  void* device_data = workspace.mutable_data_ptr();
  // cuSOLVER 11.7.1 reads it before it writes it (pytorch#192483).
  const cudaError_t zeroed = cudaMemsetAsync(device_data, 0, on_device, context.stream);
  VNE_CHECK(zeroed == cudaSuccess, "cudaMemsetAsync failed: ", cudaGetErrorString(zeroed));
  if (solver.host_workspace.size() < on_host) solver.host_workspace.resize(on_host);
  check_cusolver(cusolverDnXsyevBatched(solver.handle, solver.params, kVectors, kHalf, m, type, a,
                                        m, type, values, type, device_data, on_device,
                                        solver.host_workspace.data(), on_host, info, batch),
                 "cusolverDnXsyevBatched");
}
#endif

template <typename T>
void by_single(Solver& solver, const Tensor& like, T* a, T* values, int* info, int64_t m) {
  constexpr cudaDataType type = Lapack<T>::type;
  size_t on_device = 0, on_host = 0;
  check_cusolver(cusolverDnXsyevd_bufferSize(solver.handle, solver.params, kVectors, kHalf, m, type,
                                             a, m, type, values, type, &on_device, &on_host),
                 "cusolverDnXsyevd_bufferSize");
  Tensor workspace = bytes(like, static_cast<int64_t>(on_device));
  if (solver.host_workspace.size() < on_host) solver.host_workspace.resize(on_host);
  check_cusolver(cusolverDnXsyevd(solver.handle, solver.params, kVectors, kHalf, m, type, a, m,
                                  type, values, type, workspace.mutable_data_ptr(), on_device,
                                  solver.host_workspace.data(), on_host, info),
                 "cusolverDnXsyevd");
}

}  // namespace

template <typename T>
void gemm(const Context&, int64_t m, int64_t n, int64_t k, T alpha, GemmOperand<T> a,
          GemmOperand<T> b, T beta, T* c, int64_t c_row_stride, int64_t c_batch_stride,
          int64_t batch) {
  if (m == 0 || n == 0 || batch == 0) return;
  const FullPrecisionBlas blas;
  const cublasOperation_t op_a = a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasOperation_t op_b = b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  if (batch == 1) {  // as torch does: a batch of one is not always as fast as one product
    check_cublas(Blas<T>::gemm(blas.handle, op_b, op_a, n, m, k, &alpha, b.data, b.row_stride,
                               a.data, a.row_stride, &beta, c, c_row_stride),
                 "cublas<t>gemm_64");
    return;
  }
  check_cublas(Blas<T>::gemm_batched(blas.handle, op_b, op_a, n, m, k, &alpha, b.data, b.row_stride,
                                     b.batch_stride, a.data, a.row_stride, a.batch_stride, &beta, c,
                                     c_row_stride, c_batch_stride, batch),
               "cublas<t>gemmStridedBatched_64");
}

template <typename T>
void symmetric_eigen(const Context& context, const Tensor& like, T* a, T* values, int64_t batch,
                     int64_t m) {
  if (batch == 0 || m == 0) return;
  Solver& solver = current_solver(context);
  const Routine routine = choose(m, batch);
  const int64_t step = std::min(batch, matrices_per_call(routine, m));
  Tensor info = empty(like, {step}, ScalarType::Int);
  int* info_data = static_cast<int*>(info.mutable_data_ptr());
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = std::min(step, batch - first);
    T* a_data = a + first * m * m;
    T* values_data = values + first * m;
    if (routine == Routine::kJacobi) {
      by_jacobi(solver, like, a_data, values_data, info_data, count, m);
#if VNE_HAS_XSYEV_BATCHED
    } else if (routine == Routine::kBatched) {
      by_batched(context, solver, like, a_data, values_data, info_data, count, m);
#endif
    } else {
      by_single(solver, like, a_data, values_data, info_data, m);
    }
  }
}

template void gemm(const Context&, int64_t, int64_t, int64_t, float, GemmOperand<float>,
                   GemmOperand<float>, float, float*, int64_t, int64_t, int64_t);
template void gemm(const Context&, int64_t, int64_t, int64_t, double, GemmOperand<double>,
                   GemmOperand<double>, double, double*, int64_t, int64_t, int64_t);
template void symmetric_eigen(const Context&, const Tensor&, float*, float*, int64_t, int64_t);
template void symmetric_eigen(const Context&, const Tensor&, double*, double*, int64_t, int64_t);

}  // namespace vne
