// Chooses the kernels of the widest instruction set that this processor has.

#include <cstdlib>
#include <string>

#include "cpu/simd/kernels.h"

namespace vne::simd {

namespace baseline {
extern const Tables kTables;
}
#ifdef VNE_SIMD_X86
namespace avx2 {
extern const Tables kTables;
}
namespace avx512 {
extern const Tables kTables;
}
#endif

namespace {

// VNE_KERNELS_SIMD=baseline|avx2|avx512 lowers the level, for tests and for comparing them.
const Tables& choose() {
#ifdef VNE_SIMD_X86
  const char* variable = std::getenv("VNE_KERNELS_SIMD");
  const std::string limit = variable ? variable : "";
  __builtin_cpu_init();
  if (limit != "baseline" && limit != "avx2" && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma")) {
    return avx512::kTables;
  }
  if (limit != "baseline" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return avx2::kTables;
#endif
  return baseline::kTables;
}

}  // namespace

const Tables& tables() {
  static const Tables& chosen = choose();
  return chosen;
}

}  // namespace vne::simd
