// The pole tables as a kernel takes them: by value, in the constant bank.

#pragma once

#include "common/pole_table.h"

namespace vne {

template <typename T>
struct PoleList {
  static constexpr int kCount = sizeof(T) == 8 ? kPoles64 : kPoles32;
  T t[kCount], w[kCount];
};

template <typename T>
PoleList<T> pole_list() {
  PoleList<T> list;
  const Pole* table = sizeof(T) == 8 ? kPoleTable64 : kPoleTable32;
  for (int k = 0; k < PoleList<T>::kCount; ++k) {
    list.t[k] = static_cast<T>(table[k].t);
    list.w[k] = static_cast<T>(table[k].w);
  }
  return list;
}

template <typename T>
constexpr double pole_constant() {
  return sizeof(T) == 8 ? kPoleConstant64 : kPoleConstant32;
}

// The largest m of which one block holds the triangle in registers.
template <typename T>
constexpr int kLargestSweep = sizeof(T) == 8 ? 128 : 256;

}  // namespace vne
