"""From W, a function of A^, to gradients in z and in the weights: equations (3), (4), (5), (11).

With h = W X^, row i of z receives

    sqrt(p_i tau) |z_i|^-1 factor (h_i - (h_i . x_i) x_i / |x_i|^2),   x_i = row i of X^;

the projection removes every multiple of the identity from W, which is why a centered W may be used.
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
from vne_kernels._triton.stages import MatrixGradient, Rows

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
        (left, right, result),
        (row_count, depth, column_count, *left.stride()[1:], *right.stride()[1:]),
        TILE=tile,
        CHUNK=block_of(depth, 32, 32),
    )
    return result


# ---- rows of the gradient ------------------------------------------------------------------------


@triton.jit
def project_rows(
    h,  # [batch n, d]: W X^
    grad_z,  # [batch n, d] <- ; not h, as threads that share a number would read what one wrote
    grad_weights,  # [batch n] <- or None
    x,  # [batch n, d]: X^
    weights,  # [batch n] or None
    inverse_norms,  # [batch n]
    projected,  # [batch n]
    traces,  # [batch]
    identities,  # [batch] or None: of W + identity I
    row_count,
    n,
    d,
    m,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = grad_z.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < row_count

    # h . x and |x|^2 of each row
    radial = tl.zeros([ROWS], dtype)
    square = tl.zeros([ROWS], dtype)
    for start in range(0, d, BLOCK):
        h_part = load_rows(h, rows, row_count, start, d, BLOCK)
        own = load_rows(x, rows, row_count, start, d, BLOCK)
        radial += tl.sum(h_part * own, axis=1)
        square += tl.sum(own * own, axis=1)

    # the factors of each row
    trace = tl.load(traces + rows // n, mask=inside, other=0.0)
    regular = is_regular(trace)
    irregular = tl.where(trace == 0, 0.0, float("nan")).to(dtype)
    root = root_weights(weights, rows, row_count, n)
    inverse = tl.load(inverse_norms + rows, mask=inside, other=0.0)
    on_sphere = tl.load(projected + rows, mask=inside, other=0) != 0
    # |x|^2 vanishes with a weight that is no normal number: there is nothing to project on.
    absent = (root == 0) | (inverse == 0) | (on_sphere & (square == 0))
    identity = tl.zeros_like(trace)
    if identities is not None:
        identity = tl.load(identities + rows // n, mask=inside, other=0.0)
    factor = tl.full([1], FACTOR, tl.float64)
    outer = factor * root * tl.sqrt(trace) * inverse
    own_part = tl.where(on_sphere, -radial / square, identity.to(dtype))
    # Where W is a number it is exactly 0, without the rounding of the projection.
    is_zero = absent | (on_sphere & (m == 1))

    # rows of the gradient
    for start in range(0, d, BLOCK):
        h_part = load_rows(h, rows, row_count, start, d, BLOCK)
        own = load_rows(x, rows, row_count, start, d, BLOCK)
        tangent = (h_part + own_part[:, None] * own).to(tl.float64)
        gradient = tl.where(is_zero[:, None], 0.0, outer[:, None] * tangent).to(dtype)
        gradient = tl.where(regular[:, None], gradient, irregular[:, None])
        store_rows(grad_z, rows, row_count, start, d, gradient, BLOCK)

    # the gradient in the weights
    if grad_weights is not None:
        # d/dp_i = factor / 2 u_i^T (W + identity I) u_i
        of_u = factor / 2 * trace / (root * root)
        value = of_u * (radial.to(tl.float64) + identity * square)
        value = tl.where(absent, 0.0, value).to(dtype)
        tl.store(grad_weights + rows, tl.where(regular, value, irregular), mask=inside)


def gradient(rows: Rows, of_x: MatrixGradient) -> tuple[Tensor, Tensor | None]:
    """dF/dz [batch, n, d] and dF/dp [batch, n] of a function F, from its gradient in X."""
    samples = rows.samples
    batch, n, d = rows.x.shape
    h = product(of_x.w, rows.x) if samples.gram_side else product(rows.x, of_x.w)
    grad_z = torch.empty_like(h)
    weights = samples.weights
    grad_weights = None if weights is None else new(rows.x, batch, n, dtype=samples.dtype)
    measured = rows.inverse_norms, rows.projected, rows.traces, of_x.identity
    programs, constants = row_grid(rows.x)
    launch(
        project_rows,
        programs,
        (h, grad_z, grad_weights, rows.x, weights, *measured),
        (batch * n, n, d, samples.m),
        FACTOR=of_x.factor,
        **constants,
    )
    return grad_z, grad_weights
