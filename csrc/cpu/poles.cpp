// log A^ = c0 I - sum_k w_k (A^ + t_k I)^-1: equation (6), for a trace-one A^.
//
// The poles are independent: threads share them out, and their sum is taken in a fixed order, so
// that the result does not depend on the number of threads. One inverse is a symmetric sweep in
// panels of pivots: the columns of a panel are swept at once, and what they add to the rest of the
// matrix is one product, on its lower triangle only.
//
// Rounding breaks the sweep of a matrix of low rank (csrc/README.md, (7), "Pivot floor" and "Order
// of the pivots"). The panels raise pivots and clamp columns; a pole that needs either is swept
// again with the largest pivot first. A matrix of full rank pays for none of it.

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/pole_table.h"
#include "cpu/stages.h"

namespace vne {
namespace {

constexpr int64_t kPanel = 16;  // pivots at a time

// What the sweeps of one thread need besides the matrix: see simd/kernels.h, sweep_panel.
template <typename T>
struct Workspace {
  explicit Workspace(int64_t m)
      : panel(kPanel * m),
        c(kPanel * m),
        y(kPanel * m),
        diagonal(m),
        packed(kPanel * simd::kernels<T>().tile_cols) {}
  Buffer<T> panel, c, y, diagonal;
  Buffer<T> packed;  // part of c as the tile kernel wants it
};

enum class IfRepaired { kStop, kGoOn };

// Lower triangle of a [m, m] <- -(a + shift I)^-1; the upper triangle is scratch.
// False if a pivot needed repair; with kStop a is then left half done.
template <typename T>
bool sweep(T* a, int64_t m, T shift, T floor, IfRepaired if_repaired, const Workspace<T>& work) {
  const simd::Kernels<T>& simd = simd::kernels<T>();
  const int64_t tile_rows = simd.tile_rows, tile_cols = simd.tile_cols;
  T* panel = work.panel.get();
  bool clean = true;
  for (int64_t i = 0; i < m; ++i) a[i * m + i] += shift;

  for (int64_t first = 0; first < m; first += kPanel) {
    const int64_t size = std::min(kPanel, m - first), last = first + size;
    // Left of its diagonal a column of the panel is stored as a row, below it as a column.
    for (int64_t k = 0; k < size; ++k) {
      const T* row = a + (first + k) * m;
      std::copy_n(row, first + k + 1, panel + k * m);
      for (int64_t j = 0; j < k; ++j) panel[j * m + first + k] = row[first + j];
    }
    for (int64_t i = last; i < m; ++i) {
      for (int64_t k = 0; k < size; ++k) panel[k * m + i] = a[i * m + first + k];
    }
    fill(work.diagonal.get(), first, 0);
    for (int64_t i = first; i < m; ++i) work.diagonal[i] = a[i * m + i];

    if (simd.sweep_panel(panel, work.diagonal.get(), work.c.get(), work.y.get(), size, m, first,
                         floor) > 0) {
      clean = false;
      if (if_repaired == IfRepaired::kStop) return false;
    }

    for (int64_t j = 0; j < m; j += tile_cols) {
      const int cols = static_cast<int>(std::min(tile_cols, m - j));
      simd.pack(size, cols, {&work.c[j], m, 1}, nullptr, work.packed.get());
      const int64_t top = j / tile_rows * tile_rows;
      multiply_column<T>(m - top, cols, size, {&work.y[top], 1, m}, work.packed.get(),
                         a + top * m + j, m);
    }
    for (int64_t k = 0; k < size; ++k)
      std::copy_n(panel + k * m, first + k + 1, a + (first + k) * m);
    for (int64_t i = last; i < m; ++i) {
      for (int64_t k = 0; k < size; ++k) a[i * m + first + k] = panel[k * m + i];
    }
  }
  return clean;
}

// The order of the pivots of a pivoted Cholesky factorisation of a [m, m] down to `floor`; what is
// below that comes last.
template <typename T>
std::vector<int64_t> pivot_order(const T* a, int64_t m, double floor) {
  std::vector<int64_t> order;
  std::vector<bool> taken(m, false);
  std::vector<T> diagonal(m);
  std::vector<Buffer<T>> factor;  // rows of L^T
  for (int64_t i = 0; i < m; ++i) diagonal[i] = a[i * m + i];
  while (static_cast<int64_t>(order.size()) < m) {
    int64_t pivot = -1;
    for (int64_t i = 0; i < m; ++i) {
      if (!taken[i] && (pivot < 0 || diagonal[i] > diagonal[pivot])) pivot = i;
    }
    order.push_back(pivot);
    taken[pivot] = true;
    if (!(diagonal[pivot] > floor)) break;
    const T* l = factor.emplace_back(m).get();
    T* row = factor.back().get();
    std::copy_n(a + pivot * m, m, row);
    for (size_t j = 0; j + 1 < factor.size(); ++j) {
      simd::kernels<T>().combine(T(1), row, -factor[j][pivot], factor[j].get(), row, m);
    }
    simd::kernels<T>().scale(row, T(1) / std::sqrt(diagonal[pivot]), row, m);
    for (int64_t i = 0; i < m; ++i) diagonal[i] -= l[i] * l[i];
  }
  for (int64_t i = 0; i < m; ++i) {
    if (!taken[i]) order.push_back(i);
  }
  return order;
}

// Lower triangle of to [m, m] <- from[order, order].
template <typename T>
void permute(const T* from, const std::vector<int64_t>& order, T* to) {
  const int64_t m = static_cast<int64_t>(order.size());
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      to[i * m + j] = from[std::max(order[i], order[j]) * m + std::min(order[i], order[j])];
    }
  }
}

// Whether an entry on the diagonal of an inverse [m, m] is beyond `limit`: rounding has grown.
template <typename T>
bool has_grown(const T* inverse, int64_t m, T limit) {
  for (int64_t i = 0; i < m; ++i) {
    if (!(std::abs(inverse[i * m + i]) <= limit)) return true;
  }
  return false;
}

}  // namespace

template <typename T>
void log_by_sweeps(const T* a, int64_t m, double shift, T* result) {
  using Table = PoleTable<T>;
  const int64_t size = m * m;
  const double frobenius = std::sqrt(simd::kernels<T>().sum_of_squares(a, size));
  const double noise =
      2 * static_cast<double>(std::numeric_limits<T>::epsilon()) * frobenius;  // epsilon = 2 u

  // A wave of inverses at a time bounds the workspace; it has the same poles on any machine.
  constexpr int64_t kWaveBytes = int64_t{256} << 20;
  const int64_t wave =
      std::clamp<int64_t>(kWaveBytes / (size * static_cast<int64_t>(sizeof(T))), 4, Table::kSize);
  Buffer<T> swept(wave * size);
  for (int64_t i = 0; i < m; ++i) {
    fill(result + i * m, i, 0);
    result[i * m + i] = static_cast<T>(Table::kConstant + shift);
  }

  for (int64_t first = 0; first < Table::kSize; first += wave) {
    const int64_t count = std::min<int64_t>(wave, Table::kSize - first);
    const auto floor = [&](int64_t k) {
      return static_cast<T>(std::max(Table::kPoles[first + k].t / 2, noise));
    };
    const auto pole = [&](int64_t k) { return static_cast<T>(Table::kPoles[first + k].t); };

    std::vector<char> clean(count);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const Workspace<T> work(m);
      for (int64_t k = begin; k < end; ++k) {
        T* matrix = &swept[k * size];
        for (int64_t i = 0; i < m; ++i) std::copy_n(a + i * m, i + 1, matrix + i * m);
        clean[k] = sweep(matrix, m, pole(k), floor(k), IfRepaired::kStop, work);
      }
    });

    std::vector<int64_t> again;
    for (int64_t k = 0; k < count; ++k) {
      if (!clean[k]) again.push_back(k);
    }
    if (!again.empty()) {
      const std::vector<int64_t> order = pivot_order(a, m, noise);
      std::vector<int64_t> back(m);
      for (int64_t i = 0; i < m; ++i) back[order[i]] = i;
      torch::stable::parallel_for(
          0, static_cast<int64_t>(again.size()), 1, [&](int64_t begin, int64_t end) {
            const Workspace<T> work(m);
            Buffer<T> permuted(size);
            for (int64_t index = begin; index < end; ++index) {
              const int64_t k = again[index];
              // Of rank one, each pivot raised to the floor adds a_ii / (a_00 floor) to the first
              // diagonal entry, and these a_ii sum to less than the trace, 1. Four times that:
              // where all rows are equal a larger shift costs S up to 3e-5.
              const T limit = 4 * (1 + 1 / a[order[0] * (m + 1)]) / floor(k);
              T shift = pole(k);
              do {
                permute(a, order, permuted.get());
                sweep(permuted.get(), m, shift, floor(k), IfRepaired::kGoOn, work);
                shift = std::max(2 * shift, floor(k));
              } while (shift < 1 && has_grown(permuted.get(), m, limit));
              permute(permuted.get(), back, &swept[k * size]);
            }
          });
    }

    torch::stable::parallel_for(
        0, m, std::max<int64_t>(1, (1 << 14) / m), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            T* row = result + i * m;
            for (int64_t k = 0; k < count; ++k) {
              const T w = static_cast<T>(Table::kPoles[first + k].w);
              simd::kernels<T>().combine(T(1), row, w, &swept[k * size + i * m], row, i + 1);
            }
          }
        });
  }
  simd::kernels<T>().mirror_lower(result, m);
}

template void log_by_sweeps(const float*, int64_t, double, float*);
template void log_by_sweeps(const double*, int64_t, double, double*);

namespace {

template <typename T>
Tensor table_of(const Tensor& like) {
  using Table = PoleTable<T>;
  const Tensor table = empty(like, {1 + Table::kSize, 2}, ScalarType::Double);
  double* row = static_cast<double*>(table.mutable_data_ptr());
  row[0] = Table::kConstant;
  row[1] = 0;
  for (int k = 0; k < Table::kSize; ++k) {
    *(row += 2) = Table::kPoles[k].t;
    row[1] = Table::kPoles[k].w;
  }
  return table;
}

// The table of the dtype that `like` is computed in: c0 and 0, then t and w of each pole.
Tensor pole_table(const Tensor& like) {
  const bool wide = compute_dtype(like.scalar_type()) == ScalarType::Double;
  return wide ? table_of<double>(like) : table_of<float>(like);
}

}  // namespace
}  // namespace vne

// What backends outside of this library share with those of it: (1 + poles, 2)
STABLE_TORCH_LIBRARY_FRAGMENT(vne_kernels, library) {
  library.def("pole_table(Tensor like) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vne_kernels, CPU, library) {
  library.impl("pole_table", TORCH_BOX(&vne::pole_table));
}
