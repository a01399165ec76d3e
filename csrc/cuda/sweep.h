// The inverse of a symmetric positive definite matrix by pivots, in the registers of one block:
// "symmetric sweep" of csrc/README.md, (7).
//
// Thread t < kTiles owns a kTile x kTile tile (I, J), I >= J, of the lower triangle. With c the
// column of the pivot k and p = a_kk, a sweep is the rank-one update
//
//   a_ij <- a_ij - c'_i c'_j / p,   c'_k = p - 1, otherwise c' = c.
//
// Row and column k come out as c / p by themselves, without a select. The diagonal would not: each
// warp has a copy of all of it, spread over its lanes, and updates it by the same instructions.
//
// A step, in time:
//
//   1. The threads that own a part of column k write it to shared memory (broadcast_column). Two
//      buffers take turns.
//   2. Barrier: the column is complete.
//   3. If the pivot is as small as rounding, warp 0 repairs the column, and there is a second
//      barrier. The pivot has the same bits in all threads, so that all of them take this branch.
//   4. Each warp updates its copy of the diagonal and finds the next pivot in it, before the tiles
//      are done and without a barrier.
//   5. Each thread updates its tile.
//
// 256 rows need 17 warps, of which one part of the multiprocessor holds five, so that registers are
// short. There the copies of the diagonal are in shared memory; each entry is still read and
// written by one lane only.
//
// Pivots are taken largest first, and what only rounding can have made is repaired: csrc/README.md
// says why a floor alone does not do.

#pragma once

#include "cuda/runtime.h"
#include "cuda/stages.h"
#include "cuda/tile.h"

namespace vne {

template <int kSize, int kTile>
struct SweepShape {
  static constexpr int kSide = kSize / kTile;               // tiles along a side
  static constexpr int kTiles = kSide * (kSide + 1) / 2;    // threads that own one
  static constexpr int kThreads = (kTiles + 31) / 32 * 32;  // of a block
  static constexpr int kOfLane = kSize / 32;                // diagonal entries of a lane
  static constexpr bool kInShared = kOfLane > 4;            // they are
};

template <typename T, int kSize, int kTile>
struct SweepShared {
  using Shape = SweepShape<kSize, kTile>;
  alignas(16) T column[2][kSize];
  T diagonal[Shape::kInShared ? Shape::kThreads / 32 : 1][Shape::kInShared ? kSize : 1];
};

// 1 / x for x of ordinary size, as accurate as the division operator but for one rounding. That
// operator has a subroutine for other sizes, which costs registers.
template <typename T>
__device__ __forceinline__ T reciprocal(T x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) {
    float estimate;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(x));
    return fmaf(estimate, fmaf(-x, estimate, 1.0f), estimate);
  }
#endif
  return 1 / x;
}

template <typename T>
__device__ __forceinline__ T square_root(T x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) {
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
    return root;
  }
#endif
  return sqrt(x);
}

// Optimization barrier. Hides the value from the compiler so that addresses derived from it are
// computed after the sweep instead of being kept in registers, which the tile needs.
__device__ __forceinline__ int opaque(int value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// Records nothing of the pivots.
struct NoRecord {
  template <typename T>
  __device__ __forceinline__ void operator()(int, int, T, const T*) const {}
};

template <typename T, int kSize, int kTile>
struct Sweep {
  using Shape = SweepShape<kSize, kTile>;
  using Shared = SweepShared<T, kSize, kTile>;
  static constexpr int kOfLane = Shape::kOfLane;
  static constexpr bool kInShared = Shape::kInShared;

  Tile<T, kTile> a;  // zero beyond the matrix, as for a thread without a tile
  int tile_row, tile_col;
  bool has_tile;

  __device__ __forceinline__ explicit Sweep(Shared& shared) : s(shared) {
    has_tile = threadIdx.x < Shape::kTiles;
    tile_row = has_tile ? triangle_row(threadIdx.x) : 0;
    tile_col = has_tile ? static_cast<int>(threadIdx.x) - tile_row * (tile_row + 1) / 2 : 0;
  }

  // Entry 32 i + lane of the diagonal. Diagonal entries of the tiles are void.
  __device__ __forceinline__ T& diagonal(int i) {
    if constexpr (Shape::kInShared) {
      return s.diagonal[threadIdx.x / 32][32 * i + threadIdx.x % 32];
    } else {
      return own_diagonal[i];
    }
  }

  // The weight of the tile's entries in a sum over the whole matrix.
  __device__ __forceinline__ T count() const { return tile_row == tile_col ? T(1) : T(2); }

  // Loads A [ld, ld], ld = leading(m): the diagonal as it is, the tile times 1 / tr A. Returns tr
  // A; squares <- the thread's part of |A^|_F^2.
  __device__ __forceinline__ T load(const T* matrix, int m, T& squares) {
    const int lane = threadIdx.x % 32, ld = static_cast<int>(leading(m));
    double sum = 0;
#pragma unroll(kInShared ? 1 : kOfLane)
    for (int i = 0; i < kOfLane; ++i) {
      const int place = 32 * i + lane;
      diagonal(i) = place < m ? matrix[place * ld + place] : T(0);
      sum += diagonal(i);
    }
    const T trace = static_cast<T>(warp_sum(sum));
    const T scale = reciprocal(trace);
    squares = 0;
    const bool inside = has_tile && (tile_row + 1) * kTile <= ld;  // then all of the tile
    const int below = tile_row * kTile * ld + tile_col * kTile;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (i % (kInShared ? 2 : 4) == 0) __syncthreads();  // bounds the loads in flight: registers
#pragma unroll
      for (int j = 0; j < kTile; j += 4) {
        Quad<T> quad{};
        if (inside) quad = read_quad(matrix + below + i * ld + j);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          a.v[i][j + q] = quad.v[q] * scale;
          squares += a.v[i][j + q] * a.v[i][j + q];
        }
      }
    }
    squares *= count();
    return trace;
  }

  // diagonal <- of A^ + t I, after load().
  __device__ __forceinline__ void shift_diagonal(T trace, T t) {
    const T scale = reciprocal(trace);
#pragma unroll(kInShared ? 1 : kOfLane)
    for (int i = 0; i < kOfLane; ++i) diagonal(i) = diagonal(i) * scale + t;
  }

  // Stores factor * matrix to `to` [ld, ld], both triangles. Returns the thread's part of its inner
  // product with `other` [ld, ld]. `m` and the pointers are to come from opaque().
  __device__ __forceinline__ T store(T factor, const T* other, T* to, int m) {
    const int ld = static_cast<int>(leading(m));
    const int row = opaque(tile_row * kTile), col = opaque(tile_col * kTile);
    const bool writes = has_tile && row + kTile <= ld;
    constexpr int kStep = kInShared ? 1 : 2;  // rows between barriers, as in load()
    T product = 0;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (i % kStep == 0) __syncthreads();
      if (!writes) continue;
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        const int at = (row + i) * ld + col + j;
        a.v[i][j] *= factor;
        product += other[at] * a.v[i][j];
        to[at] = a.v[i][j];
      }
    }
#pragma unroll
    for (int j = 0; j < kTile; ++j) {  // above the diagonal
      if (j % kStep == 0) __syncthreads();
      if (!writes) continue;
#pragma unroll
      for (int i = 0; i < kTile; ++i) to[(col + j) * ld + row + i] = a.v[i][j];
    }
    return product * count();
  }

  // a and diagonal <- of -(matrix)^-1; rows and columns from `size` on stay as they are. `noise` is
  // what rounding may have put into an entry, `floor` >= noise the least pivot. Every thread calls
  // record(step, k, 1 / p, column) after the barrier of each pivot.
  template <typename Record>
  __device__ __forceinline__ void run(int size, T floor, T noise, const Record& record) {
    const int lane = threadIdx.x % 32;
    unsigned swept = 0;  // bit i: entry i of this lane's diagonal, or there is none
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) swept |= 32 * i + lane < size ? 0u : 1u << i;
    T pivot;
    int k = next_pivot(swept, pivot);
    for (int step = 0; step < size; ++step) {
      T* column = s.column[step % 2];
      broadcast_column(column, k, pivot);
      __syncthreads();

      const volatile T* c = column + lane;  // volatile: read here, not where it is first needed
      const int own = k - lane;             // 32 i for the one entry that is the pivot
      // Not max(): a NaN has to stay one.
      const T raised = pivot < floor ? floor : pivot;
      if (pivot < 16 * noise) {  // the same in all threads of the block
        // In exact arithmetic c_i^2 <= p a_ii for rows not swept yet; the excess is rounding.
        if (threadIdx.x < 32) {
#pragma unroll(kInShared ? 1 : kOfLane)
          for (int i = 0; i < kOfLane; ++i) {
            const T limit = raised * max(diagonal(i), T(0)), c_i = c[32 * i];
            if ((swept >> i & 1u) == 0 && own != 32 * i && c_i * c_i > limit)
              column[32 * i + lane] = c_i < 0 ? -square_root(limit) : square_root(limit);
          }
        }
        __syncthreads();
      }
      const T inverse = reciprocal(raised);
      record(step, k, inverse, column);
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const bool is_pivot = own == 32 * i;
        const T c_i = c[32 * i];
        diagonal(i) = is_pivot ? -inverse : diagonal(i) - c_i * inverse * c_i;
        if (is_pivot) swept |= 1u << i;
      }
      k = next_pivot(swept, pivot);

      if (has_tile) {
#pragma unroll
        for (int j = 0; j < kTile; j += 4) {
          Quad<T> y = read_quad(column + tile_col * kTile + j);
#pragma unroll
          for (int q = 0; q < 4; ++q) y.v[q] *= inverse;
#pragma unroll
          for (int i = 0; i < kTile; i += 4)
            a.subtract_product(read_quad(column + tile_row * kTile + i), y, i, j);
        }
      }
    }
  }

  // Writes the diagonal back into the tiles.
  __device__ __forceinline__ void restore_diagonal() {
    __syncthreads();
    if (threadIdx.x < 32) {
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) s.column[0][32 * i + threadIdx.x] = diagonal(i);
    }
    __syncthreads();
    if (has_tile && tile_row == tile_col) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) a.v[i][i] = s.column[0][tile_row * kTile + i];
    }
  }

 private:
  Shared& s;
  T own_diagonal[Shape::kInShared ? 1 : kOfLane];

  // Returns the place of the largest entry of the diagonal not swept yet, and its value: the same
  // in all warps. The comparison between lanes rounds entries to 15 bits of mantissa; the place
  // takes the other bits.
  __device__ __forceinline__ int next_pivot(unsigned swept, T& value) {
    constexpr unsigned kPlaceMask = 0xff, kLeast = 0x100;
    static_assert(kSize <= 256);
    T best = -INFINITY;
    int best_place = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const T entry = diagonal(i);
      if ((swept >> i & 1u) == 0 && entry > best) {
        best = entry;
        best_place = 32 * i;
      }
    }
    const unsigned bits = __float_as_uint(fmaxf(static_cast<float>(best), 0.0f));
    const unsigned place = static_cast<unsigned>(best_place) + threadIdx.x % 32;
    const bool any = best > -INFINITY;
    const unsigned key = any ? (max(bits, kLeast) & ~kPlaceMask) | place : 0;
    const int k = static_cast<int>(warp_max(key) & kPlaceMask);
    value = __shfl_sync(kFullMask, best, k % 32);
    return k;
  }

  // column <- c', from the tiles that hold a part of row or column k. volatile: entries are stored
  // one by one, as four at a time would need registers side by side.
  __device__ __forceinline__ void broadcast_column(volatile T* column, int k, T pivot) const {
    if (!has_tile) return;
    const int tile = k / kTile, at = k % kTile;
    if (tile_col == tile) {
#pragma unroll
      for (int q = 0; q < kTile; ++q) {
        if (q != at) continue;
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          column[tile_row * kTile + i] = tile_row == tile && i == q ? pivot - 1 : a.v[i][q];
        }
      }
    } else if (tile_row == tile) {
#pragma unroll
      for (int q = 0; q < kTile; ++q) {
        if (q != at) continue;
#pragma unroll
        for (int j = 0; j < kTile; ++j) column[tile_col * kTile + j] = a.v[q][j];
      }
    }
  }
};

}  // namespace vne
