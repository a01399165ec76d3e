"""log A^ by poles where a matrix does not fit the registers of a program, m > 128.

The symmetric sweep, a panel of 64 pivots at a time, for all poles of a sample at once, on the lower
triangles of matrices in memory. A panel is three launches:

    sweep_panels    sweeps the panel's diagonal block in the registers of one program a matrix, and
                    writes down each pivot and its column
    apply_panels    repeats those pivots on every other row of the panel's columns, in registers:
                    c_i and c_i / p of each pivot
    update_matrices subtracts c c^T / p, summed over the panel, from the rest: nearly all the work

Pivots are ordered largest first within a panel only. What makes low rank harmless all the same is a
bound that each row can keep by itself: exactly, c_i^2 <= p a_ii for a row not swept yet, and a c_i
that is larger is rounding and is cut down to that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vne_kernels._triton.launch import block_of, ceil_div, launch, new
from vne_kernels._triton.normalize import load_tile
from vne_kernels._triton.poles import CONSTANT, COUNT, pole_shift, pole_weight, rounding_of
from vne_kernels._triton.stages import MatrixFunction, with_unit_trace
from vne_kernels._triton.sweep import bounded, indicator, sweep

PANEL = 64


@triton.jit
def shift_matrices(
    a,  # [batch, m, m]
    matrices,  # [batch, poles, m, m] <- A^ + t I
    m,
    POLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = a.dtype.element_ty
    programs = tl.cdiv(m * m, BLOCK)  # of a matrix
    matrix = (tl.program_id(0) // programs).to(tl.int64)
    t = tl.sum(pole_shift(matrix % POLES + tl.zeros([1], tl.int64), dtype), axis=0)
    at = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    inside = at < m * m
    x = tl.load(a + matrix // POLES * m * m + at, mask=inside, other=0.0)
    x += tl.where(at // m == at % m, t, 0.0)
    tl.store(matrices + matrix * m * m + at, x, mask=inside)


@triton.jit
def sweep_panels(
    matrices,
    norms,  # [batch]: |A^|_F
    columns,  # [matrices, PANEL, PANEL] <- the panel's part of the column of each pivot
    inverses,  # [matrices, PANEL] <- 1 / p
    order,  # [matrices, PANEL] <- which row of the panel
    count,
    m,
    first,
    POLES: tl.constexpr,
    P: tl.constexpr,
    PANEL: tl.constexpr,
):
    dtype: tl.constexpr = matrices.dtype.element_ty
    matrix = tl.minimum(tl.program_id(0).to(tl.int64) * P + tl.arange(0, P), count - 1)
    size = tl.minimum(m - first, PANEL)
    places = tl.arange(0, PANEL)
    low = tl.maximum(places[:, None], places[None, :])  # only the lower triangle is in memory
    left = tl.minimum(places[:, None], places[None, :])
    corner = matrices + matrix[:, None, None] * m * m + first * (m + 1)
    x = tl.load(corner + (low * m + left)[None, :, :], mask=(low < size)[None, :, :], other=0.0)
    noise = rounding_of(tl.load(norms + matrix // POLES), dtype)
    floor = tl.maximum(pole_shift((matrix % POLES).to(tl.int32), dtype) / 2, noise)
    x = sweep(
        x,
        size,
        floor,
        noise,
        columns + matrix * PANEL * PANEL,
        inverses + matrix * PANEL,
        order + matrix * PANEL,
        P,
        PANEL,
        True,
    )
    own = (low == places[:, None]) & (low < size)
    tl.store(corner + (low * m + left)[None, :, :], x, mask=own[None, :, :])


@triton.jit
def apply_panels(
    matrices,
    columns,
    inverses,
    order,
    c,  # [matrices, PANEL, m] <- c_i of each pivot; 0 in the panel's own rows
    y,  # [matrices, PANEL, m] <- c_i / p
    count,
    m,
    first,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    PANEL: tl.constexpr,
):
    """A thread a row, its entries of the panel in registers: ROWS is the number of threads, for
    which Triton's layout is this one, and nothing passes between threads."""
    dtype: tl.constexpr = matrices.dtype.element_ty
    programs = tl.cdiv(m, ROWS)  # of P matrices
    matrix = (tl.program_id(0) // programs).to(tl.int64) * P + tl.arange(0, P)
    matrix = tl.minimum(matrix, count - 1)[:, None, None]
    rows = (tl.program_id(0) % programs * ROWS + tl.arange(0, ROWS))[None, None, :]
    places = tl.arange(0, PANEL)[None, :, None]
    size = tl.minimum(m - first, PANEL)
    in_panel = (rows >= first) & (rows < first + size)
    unswept = (rows >= first + size) & (rows < m)
    inside = (rows < m) & (in_panel == 0)
    # Swept rows, above the panel, are columns of the triangle in memory.
    row_stride = tl.where(rows < first, 1, m)
    place_stride = tl.where(rows < first, m, 1)
    own = matrices + matrix * m * m + (rows * row_stride + (first + places) * place_stride)
    mask = inside & (places < size) & (matrix < count)
    x = tl.load(own, mask=mask, other=0.0)
    diagonal = tl.load(matrices + matrix * m * m + rows * (m + 1), mask=unswept, other=0.0)
    diagonal = tl.maximum(diagonal, 0.0)
    for step in range(size):
        k = tl.load(order + matrix * PANEL + step)
        inverse = tl.load(inverses + matrix * PANEL + step)
        column = tl.load(columns + (matrix * PANEL + step) * PANEL + places)
        at_pivot = indicator(places == k, dtype)
        entry = tl.sum(x * at_pivot, axis=1, keep_dims=True)
        own_c = bounded(entry, tl.where(unswept, diagonal / inverse, float("inf")))
        own_y = own_c * inverse
        diagonal = tl.maximum(diagonal - own_c * own_y, 0.0)
        to = (matrix * PANEL + step) * m + rows
        tl.store(c + to, tl.where(inside, own_c, 0.0), mask=rows < m)
        tl.store(y + to, tl.where(inside, own_y, 0.0), mask=rows < m)
        x += at_pivot * (own_c - entry)
        x -= own_y * column
    tl.store(own, x, mask=mask)


@triton.jit
def update_matrices(
    matrices,
    c,
    y,
    m,
    size,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PANEL: tl.constexpr,
):
    tiles = tl.cdiv(m, TILE)  # on a side
    tile_row, tile_column = tl.program_id(0) // tiles % tiles, tl.program_id(0) % tiles
    if tile_column <= tile_row:
        matrix = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
        rows = tile_row * TILE + tl.arange(0, TILE)
        columns = tile_column * TILE + tl.arange(0, TILE)
        dtype: tl.constexpr = matrices.dtype.element_ty
        product = tl.zeros([TILE, TILE], dtype)
        for start in range(0, size, CHUNK):
            k = start + tl.arange(0, CHUNK)
            left = load_tile(c + matrix * PANEL * m, rows, m, 1, k, size, m)
            right = load_tile(y + matrix * PANEL * m, k, size, m, columns, m, 1)
            product = tl.dot(left, right, product, input_precision="ieee", out_dtype=dtype)
        inside = (rows < m)[:, None] & (columns < m)[None, :]
        at = matrices + matrix * m * m + rows[:, None] * m + columns[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) - product, mask=inside)


@triton.jit
def sum_poles(
    a,
    matrices,  # [batch, poles, m, m], lower triangles: -(A^ + t I)^-1
    terms,  # [batch, m, m] <- sum of w_k times them
    inner,  # [batch, programs] <- a program's part in <A^, terms>
    m,
    POLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = a.dtype.element_ty
    programs = tl.cdiv(m * m, BLOCK)  # of a sample
    sample = (tl.program_id(0) // programs).to(tl.int64)
    at = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    row, column = at // m, at % m
    inside = (at < m * m) & (column <= row)
    total = tl.zeros([BLOCK], dtype)
    for pole in range(POLES):
        weight = pole_weight(pole + tl.zeros([1], tl.int32), dtype)
        matrix = matrices + (sample * POLES + pole) * m * m
        total += weight * tl.load(matrix + at, mask=inside, other=0.0)
    tl.store(terms + sample * m * m + at, total, mask=inside)
    tl.store(terms + sample * m * m + column * m + row, total, mask=inside & (column < row))
    product = total * tl.load(a + sample * m * m + at, mask=inside, other=0.0)
    product *= tl.where(row == column, 1.0, 2.0)
    part = tl.sum(product.to(tl.float64), axis=0)
    tl.store(inner + tl.program_id(0), part)


def sweep_matrices(matrices: Tensor, norms: Tensor, poles: int) -> None:
    """The lower triangles of matrices [batch poles, m, m] <- -(matrix)^-1."""
    count, m, _ = matrices.shape
    pivots = (
        new(matrices, count, PANEL, PANEL, dtype=matrices.dtype),  # columns
        new(matrices, count, PANEL, dtype=matrices.dtype),  # inverses
        new(matrices, count, PANEL, dtype=torch.int32),  # order
    )
    c = new(matrices, count, PANEL, m, dtype=matrices.dtype)
    y = new(matrices, count, PANEL, m, dtype=matrices.dtype)
    of_program = block_of(count, 1, 1, interpreted=16)
    rows = block_of(m, 128, 128)
    tile = block_of(m, 32, 64 if matrices.dtype == torch.float32 else 32)
    tiles = ceil_div(m, tile)
    first = 0
    while first < m:  # not a range, for which torch.compile would take m for a constant
        launch(
            sweep_panels,
            ceil_div(count, of_program),
            (matrices, norms, *pivots),
            (count, m, first),
            POLES=poles,
            P=of_program,
            PANEL=PANEL,
        )
        launch(
            apply_panels,
            ceil_div(count, of_program) * ceil_div(m, rows),
            (matrices, *pivots, c, y),
            (count, m, first),
            P=of_program,
            ROWS=rows,
            PANEL=PANEL,
        )
        launch(
            update_matrices,
            count * tiles * tiles,
            (matrices, c, y),
            (m, min(PANEL, m - first)),
            TILE=tile,
            CHUNK=block_of(PANEL, 16, 16, interpreted=PANEL),
            PANEL=PANEL,
        )
        first += PANEL


def log_by_blocked_poles(a: Tensor) -> MatrixFunction:
    """log A^ + log(m) I of matrices [batch, m, m] of trace one but for rounding."""
    a = with_unit_trace(a)
    batch, m, _ = a.shape
    poles = COUNT[a.dtype]
    block = block_of(m * m, 1024, 1024)
    programs = ceil_div(m * m, block)
    matrices = new(a, batch * poles, m, m, dtype=a.dtype)
    constants = {"POLES": poles, "BLOCK": block}
    launch(shift_matrices, batch * poles * programs, (a, matrices), (m,), **constants)
    sweep_matrices(matrices, torch.linalg.vector_norm(a, dim=(1, 2)), poles)
    terms = new(a, batch, 1, m, m, dtype=a.dtype)
    inner = new(a, batch, programs, dtype=torch.float64)
    launch(sum_poles, batch * programs, (a, matrices, terms, inner), (m,), **constants)
    return MatrixFunction(terms, inner, CONSTANT[a.dtype])
