// From a function W of A^ to S and to the gradient in z: equations (3), (4), (5), (11).
//
// With h = W X^, row i of z receives
//
//   sqrt(p_i tau) |z_i|^-1 factor (h_i - (h_i . x_i) x_i / |x_i|^2),   x_i = row i of X^.
//
// The projection removes every multiple of the identity from W, so that a centered W may be used. A
// row that was not divided by its own norm is not projected and gets `identity` back.
//
// Where A^ is the Gram matrix and small, one launch does it all. A block computes four rows of the
// gradient, a thread two columns of them. The block sums its rows of W from the poles' terms. Each
// element of z is read by one thread only, for four rows, straight from the cache.
//
// The block sees whole rows of h, which saves a launch and matters for accuracy: h_i . x_i equals
// sum_j W_ij A_ij, but A differs from X X^T by rounding, which a large W magnifies, and a
// projection that does not fit h leaves that behind. The first block of a sample also adds up S,
// and the mean cosine of the DoE loss.
//
// Otherwise W is summed first (combine), `product` multiplies in tiles, and a warp finishes each
// row.

#include <algorithm>
#include <cmath>

#include "cuda/stages.h"
#include "cuda/tile.h"

namespace vne {
namespace {

// ---- results of a sample ----------------------------------------------------------------------

template <typename T>
struct FinishArgs {
  const Sample* samples;  // [batch]
  const double* inner;    // [batch, parts]
  int64_t parts;
  double shift, identity;  // shift and MatrixFunction::identity
  T* entropy;              // [batch] or null
  const double* cosines;   // [batch, n]; with `cosine`
  T* cosine;               // [batch] or null
  T* row_stats;            // [batch, 4, n] or null
  int64_t n;
};

// S(A^) = shift - <A^, W>, then (10), by a whole block.
template <typename T>
__device__ __forceinline__ void finish_entropy(const FinishArgs<T>& args, int64_t b,
                                               double* scratch) {
  const Sample sample = args.samples[b];
  double sum = 0;
  if (is_regular(sample)) {
    for (int64_t i = threadIdx.x; i < args.parts; i += blockDim.x)
      sum += args.inner[b * args.parts + i];
  }
  const double inner = sample.scale * block_sum(sum, scratch);
  if (threadIdx.x != 0) return;
  double result = sample.trace == 0 ? 0.0 : NAN;
  if (is_regular(sample)) {
    const double value = min(max(args.shift - args.identity - inner, 0.0), args.shift);
    // A trace that is one but for rounding is one.
    constexpr double kTolerance = sizeof(T) == 8 ? 0x1p-49 : 0x1p-20;
    const bool is_one = fabs(sample.trace - 1) <= kTolerance;
    result = is_one ? value : sample.trace * (value - sample.log_trace);
  }
  args.entropy[b] = static_cast<T>(result);
}

// The mean cosine, by a whole block. If it is NaN, so are both views of the whole sample.
template <typename T>
__device__ __forceinline__ void finish_cosine(const FinishArgs<T>& args, int64_t b,
                                              double* scratch) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < args.n; i += blockDim.x) sum += args.cosines[b * args.n + i];
  const double mean = block_sum(sum, scratch) / static_cast<double>(args.n);
  if (threadIdx.x == 0) args.cosine[b] = static_cast<T>(mean);
  if (args.row_stats && isnan(mean)) {
    T* stats = args.row_stats + b * kRowStats * args.n;
    for (int64_t i = threadIdx.x; i < kRowStats * args.n; i += blockDim.x) stats[i] = NAN;
  }
}

template <typename T>
__device__ void finish_sample(const FinishArgs<T>& args, int64_t b, double* scratch) {
  if (args.entropy) finish_entropy(args, b, scratch);
  if (args.cosine) finish_cosine(args, b, scratch);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) finish_samples(FinishArgs<T> args) {
  VNE_SHARED_ARRAY(double, scratch, 32);
  finish_sample(args, blockIdx.x, scratch);
}

// ---- W ----------------------------------------------------------------------------------------

constexpr int kCombineTile = 32;

// w [batch, ld, ld] <- identity I + sum of terms, each times its pole's weight if `weighted`; of
// the terms only the lower triangle is read. inner [batch, tiles] <- a tile's part in <A, sum of
// terms>.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_terms(const T* a, const T* terms, int count, T identity,
              const __grid_constant__ PoleList<T> poles, bool weighted, int m,
              const Sample* samples, T* w, double* inner) {
  using Sums = T[kCombineTile][kCombineTile + 1];
  VNE_SHARED(Sums, sums);
  VNE_SHARED_ARRAY(double, scratch, 32);
  const int side = ceil_div(m, kCombineTile), tiles = side * (side + 1) / 2;
  const int64_t sample = blockIdx.x / tiles;
  const int tile = blockIdx.x % tiles;
  const int tile_row = triangle_row(tile), tile_col = tile - tile_row * (tile_row + 1) / 2;
  if (!is_regular(samples[sample])) return;
  const int64_t ld = leading(m), size = ld * ld;
  a += sample * size;
  terms += sample * count * size;
  w += sample * size;

  T product = 0;
  for (int i = threadIdx.x / 32; i < kCombineTile; i += kWarps) {
    const int row = tile_row * kCombineTile + i, col = tile_col * kCombineTile + threadIdx.x % 32;
    T sum = 0;
    if (row < m && col <= row) {
      const int64_t at = row * ld + col;
      for (int k = 0; k < count; ++k)
        sum += weighted ? poles.w[k] * terms[k * size + at] : terms[k * size + at];
      product += (row == col ? T(1) : T(2)) * a[at] * sum;
      if (row == col) sum += identity;
      w[at] = sum;
    }
    sums[i][threadIdx.x % 32] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x / 32; i < kCombineTile; i += kWarps) {  // above the diagonal
    const int row = tile_col * kCombineTile + i, col = tile_row * kCombineTile + threadIdx.x % 32;
    if (col < m && row < col) w[row * ld + col] = sums[threadIdx.x % 32][i];
  }
  const double total = block_sum(static_cast<double>(product), scratch);
  if (threadIdx.x == 0) inner[blockIdx.x] = total;
}

// ---- rows of the gradient ---------------------------------------------------------------------

template <typename T, typename In>
struct GradientArgs {
  const In* z;  // [batch, n, d]
  bool vector;
  int64_t n, d;
  int m;
  const Row* rows;         // [batch, n]
  const Scale<T>* scales;  // [batch, n]
  const Sample* samples;   // [batch]
  const T* terms;          // [batch, count, ld, ld]
  int count;
  T terms_identity;  // W = sum of terms + terms_identity I
  double factor, identity;
  bool adds_log_trace;  // to identity
  T* grad_z;            // [batch, n, d]
  T* grad_weights;      // [batch, n] or null
};

// A row of the gradient from a row of h: outer (h + inner x).
template <typename T>
struct RowRule {
  Scale<T> outer;
  T inner;
  bool is_zero;
};

// The rule of row `index` of the batch. radial = h_i . x_i, square = |x_i|^2. Sets the gradient of
// the weight too if `sets_weight`.
template <typename T, typename In>
__device__ RowRule<T> make_rule(const GradientArgs<T, In>& args, int64_t index,
                                const Sample& sample, T radial, T square, bool sets_weight) {
  const Row row = args.rows[index];
  const double identity = args.identity + (args.adds_log_trace ? sample.log_trace : 0.0);
  RowRule<T> rule{};
  // |x|^2 vanishes with a weight that is no normal number: there is nothing to project on.
  const bool absent =
      row.root_weight == 0 || row.inverse_norm == 0 || (row.projected && square == 0);
  // With m = 1, W is a number: exactly 0, without the rounding of the projection.
  rule.is_zero = absent || (args.m == 1 && row.projected);
  rule.outer = make_scale<T>(args.factor * row.root_weight * sample.root_trace * row.inverse_norm);
  rule.inner = row.projected ? -radial / square : static_cast<T>(identity);
  if (sets_weight && args.grad_weights) {
    // d/dp_i = factor / 2 u_i^T (W + identity I) u_i
    const double of_u = sample.trace / (row.root_weight * row.root_weight);
    args.grad_weights[index] =
        absent ? T(0) : static_cast<T>(args.factor / 2 * of_u * (radial + identity * square));
  }
  return rule;
}

template <typename T>
__device__ __forceinline__ T apply(const RowRule<T>& rule, T h, T x) {
  return rule.is_zero ? T(0) : rule.outer(h + rule.inner * x);
}

// The scale from a row of z to its row of X^.
template <typename T>
__device__ __forceinline__ Scale<T> unit_trace(Scale<T> scale, const Sample& sample) {
  return {scale.power_of_two, scale.mantissa * static_cast<T>(sample.root_scale)};
}

// The gradient of a sample without an entropy.
template <typename T>
__device__ __forceinline__ T irregular_gradient(const Sample& sample) {
  return sample.trace == 0 ? T(0) : T(NAN);
}

constexpr int kRows = 4;  // of the fused kernel's block

template <typename T>
struct FusedShared {
  alignas(16) T w[kLargestSweep<T>][kRows];  // times the mantissa of the scale of row j of z
  T power_of_two[kLargestSweep<T>];          // of that scale; 0 if it is 0
  T radial[kRows][kWarps], square[kRows][kWarps];
  RowRule<T> rule[kRows];
  double scratch[32];
};

template <typename In>
struct alignas(2 * sizeof(In)) Pair {
  In v[2];
};

// to <- from[0, 1], zeros from `count` on.
template <typename T, typename In>
__device__ __forceinline__ void load_pair(const In* from, int64_t count, bool vector, T (&to)[2]) {
  if (vector && count > 0) {
    const Pair<In> pair = *reinterpret_cast<const Pair<In>*>(from);
    to[0] = convert<T>(pair.v[0]);
    to[1] = convert<T>(pair.v[1]);
  } else {
    to[0] = count > 0 ? convert<T>(from[0]) : T(0);
    to[1] = count > 1 ? convert<T>(from[1]) : T(0);
  }
}

// The work of a block of fused_gradient, in phases: kRows rows of a sample.
template <typename T, typename In>
struct FusedBlock {
  __device__ __forceinline__ FusedBlock(const GradientArgs<T, In>& args, FusedShared<T>& shared)
      : args(args), s(shared) {
    const int row_tiles = ceil_div(args.m, kRows);
    b = blockIdx.x / row_tiles;
    first_row = static_cast<int>(blockIdx.x % row_tiles) * kRows;
    rows = min(kRows, args.m - first_row);
    sample = args.samples[b];
    z = args.z + b * args.n * args.d;
    own_z = z + first_row * args.d;
    grad_z = args.grad_z + (b * args.n + first_row) * args.d;
  }

  __device__ __forceinline__ void write_irregular() const {
    const T value = irregular_gradient<T>(sample);
    for (int64_t i = threadIdx.x; i < rows * args.d; i += blockDim.x) grad_z[i] = value;
    if (args.grad_weights && threadIdx.x < rows)
      args.grad_weights[b * args.n + first_row + threadIdx.x] = value;
  }

  // s.w <- the block's rows of W, a warp each.
  __device__ __forceinline__ void sum_terms_of_rows() {
    const int64_t ld = leading(args.m), size = ld * ld;
    const T* terms = args.terms + b * args.count * size + first_row * ld;
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int i = threadIdx.x / 32; i < kRows; i += warps) {
      for (int j = lane; j < args.m; j += 32) {
        T sum = 0;
        if (i < rows) {
#pragma unroll 8
          for (int k = 0; k < args.count; ++k) sum += terms[k * size + i * ld + j];
          if (j == first_row + i) sum += args.terms_identity;
        }
        const Scale<T> scale = unit_trace(args.scales[b * args.n + j], sample);
        s.w[j][i] = i < rows ? sum * scale.mantissa : T(0);
        if (i == 0) s.power_of_two[j] = scale.is_zero() ? T(0) : scale.power_of_two;
      }
    }
    __syncthreads();
  }

  // x <- columns col and col + 1 of x_i, for row i of the block.
  __device__ __forceinline__ void load_own(int i, int64_t col, bool vector, T (&x)[2]) const {
    load_pair(own_z + i * args.d + col, i < rows ? args.d - col : 0, vector, x);
    const Scale<T> scale =
        unit_trace(args.scales[b * args.n + min(first_row + i, args.m - 1)], sample);
    x[0] = scale(x[0]);
    x[1] = scale(x[1]);
  }

  // h <- W X^ in columns col and col + 1; adds to radial and square. `vector` is a constant where
  // this is called: without a branch on it in the loop, eight loads are in flight at once, or four
  // of double, which is what registers hold.
  __device__ __forceinline__ void multiply_columns(int64_t col, bool vector) {
    constexpr int kLoads = sizeof(T) == 8 ? 4 : 8;
    h.set_zero();
#pragma unroll kLoads
    for (int j = 0; j < args.m; ++j) {
      T x[2];
      const T power = s.power_of_two[j];
      load_pair(z + j * args.d + col, power == T(0) ? 0 : args.d - col, vector, x);
      const Quad<T> w = read_quad(s.w[j]);
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        x[q] *= power;
#pragma unroll
        for (int i = 0; i < kRows; ++i) h.v[i][q] += w.v[i] * x[q];
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      T x[2];
      load_own(i, col, vector, x);
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        radial[i] += h.v[i][q] * x[q];
        square[i] += x[q] * x[q];
        if (!one_pass() && i < rows && col + q < args.d) grad_z[i * args.d + col + q] = h.v[i][q];
      }
    }
  }

  // The same in all columns of the thread. If they are two, h stays in registers; otherwise it goes
  // to grad_z.
  __device__ __forceinline__ void multiply() {
    for (int64_t col = 2 * threadIdx.x; col < args.d; col += stride()) {
      if (args.vector) {
        multiply_columns(col, true);
      } else {
        multiply_columns(col, false);
      }
    }
  }

  // s.rule <- the rules of the rows.
  __device__ __forceinline__ void reduce_rows() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      radial[i] = warp_sum(radial[i]);
      square[i] = warp_sum(square[i]);
      if (lane == 0) {
        s.radial[i][warp] = radial[i];
        s.square[i][warp] = square[i];
      }
    }
    __syncthreads();
    if (threadIdx.x < rows) {
      T radial_sum = 0, square_sum = 0;
      for (int i = 0; i < warps; ++i) {
        radial_sum += s.radial[threadIdx.x][i];
        square_sum += s.square[threadIdx.x][i];
      }
      s.rule[threadIdx.x] = make_rule(args, b * args.n + first_row + threadIdx.x, sample,
                                      radial_sum, square_sum, true);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void write_rows() const {
    for (int64_t col = 2 * threadIdx.x; col < args.d; col += stride()) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i >= rows) break;
        T x[2];
        load_own(i, col, args.vector, x);
        T* to = grad_z + i * args.d + col;
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          if (col + q < args.d) to[q] = apply(s.rule[i], one_pass() ? h.v[i][q] : to[q], x[q]);
        }
      }
    }
  }

  int64_t b;  // the sample's place in the batch
  int first_row, rows;
  Sample sample;

 private:
  __device__ __forceinline__ int64_t stride() const { return 2 * blockDim.x; }
  __device__ __forceinline__ bool one_pass() const { return args.d <= stride(); }

  const GradientArgs<T, In> args;
  FusedShared<T>& s;
  const In* z;      // of the sample
  const In* own_z;  // of the block's rows
  T* grad_z;        // of the block's rows
  Tile<T, kRows, 2> h{};
  T radial[kRows] = {}, square[kRows] = {};  // the thread's part of h_i . x_i and |x_i|^2
};

template <typename T, typename In>
__global__ void __launch_bounds__(kThreads, 2)
    fused_gradient(GradientArgs<T, In> args, FinishArgs<T> finish) {
  VNE_SHARED(FusedShared<T>, s);
  FusedBlock<T, In> block(args, s);
  if (block.first_row == 0) finish_sample(finish, block.b, s.scratch);
  if (!is_regular(block.sample)) return block.write_irregular();
  block.sum_terms_of_rows();
  block.multiply();
  block.reduce_rows();
  block.write_rows();
}

// ---- the same in three launches ---------------------------------------------------------------

constexpr int kTile = 64, kChunk = 16;  // of the product

template <typename T>
struct ProductShared {
  alignas(16) T left[kChunk][kTile + 4];  // + 4: the transposed stores of a warp spread over banks
  alignas(16) T right[kChunk][kTile];
};

// The work of a block of `product`, in phases: a tile of h = W X^ or, on the covariance side, X^ W.
template <typename T, typename In>
struct ProductBlock {
  __device__ __forceinline__ ProductBlock(const GradientArgs<T, In>& args, bool gram_side,
                                          ProductShared<T>& shared)
      : args(args), gram_side(gram_side), s(shared) {
    const int64_t col_tiles = ceil_div(args.d, int64_t{kTile});
    const int64_t tiles = ceil_div(args.n, int64_t{kTile}) * col_tiles;
    b = blockIdx.x / tiles;
    const int64_t tile = blockIdx.x % tiles;
    first_row = tile / col_tiles * kTile;
    first_col = tile % col_tiles * kTile;
    sample = args.samples[b];
    z = args.z + b * args.n * args.d;
    scales = args.scales + b * args.n;
    quad = threadIdx.x % 16;
    line = threadIdx.x / 16;
  }

  // Loads W. It is symmetric: its rows serve as columns.
  __device__ __forceinline__ void stage_w(int k) {
    const int64_t ld = leading(args.m), at = gram_side ? first_row : first_col;
    const T* w = args.terms + b * ld * ld;
    const int64_t left = k + line < args.m ? args.m - at - 4 * quad : 0;
    Quad<T> x;
    load_quad(w + (k + line) * ld + at + 4 * quad, left, false, x.v);
    write_quad(gram_side ? &s.left[line][4 * quad] : &s.right[line][4 * quad], x);
  }

  __device__ __forceinline__ void stage_z(int k) {
    Quad<T> x;
    if (gram_side) {
      const int j = k + line;
      const int64_t at = first_col + 4 * quad;
      load_quad(z + j * args.d + at, j < args.m ? args.d - at : 0, args.vector, x.v);
      const Scale<T> scale = j < args.m ? unit_trace(scales[j], sample) : Scale<T>{T(1), T(0)};
      write_quad(&s.right[line][4 * quad], scale(x));
    } else {
      constexpr int kQuads = kChunk / 4;
      const int at_k = threadIdx.x % kQuads * 4, at_row = threadIdx.x / kQuads;
      const int64_t i = first_row + at_row;
      load_quad(z + i * args.d + k + at_k, i < args.n ? args.m - k - at_k : 0, args.vector, x.v);
      const Scale<T> scale = i < args.n ? unit_trace(scales[i], sample) : Scale<T>{T(1), T(0)};
#pragma unroll
      for (int q = 0; q < 4; ++q) s.left[at_k + q][at_row] = scale(x.v[q]);
    }
  }

  __device__ __forceinline__ void multiply_chunk() {
#pragma unroll
    for (int l = 0; l < kChunk; ++l)
      sum.add_product(read_quad(&s.left[l][4 * line]), read_quad(&s.right[l][4 * quad]));
  }

  __device__ __forceinline__ void store() {
    T* h = args.grad_z + b * args.n * args.d;
    sum.for_each([&](int i, int j, T entry) {
      const int64_t row = first_row + 4 * line + i, col = first_col + 4 * quad + j;
      if (row < args.n && col < args.d) h[row * args.d + col] = entry;
    });
  }

  Sample sample;

 private:
  const GradientArgs<T, In> args;
  const bool gram_side;
  ProductShared<T>& s;
  const In* z;             // of the sample
  const Scale<T>* scales;  // of the sample
  int64_t b, first_row, first_col;
  int quad, line;  // of the thread: 16 x 16 of them share a tile and a chunk
  Tile<T, 4> sum{};
};

// grad_z <- h.
template <typename T, typename In>
__global__ void __launch_bounds__(kThreads, 2) product(GradientArgs<T, In> args, bool gram_side) {
  VNE_SHARED(ProductShared<T>, s);
  ProductBlock<T, In> block(args, gram_side, s);
  if (!is_regular(block.sample)) return;
  for (int k = 0; k < args.m; k += kChunk) {
    block.stage_w(k);
    block.stage_z(k);
    __syncthreads();
    block.multiply_chunk();
    __syncthreads();
  }
  block.store();
}

// grad_z, which holds h, <- the gradient, a warp each row. The blocks after those of the rows
// finish a sample each.
template <typename T, typename In>
__global__ void __launch_bounds__(kThreads)
    finish_rows(GradientArgs<T, In> args, int64_t batch, FinishArgs<T> finish) {
  VNE_SHARED_ARRAY(double, scratch, 32);
  const int64_t row_blocks = grid_for(batch * args.n, kWarps), d = args.d;
  if (blockIdx.x >= row_blocks) return finish_sample(finish, blockIdx.x - row_blocks, scratch);
  const int64_t index = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (index >= batch * args.n) return;
  const int lane = threadIdx.x % 32;
  const Sample& sample = args.samples[index / args.n];  // a copy would take too many registers
  const In* z = args.z + index * d;
  T* grad_z = args.grad_z + index * d;
  if (!is_regular(sample)) {
    const T value = irregular_gradient<T>(sample);
    for (int64_t j = lane; j < d; j += 32) grad_z[j] = value;
    if (args.grad_weights && lane == 0) args.grad_weights[index] = value;
    return;
  }
  const Scale<T> scale = unit_trace(args.scales[index], sample);
  T radial = 0, square = 0;
  for (int64_t j = lane; j < d; j += 32) {
    const T x = scale(convert<T>(z[j]));
    radial += grad_z[j] * x;
    square += x * x;
  }
  radial = warp_sum(radial);
  square = warp_sum(square);
  const RowRule<T> rule = make_rule(args, index, sample, radial, square, lane == 0);
  for (int64_t j = lane; j < d; j += 32)
    grad_z[j] = apply(rule, grad_z[j], scale(convert<T>(z[j])));
}

template <typename T>
FinishArgs<T> finish_args(const Call& call, const MatrixFunction<T>& w, double shift,
                          const SecondView<T>& second, const Outputs<T>& out) {
  return {.samples = w.samples.data,
          .inner = w.inner.data,
          .parts = w.parts,
          .shift = shift,
          .identity = w.identity,
          .entropy = out.entropy,
          .cosines = second.cosines,
          .cosine = out.cosine,
          .row_stats = second.row_stats,
          .n = call.problem.n};
}

template <typename T>
void run_gradient(const Call& call, const Input& z, const Normalized<T>& normalized,
                  MatrixFunction<T>& w, double factor, double identity, bool adds_log_trace,
                  const FinishArgs<T>& finish_before, const Outputs<T>& out) {
  const Problem& problem = call.problem;
  const bool fused = problem.gram_side() && problem.m() <= kLargestSweep<T>;
  FinishArgs<T> finish = finish_before;
  if (w.count > 1 && !fused) {
    combine(call, normalized, w);
    finish.inner = w.inner.data;
    finish.parts = w.parts;
  }
  dispatch_elements<T>(z.dtype, [&](auto element) {
    using In = decltype(element);
    const In* data = static_cast<const In*>(z.data);
    const GradientArgs<T, In> args{.z = data,
                                   .vector = is_vector(data, problem.d),
                                   .n = problem.n,
                                   .d = problem.d,
                                   .m = static_cast<int>(problem.m()),
                                   .rows = normalized.rows.data,
                                   .scales = normalized.scales.data,
                                   .samples = w.samples.data,
                                   .terms = w.terms.data,
                                   .count = w.count,
                                   .terms_identity = static_cast<T>(w.terms_identity),
                                   .factor = factor,
                                   .identity = identity,
                                   .adds_log_trace = adds_log_trace,
                                   .grad_z = out.grad_z,
                                   .grad_weights = out.grad_weights};
    if (fused) {
      const int64_t threads = grid_for(problem.d, 64) * 32;  // of two columns each
      call.launch("fused_gradient", fused_gradient<T, In>,
                  problem.batch * grid_for(problem.m(), kRows),
                  std::min<int64_t>(threads, kThreads), args, finish);
      return;
    }
    const int64_t tiles = grid_for(problem.n, kTile) * grid_for(problem.d, kTile);
    call.launch("product", product<T, In>, problem.batch * tiles, kThreads, args,
                problem.gram_side());
    const bool finishes = finish.entropy || finish.cosine;
    call.launch("finish_rows", finish_rows<T, In>,
                grid_for(problem.batch * problem.n, kWarps) + (finishes ? problem.batch : 0),
                kThreads, args, problem.batch, finish);
  });
}

}  // namespace

int64_t inner_parts(int64_t m) {
  const int64_t side = ceil_div(m, int64_t{kCombineTile});
  return side * (side + 1) / 2;
}

template <typename T>
void sum_terms_of(const Call& call, int64_t batch, int64_t m, const T* a, const T* terms, int count,
                  double identity, bool weighted, const Sample* samples, T* w, double* inner) {
  call.launch("sum_terms", sum_terms<T>, batch * inner_parts(m), kThreads, a, terms, count,
              static_cast<T>(identity), PoleList<T>(), weighted, static_cast<int>(m), samples, w,
              inner);
}

template <typename T>
void combine(const Call& call, const Normalized<T>& normalized, MatrixFunction<T>& w) {
  const int64_t m = call.problem.m();
  Workspace<T> sum = call.workspace<T>(call.problem.batch * leading(m) * leading(m));
  Workspace<double> inner = call.workspace<double>(call.problem.batch * inner_parts(m));
  sum_terms_of(call, call.problem.batch, m, normalized.a.data, w.terms.data, w.count,
               w.terms_identity, false, w.samples.data, sum.data, inner.data);
  w.terms = std::move(sum);
  w.inner = std::move(inner);
  w.parts = inner_parts(m);
  w.count = 1;
  w.terms_identity = 0;
}

template <typename T>
void write_samples(const Call& call, const MatrixFunction<T>& w, double shift,
                   const SecondView<T>& second, const Outputs<T>& out) {
  call.launch("finish_samples", finish_samples<T>, call.problem.batch, kThreads,
              finish_args(call, w, shift, second, out));
}

template <typename T>
void entropy_from_log(const Call& call, const Input& z, const Normalized<T>& normalized,
                      MatrixFunction<T>& w, double shift, const SecondView<T>& second,
                      const Outputs<T>& out) {
  if (!out.grad_z) return write_samples(call, w, shift, second, out);
  // (3): dS/dX = -2 (log A + I) X with log A = W - shift I + log(tau) I
  run_gradient(call, z, normalized, w, -2, 1 - shift, true,
               finish_args(call, w, shift, second, out), out);
}

template <typename T>
void gradient(const Call& call, const Input& z, const Normalized<T>& normalized,
              MatrixFunction<T>& w, double factor, double identity, const Outputs<T>& out) {
  run_gradient(call, z, normalized, w, factor, identity, false, FinishArgs<T>{}, out);
}

#define VNE_INSTANTIATE(T)                                                                         \
  template void sum_terms_of(const Call&, int64_t, int64_t, const T*, const T*, int, double, bool, \
                             const Sample*, T*, double*);                                          \
  template void combine(const Call&, const Normalized<T>&, MatrixFunction<T>&);                    \
  template void write_samples(const Call&, const MatrixFunction<T>&, double, const SecondView<T>&, \
                              const Outputs<T>&);                                                  \
  template void entropy_from_log(const Call&, const Input&, const Normalized<T>&,                  \
                                 MatrixFunction<T>&, double, const SecondView<T>&,                 \
                                 const Outputs<T>&);                                               \
  template void gradient(const Call&, const Input&, const Normalized<T>&, MatrixFunction<T>&,      \
                         double, double, const Outputs<T>&);
VNE_INSTANTIATE(float)
VNE_INSTANTIATE(double)
#undef VNE_INSTANTIATE

}  // namespace vne
