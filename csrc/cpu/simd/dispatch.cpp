// Chooses the kernels of the widest instruction set that this processor has.

#include <cstdlib>
#include <cstring>

#include "cpu/simd/kernels.h"

namespace vne::simd {

namespace baseline {
extern const Kernels<float> kFloat;
extern const Kernels<double> kDouble;
extern const ReductionKernels kReduction;
extern const BandKernels kBands;
}  // namespace baseline

#ifdef VNE_SIMD_X86
namespace avx2 {
extern const Kernels<float> kFloat;
extern const Kernels<double> kDouble;
extern const ReductionKernels kReduction;
extern const BandKernels kBands;
}  // namespace avx2
namespace avx512 {
extern const Kernels<float> kFloat;
extern const Kernels<double> kDouble;
extern const ReductionKernels kReduction;
extern const BandKernels kBands;
}  // namespace avx512
#endif

namespace {

enum class Level { kBaseline, kAvx2, kAvx512 };

// VNE_KERNELS_SIMD=baseline|avx2|avx512 lowers the level, for tests and for comparing them.
Level limit() {
  const char* name = std::getenv("VNE_KERNELS_SIMD");
  if (name && std::strcmp(name, "baseline") == 0) return Level::kBaseline;
  if (name && std::strcmp(name, "avx2") == 0) return Level::kAvx2;
  return Level::kAvx512;
}

Level detect() {
#ifdef VNE_SIMD_X86
  __builtin_cpu_init();
  if (limit() >= Level::kAvx512 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma")) {
    return Level::kAvx512;
  }
  if (limit() >= Level::kAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Level::kAvx2;
  }
#endif
  return Level::kBaseline;
}

template <typename Table>
const Table* choose(const Table* baseline, [[maybe_unused]] const Table* avx2,
                    [[maybe_unused]] const Table* avx512) {
  switch (detect()) {
    case Level::kAvx512:
      return avx512;
    case Level::kAvx2:
      return avx2;
    case Level::kBaseline:
      break;
  }
  return baseline;
}

}  // namespace

#ifdef VNE_SIMD_X86
#define VNE_CHOOSE(table) choose(&baseline::table, &avx2::table, &avx512::table)
#else
#define VNE_CHOOSE(table) choose(&baseline::table, &baseline::table, &baseline::table)
#endif

template <>
const Kernels<float>& kernels<float>() {
  static const Kernels<float>* const chosen = VNE_CHOOSE(kFloat);
  return *chosen;
}

template <>
const Kernels<double>& kernels<double>() {
  static const Kernels<double>* const chosen = VNE_CHOOSE(kDouble);
  return *chosen;
}

const ReductionKernels& reduction_kernels() {
  static const ReductionKernels* const chosen = VNE_CHOOSE(kReduction);
  return *chosen;
}

const BandKernels& band_kernels() {
  static const BandKernels* const chosen = VNE_CHOOSE(kBands);
  return *chosen;
}

}  // namespace vne::simd
