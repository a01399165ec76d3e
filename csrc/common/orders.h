// Functions of eigenvalues with their slopes: entropies of every order, (13), and RankMe, (14).
//
// The eigenvalues l [m] may have any trace, and come in any order. Those below 0 are rounding: they
// count as 0 and have the slope 0. All are computed in double. slope [m] receives dF/dl_k; it is
// null where it is not wanted.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace vne {

enum class Family { kRenyi, kTsallis };

namespace orders {

// Below it rounding may have made what is 0: the threshold of torch.linalg.matrix_rank.
inline double rounding_floor(const double* l, int64_t m, double epsilon) {
  double largest = 0;
  for (int64_t k = 0; k < m; ++k) largest = std::max(largest, l[k]);
  return static_cast<double>(m) * epsilon * largest;
}

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr double kNearOne = 0.5;  // orders so near are computed from their deviation from 1

// Whether an eigenvalue counts. One that is exactly 0 does where nothing is cut off.
inline bool counts(double l, double floor) { return l >= floor; }

// The slope of order infinity: the largest p_k share it.
inline double min_entropy(const std::vector<double>& p, double total, double* slope) {
  const int64_t m = static_cast<int64_t>(p.size());
  const double largest = *std::max_element(p.begin(), p.end());
  if (slope) {
    const double count = static_cast<double>(std::count(p.begin(), p.end(), largest));
    for (int64_t k = 0; k < m; ++k)
      slope[k] = (1 - (p[k] == largest ? 1 / (largest * count) : 0)) / total;
  }
  return 0 - std::log(largest);  // not -0.
}

// R of an order far from 1, by the logarithm of the sum of powers.
inline double far_renyi(double order, const std::vector<double>& p, double total, double* slope) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const int64_t m = static_cast<int64_t>(p.size());
  std::vector<double> log_p(m);
  double largest = -kInfinity, sum = 0;
  for (int64_t k = 0; k < m; ++k) {
    log_p[k] = p[k] == 0 ? -kInfinity : std::log(p[k]);
    if (p[k] != 0) largest = std::max(largest, order * log_p[k]);
  }
  for (int64_t k = 0; k < m; ++k) sum += p[k] == 0 ? 0 : std::exp(order * log_p[k] - largest);
  const double log_sum = std::log(sum) + largest;
  for (int64_t k = 0; slope && k < m; ++k) {
    const double power = p[k] == 0 ? 0 : std::exp(order * log_p[k] - largest) / sum / p[k];
    slope[k] = order / (1 - order) * (power - 1) / total;
  }
  return std::max(0.0, log_sum / (1 - order));  // neither -0. nor -1e-16
}

// With t_k = (p_k^(q - 1) - 1) / (1 - q), which is -log p_k at order 1, T = sum_k p_k t_k and
// dT/dl_k = q (t_k - T) / total. R and its slope follow from sum_k p_k^q = 1 + (1 - q) T.
inline double by_deviation(Family family, double order, const std::vector<double>& p, double total,
                           double* slope) {
  const int64_t m = static_cast<int64_t>(p.size());
  const double from_one = order - 1;
  // Where p_k is 0: the limit, or a finite number in the place of a limit that is not, or is huge.
  const double at_zero = 1 / (from_one < kNearOne ? order : from_one);
  std::vector<double> t(m);
  double tsallis = 0;
  for (int64_t k = 0; k < m; ++k) {
    const double log_p = p[k] == 0 ? 0 : std::log(p[k]);
    t[k] = p[k] == 0 ? at_zero : from_one == 0 ? -log_p : std::expm1(from_one * log_p) / -from_one;
    if (p[k] != 0) tsallis += p[k] * t[k];
  }
  const bool is_renyi = family == Family::kRenyi;
  const double sum = is_renyi ? 1 - from_one * tsallis : 1;
  for (int64_t k = 0; slope && k < m; ++k) slope[k] = order * (t[k] - tsallis) / (total * sum);
  if (!is_renyi || from_one == 0) return tsallis + 0.0;  // not -0.
  return std::log1p(-from_one * tsallis) / -from_one + 0.0;
}

}  // namespace orders

// R or T of any order, at least 0 and infinity too, of the eigenvalues over their sum; von
// Neumann's entropy is either one of order 1, the linear entropy T of order 2. Orders below 1 do
// not count eigenvalues below the floor, m epsilon times the largest. 0 where all are 0.
inline double entropy_of_order(Family family, double order, const double* l, int64_t m,
                               double* slope, double epsilon = orders::kEpsilon) {
  const double floor = order < 1 ? orders::rounding_floor(l, m, epsilon) : 0;
  std::vector<double> p(m);
  double total = 0;
  for (int64_t k = 0; k < m; ++k) total += p[k] = orders::counts(l[k], floor) ? l[k] : 0;
  if (slope) std::fill_n(slope, m, 0);
  if (total == 0) return 0;
  for (double& share : p) share /= total;
  const bool is_infinite = std::isinf(order);
  if (is_infinite && family == Family::kTsallis) return 0;
  const double value = is_infinite ? orders::min_entropy(p, total, slope)
                       : family == Family::kRenyi && std::abs(order - 1) >= orders::kNearOne
                           ? orders::far_renyi(order, p, total, slope)
                           : orders::by_deviation(family, order, p, total, slope);
  for (int64_t k = 0; slope && k < m; ++k) {
    if (!orders::counts(l[k], floor)) slope[k] = 0;
  }
  return value;
}

// S = -sum_k l_k log l_k of the eigenvalues as they are, (1). A zero has the slope 0.
inline double entropy_as_given(const double* l, int64_t m, double* slope) {
  double sum = 0;
  for (int64_t k = 0; k < m; ++k) {
    const double log_l = l[k] > 0 ? std::log(l[k]) : 0;
    if (l[k] > 0) sum += l[k] * log_l;
    if (slope) slope[k] = l[k] > 0 ? -log_l - 1 : 0;
  }
  return 0 - sum;  // not -0.
}

// exp(-sum_k p_k log p_k) with p_k = s_k / sum_j s_j + added and s_k^2 = l_k, of l in descending
// order, of which `count` are there. Where all are 0, s_0 counts as 1. A zero has the slope 0.
inline double rankme_of(double added, int64_t count, const double* l, int64_t m, double* slope) {
  const double floor = orders::rounding_floor(l, m, orders::kEpsilon);
  std::vector<double> s(m), of_p(m);  // dS/dp_k
  double total = 0;
  for (int64_t k = 0; k < m; ++k)
    total += s[k] = l[k] >= floor ? std::sqrt(std::max(l[k], 0.0)) : 0;
  if (total == 0) s[0] = 1;
  double entropy = 0, mean = 0;
  for (int64_t k = 0; k < std::min(m, count); ++k) {
    const double share = s[k] / (total == 0 ? 1 : total), p = share + added;
    const double log_p = p == 0 ? 0 : std::log(p);
    entropy -= p * log_p;
    of_p[k] = -log_p - 1;
    mean += share * of_p[k];
  }
  const double value = std::exp(entropy);
  for (int64_t k = 0; slope && k < m; ++k) {
    const bool is_zero = total == 0 || s[k] == 0;
    slope[k] = is_zero ? 0 : value * (of_p[k] - mean) / (2 * total * s[k]);
  }
  return value;
}

}  // namespace vne
