// The table of poles for the type that is computed in.

#pragma once

#include "common/pole_table.h"

namespace vne {

template <typename T>
struct PoleTable;
template <>
struct PoleTable<float> {
  static constexpr int kSize = kPoles32;
  static constexpr const Pole* kPoles = kPoleTable32;
  static constexpr double kConstant = kPoleConstant32;
};
template <>
struct PoleTable<double> {
  static constexpr int kSize = kPoles64;
  static constexpr const Pole* kPoles = kPoleTable64;
  static constexpr double kConstant = kPoleConstant64;
};

}  // namespace vne
