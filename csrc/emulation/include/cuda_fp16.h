// Stand-in for CUDA's header of the same name: the part of it that the kernels use.

#pragma once

#include <torch/headeronly/util/Half.h>

using __half = torch::headeronly::Half;
inline float __half2float(__half half) { return half; }
