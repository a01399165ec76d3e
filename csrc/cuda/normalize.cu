// Rows to the unit sphere, and the Gram matrix or covariance of the smaller side: equations (1),
// (2).
//
// A = X X^T (n <= d) or X^T X is a symmetric product, so only tiles of its lower triangle are
// computed, one block each, and written twice. For one sample of 128 x 512 a 16 x 16 tile gives 36
// blocks: the K dimension of a tile is shared out among 16 groups of 16 threads inside the block,
// so that no second launch has to add partial sums. Many samples, or a large m, fill the chip with
// 64 x 64 tiles (in float32), which read each element of z four times less often. Where K is long
// and tiles are few, K is shared out among blocks too, and a second kernel adds their parts in a
// fixed order.
//
// A thread accumulates a 4 x 4 piece of the tile in float32 FMA; the sum of one chunk of K is kept
// apart and then added to the total, so that the rounding error of a long K grows with the number
// of chunks. TF32 plays no part.
//
// A tile of the Gram matrix sees the whole of its rows pass by, so it sums their squares as well
// and divides by the norms at the end: normalising costs no pass of its own. Only where a sum of
// squares has left the range of T is the tile done again with rows scaled beforehand. Meanwhile
// further blocks of the same launch measure all rows for the gradient, and the cosines to a second
// view. The covariance, weights and normalize=False need the norms before the product: then
// measuring is a launch of its own. A row of weight 0 is absent, a NaN in it too: it is measured as
// a zero row, and its scale is 0.

#include <algorithm>
#include <cmath>

#include "cuda/stages.h"

namespace vne {
namespace {

// ---- rows -----------------------------------------------------------------------------------

template <typename T, typename In>
struct MeasureArgs {
  const In* z1;
  const In* z2;      // or null
  const T* weights;  // [batch, n] or null: 1/n
  int64_t batch, n, d;
  double eps, root_weight;  // sqrt(1/n)
  bool normalize, vector;
  Row* rows;
  Scale<T>* scales;
  double* cosines;
  T* row_stats;  // or null
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

// One row of z1, and of z2, by a warp. `index` counts rows over the whole batch.
template <typename T, typename In>
__device__ void measure_row(const MeasureArgs<T, In>& args, int64_t index) {
  const int lane = threadIdx.x % 32;
  const int64_t d = args.d;
  const In* z1 = args.z1 + index * d;
  const double root_weight =
      args.weights ? sqrt(static_cast<double>(args.weights[index])) : args.root_weight;
  const double length1 = root_weight == 0 ? 0.0 : row_norm<T>(z1, d, args.vector);
  const Norm norm1 = make_norm<T>(length1, args.normalize, args.eps);
  if (lane == 0) {
    const double u_norm = norm1.length * norm1.inverse;
    args.rows[index] = {norm1.inverse, root_weight, norm1.projected ? 1.0 : u_norm * u_norm,
                        norm1.projected};
    args.scales[index] = make_scale<T>(norm1.inverse, kStretch<T> * root_weight);
  }
  if (!args.z2) return;

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

// The rows of block `block` of those that measure.
template <typename T, typename In>
__device__ void measure_block(const MeasureArgs<T, In>& args, int64_t block) {
  const int64_t index = block * kWarps + threadIdx.x / 32;
  if (index < args.batch * args.n) measure_row(args, index);
}

template <typename T, typename In>
__global__ void __launch_bounds__(kThreads) measure_rows(MeasureArgs<T, In> args) {
  measure_block(args, blockIdx.x);
}

// tau of each sample, and scales that make the trace one: what normalize=False and weights need,
// for only then may A leave the range of T.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    divide_by_trace(const Row* rows, int64_t n, Scale<T>* scales, double* trace) {
  using Scratch = double[32];
  VNE_SHARED(Scratch, scratch);
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
  int64_t n, d;
  int m, tiles;            // rows of A; tiles of a sample
  int splits;              // parts that K is cut into, a multiple of the chunk each
  int64_t split_size;      // length of a part
  const Scale<T>* scales;  // [batch, n] or null: normalise by the tile's own sums of squares
  double eps;
  bool vector;
  T* a;  // [batch, ld, ld], or with splits > 1 their parts [splits, batch, ld, ld]
};

// Sizes of a block's work: kTile x kTile outputs, kChunk of K at a time, kGroups groups of threads
// that share the chunk out.
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

// 4 x 4 outputs of a thread: rows first_row + span a, columns first_col + span b.
template <typename T, Side kSide, int kTile>
__device__ __forceinline__ void multiply_chunk(const T* data, int group, int row, int col,
                                               T (&part)[4][4]) {
  using Shape = GramShape<kTile>;
  constexpr int kSpan = Shape::kSpan;
  if constexpr (kSide == Side::kRows) {  // staged [side][row][k]
    const T* x = data + row * Shape::kStride + group * Shape::kDepth;
    const T* y = data + (kTile + col) * Shape::kStride + group * Shape::kDepth;
#pragma unroll 1
    for (int k = 0; k < Shape::kDepth; k += 4) {
      Quad<T> b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        b[j] = *reinterpret_cast<const Quad<T>*>(y + j * kSpan * Shape::kStride + k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Quad<T> a = *reinterpret_cast<const Quad<T>*>(x + i * kSpan * Shape::kStride + k);
#pragma unroll
        for (int l = 0; l < 4; ++l)
#pragma unroll
          for (int j = 0; j < 4; ++j) part[i][j] += a.v[l] * b[j].v[l];
      }
    }
  } else {  // staged [side][k][column]; here a thread's four columns lie side by side
    const T* x = data + group * Shape::kDepth * kTile;
    const T* y = x + Shape::kElements;
#pragma unroll 8
    for (int k = 0; k < Shape::kDepth; ++k) {
      const Quad<T> a = *reinterpret_cast<const Quad<T>*>(x + k * kTile + 4 * row);
      const Quad<T> b = *reinterpret_cast<const Quad<T>*>(y + k * kTile + 4 * col);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) part[i][j] += a.v[i] * b.v[j];
    }
  }
}

template <typename T, typename In, Side kSide, int kTile>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    gram(GramArgs<T> args, MeasureArgs<T, In> measure) {
  using Shape = GramShape<kTile>;
  using Shared = GramShared<T, kTile>;
  constexpr bool kRowSide = kSide == Side::kRows;
  VNE_SHARED(Shared, s);
  const int64_t tile_blocks = static_cast<int64_t>(args.tiles) * args.splits * measure.batch;
  if constexpr (kRowSide) {
    if (blockIdx.x >= tile_blocks) return measure_block(measure, blockIdx.x - tile_blocks);
  }

  const int tile = static_cast<int>(blockIdx.x % args.tiles);
  const int64_t rest = blockIdx.x / args.tiles, sample = rest % measure.batch;
  const int split = static_cast<int>(rest / measure.batch);
  const int tile_row = triangle_row(tile), tile_col = tile - tile_row * (tile_row + 1) / 2;
  const auto start = [&](int side) { return (side == 0 ? tile_row : tile_col) * kTile; };
  const int64_t k_total = kRowSide ? args.d : args.n;
  const int64_t k_begin = split * args.split_size;
  const int64_t k_end = min(k_total, k_begin + args.split_size);
  const In* z = measure.z1 + sample * args.n * args.d;
  const Scale<T>* scales = args.scales ? args.scales + sample * args.n : nullptr;

  const int group = threadIdx.x / (Shape::kSpan * Shape::kSpan);
  const int row = threadIdx.x / Shape::kSpan % Shape::kSpan, col = threadIdx.x % Shape::kSpan;
  // What this thread stages: four Quads of a chunk, two of each operand, at fixed rows (kRows) or
  // columns of A.
  constexpr int kQuads = (kRowSide ? Shape::kChunk : kTile) / 4;  // Quads side by side in memory
  const int quad = threadIdx.x % kQuads, line = threadIdx.x / kQuads;
  constexpr int kLines = kThreads / kQuads;

  if (kRowSide && scales) {
    for (int i = threadIdx.x; i < 2 * kTile; i += kThreads) {
      const int index = start(i / kTile) + i % kTile;
      s.scale[i / kTile][i % kTile] = index < args.m ? scales[index] : Scale<T>{T(1), T(0)};
    }
    __syncthreads();
  }
  bool scaled = scales != nullptr;
  T sum[4][4];
  while (true) {
    T square[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = 0;

    for (int64_t k = k_begin; k < k_end; k += Shape::kChunk) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int side = q / 2, at = line + q % 2 * kLines;
        T x[4];
        if constexpr (kRowSide) {
          const int index = start(side) + at;
          const int64_t k_at = k + 4 * quad;
          load_quad(z + index * args.d + k_at, index < args.m ? k_end - k_at : 0, args.vector, x);
          if (scaled) {
            const Scale<T> scale = s.scale[side][at];
#pragma unroll
            for (int l = 0; l < 4; ++l) x[l] = scale(x[l]);
          } else {
            square[q] += x[0] * x[0] + x[1] * x[1] + (x[2] * x[2] + x[3] * x[3]);
          }
          T* to = s.data + (side * kTile + at) * Shape::kStride + 4 * quad;
          *reinterpret_cast<Quad<T>*>(to) = {x[0], x[1], x[2], x[3]};
        } else {
          const int index = start(side) + 4 * quad;
          const int64_t k_at = k + at;
          load_quad(z + k_at * args.d + index, k_at < k_end ? args.m - index : 0, args.vector, x);
          const Scale<T> scale = k_at < k_end ? scales[k_at] : Scale<T>{T(1), T(0)};
          T* to = s.data + side * Shape::kElements + at * kTile + 4 * quad;
          *reinterpret_cast<Quad<T>*>(to) = {scale(x[0]), scale(x[1]), scale(x[2]), scale(x[3])};
        }
      }
      __syncthreads();
      T part[4][4] = {};
      multiply_chunk<T, kSide, kTile>(s.data, group, row, col, part);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += part[i][j];
      __syncthreads();
    }
    if (!kRowSide || scaled) break;

    // The lanes that staged a row hold its sum of squares; kQuads is a power of two.
    bool unsafe = false;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int offset = kQuads / 2; offset > 0; offset /= 2)
        square[q] += __shfl_xor_sync(kFullMask, square[q], offset);
      const int side = q / 2, at = line + q % 2 * kLines;
      unsafe = unsafe || (start(side) + at < args.m && !is_safe_square(square[q]));
      if (quad == 0) {
        s.inverse[side][at] =
            static_cast<T>(kStretch<T>) / max(sqrt(square[q]), static_cast<T>(args.eps));
      }
    }
    if (!__syncthreads_or(unsafe)) break;
    for (int i = threadIdx.x / 32; i < 2 * kTile; i += kWarps) {
      const int index = start(i / kTile) + i % kTile;
      double length = 0;
      if (index < args.m) length = row_norm<T>(z + index * args.d, args.d, args.vector);
      const Norm norm = make_norm<T>(length, true, args.eps);
      if (threadIdx.x % 32 == 0)
        s.scale[i / kTile][i % kTile] =
            make_scale<T>(norm.inverse, kStretch<T> * measure.root_weight);
    }
    __syncthreads();
    scaled = true;
  }

  // The groups' parts of the tile, added in order.
  constexpr int kPitch = kTile + 1;
  const T inverse_n = static_cast<T>(measure.root_weight * measure.root_weight);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = kRowSide ? row + i * Shape::kSpan : 4 * row + i;
      const int c = kRowSide ? col + j * Shape::kSpan : 4 * col + j;
      s.data[(group * kTile + r) * kPitch + c] = sum[i][j];
    }
  __syncthreads();
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
  const int64_t k_total = kSide == Side::kRows ? args.d : args.n;
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
      args.tiles * args.splits * batch + (args.scales ? 0 : grid_for(batch * args.n, kWarps));
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
  return {z1,
          z2,
          weights,
          problem.batch,
          problem.n,
          problem.d,
          problem.eps,
          std::sqrt(1 / static_cast<double>(problem.n)),
          problem.normalize,
          is_vector(z1, problem.d) && (!z2 || is_vector(z2, problem.d)),
          result.rows.data,
          result.scales.data,
          second.cosines,
          second.row_stats};
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
  GramArgs<T> args{};
  args.n = problem.n;
  args.d = problem.d;
  args.m = static_cast<int>(problem.m());
  args.scales = fused ? nullptr : result.scales.data;
  args.eps = problem.eps;
  args.vector = measure.vector;
  args.a = result.a.data;
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

// Runs f(In{}) with the type of the elements of z, which are computed in T.
template <typename T, typename F>
void dispatch_input_of(const Input& z, F f) {
  dispatch_input(z.dtype, [&](auto element) {
    if constexpr (std::is_same_v<decltype(element), double> == std::is_same_v<T, double>)
      f(element);
  });
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
  dispatch_input_of<T>(z, [&](auto element) {
    normalize_as<T, decltype(element)>(call, z, weights, second, result);
  });
  return result;
}

template <typename T>
Normalized<T> normalize_rows(const Call& call, const Input& z, const T* weights,
                             const SecondView<T>& second) {
  Normalized<T> result = make_rows<T>(call);
  if (call.problem.batch == 0) return result;
  dispatch_input_of<T>(z, [&](auto element) {
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
