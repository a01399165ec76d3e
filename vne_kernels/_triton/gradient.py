"""From a function W of A^ to S and to the gradient in z: equations (3), (4), (5), (10), (11).

With h = W X^, row i of z receives

    sqrt(p_i tau) |z_i|^-1 factor (h_i - (h_i . x_i) x_i / |x_i|^2),   x_i = row i of X^;

the projection removes every multiple of the identity from W, which is why a centred W may be used.
A row that was not divided by its own norm is not projected and gets the identity back. h_i . x_i is
taken from h itself: sum_j W_ij A_ij differs by the rounding of A, which a large W magnifies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vne_kernels._triton.launch import block_of, ceil_div, launch, new, tile_of
from vne_kernels._triton.normalize import (
    is_regular,
    load_rows,
    load_tile,
    root_weights,
    row_grid,
    store_rows,
)
from vne_kernels._triton.stages import MatrixFunction, Rows

# ---- S -------------------------------------------------------------------------------------------


@triton.jit
def write_entropy(
    inner,  # [batch, parts]: their sum is <A^, sum of terms>
    traces,  # [batch]
    entropy,  # [batch] <- S
    parts,
    m,
    CONSTANT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """S of `MatrixFunction`s: log m - <A^, W>, and <A^, I> is one."""
    sample = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(inner + sample * parts + at, mask=at < parts, other=0.0)
    one = tl.full([1], 1.0, tl.float64)
    trace = one * tl.load(traces + sample)
    log_m = tl.log(one * m)
    value = -tl.sum(sums, axis=0)
    if CONSTANT is None:
        value += log_m
    else:
        value -= tl.full([1], CONSTANT, tl.float64)
    value = tl.minimum(tl.maximum(value, 0.0), log_m)
    # A trace that is one but for rounding is one.
    tolerance = 9.5367431640625e-07
    if entropy.dtype.element_ty == tl.float64:
        tolerance = 1.7763568394002505e-15
    is_one = tl.abs(trace - 1) <= tolerance
    result = tl.where(is_one, value, trace * (value - tl.log(trace)))
    result = tl.where(is_regular(trace), result, tl.where(trace == 0, 0.0, float("nan")))
    tl.store(entropy + sample + tl.arange(0, 1), result.to(entropy.dtype.element_ty))


def entropy_of(w: MatrixFunction, traces: Tensor) -> Tensor:
    """S [batch]."""
    batch, parts = w.inner.shape
    entropy = new(w.inner, batch, dtype=w.terms.dtype)
    launch(
        write_entropy,
        batch,
        w.inner,
        traces,
        entropy,
        parts,
        w.terms.shape[-1],
        CONSTANT=w.constant,
        BLOCK=128,
    )
    return entropy


# ---- W -------------------------------------------------------------------------------------------


@triton.jit
def sum_terms(
    terms,  # [batch, COUNT, m, m]
    w,  # [batch, m, m] <- sum of terms + (CONSTANT + log m) I
    m,
    CONSTANT: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    programs = tl.cdiv(m * m, BLOCK)  # of a sample
    sample = (tl.program_id(0) // programs).to(tl.int64)
    at = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    inside = at < m * m
    total = tl.zeros([BLOCK], w.dtype.element_ty)
    for k in range(COUNT):
        total += tl.load(terms + (sample * COUNT + k) * m * m + at, mask=inside, other=0.0)
    identity = tl.full([1], CONSTANT, tl.float64)
    identity += tl.log(tl.full([1], 1.0, tl.float64) * m)
    total += tl.where(at // m == at % m, identity.to(w.dtype.element_ty), 0.0)
    tl.store(w + sample * m * m + at, total, mask=inside)


def summed(w: MatrixFunction) -> Tensor:
    """W [batch, m, m]."""
    batch, count, m, _ = w.terms.shape
    if w.constant is None:
        return w.terms[:, 0]
    result = new(w.terms, batch, m, m, dtype=w.terms.dtype)
    block = block_of(m * m, 512, 512)
    launch(
        sum_terms,
        batch * ceil_div(m * m, block),
        w.terms,
        result,
        m,
        CONSTANT=w.constant,
        COUNT=count,
        BLOCK=block,
    )
    return result


# ---- products ------------------------------------------------------------------------------------


@triton.jit
def multiply(
    left,  # [batch, rows, depth]
    right,  # [batch, depth, columns]
    product,  # [batch, rows, columns], contiguous
    row_count,
    depth,
    column_count,
    left_row_stride,
    left_column_stride,
    right_row_stride,
    right_column_stride,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tile_rows, tile_columns = tl.cdiv(row_count, TILE), tl.cdiv(column_count, TILE)
    sample = (tl.program_id(0) // tile_columns // tile_rows).to(tl.int64)
    left += sample * row_count * depth
    right += sample * depth * column_count
    rows = tl.program_id(0) // tile_columns % tile_rows * TILE + tl.arange(0, TILE)
    columns = tl.program_id(0) % tile_columns * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE, TILE], product.dtype.element_ty)
    for start in range(0, depth, CHUNK):
        k = start + tl.arange(0, CHUNK)
        a = load_tile(left, rows, row_count, left_row_stride, k, depth, left_column_stride)
        b = load_tile(right, k, depth, right_row_stride, columns, column_count, right_column_stride)
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=product.dtype.element_ty)
    at = rows[:, None].to(tl.int64) * column_count + columns[None, :]
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    tl.store(product + sample * row_count * column_count + at, total, mask=inside)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32 FMA, of matrices [batch, ...] that lie densely, in either order."""
    batch, row_count, depth = left.shape
    column_count = right.shape[2]
    result = new(left, batch, row_count, column_count, dtype=left.dtype)

    def tiles(tile: int) -> int:
        return ceil_div(row_count, tile) * ceil_div(column_count, tile) * batch

    tile = tile_of(tiles, left.dtype)
    launch(
        multiply,
        tiles(tile),
        left,
        right,
        result,
        row_count,
        depth,
        column_count,
        *left.stride()[1:],
        *right.stride()[1:],
        TILE=tile,
        CHUNK=block_of(depth, 32, 32),
    )
    return result


# ---- rows of the gradient ------------------------------------------------------------------------


@triton.jit
def project_rows(
    h,  # [batch n, d]
    grad_z,  # [batch n, d] <- ; not h, as threads that share a number would read what one wrote
    grad_weights,  # [batch n] <- or None
    x,  # [batch n, d]: X^
    weights,
    inverse_norms,
    projected,
    traces,
    row_count,
    n,
    d,
    m,
    FACTOR: tl.constexpr,
    OF_ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = grad_z.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < row_count
    radial = tl.zeros([ROWS], dtype)
    square = tl.zeros([ROWS], dtype)
    for start in range(0, d, BLOCK):
        h_part = load_rows(h, rows, row_count, start, d, BLOCK)
        own = load_rows(x, rows, row_count, start, d, BLOCK)
        radial += tl.sum(h_part * own, axis=1)
        square += tl.sum(own * own, axis=1)

    trace = tl.load(traces + rows // n, mask=inside, other=0.0)
    regular = is_regular(trace)
    irregular = tl.where(trace == 0, 0.0, float("nan")).to(dtype)
    root = root_weights(weights, rows, row_count, n)
    inverse = tl.load(inverse_norms + rows, mask=inside, other=0.0)
    on_sphere = tl.load(projected + rows, mask=inside, other=0) != 0
    # |x|^2 vanishes with a weight that is no normal number: there is nothing to project on.
    absent = (root == 0) | (inverse == 0) | (on_sphere & (square == 0))
    identity = tl.zeros_like(trace)
    if OF_ENTROPY:
        identity = 1 + tl.log(trace / m)
    factor = tl.full([1], FACTOR, tl.float64)
    outer = factor * root * tl.sqrt(trace) * inverse
    own_part = tl.where(on_sphere, -radial / square, identity.to(dtype))
    # Where W is a number it is exactly 0, without the rounding of the projection.
    is_zero = absent | (on_sphere & (m == 1))
    for start in range(0, d, BLOCK):
        h_part = load_rows(h, rows, row_count, start, d, BLOCK)
        own = load_rows(x, rows, row_count, start, d, BLOCK)
        tangent = (h_part + own_part[:, None] * own).to(tl.float64)
        gradient = tl.where(is_zero[:, None], 0.0, outer[:, None] * tangent).to(dtype)
        gradient = tl.where(regular[:, None], gradient, irregular[:, None])
        store_rows(grad_z, rows, row_count, start, d, gradient, BLOCK)
    if grad_weights is not None:
        # d/dp_i = factor / 2 u_i^T (W + identity I) u_i
        of_u = factor / 2 * trace / (root * root)
        value = of_u * (radial.to(tl.float64) + identity * square)
        value = tl.where(absent, 0.0, value).to(dtype)
        tl.store(grad_weights + rows, tl.where(regular, value, irregular), mask=inside)


def gradient(
    rows: Rows, w: Tensor, factor: float, *, of_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """dS/dz [batch, n, d] and dS/dp [batch, n] of a scalar S whose dS/dX is factor W X;
    `of_entropy`, factor (log A + I) X by W = log A^ + log(m) I.
    """
    samples = rows.samples
    batch, n, d = rows.x.shape
    h = product(w, rows.x) if samples.gram_side else product(rows.x, w)
    grad_z = torch.empty_like(h)
    weights = samples.weights
    grad_weights = None if weights is None else new(rows.x, batch, n, dtype=samples.dtype)
    programs, own_rows, block = row_grid(rows.x)
    launch(
        project_rows,
        programs,
        h,
        grad_z,
        grad_weights,
        rows.x,
        weights,
        rows.inverse_norms,
        rows.projected,
        rows.traces,
        batch * n,
        n,
        d,
        samples.m,
        FACTOR=factor,
        OF_ENTROPY=of_entropy,
        ROWS=own_rows,
        BLOCK=block,
    )
    return grad_z, grad_weights
