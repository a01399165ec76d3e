#include "cpu/gemm.h"

namespace vne {
namespace {

constexpr int64_t kPanelBytes = 32 * 1024;  // a packed panel of B stays in the L1 cache
// What one thread packs at once stays in the L2 cache: a long k takes several rounds. More threads
// take one, as they wait for each other in each.
constexpr int64_t kRoundBytes = 512 * 1024;
constexpr int64_t kStrip = 16;  // rows of B that are packed at once, a divisor of a panel's

// C is computed by tiles, numbered down the columns of tiles: the first `skipped(column)` tiles of
// a column lie wholly above the diagonal and are left out of a symmetric result.
struct Tiling {
  int64_t rows, cols, tile_rows, tile_cols;
  Result result;

  int64_t tile_row_count() const { return ceil_div(rows, tile_rows); }
  int64_t tile_col_count() const { return ceil_div(cols, tile_cols); }
  int64_t skipped(int64_t column) const {
    return result == Result::kSymmetric ? column * tile_cols / tile_rows : 0;
  }
  // Columns of a tile that are computed. Above the diagonal, the second of its vectors is left out.
  int64_t width(int64_t i, int64_t j) const {
    const bool half = result == Result::kSymmetric && i + tile_rows <= j + tile_cols / 2;
    return std::min(half ? tile_cols / 2 : tile_cols, cols - j);
  }
  int64_t count() const {
    int64_t total = 0;
    for (int64_t column = 0; column < tile_col_count(); ++column)
      total += tile_row_count() - skipped(column);
    return total;
  }
};

}  // namespace

template <typename T>
void multiply(int64_t rows, int64_t cols, int64_t k, MatrixView<T> a, MatrixView<T> b, T* c,
              Result result, const T* scale) {
  const simd::Kernels<T>& simd = simd::kernels<T>();
  const Tiling tiling{rows, cols, simd.tile_rows, simd.tile_cols, result};
  const int64_t depth = kPanelBytes / (simd.tile_cols * static_cast<int64_t>(sizeof(T)));
  const int64_t panel_cols = tiling.tile_col_count();
  const int64_t panel_elements = depth * tiling.tile_cols;
  const int64_t panels_of_round =
      kRoundBytes / (panel_cols * panel_elements * static_cast<int64_t>(sizeof(T)));
  const bool in_rounds = torch::stable::get_num_threads() == 1;
  const int64_t round_depth =
      in_rounds ? std::min(k, std::max<int64_t>(1, panels_of_round) * depth) : k;
  Buffer<T> packed(round_depth * panel_cols * tiling.tile_cols);
  // B is read in the order of its memory: by a few whole rows, or by a panel of columns.
  const int64_t strip = b.col_stride == 1 ? kStrip : depth;
  const int64_t groups = b.col_stride == 1 ? 1 : panel_cols;

  for (int64_t begin_k = 0; begin_k < k; begin_k += round_depth) {
    const int64_t end_k = std::min(k, begin_k + round_depth);
    const int64_t panel_rows = ceil_div(end_k - begin_k, depth);
    const auto size_of = [&](int64_t panel_row) {
      return std::min(depth, end_k - begin_k - panel_row * depth);
    };
    const auto panel_of = [&](int64_t panel_row, int64_t panel_col) {
      return packed.get() +
             (panel_row * panel_cols * depth + panel_col * size_of(panel_row)) * tiling.tile_cols;
    };

    const auto pack = [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t from = block / groups * strip, panel_row = from / depth;
        const int64_t size = std::min(strip, end_k - begin_k - from), first_k = begin_k + from;
        const int64_t group = block % groups, group_cols = panel_cols / groups;
        for (int64_t col = group * group_cols; col < (group + 1) * group_cols; ++col) {
          const int64_t first_col = col * tiling.tile_cols;
          const MatrixView<T> part = {b.data + first_k * b.row_stride + first_col * b.col_stride,
                                      b.row_stride, b.col_stride};
          simd.pack(size, static_cast<int>(std::min(tiling.tile_cols, cols - first_col)), part,
                    scale ? scale + first_k : nullptr,
                    panel_of(panel_row, col) + (from - panel_row * depth) * tiling.tile_cols);
        }
      }
    };

    // Each thread runs through all of the round for its own tiles: no two threads write to the same
    // place, and the order of summation does not depend on their number.
    const auto compute = [&](int64_t begin, int64_t end) {
      int64_t first_column = 0,
              before = 0;  // the column of the tile `begin`, and the tiles before that column
      while (begin - before >= tiling.tile_row_count() - tiling.skipped(first_column)) {
        before += tiling.tile_row_count() - tiling.skipped(first_column++);
      }
      for (int64_t panel_row = 0; panel_row < panel_rows; ++panel_row) {
        const int64_t first_k = begin_k + panel_row * depth;
        int64_t column = first_column, row = tiling.skipped(column) + begin - before;
        for (int64_t tile = begin; tile < end; ++tile, ++row) {
          if (row == tiling.tile_row_count()) row = tiling.skipped(++column);
          const int64_t i = row * tiling.tile_rows, j = column * tiling.tile_cols;
          const MatrixView<T> part = {a.data + i * a.row_stride + first_k * a.col_stride,
                                      a.row_stride, a.col_stride};
          simd.multiply_tile(size_of(panel_row), part, panel_of(panel_row, column),
                             c + i * cols + j, cols,
                             static_cast<int>(std::min(tiling.tile_rows, rows - i)),
                             static_cast<int>(tiling.width(i, j)), first_k > 0);
        }
      }
    };

    // Small products stay on one thread: waking another costs some microseconds.
    constexpr int64_t kGrainFlops = 1 << 20;
    const int64_t tile_flops = 2 * (end_k - begin_k) * tiling.tile_rows * tiling.tile_cols;
    const int64_t block_elements = strip * tiling.tile_cols * (panel_cols / groups);
    torch::stable::parallel_for(0, ceil_div(end_k - begin_k, strip) * groups,
                                std::max<int64_t>(1, (1 << 16) / block_elements), pack);
    torch::stable::parallel_for(0, tiling.count(), std::max<int64_t>(1, kGrainFlops / tile_flops),
                                compute);
  }
  if (result == Result::kSymmetric) simd.mirror_lower(c, rows);
}

template void multiply(int64_t, int64_t, int64_t, MatrixView<float>, MatrixView<float>, float*,
                       Result, const float*);
template void multiply(int64_t, int64_t, int64_t, MatrixView<double>, MatrixView<double>, double*,
                       Result, const double*);

}  // namespace vne
