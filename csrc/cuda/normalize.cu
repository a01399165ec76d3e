// Rows on the unit sphere, and the Gram matrix or covariance of the smaller side: equations (1),
// (2).
//
// A = X X^T (n <= d) or X^T X is symmetric. A block computes one tile of its lower triangle and
// writes it twice.
//
//   16 x 16   One sample of 128 x 512 has 36 such tiles. 16 groups of 16 threads share the K
//             dimension of a tile inside the block, so that no second launch has to add partial
//             sums.
//   64 x 64   (float32) Many samples, or a large m, fill the chip. Each element of z is read four
//             times less often.
//   splits    Where K is long and tiles are few, blocks share K too, and a second kernel adds their
//             parts in a fixed order.
//
// A thread accumulates 4 x 4 entries of the tile in float32 FMA, never in TF32. It sums each chunk
// of K separately, so that the rounding error of a long K grows with the number of chunks.
//
// A tile of the Gram matrix reads its rows completely. It sums their squares as well and divides by
// the norms at the end, so that normalization costs no pass over z. If a sum of squares has left
// the range of T, the block computes its tile again from scaled rows. Further blocks of the same
// launch measure all rows for the gradient, and the cosines to a second view. The covariance,
// weights and normalize=False need the norms before the product: then measuring is a launch of its
// own.
//
// A row of weight 0 is absent, even if it has a NaN: it is measured as a zero row of scale 0.

#include <algorithm>
#include <cmath>

#include "cuda/stages.h"
#include "cuda/tile.h"

namespace vne {
namespace {

// ---- rows -----------------------------------------------------------------------------------

template <typename T, typename In>
struct MeasureArgs {
  const In* z1;      // [batch, n, d]
  const In* z2;      // [batch, n, d] or null
  const T* weights;  // [batch, n] or null: 1/n
  int64_t batch, n, d;
  double eps, root_weight;  // sqrt(1/n)
  bool normalize, vector;
  Row* rows;         // [batch, n]
  Scale<T>* scales;  // [batch, n]
  double* cosines;   // [batch, n]; with z2
  T* row_stats;      // [batch, 4, n] or null
};

struct Norm {
  double length, inverse;
  bool projected;
};

// 1 / x, to the accuracy of T where T can hold both.
template <typename T>
__device__ __forceinline__ double invert(double x) {
  if (sizeof(T) == 4 && x > 1e-30 && x < 1e30) return T(1) / static_cast<T>(x);
  return 1 / x;
}

template <typename T>
__device__ __forceinline__ Norm make_norm(double length, bool normalize, double eps) {
  Norm norm{length, 0, normalize && length > eps};
  if (length != 0) norm.inverse = normalize ? invert<T>(max(length, eps)) : 1.0;
  if (!isfinite(length)) norm.inverse = NAN;
  return norm;
}

// The cosine between row `index` of z1, whose norm is `norm1`, and of z2, by a warp.
template <typename T, typename In>
__device__ __forceinline__ void measure_cosine(const MeasureArgs<T, In>& args, int64_t index,
                                               const In* z1, Norm norm1) {
  const int lane = threadIdx.x % 32;
  const int64_t d = args.d;
  const In* z2 = args.z2 + index * d;
  const Norm norm2 = make_norm<T>(row_norm<T>(z2, d, args.vector), true, args.eps);
  const Scale<T> scale1 = make_scale<T>(norm1.inverse), scale2 = make_scale<T>(norm2.inverse);
  T sum = 0;
#pragma unroll 2
  for (int64_t j = 4 * lane; j < d; j += 128) {
    T quad1[4], quad2[4];
    load_quad(z1 + j, d - j, args.vector, quad1);
    load_quad(z2 + j, d - j, args.vector, quad2);
#pragma unroll
    for (int q = 0; q < 4; ++q) sum += scale1(quad1[q]) * scale2(quad2[q]);
  }
  const T cosine = warp_sum(sum);
  if (lane != 0) return;
  args.cosines[index] = cosine;
  if (!args.row_stats) return;
  const int64_t n = args.n, sample = index / n;
  T* stats = args.row_stats + sample * kRowStats * n + index % n;
  stats[kInverseNorm1 * n] = static_cast<T>(norm1.inverse);
  stats[kInverseNorm2 * n] = static_cast<T>(norm2.inverse);
  stats[kProjection1 * n] = norm1.projected ? cosine : T(0);
  stats[kProjection2 * n] = norm2.projected ? cosine : T(0);
}

// Row `index` of z1 by a warp, and its cosine to that of z2. `index` counts over the whole batch.
template <typename T, typename In>
__device__ void measure_row(const MeasureArgs<T, In>& args, int64_t index) {
  const int lane = threadIdx.x % 32;
  const int64_t d = args.d;
  const In* z1 = args.z1 + index * d;
  const double root_weight =
      args.weights ? sqrt(static_cast<double>(args.weights[index])) : args.root_weight;
  const double length = root_weight == 0 ? 0.0 : row_norm<T>(z1, d, args.vector);
  const Norm norm = make_norm<T>(length, args.normalize, args.eps);
  if (lane == 0) {
    const double u_norm = norm.length * norm.inverse;
    args.rows[index] = {.inverse_norm = norm.inverse,
                        .root_weight = root_weight,
                        .square_norm = norm.projected ? 1.0 : u_norm * u_norm,
                        .projected = norm.projected};
    args.scales[index] = make_scale<T>(norm.inverse, kStretch<T> * root_weight);
  }
  if (args.z2) measure_cosine(args, index, z1, norm);
}

// The rows of measuring block `block`, a warp each.
template <typename T, typename In>
__device__ void measure_block(const MeasureArgs<T, In>& args, int64_t block) {
  const int64_t index = block * kWarps + threadIdx.x / 32;
  if (index < args.batch * args.n) measure_row(args, index);
}

template <typename T, typename In>
__global__ void __launch_bounds__(kThreads) measure_rows(MeasureArgs<T, In> args) {
  measure_block(args, blockIdx.x);
}

// trace [batch] <- tau of each sample, scales [batch, n] <- those that make the trace one. Weights
// and normalize=False need them: A could leave the range of T.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    divide_by_trace(const Row* rows, int64_t n, Scale<T>* scales, double* trace) {
  VNE_SHARED_ARRAY(double, scratch, 32);
  const int64_t first = blockIdx.x * n;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const Row& row = rows[first + i];
    sum += row.root_weight * row.root_weight * row.square_norm;
  }
  const double tau = block_sum(sum, scratch);
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const Row& row = rows[first + i];
    const double share = tau == 0 ? 0.0 : isfinite(tau) ? row.root_weight / sqrt(tau) : NAN;
    scales[first + i] = make_scale<T>(row.inverse_norm, share);
  }
  if (threadIdx.x == 0) trace[blockIdx.x] = tau;
}

// ---- the product ----------------------------------------------------------------------------

enum class Side { kRows, kColumns };  // A = X X^T or X^T X

template <typename T>
struct GramArgs {
  int m, tiles;            // rows of A; tiles of a sample
  int splits;              // parts of K
  int64_t split_size;      // length of a part, a multiple of the chunk
  const Scale<T>* scales;  // [batch, n], or null: the tile divides by its own norms
  T* a;  // [batch, ld, ld], or with splits > 1 their parts [splits, batch, ld, ld]
};

// A block computes kTile x kTile entries, from kChunk of K at a time. kGroups groups of threads
// share a chunk.
template <int kTile>
struct GramShape {
  static constexpr int kElements = 2048;  // of one operand in a chunk
  static constexpr int kChunk = kElements / kTile;
  static constexpr int kSpan = kTile / 4;  // threads along a side of the tile
  static constexpr int kGroups = kThreads / (kSpan * kSpan);
  static constexpr int kDepth = kChunk / kGroups;  // K of one group in a chunk
  static constexpr int kStride = kChunk + 4;       // of staged rows: spreads them over the banks
};

template <typename T, int kTile>
struct GramShared {
  using Shape = GramShape<kTile>;
  static constexpr int kStaged = 2 * kTile * Shape::kStride;
  static constexpr int kSums = Shape::kGroups * kTile * (kTile + 1);
  alignas(16) T data[kStaged > kSums ? kStaged : kSums];  // chunks, and at the end partial tiles
  Scale<T> scale[2][kTile];                               // of the tile's rows and columns
  T inverse[2][kTile];                                    // norm
};

// The work of a block, in phases.
template <typename T, typename In, Side kSide, int kTile>
struct GramBlock {
  using Shape = GramShape<kTile>;
  using Shared = GramShared<T, kTile>;
  static constexpr bool kRowSide = kSide == Side::kRows;
  // A thread stages four Quads of a chunk, two of each operand, always for the same rows (kRows)
  // or columns (kColumns) of A.
  static constexpr int kQuads = (kRowSide ? Shape::kChunk : kTile) / 4;  // side by side in memory
  static constexpr int kLines = kThreads / kQuads;
  static constexpr int kPitch = kTile + 1;  // of a row of a partial tile

  __device__ __forceinline__ GramBlock(const GramArgs<T>& args, const MeasureArgs<T, In>& measure,
                                       Shared& shared)
      : args(args), measure(measure), s(shared) {
    const int tile = static_cast<int>(blockIdx.x % args.tiles);
    const int64_t rest = blockIdx.x / args.tiles;
    sample = rest % measure.batch;
    split = static_cast<int>(rest / measure.batch);
    tile_row = triangle_row(tile);
    tile_col = tile - tile_row * (tile_row + 1) / 2;
    z = measure.z1 + sample * measure.n * measure.d;
    scales = args.scales ? args.scales + sample * measure.n : nullptr;
    group = threadIdx.x / (Shape::kSpan * Shape::kSpan);
    row = threadIdx.x / Shape::kSpan % Shape::kSpan;
    col = threadIdx.x % Shape::kSpan;
    quad = threadIdx.x % kQuads;
    line = threadIdx.x / kQuads;
  }

  // The first row of A that operand `side` of the product has.
  __device__ __forceinline__ int start(int side) const {
    return (side == 0 ? tile_row : tile_col) * kTile;
  }

  __device__ __forceinline__ void load_scales() {
    for (int i = threadIdx.x; i < 2 * kTile; i += kThreads) {
      const int index = start(i / kTile) + i % kTile;
      s.scale[i / kTile][i % kTile] = index < args.m ? scales[index] : Scale<T>{T(1), T(0)};
    }
    __syncthreads();
  }

  // Loads the chunk at `k` into shared memory: [side][row][k], or [side][k][column]. `vector` is a
  // constant where this is called: one branch for the chunk leaves its four loads in flight at
  // once.
  __device__ __forceinline__ void stage_chunk(int64_t k, int64_t k_end, bool scaled, bool vector) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int side = q / 2, at = line + q % 2 * kLines;
      Quad<T> x;
      if constexpr (kRowSide) {
        const int index = start(side) + at;
        const int64_t k_at = k + 4 * quad;
        load_quad(z + index * measure.d + k_at, index < args.m ? k_end - k_at : 0, vector, x.v);
        if (scaled) {
          x = s.scale[side][at](x);
        } else {
          square[q] += sum_of_squares(x.v);
        }
        write_quad(s.data + (side * kTile + at) * Shape::kStride + 4 * quad, x);
      } else {
        const int index = start(side) + 4 * quad;
        const int64_t k_at = k + at;
        load_quad(z + k_at * measure.d + index, k_at < k_end ? args.m - index : 0, vector, x.v);
        const Scale<T> scale = k_at < k_end ? scales[k_at] : Scale<T>{T(1), T(0)};
        write_quad(s.data + side * Shape::kElements + at * kTile + 4 * quad, scale(x));
      }
    }
    __syncthreads();
  }

  // The product of the staged chunk, of the thread's group: 4 x 4 entries.
  __device__ __forceinline__ Tile<T, 4> multiply_chunk() const {
    Tile<T, 4> part{};
    if constexpr (kRowSide) {  // rows row + kSpan i, columns col + kSpan j
      constexpr int kStep = Shape::kSpan * Shape::kStride;
      const T* x = s.data + row * Shape::kStride + group * Shape::kDepth;
      const T* y = s.data + (kTile + col) * Shape::kStride + group * Shape::kDepth;
#pragma unroll 1
      for (int k = 0; k < Shape::kDepth; k += 4) {
        Quad<T> b[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) b[j] = read_quad(y + j * kStep + k);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Quad<T> a = read_quad(x + i * kStep + k);
#pragma unroll
          for (int l = 0; l < 4; ++l)
#pragma unroll
            for (int j = 0; j < 4; ++j) part.v[i][j] += a.v[l] * b[j].v[l];
        }
      }
    } else {  // rows 4 row + i, columns 4 col + j
      const T* x = s.data + group * Shape::kDepth * kTile;
      const T* y = x + Shape::kElements;
#pragma unroll 8
      for (int k = 0; k < Shape::kDepth; ++k)
        part.add_product(read_quad(x + k * kTile + 4 * row), read_quad(y + k * kTile + 4 * col));
    }
    return part;
  }

  // sum <- the product over the block's part of K; square <- the sums of squares of staged rows.
  __device__ __forceinline__ void multiply(bool scaled) {
    const int64_t k_begin = split * args.split_size;
    const int64_t k_end = min(kRowSide ? measure.d : measure.n, k_begin + args.split_size);
    sum.set_zero();
#pragma unroll
    for (int q = 0; q < 4; ++q) square[q] = 0;
    for (int64_t k = k_begin; k < k_end; k += Shape::kChunk) {
      if (measure.vector) {
        stage_chunk(k, k_end, scaled, true);
      } else {
        stage_chunk(k, k_end, scaled, false);
      }
      sum.add(multiply_chunk());
      __syncthreads();
    }
  }

  // Stores the inverse norms of the tile's rows. Returns whether a sum of squares has left the
  // range of T, which is the same for all threads.
  __device__ __forceinline__ bool norms_are_unsafe() {
    bool unsafe = false;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int offset = kQuads / 2; offset > 0; offset /= 2)  // the lanes that staged the row
        square[q] += __shfl_xor_sync(kFullMask, square[q], offset);
      const int side = q / 2, at = line + q % 2 * kLines;
      unsafe = unsafe || (start(side) + at < args.m && !is_safe_square(square[q]));
      if (quad == 0) {
        s.inverse[side][at] =
            static_cast<T>(kStretch<T>) / max(sqrt(square[q]), static_cast<T>(measure.eps));
      }
    }
    return __syncthreads_or(unsafe);
  }

  // Computes the scales of the tile's rows without overflow.
  __device__ __forceinline__ void measure_scales() {
    for (int i = threadIdx.x / 32; i < 2 * kTile; i += kWarps) {
      const int index = start(i / kTile) + i % kTile;
      double length = 0;
      if (index < args.m) length = row_norm<T>(z + index * measure.d, measure.d, measure.vector);
      const Norm norm = make_norm<T>(length, true, measure.eps);
      if (threadIdx.x % 32 == 0)
        s.scale[i / kTile][i % kTile] =
            make_scale<T>(norm.inverse, kStretch<T> * measure.root_weight);
    }
    __syncthreads();
  }

  // Adds the groups' parts of the tile in order, and divides by the norms unless rows were scaled.
  __device__ __forceinline__ void reduce_groups(bool scaled) {
    sum.for_each([&](int i, int j, T entry) {
      const int r = kRowSide ? row + i * Shape::kSpan : 4 * row + i;
      const int c = kRowSide ? col + j * Shape::kSpan : 4 * col + j;
      s.data[(group * kTile + r) * kPitch + c] = entry;
    });
    __syncthreads();
    const T inverse_n = static_cast<T>(measure.root_weight * measure.root_weight);
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      const int r = i / kTile, c = i % kTile;
      T total = 0;
#pragma unroll
      for (int g = 0; g < Shape::kGroups; ++g) total += s.data[(g * kTile + r) * kPitch + c];
      if (!scaled && start(0) + r < args.m && start(1) + c < args.m)
        total = total * s.inverse[0][r] * s.inverse[1][c] * inverse_n;
      s.data[r * kPitch + c] = total;  // group 0's own place: no other thread reads it
    }
    __syncthreads();
  }

  // Stores the tile and, above the diagonal, its transpose.
  __device__ __forceinline__ void store_symmetric() const {
    const int64_t ld = leading(args.m);
    T* a = args.a + (split * measure.batch + sample) * ld * ld;
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      const int r = i / kTile, c = i % kTile;
      if (start(0) + r < ld && start(1) + c < ld && (tile_row != tile_col || c <= r))
        a[(start(0) + r) * ld + start(1) + c] = s.data[r * kPitch + c];
      // The same entries above the diagonal, their columns now side by side.
      if (start(0) + c < ld && start(1) + r < ld && (tile_row != tile_col || r < c))
        a[(start(1) + r) * ld + start(0) + c] = s.data[c * kPitch + r];
    }
  }

 private:
  const GramArgs<T> args;
  const MeasureArgs<T, In> measure;
  Shared& s;
  const In* z;             // of the sample
  const Scale<T>* scales;  // of the sample, or null
  int64_t sample;
  int split, tile_row, tile_col;
  int group, row, col;  // of the thread's entries
  int quad, line;       // of what the thread stages
  Tile<T, 4> sum;
  T square[4];
};

template <typename T, typename In, Side kSide, int kTile>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    gram(GramArgs<T> args, MeasureArgs<T, In> measure) {
  using Block = GramBlock<T, In, kSide, kTile>;
  using Shared = GramShared<T, kTile>;
  VNE_SHARED(Shared, s);
  if constexpr (Block::kRowSide) {
    const int64_t tile_blocks = static_cast<int64_t>(args.tiles) * args.splits * measure.batch;
    if (blockIdx.x >= tile_blocks) return measure_block(measure, blockIdx.x - tile_blocks);
  }
  Block block(args, measure, s);
  bool scaled = args.scales;
  if (Block::kRowSide && scaled) block.load_scales();
  while (true) {  // at most twice
    block.multiply(scaled);
    if (!Block::kRowSide || scaled || !block.norms_are_unsafe()) break;
    block.measure_scales();
    scaled = true;
  }
  block.reduce_groups(scaled);
  block.store_symmetric();
}

// a [size] <- sum over the parts [splits, size].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_splits(const T* parts, int splits, int64_t size, T* a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  T sum = 0;
  for (int split = 0; split < splits; ++split) sum += parts[split * size + i];
  a[i] = sum;
}

// ---- launchers ------------------------------------------------------------------------------

template <typename T, typename In, Side kSide, int kTile>
void launch_gram(const Call& call, GramArgs<T> args, const MeasureArgs<T, In>& measure) {
  constexpr int64_t kChunk = GramShape<kTile>::kChunk;
  const int64_t side = ceil_div(args.m, kTile), batch = measure.batch;
  const int64_t k_total = kSide == Side::kRows ? measure.d : measure.n;
  args.tiles = static_cast<int>(side * (side + 1) / 2);
  args.splits = 1;
  args.split_size = k_total;
  if (args.scales) {  // with its own norms a tile needs the whole of K
    constexpr int64_t kLeast = 1024;
    const int64_t wanted = ceil_div(int64_t{2} * call.context.multiprocessors, args.tiles * batch);
    const int64_t splits = std::clamp<int64_t>(k_total / kLeast, 1, wanted);
    args.split_size = ceil_div(ceil_div(k_total, splits), kChunk) * kChunk;
    args.splits = static_cast<int>(ceil_div(k_total, args.split_size));
  }
  T* a = args.a;
  const int64_t ld = leading(args.m), size = batch * ld * ld;
  Workspace<T> parts;
  if (args.splits > 1) {
    parts = call.workspace<T>(args.splits * size);
    args.a = parts.data;
  }
  const int64_t blocks =
      args.tiles * args.splits * batch + (args.scales ? 0 : grid_for(batch * measure.n, kWarps));
  call.launch("gram", gram<T, In, kSide, kTile>, blocks, kThreads, args, measure);
  if (args.splits > 1) {
    call.launch("add_splits", add_splits<T>, grid_for(size), kThreads, parts.data, args.splits,
                size, a);
  }
}

template <typename T, typename In>
MeasureArgs<T, In> measure_args(const Call& call, const Input& z, const T* weights,
                                const SecondView<T>& second, const Normalized<T>& result) {
  const Problem& problem = call.problem;
  const In* z1 = static_cast<const In*>(z.data);
  const In* z2 = second.z ? static_cast<const In*>(second.z->data) : nullptr;
  return {.z1 = z1,
          .z2 = z2,
          .weights = weights,
          .batch = problem.batch,
          .n = problem.n,
          .d = problem.d,
          .eps = problem.eps,
          .root_weight = std::sqrt(1 / static_cast<double>(problem.n)),
          .normalize = problem.normalize,
          .vector = is_vector(z1, problem.d) && (!z2 || is_vector(z2, problem.d)),
          .rows = result.rows.data,
          .scales = result.scales.data,
          .cosines = second.cosines,
          .row_stats = second.row_stats};
}

template <typename T, typename In>
void launch_measure(const Call& call, const MeasureArgs<T, In>& measure) {
  call.launch("measure_rows", measure_rows<T, In>, grid_for(measure.batch * measure.n, kWarps),
              kThreads, measure);
}

template <typename T>
void launch_divide(const Call& call, Normalized<T>& result) {
  result.trace = call.workspace<double>(call.problem.batch);
  call.launch("divide_by_trace", divide_by_trace<T>, call.problem.batch, kThreads, result.rows.data,
              call.problem.n, result.scales.data, result.trace.data);
}

template <typename T, typename In>
void normalize_as(const Call& call, const Input& z, const T* weights, const SecondView<T>& second,
                  Normalized<T>& result) {
  const Problem& problem = call.problem;
  const MeasureArgs<T, In> measure = measure_args<T, In>(call, z, weights, second, result);
  const bool divide = weights || !problem.normalize;
  constexpr int64_t kLongRow = 4096;  // from here on K is better shared out among blocks
  const bool fused = problem.gram_side() && !divide && problem.d < kLongRow;
  if (!fused) launch_measure(call, measure);
  if (divide) launch_divide(call, result);
  const GramArgs<T> args{.m = static_cast<int>(problem.m()),
                         .scales = fused ? nullptr : result.scales.data,
                         .a = result.a.data};
  const int64_t side = ceil_div(problem.m(), int64_t{64});
  const bool large = side * (side + 1) / 2 * problem.batch >= 2 * call.context.multiprocessors;
  const auto run = [&](auto tile) {
    constexpr int kTile = decltype(tile)::value;
    if (problem.gram_side()) {
      launch_gram<T, In, Side::kRows, kTile>(call, args, measure);
    } else {
      launch_gram<T, In, Side::kColumns, kTile>(call, args, measure);
    }
  };
  if constexpr (std::is_same_v<T, float>) {  // float64 is slow by itself on most GPUs
    if (large) return run(std::integral_constant<int, 64>{});
  }
  run(std::integral_constant<int, 16>{});
}

template <typename T>
Normalized<T> make_rows(const Call& call) {
  Normalized<T> result;
  result.rows = call.workspace<Row>(call.problem.batch * call.problem.n);
  result.scales = call.workspace<Scale<T>>(call.problem.batch * call.problem.n);
  return result;
}

}  // namespace

template <typename T>
Normalized<T> normalize(const Call& call, const Input& z, const T* weights,
                        const SecondView<T>& second) {
  check_side(call.problem);
  const int64_t ld = leading(call.problem.m());
  Normalized<T> result = make_rows<T>(call);
  result.a = call.workspace<T>(call.problem.batch * ld * ld);
  if (call.problem.batch == 0) return result;
  dispatch_elements<T>(z.dtype, [&](auto element) {
    normalize_as<T, decltype(element)>(call, z, weights, second, result);
  });
  return result;
}

template <typename T>
Normalized<T> normalize_rows(const Call& call, const Input& z, const T* weights,
                             const SecondView<T>& second) {
  Normalized<T> result = make_rows<T>(call);
  if (call.problem.batch == 0) return result;
  dispatch_elements<T>(z.dtype, [&](auto element) {
    launch_measure(call, measure_args<T, decltype(element)>(call, z, weights, second, result));
  });
  launch_divide(call, result);
  return result;
}

#define VNE_INSTANTIATE(T)                                                                     \
  template Normalized<T> normalize(const Call&, const Input&, const T*, const SecondView<T>&); \
  template Normalized<T> normalize_rows(const Call&, const Input&, const T*, const SecondView<T>&);
VNE_INSTANTIATE(float)
VNE_INSTANTIATE(double)
#undef VNE_INSTANTIATE

}  // namespace vne
