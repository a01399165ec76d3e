// cuSOLVER's functions that bench/cusolver.py calls, on host memory: its calls are tested without a
// GPU. The declarations are NVIDIA's own header's, so a wrong type or order here does not compile.

#include <cusolverDn.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace {

// Jacobi's rotations: eigenvalues w, ascending, and eigenvectors as the columns of a
// (column-major).
template <typename T>
void eigen(T* a, int64_t m, T* w, bool vectors) {
  std::vector<double> s(a, a + m * m), v(m * m, 0);
  for (int64_t i = 0; i < m; ++i) v[i * m + i] = 1;
  for (int sweep = 0; sweep < 30; ++sweep)
    for (int64_t p = 0; p < m; ++p)
      for (int64_t q = p + 1; q < m; ++q) {
        const double angle = 0.5 * std::atan2(2 * s[q * m + p], s[q * m + q] - s[p * m + p]);
        const double c = std::cos(angle), n = std::sin(angle);
        const auto rotate = [&](double& x, double& y) {
          const double x0 = x, y0 = y;
          x = c * x0 - n * y0;
          y = n * x0 + c * y0;
        };
        for (int64_t k = 0; k < m; ++k) rotate(s[p * m + k], s[q * m + k]);
        for (int64_t k = 0; k < m; ++k) rotate(s[k * m + p], s[k * m + q]);
        for (int64_t k = 0; k < m; ++k) rotate(v[p * m + k], v[q * m + k]);
      }
  std::vector<int64_t> order(m);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t i, int64_t j) { return s[i * m + i] < s[j * m + j]; });
  for (int64_t k = 0; k < m; ++k) {
    w[k] = static_cast<T>(s[order[k] * m + order[k]]);
    for (int64_t i = 0; i < m; ++i)  // without vectors a is destroyed, as NVIDIA documents
      a[k * m + i] = vectors ? static_cast<T>(v[order[k] * m + i]) : T(1e30);
  }
}

template <typename T>
cusolverStatus_t syevj(cusolverEigMode_t jobz, cublasFillMode_t uplo, int n, T* a, int lda, T* w,
                       T* work, int lwork, int* info, syevjInfo_t params, int batch) {
  if (params != reinterpret_cast<syevjInfo_t>(3) || lda != n || lwork != 7 * n || !work ||
      uplo != CUBLAS_FILL_MODE_LOWER)
    return CUSOLVER_STATUS_INVALID_VALUE;
  std::fill_n(work, lwork, T(1));
  for (int k = 0; k < batch; ++k) {
    eigen<T>(a + k * n * n, n, w + k * n, jobz == CUSOLVER_EIG_MODE_VECTOR);
    info[k] = 0;
  }
  return CUSOLVER_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

cusolverStatus_t cusolverGetVersion(int* version) {
  *version = 11702;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle) {
  *handle = reinterpret_cast<cusolverDnHandle_t>(1);
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t* params) {
  *params = reinterpret_cast<cusolverDnParams_t>(2);
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnCreateSyevjInfo(syevjInfo_t* info) {
  *info = reinterpret_cast<syevjInfo_t>(3);
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t) {
  return handle == reinterpret_cast<cusolverDnHandle_t>(1) ? CUSOLVER_STATUS_SUCCESS
                                                           : CUSOLVER_STATUS_NOT_INITIALIZED;
}

cusolverStatus_t cusolverDnSsyevjBatched_bufferSize(cusolverDnHandle_t, cusolverEigMode_t,
                                                    cublasFillMode_t, int n, const float*, int,
                                                    const float*, int* lwork, syevjInfo_t, int) {
  *lwork = 7 * n;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnDsyevjBatched_bufferSize(cusolverDnHandle_t, cusolverEigMode_t,
                                                    cublasFillMode_t, int n, const double*, int,
                                                    const double*, int* lwork, syevjInfo_t, int) {
  *lwork = 7 * n;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnSsyevjBatched(cusolverDnHandle_t, cusolverEigMode_t jobz,
                                         cublasFillMode_t uplo, int n, float* a, int lda, float* w,
                                         float* work, int lwork, int* info, syevjInfo_t params,
                                         int batch) {
  return syevj(jobz, uplo, n, a, lda, w, work, lwork, info, params, batch);
}
cusolverStatus_t cusolverDnDsyevjBatched(cusolverDnHandle_t, cusolverEigMode_t jobz,
                                         cublasFillMode_t uplo, int n, double* a, int lda,
                                         double* w, double* work, int lwork, int* info,
                                         syevjInfo_t params, int batch) {
  return syevj(jobz, uplo, n, a, lda, w, work, lwork, info, params, batch);
}

cusolverStatus_t cusolverDnXsyevBatched_bufferSize(cusolverDnHandle_t, cusolverDnParams_t,
                                                   cusolverEigMode_t, cublasFillMode_t, int64_t n,
                                                   cudaDataType, const void*, int64_t, cudaDataType,
                                                   const void*, cudaDataType, size_t* on_device,
                                                   size_t* on_host, int64_t batch) {
  *on_device = 11 * n * batch;
  *on_host = 0;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnXsyevBatched(cusolverDnHandle_t, cusolverDnParams_t params,
                                        cusolverEigMode_t jobz, cublasFillMode_t uplo, int64_t n,
                                        cudaDataType type_a, void* a, int64_t lda,
                                        cudaDataType type_w, void* w, cudaDataType compute,
                                        void* on_device, size_t device_bytes, void* on_host,
                                        size_t host_bytes, int* info, int64_t batch) {
  char* zeroed = static_cast<char*>(on_device);
  if (params != reinterpret_cast<cusolverDnParams_t>(2) || lda != n || type_a != type_w ||
      type_a != compute || uplo != CUBLAS_FILL_MODE_LOWER || !on_host || host_bytes != 0 ||
      device_bytes != static_cast<size_t>(11 * n * batch) ||
      std::any_of(zeroed, zeroed + device_bytes, [](char byte) { return byte != 0; }))
    return CUSOLVER_STATUS_INVALID_VALUE;
  const bool vectors = jobz == CUSOLVER_EIG_MODE_VECTOR;
  for (int64_t k = 0; k < batch; ++k) {
    if (type_a == CUDA_R_32F)
      eigen(static_cast<float*>(a) + k * n * n, n, static_cast<float*>(w) + k * n, vectors);
    else
      eigen(static_cast<double*>(a) + k * n * n, n, static_cast<double*>(w) + k * n, vectors);
    info[k] = 0;
  }
  return CUSOLVER_STATUS_SUCCESS;
}

}  // extern "C"
