// Registers an operator: its schema, its kernel on this backend, and its checks.
//
// A header of this folder, or VNE_FUNCTION in a backend's file, declares an operator once:
//
//   VNE_OPERATOR("spectrum", "(Tensor z, Tensor? weights, bool normalize, float eps)", "Tensor",
//                check_samples, spectrum)
//
// `check` takes the operator's arguments, throws if one is not allowed, and returns them as one
// value; `compute` takes that value. In the host module, _C, this defines the schema and registers
// the CPU kernel; the emulation does the same in another library. In the CUDA module it
// registers the kernel alone.
//
// The host module also defines `check_NAME`, which takes the same arguments and only checks them:
// backends that are not written in C++ (vne_kernels/_triton/) raise the same errors by it.
//
// The dispatcher accepts schemas and kernels in any order, so the order in which the files of a
// module are initialized does not matter. No argument has a default: the public functions of
// vne_kernels/functional/ have them.

#pragma once

#include <string>

#include "common/stable.h"

namespace vne {

template <auto check, auto compute, typename = decltype(check)>
struct Operator;

template <auto check, auto compute, typename Checked, typename... Parameters>
struct Operator<check, compute, Checked (*)(Parameters...)> {
  static auto call(Parameters... parameters) { return compute(check(parameters...)); }
  static void check_only(Parameters... parameters) { check(parameters...); }
};

}  // namespace vne

#ifndef VNE_LIBRARY
#define VNE_LIBRARY vne_kernels
#endif

#ifdef VNE_HOST_MODULE
#define VNE_OPERATOR(name, arguments, results, check, compute)                            \
  STABLE_TORCH_LIBRARY_FRAGMENT(VNE_LIBRARY, library) {                                   \
    const std::string parameters(arguments);                                              \
    library.def((name + parameters + " -> " + results).c_str());                          \
    library.def(("check_" name + parameters + " -> ()").c_str());                         \
  }                                                                                       \
  STABLE_TORCH_LIBRARY_IMPL(VNE_LIBRARY, CPU, library) {                                  \
    library.impl(name, TORCH_BOX((&vne::Operator<check, compute>::call)));                \
  }                                                                                       \
  STABLE_TORCH_LIBRARY_IMPL(VNE_LIBRARY, CompositeExplicitAutograd, library) {            \
    library.impl("check_" name, TORCH_BOX((&vne::Operator<check, compute>::check_only))); \
  }
#else
#define VNE_OPERATOR(name, arguments, results, check, compute)             \
  STABLE_TORCH_LIBRARY_IMPL(VNE_LIBRARY, CUDA, library) {                  \
    library.impl(name, TORCH_BOX((&vne::Operator<check, compute>::call))); \
  }
#endif
