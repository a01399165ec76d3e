"""Rows to the unit sphere, and A of the smaller side: equations (1), (2).

X^ = diag(sqrt(p)) U / sqrt(tau), tau the trace of A, is written out once in the dtype of the
computation, and every later stage reads it: a pass over n d numbers more than reading z each time,
for kernels that need not know of norms, weights and half precisions. Norms and factors are float64,
in which no float32 row is too long or too short; per element that is one multiplication. A row of
weight 0 is absent, a NaN in it too: it is measured as a zero row, and its X^ is zero.

The product is float32 FMA ("ieee"), whatever the user's TF32 switch says: TF32 alone ruins A.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vne_kernels._triton.launch import PROGRAMS, block_of, ceil_div, launch, new, tile_of
from vne_kernels._triton.stages import Rows, Samples

# ---- rows ----------------------------------------------------------------------------------------


@triton.jit
def load_rows(pointer, rows, row_count, first_column, d, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] of a matrix [row_count, d], zeros outside of it, in its own dtype."""
    columns = first_column + tl.arange(0, BLOCK)
    inside = (rows < row_count)[:, None] & (columns < d)[None, :]
    return tl.load(pointer + rows[:, None] * d + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(pointer, rows, row_count, first_column, d, x, BLOCK: tl.constexpr):
    columns = first_column + tl.arange(0, BLOCK)
    inside = (rows < row_count)[:, None] & (columns < d)[None, :]
    at = rows[:, None] * d + columns[None, :]
    tl.store(pointer + at, x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def inverse_power_of_2(x):
    """2^-e for 2^e <= x < 2^(e+1), e between -1000 and 1000; of float64."""
    exponent = (x.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    exponent = tl.minimum(tl.maximum(exponent, 23), 2023)
    return ((2046 - exponent) << 52).to(tl.float64, bitcast=True)


@triton.jit
def row_norms(z, rows, row_count, d, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """|z_i| [ROWS] in float64; of a float64 z the rows are scaled so that no square overflows."""
    scale = tl.full([ROWS], 1.0, tl.float64)
    if z.dtype.element_ty == tl.float64:
        largest = tl.zeros([ROWS], tl.float64)
        for start in range(0, d, BLOCK):
            x = load_rows(z, rows, row_count, start, d, BLOCK)
            largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))
        scale = inverse_power_of_2(largest)
    squares = tl.zeros([ROWS], tl.float64)
    for start in range(0, d, BLOCK):
        x = load_rows(z, rows, row_count, start, d, BLOCK).to(tl.float64) * scale[:, None]
        squares += tl.sum(x * x, axis=1)
    return tl.sqrt(squares) / scale


@triton.jit
def unit_factor(norm, EPS: tl.constexpr):
    """1 / max(norm, eps); 0 for a zero row, NaN for one that is not finite."""
    inverse = 1 / tl.maximum(norm, tl.full([1], EPS, tl.float64))
    return tl.where(norm == 0, 0.0, tl.where(norm < float("inf"), inverse, float("nan")))


@triton.jit
def root_weights(weights, rows, row_count, n):
    """sqrt(p_i) in float64; rows count over the whole batch."""
    if weights is None:
        return tl.sqrt(1 / (n + tl.zeros_like(rows)).to(tl.float64))
    else:
        p = tl.load(weights + rows, mask=rows < row_count, other=0.0).to(tl.float64)
        return tl.where(p < 0, float("nan"), tl.sqrt(tl.maximum(p, 0.0)) + (p - p))


@triton.jit
def measure_rows(
    z,  # [row_count, d], row_count = batch n
    weights,  # [row_count] or None
    inverse_norms,  # [row_count] <- 1 / max(|z_i|, eps); 1 without normalization; 0 of a zero row
    traces,  # [row_count] <- p_i |u_i|^2
    projected,  # [row_count] <- whether u_i moves on the sphere: equation (4) applies
    row_count,
    n,
    d,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    root = root_weights(weights, rows, row_count, n)
    norm = tl.where(root == 0, 0.0, row_norms(z, rows, row_count, d, ROWS, BLOCK))
    on_sphere = norm > tl.full([1], EPS, tl.float64)
    inverse = unit_factor(norm, EPS)
    length = norm * inverse
    if not NORMALIZE:
        on_sphere = norm != norm
        inverse = tl.where(norm == 0, 0.0, 1.0)
        length = norm
    square = tl.where(on_sphere, 1.0, length * length)
    inside = rows < row_count
    tl.store(inverse_norms + rows, inverse, mask=inside)
    tl.store(traces + rows, tl.where(norm < float("inf"), root * root * square, norm), mask=inside)
    tl.store(projected + rows, on_sphere.to(tl.int8), mask=inside)


@triton.jit
def is_regular(trace):
    """Whether a sample of this trace has an entropy to speak of; otherwise S is 0, or NaN."""
    return (trace > 0) & (trace < float("inf"))


@triton.jit
def scale_rows(
    z,  # [batch n, d]
    weights,
    inverse_norms,
    row_traces,
    x,  # [batch n, d] <- X^; zeros if the sample is not regular
    traces,  # [batch] <- tau
    n,
    d,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TRACE_BLOCK: tl.constexpr,
):
    programs = tl.cdiv(n, ROWS)  # of a sample
    sample = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    parts = tl.zeros([TRACE_BLOCK], tl.float64)
    for start in range(0, n, TRACE_BLOCK):
        at = start + tl.arange(0, TRACE_BLOCK)
        parts += tl.load(row_traces + sample * n + at, mask=at < n, other=0.0)
    trace = tl.sum(parts, axis=0)  # every program adds up the rows' traces for itself
    if program == 0:
        tl.store(traces + sample, trace)

    own = program * ROWS + tl.arange(0, ROWS)
    rows = sample * n + own
    end = (sample + 1) * n
    regular = is_regular(trace + tl.zeros([ROWS], tl.float64))
    inverse = tl.load(inverse_norms + rows, mask=own < n, other=0.0)
    share = tl.where(regular, root_weights(weights, rows, end, n) / tl.sqrt(trace), 0.0)
    absent = ((inverse == 0) | (share == 0))[:, None]
    factor = (inverse * share)[:, None]
    for start in range(0, d, BLOCK):
        entries = load_rows(z, rows, end, start, d, BLOCK).to(tl.float64)
        if z.dtype.element_ty == tl.float64:  # the product of its factors may be out of range
            entries = entries * inverse[:, None] * share[:, None]
        else:
            entries = entries * factor
        entries = tl.where(absent, 0.0, entries)
        store_rows(x, rows, end, start, d, entries, BLOCK)


# ---- the product ---------------------------------------------------------------------------------


@triton.jit
def load_tile(pointer, rows, row_count, row_stride, columns, column_count, column_stride):
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    at = rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride
    return tl.load(pointer + at, mask=inside, other=0.0)


@triton.jit
def gram(
    x,  # of each sample Y [m, depth]: X^ or its transpose
    parts,  # [splits, batch, m, m] <- Y Y^T, summed over a part of the depth
    batch,
    m,
    depth,
    row_stride,
    depth_stride,
    sample_stride,
    split_size,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A symmetric product: only tiles of the lower triangle are computed, and written twice."""
    # this program's tile
    tiles = tl.cdiv(m, TILE)  # on a side
    tile_row, tile_column = tl.program_id(0) // tiles % tiles, tl.program_id(0) % tiles
    if tile_column <= tile_row:
        part = tl.program_id(0) // (tiles * tiles)
        x += (part % batch).to(tl.int64) * sample_stride
        parts += part.to(tl.int64) * m * m
        rows = tile_row * TILE + tl.arange(0, TILE)
        columns = tile_column * TILE + tl.arange(0, TILE)
        first = part // batch * split_size
        end = tl.minimum(first + split_size, depth)

        # its sum over the depth
        dtype: tl.constexpr = parts.dtype.element_ty
        total = tl.zeros([TILE, TILE], dtype)
        for run in range(first, end, 64):
            # A sum of its own, so that rounding grows with the number of runs, not with the depth.
            part_of_run = tl.zeros([TILE, TILE], dtype)
            for start in range(run, tl.minimum(run + 64, end), CHUNK):
                k = start + tl.arange(0, CHUNK)
                left = load_tile(x, rows, m, row_stride, k, end, depth_stride)
                right = load_tile(x, k, end, depth_stride, columns, m, row_stride)
                part_of_run = tl.dot(
                    left, right, part_of_run, input_precision="ieee", out_dtype=dtype
                )
            total += part_of_run

        # the tile and its mirror image
        turned = tl.trans(total)
        if tile_row == tile_column:  # equal but for rounding
            total = tl.where(rows[:, None] >= columns[None, :], total, turned)
            turned = tl.trans(total)
        inside = (rows < m)[:, None] & (columns < m)[None, :]
        tl.store(parts + rows[:, None] * m + columns[None, :], total, mask=inside)
        inside = (columns < m)[:, None] & (rows < m)[None, :]
        tl.store(parts + columns[:, None] * m + rows[None, :], turned, mask=inside)


# ---- launchers -----------------------------------------------------------------------------------


ROWS = 4
"""Rows of a program that reads them from end to end."""


def row_grid(z: Tensor) -> tuple[int, dict[str, int]]:
    """Programs for all rows of a batch, and constants ROWS and BLOCK of the kernels."""
    batch, n, d = z.shape
    rows = block_of(batch * n, 1, ROWS)
    return ceil_div(batch * n, rows), {"ROWS": rows, "BLOCK": block_of(d, 16, 256)}


def normalize_rows(samples: Samples) -> Rows:
    """X^ of a batch."""
    z, weights = samples.z, samples.weights
    batch, n, d = z.shape
    programs, constants = row_grid(z)
    inverse_norms = new(z, batch, n, dtype=torch.float64)
    row_traces = new(z, batch, n, dtype=torch.float64)
    projected = new(z, batch, n, dtype=torch.int8)
    launch(
        measure_rows,
        programs,
        (z, weights, inverse_norms, row_traces, projected),
        (batch * n, n, d),
        NORMALIZE=samples.normalize,
        EPS=samples.eps,
        **constants,
    )
    x = new(z, batch, n, d, dtype=samples.dtype)
    traces = new(z, batch, dtype=torch.float64)
    constants["ROWS"] = block_of(n, 1, ROWS)
    launch(
        scale_rows,
        batch * ceil_div(n, constants["ROWS"]),
        (z, weights, inverse_norms, row_traces, x, traces),
        (n, d),
        TRACE_BLOCK=block_of(n, 16, 1024),
        **constants,
    )
    return Rows(samples, x, inverse_norms, projected, traces)


def matrix_of(rows: Rows) -> Tensor:
    """A^ [batch, m, m], symmetric to the bit, of trace one."""
    samples, x = rows.samples, rows.x
    batch, n, d = x.shape
    m, depth = (n, d) if samples.gram_side else (d, n)
    strides = (d, 1) if samples.gram_side else (1, d)  # of rows, of the depth

    def tiles(tile: int) -> int:
        side = ceil_div(m, tile)
        return side * (side + 1) // 2 * max(batch, 1)

    tile = tile_of(tiles, samples.dtype)
    splits = min(max(depth // 1024, 1), ceil_div(PROGRAMS, tiles(tile)))
    split_size = ceil_div(ceil_div(depth, splits), 64) * 64
    splits = ceil_div(depth, split_size)
    parts = new(x, splits, batch, m, m, dtype=samples.dtype)
    side = ceil_div(m, tile)
    launch(
        gram,
        splits * batch * side * side,
        (x, parts),
        (batch, m, depth, *strides, n * d, split_size),
        TILE=tile,
        CHUNK=64 if tile != 64 else 32,
    )
    return parts[0] if splits == 1 else parts.sum(0)
