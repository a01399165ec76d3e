"""The inverse of symmetric positive definite matrices by pivots, in registers.

"Symmetric sweep" of csrc/README.md, (7): with c the column of the pivot k and p = a_kk, a sweep is
the masked rank-one update a_ij <- a_ij - c'_i c'_j / p, c'_k = p - 1 and otherwise c' = c. Row and
column k come out as c / p by themselves; the diagonal, which would not, is kept apart.

Pivots are taken largest first, and what only rounding can have made is repaired: the README says
why a floor alone does not do.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def diagonal_of(a, SIZE: tl.constexpr):
    """[P, 1, SIZE] of matrices a [P, SIZE, SIZE]."""
    places = tl.arange(0, SIZE)
    on_diagonal = (places[:, None] == places[None, :])[None, :, :]
    return tl.sum(tl.where(on_diagonal, a, 0.0), axis=1, keep_dims=True)


@triton.jit
def indicator(condition, DTYPE: tl.constexpr):
    """1 where it holds, else 0. To add up a row by products with it takes one instruction an entry,
    by a select two."""
    return tl.where(condition, 1.0, 0.0).to(DTYPE)


@triton.jit
def bounded(column, limit):
    """c_i, where c_i^2 is beyond its limit cut down to it."""
    root = tl.sqrt(limit)
    return tl.where(column * column > limit, tl.where(column < 0, -root, root), column)


@triton.jit
def sweep(
    a,  # [P, SIZE, SIZE], zero from row and column `size` on
    size,
    floor,  # [P], the least pivot, not below `noise`
    noise,  # [P], what rounding may have put into an entry
    columns,  # if RECORD: [P] pointers to [SIZE, SIZE] <- c' of each pivot
    inverses,  # to [SIZE] <- 1 / p
    order,  # to [SIZE] <- k
    P: tl.constexpr,
    SIZE: tl.constexpr,
    RECORD: tl.constexpr,
):
    """-(a)^-1 in the first `size` rows and columns."""
    rows, places = tl.arange(0, SIZE)[None, :, None], tl.arange(0, SIZE)[None, None, :]
    floor, noise = floor[:, None, None], noise[:, None, None]
    diagonal = diagonal_of(a, SIZE)
    unswept = places + tl.zeros_like(diagonal).to(tl.int32) < size
    for step in range(size):
        pivot, k = tl.max(
            tl.where(unswept, diagonal, float("-inf")),
            axis=2,
            return_indices=True,
            keep_dims=True,
        )
        column = tl.sum(a * indicator(rows == k, a.dtype), axis=1, keep_dims=True)
        raised = tl.maximum(pivot, floor)
        inverse = 1 / raised
        # c_i^2 <= p a_ii holds exactly for what has not been swept; what is beyond is rounding.
        limit = raised * tl.maximum(diagonal, 0.0)
        is_noise = tl.where(unswept, pivot, float("inf")) < 16 * noise
        column = bounded(column, tl.where(is_noise, limit, float("inf")))
        unswept = unswept & (places != k)
        diagonal = tl.where(places == k, -inverse, diagonal - column * inverse * column)
        column = tl.where(places == k, raised - 1, column)
        a -= tl.reshape(column, [P, SIZE])[:, :, None] * (column * inverse)
        if RECORD:
            tl.store(columns[:, None, None] + step * SIZE + places, column)
            tl.store(inverses[:, None, None] + step, inverse)
            tl.store(order[:, None, None] + step, k)
    return tl.where(rows == places, diagonal, a)
