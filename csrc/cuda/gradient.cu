// From a function W of A^ to S and to the gradient in z: equations (3), (4), (5), (11).
//
// With h = W X^, row i of z receives
//
//   sqrt(p_i tau) |z_i|^-1 factor (h_i - (h_i . x_i) x_i / |x_i|^2),   x_i = row i of X^;
//
// the projection removes every multiple of the identity from W, which is why a centred W may be
// used. A row that was not divided by its own norm is not projected and gets `identity` back.
//
// Where A^ is the Gram matrix and small, one launch does it all. A block computes four rows of the
// gradient, a thread two columns of them: its rows of W it sums itself from the poles' terms, and
// each element of z is used by one thread only, for four rows, straight from the cache. That the
// block sees whole rows of h matters for accuracy, not only for the launch it saves: h_i . x_i
// could be had as sum_j W_ij A_ij, but A differs from X X^T by rounding, which a large W magnifies,
// and a projection that does not fit h leaves that behind. The first block of a sample also adds up
// S, and the mean cosine of the DoE loss.
//
// Otherwise W is summed first (combine), the product is a tiled one, and a warp finishes each row.

#include <algorithm>
#include <cmath>

#include "cuda/pole_list.h"
#include "cuda/stages.h"

namespace vne {
namespace {

// ---- results of a sample ----------------------------------------------------------------------

template <typename T>
struct FinishArgs {
  const Sample* samples;
  const double* inner;  // [batch, parts]
  int64_t parts;
  double shift, identity;  // shift and MatrixFunction::identity
  T* entropy;              // [batch] or null
  const double* cosines;   // [batch, n]; with `cosine`
  T* cosine;               // [batch] or null
  T* row_stats;            // [batch, 4, n] or null
  int64_t n;
};

// S and the mean cosine of a sample, by a whole block.
template <typename T>
__device__ void finish_sample(const FinishArgs<T>& args, int64_t sample, double* scratch) {
  if (args.entropy) {
    const Sample known = args.samples[sample];
    double sum = 0;
    if (is_regular(known)) {
      for (int64_t i = threadIdx.x; i < args.parts; i += blockDim.x)
        sum += args.inner[sample * args.parts + i];
    }
    const double inner = known.scale * block_sum(sum, scratch);
    if (threadIdx.x == 0) {
      double result = known.trace == 0 ? 0.0 : NAN;
      if (is_regular(known)) {
        // S(A^) = shift - <A^, W>, then (10). A trace that is one but for rounding is one.
        const double shift = args.shift;
        const double value = min(max(shift - args.identity - inner, 0.0), shift);
        constexpr double kTolerance = sizeof(T) == 8 ? 0x1p-49 : 0x1p-20;
        const bool is_one = fabs(known.trace - 1) <= kTolerance;
        result = is_one ? value : known.trace * (value - known.log_trace);
      }
      args.entropy[sample] = static_cast<T>(result);
    }
  }
  if (args.cosine) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < args.n; i += blockDim.x)
      sum += args.cosines[sample * args.n + i];
    const double mean = block_sum(sum, scratch) / static_cast<double>(args.n);
    if (threadIdx.x == 0) args.cosine[sample] = static_cast<T>(mean);
    if (args.row_stats && isnan(mean)) {  // NaN for the whole sample, in both views
      T* stats = args.row_stats + sample * kRowStats * args.n;
      for (int64_t i = threadIdx.x; i < kRowStats * args.n; i += blockDim.x) stats[i] = NAN;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) finish_samples(FinishArgs<T> args) {
  using Scratch = double[32];
  VNE_SHARED(Scratch, scratch);
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
  using Tile = T[kCombineTile][kCombineTile + 1];
  using Scratch = double[32];
  VNE_SHARED(Tile, sums);
  VNE_SHARED(Scratch, scratch);
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
  const In* z;
  bool vector;
  int64_t n, d;
  int m;
  const Row* rows;
  const Scale<T>* scales;
  const Sample* samples;
  const T* a;
  const T* terms;  // [batch, count, ld, ld]
  int count;
  T terms_identity;  // W = sum of terms + terms_identity I
  double factor, identity;
  bool adds_log_trace;  // to identity
  T* grad_z;
  T* grad_weights;  // or null
};

// What turns a row of h into a row of the gradient: outer (h + inner x).
template <typename T>
struct RowRule {
  Scale<T> outer;
  T inner;
  bool is_zero;
};

// radial = h_i . x_i and square = |x_i|^2. Sets the weight's gradient too, if asked to.
template <typename T, typename In>
__device__ RowRule<T> make_rule(const GradientArgs<T, In>& args, int64_t index, const Sample& known,
                                T radial, T square, bool sets_weight) {
  const Row row = args.rows[index];
  const double identity = args.identity + (args.adds_log_trace ? known.log_trace : 0.0);
  RowRule<T> rule{};
  // |x|^2 vanishes with a weight that is no normal number: there is nothing to project on.
  const bool absent =
      row.root_weight == 0 || row.inverse_norm == 0 || (row.projected && square == 0);
  // With m = 1, W is a number: exactly 0, without the rounding of the projection.
  rule.is_zero = absent || (args.m == 1 && row.projected);
  rule.outer = make_scale<T>(args.factor * row.root_weight * known.root_trace * row.inverse_norm);
  rule.inner = row.projected ? -radial / square : static_cast<T>(identity);
  if (sets_weight && args.grad_weights) {
    // d/dp_i = factor / 2 u_i^T (W + identity I) u_i
    const double of_u = known.trace / (row.root_weight * row.root_weight);
    args.grad_weights[index] =
        absent ? T(0) : static_cast<T>(args.factor / 2 * of_u * (radial + identity * square));
  }
  return rule;
}

template <typename T>
__device__ __forceinline__ T apply(const RowRule<T>& rule, T h, T x) {
  return rule.is_zero ? T(0) : rule.outer(h + rule.inner * x);
}

// The row of X^ over the row of z.
template <typename T>
__device__ __forceinline__ Scale<T> unit_trace(Scale<T> scale, const Sample& known) {
  return {scale.power, scale.rest * static_cast<T>(known.root_scale)};
}

constexpr int kRows = 4;  // of the fused kernel's block

template <typename T>
struct FusedShared {
  alignas(16) T w[kLargestSweep<T>][kRows];  // times the rest of the scale of row j of z
  T power[kLargestSweep<T>];                 // of that scale; 0 if it is 0
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

template <typename T, typename In>
__global__ void __launch_bounds__(kThreads, 2)
    fused_gradient(GradientArgs<T, In> args, FinishArgs<T> finish) {
  using Shared = FusedShared<T>;
  VNE_SHARED(Shared, s);
  const int64_t n = args.n, d = args.d;
  const int m = args.m, row_tiles = ceil_div(m, kRows);
  const int64_t sample = blockIdx.x / row_tiles;
  const int first_row = static_cast<int>(blockIdx.x % row_tiles) * kRows;
  const int rows = min(kRows, m - first_row);
  const Sample known = args.samples[sample];
  const In* z = args.z + sample * n * d;
  const In* own_z = z + first_row * d;
  T* grad_z = args.grad_z + (sample * n + first_row) * d;

  if (first_row == 0) finish_sample(finish, sample, s.scratch);
  if (!is_regular(known)) {
    const T value = known.trace == 0 ? T(0) : T(NAN);
    for (int64_t i = threadIdx.x; i < rows * d; i += blockDim.x) grad_z[i] = value;
    if (args.grad_weights && threadIdx.x < rows)
      args.grad_weights[sample * n + first_row + threadIdx.x] = value;
    return;
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t ld = leading(m), size = ld * ld;
  const T* terms = args.terms + sample * args.count * size + first_row * ld;
  for (int i = warp; i < kRows; i += warps) {
    for (int j = lane; j < m; j += 32) {
      T sum = 0;
      if (i < rows) {
#pragma unroll 8
        for (int k = 0; k < args.count; ++k) sum += terms[k * size + i * ld + j];
        if (j == first_row + i) sum += args.terms_identity;
      }
      const Scale<T> scale = unit_trace(args.scales[sample * n + j], known);
      s.w[j][i] = i < rows ? sum * scale.rest : T(0);
      if (i == 0) s.power[j] = scale.is_zero() ? T(0) : scale.power;
    }
  }
  __syncthreads();

  // x_i of the own rows, in the columns of this thread.
  const auto load_own = [&](int i, int64_t col, T(&x)[2]) {
    load_pair(own_z + i * d + col, i < rows ? d - col : 0, args.vector, x);
    const Scale<T> scale = unit_trace(args.scales[sample * n + min(first_row + i, m - 1)], known);
    x[0] = scale(x[0]);
    x[1] = scale(x[1]);
  };
  const int64_t stride = 2 * blockDim.x;
  const bool one_pass = d <= stride;  // then h stays in registers
  T h[kRows][2] = {};
  T radial[kRows] = {}, square[kRows] = {};
  for (int64_t col = 2 * threadIdx.x; col < d; col += stride) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) h[i][0] = h[i][1] = 0;
#pragma unroll 8
    for (int j = 0; j < m; ++j) {
      T x[2];
      const T power = s.power[j];
      load_pair(z + j * d + col, power == T(0) ? 0 : d - col, args.vector, x);
      const Quad<T> w = *reinterpret_cast<const Quad<T>*>(s.w[j]);
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        x[q] *= power;
#pragma unroll
        for (int i = 0; i < kRows; ++i) h[i][q] += w.v[i] * x[q];
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      T x[2];
      load_own(i, col, x);
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        radial[i] += h[i][q] * x[q];
        square[i] += x[q] * x[q];
        if (!one_pass && i < rows && col + q < d) grad_z[i * d + col + q] = h[i][q];
      }
    }
  }

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
    s.rule[threadIdx.x] =
        make_rule(args, sample * n + first_row + threadIdx.x, known, radial_sum, square_sum, true);
  }
  __syncthreads();
  for (int64_t col = 2 * threadIdx.x; col < d; col += stride) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
      T x[2];
      load_own(i, col, x);
      T* to = grad_z + i * d + col;
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        if (col + q < d) to[q] = apply(s.rule[i], one_pass ? h[i][q] : to[q], x[q]);
      }
    }
  }
}

// ---- the same in three launches ---------------------------------------------------------------

constexpr int kTile = 64, kChunk = 16;  // of the product

template <typename T>
struct ProductShared {
  alignas(16) T left[kChunk][kTile + 4];  // + 4: the transposed stores of a warp spread over banks
  alignas(16) T right[kChunk][kTile];
};

// grad_z <- h = W X^ or, on the covariance side, X^ W.
template <typename T, typename In>
__global__ void __launch_bounds__(kThreads, 2) product(GradientArgs<T, In> args, bool gram_side) {
  using Shared = ProductShared<T>;
  VNE_SHARED(Shared, s);
  const int64_t n = args.n, d = args.d;
  const int m = args.m;
  const int64_t row_tiles = ceil_div(n, int64_t{kTile}), col_tiles = ceil_div(d, int64_t{kTile});
  const int64_t sample = blockIdx.x / (row_tiles * col_tiles);
  const int64_t tile = blockIdx.x % (row_tiles * col_tiles);
  const int64_t first_row = tile / col_tiles * kTile, first_col = tile % col_tiles * kTile;
  const Sample known = args.samples[sample];
  if (!is_regular(known)) return;
  const In* z = args.z + sample * n * d;
  const int64_t ld = leading(m);
  const T* w = args.terms + sample * ld * ld;
  const Scale<T>* scales = args.scales + sample * n;

  const int row = threadIdx.x / 16, col = threadIdx.x % 16;
  const int quad = threadIdx.x % 16, line = threadIdx.x / 16;  // a Quad of each operand
  T sum[4][4] = {};
  for (int k = 0; k < m; k += kChunk) {
    T x[4];
    {  // W is symmetric: its rows serve as columns
      const int64_t at = gram_side ? first_row : first_col;
      const int64_t left = k + line < m ? m - at - 4 * quad : 0;
      load_quad(w + (k + line) * ld + at + 4 * quad, left, false, x);
      T* to = gram_side ? &s.left[line][4 * quad] : &s.right[line][4 * quad];
      *reinterpret_cast<Quad<T>*>(to) = {x[0], x[1], x[2], x[3]};
    }
    if (gram_side) {
      const int j = k + line;
      const int64_t at = first_col + 4 * quad;
      load_quad(z + j * d + at, j < m ? d - at : 0, args.vector, x);
      const Scale<T> scale = j < m ? unit_trace(scales[j], known) : Scale<T>{T(1), T(0)};
      *reinterpret_cast<Quad<T>*>(&s.right[line][4 * quad]) = {scale(x[0]), scale(x[1]),
                                                               scale(x[2]), scale(x[3])};
    } else {
      constexpr int kQuads = kChunk / 4;
      const int at_k = k + threadIdx.x % kQuads * 4, at_row = threadIdx.x / kQuads;
      const int64_t i = first_row + at_row;
      load_quad(z + i * d + at_k, i < n ? m - at_k : 0, args.vector, x);
      const Scale<T> scale = i < n ? unit_trace(scales[i], known) : Scale<T>{T(1), T(0)};
#pragma unroll
      for (int q = 0; q < 4; ++q) s.left[at_k - k + q][at_row] = scale(x[q]);
    }
    __syncthreads();
#pragma unroll
    for (int l = 0; l < kChunk; ++l) {
      const Quad<T> a = *reinterpret_cast<const Quad<T>*>(&s.left[l][4 * row]);
      const Quad<T> b = *reinterpret_cast<const Quad<T>*>(&s.right[l][4 * col]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += a.v[i] * b.v[j];
    }
    __syncthreads();
  }
  T* h = args.grad_z + sample * n * d;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t at_row = first_row + 4 * row + i, at_col = first_col + 4 * col + j;
      if (at_row < n && at_col < d) h[at_row * d + at_col] = sum[i][j];
    }
}

// grad_z, holding h, <- the gradient, a warp each row. Blocks behind those of the rows finish a
// sample each.
template <typename T, typename In>
__global__ void __launch_bounds__(kThreads)
    finish_rows(GradientArgs<T, In> args, int64_t batch, FinishArgs<T> finish) {
  using Scratch = double[32];
  VNE_SHARED(Scratch, scratch);
  const int64_t row_blocks = grid_for(batch * args.n, kWarps), d = args.d;
  if (blockIdx.x >= row_blocks) return finish_sample(finish, blockIdx.x - row_blocks, scratch);
  const int64_t index = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (index >= batch * args.n) return;
  const int lane = threadIdx.x % 32;
  const Sample known = args.samples[index / args.n];
  const In* z = args.z + index * d;
  T* grad_z = args.grad_z + index * d;
  if (!is_regular(known)) {
    const T value = known.trace == 0 ? T(0) : T(NAN);
    for (int64_t j = lane; j < d; j += 32) grad_z[j] = value;
    if (args.grad_weights && lane == 0) args.grad_weights[index] = value;
    return;
  }
  const Scale<T> scale = unit_trace(args.scales[index], known);
  T radial = 0, square = 0;
  for (int64_t j = lane; j < d; j += 32) {
    const T x = scale(convert<T>(z[j]));
    radial += grad_z[j] * x;
    square += x * x;
  }
  radial = warp_sum(radial);
  square = warp_sum(square);
  const RowRule<T> rule = make_rule(args, index, known, radial, square, lane == 0);
  for (int64_t j = lane; j < d; j += 32)
    grad_z[j] = apply(rule, grad_z[j], scale(convert<T>(z[j])));
}

template <typename T>
FinishArgs<T> finish_args(const Call& call, const MatrixFunction<T>& w, double shift,
                          const SecondView<T>& second, const Outputs<T>& out) {
  return {w.samples.data, w.inner.data, w.parts,          shift,         w.identity, out.entropy,
          second.cosines, out.cosine,   second.row_stats, call.problem.n};
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
  dispatch_input(z.dtype, [&](auto element) {
    using In = decltype(element);
    if constexpr (std::is_same_v<In, double> == std::is_same_v<T, double>) {
      const In* data = static_cast<const In*>(z.data);
      const GradientArgs<T, In> args{data,
                                     is_vector(data, problem.d),
                                     problem.n,
                                     problem.d,
                                     static_cast<int>(problem.m()),
                                     normalized.rows.data,
                                     normalized.scales.data,
                                     w.samples.data,
                                     normalized.a.data,
                                     w.terms.data,
                                     w.count,
                                     static_cast<T>(w.terms_identity),
                                     factor,
                                     identity,
                                     adds_log_trace,
                                     out.grad_z,
                                     out.grad_weights};
      if (fused) {
        const int64_t threads = ceil_div(problem.d, int64_t{64}) * 32;  // of two columns each
        call.launch("fused_gradient", fused_gradient<T, In>,
                    problem.batch * grid_for(problem.m(), kRows),
                    std::min<int64_t>(threads, kThreads), args, finish);
      } else {
        const int64_t tiles =
            ceil_div(problem.n, int64_t{kTile}) * ceil_div(problem.d, int64_t{kTile});
        call.launch("product", product<T, In>, problem.batch * tiles, kThreads, args,
                    problem.gram_side());
        const bool finishes = finish.entropy || finish.cosine;
        call.launch("finish_rows", finish_rows<T, In>,
                    grid_for(problem.batch * problem.n, kWarps) + (finishes ? problem.batch : 0),
                    kThreads, args, problem.batch, finish);
      }
    }
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
              static_cast<T>(identity), pole_list<T>(), weighted, static_cast<int>(m), samples, w,
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
