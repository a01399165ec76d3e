"""log A^ = c0 I - sum_k w_k (A^ + t_k I)^-1, equation (6), for m <= 128: one program a pole.

The poles do not depend on each other: one sample of 16 poles occupies 16 multiprocessors for the
time of one inverse, m pivots that do depend on each other (sweep.py). Summing the terms is left to
the next stage. A program holds its matrix in registers from the load to the store.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vne_kernels._core.ops import POLE_TABLE
from vne_kernels._triton.launch import block_of, ceil_div, is_interpreted, launch, new, power_of_2
from vne_kernels._triton.stages import MatrixFunction
from vne_kernels._triton.sweep import diagonal_of, sweep

CONSTANT = {dtype: table[0][0] for dtype, table in POLE_TABLE.items()}
COUNT = {dtype: len(table) - 1 for dtype, table in POLE_TABLE.items()}
# Globals of compiled kernels must be constexpr; the interpreter takes them as Python has them.
_constant = (lambda values: values) if is_interpreted else tl.constexpr
_T32, _W32 = map(_constant, zip(*POLE_TABLE[torch.float32][1:], strict=True))
_T64, _W64 = map(_constant, zip(*POLE_TABLE[torch.float64][1:], strict=True))


@triton.jit
def pick(pole, TABLE32: tl.constexpr, TABLE64: tl.constexpr, DTYPE: tl.constexpr):
    """TABLE[pole] of each of [P] poles: a table in the code needs no memory of its own."""
    TABLE: tl.constexpr = TABLE64 if DTYPE == tl.float64 else TABLE32
    value = tl.full([1], 0.0, DTYPE)
    for k in tl.static_range(len(TABLE)):
        value = tl.where(pole == k, tl.full([1], TABLE[k], DTYPE), value)
    return value


@triton.jit
def pole_shift(pole, DTYPE: tl.constexpr):
    """t_k."""
    return pick(pole, _T32, _T64, DTYPE)


@triton.jit
def pole_weight(pole, DTYPE: tl.constexpr):
    """w_k."""
    return pick(pole, _W32, _W64, DTYPE)


@triton.jit
def rounding_of(norm, DTYPE: tl.constexpr):
    """4 u |A|_F: what rounding may have put into an entry of A."""
    if DTYPE == tl.float64:
        return norm * 4.440892098500626e-16
    else:
        return norm * 2.384185791015625e-07


@triton.jit
def sweep_poles(
    a,  # [batch, m, m]
    terms,  # [batch, poles, m, m] <- -w_k (A^ + t_k I)^-1
    inner,  # [batch, poles] <- <A^, term>
    count,  # batch poles
    m,
    POLES: tl.constexpr,
    P: tl.constexpr,  # matrices of a program
    SIZE: tl.constexpr,
):
    # load A^
    dtype: tl.constexpr = a.dtype.element_ty
    matrix = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    pole = (matrix % POLES).to(tl.int32)
    places = tl.arange(0, SIZE)
    inside = (places < m)[None, :, None] & (places < m)[None, None, :]
    inside = inside & (matrix < count)[:, None, None]
    at = (places[:, None] * m + places[None, :])[None, :, :]
    own_a = a + (matrix // POLES)[:, None, None] * m * m + at
    x = tl.load(own_a, mask=inside, other=0.0)
    # Of trace one again, for r(1) = 0 to hold where all there is is one eigenvalue.
    trace = tl.sum(tl.sum(diagonal_of(x, SIZE), axis=2), axis=1)
    scale = tl.where(trace > 0, 1 / trace, 0.0)
    x *= scale[:, None, None]
    norm = tl.sqrt(tl.sum(tl.sum(x * x, axis=2), axis=1))

    # sweep A^ + t I
    t = pole_shift(pole, dtype)
    noise = rounding_of(norm, dtype)
    on_diagonal = (places[:, None] == places[None, :])[None, :, :]
    x += tl.where(on_diagonal, t[:, None, None], 0.0)
    x = sweep(x, m, tl.maximum(t / 2, noise), noise, None, None, None, P, SIZE, False)

    # store the term and its product with A^
    x *= pole_weight(pole, dtype)[:, None, None]
    tl.store(terms + matrix[:, None, None] * m * m + at, x, mask=inside)
    # A^ once more, from the cache, as the sweep needed the registers.
    x *= tl.load(own_a, mask=inside, other=0.0)
    product = tl.sum(tl.sum(x, axis=2).to(tl.float64), axis=1) * scale
    tl.store(inner + matrix, product, mask=matrix < count)


WORKSPACE_BYTES = 2**30
"""Of one matrix a pole and sample; a larger batch is taken in parts."""


def in_waves(log_by: Callable[[Tensor], MatrixFunction], a: Tensor) -> MatrixFunction:
    """`log_by` of so many samples at a time, each wave's terms added up before the next."""
    batch, m, _ = a.shape
    wave = max(WORKSPACE_BYTES // (COUNT[a.dtype] * m * m * a.element_size()), 1)
    if batch <= wave:
        return log_by(a)
    terms, inner = [], []
    for part in a.split(wave):
        w = log_by(part)
        terms.append(w.terms.sum(1, keepdim=True))
        inner.append(w.inner)
    return MatrixFunction(torch.cat(terms), torch.cat(inner), CONSTANT[a.dtype])


LARGEST = 128
"""The largest m of which a program holds the matrix in registers."""

WARPS = {16: (1,), 32: (1, 2, 4), 64: (2, 4, 8), 128: (4, 8, 16)}
"""By the size that m is rounded up to, twice as many in float64: few warps share what passes
between threads at each pivot, many share the work, and which is best depends on the GPU. Nothing
else is tuned at the first call. Triton keeps the choice on disk."""


@cache
def tuned_sweep(size: int, dtype: torch.dtype) -> Any:
    """The kernel `sweep_poles` for matrices of this size."""
    if is_interpreted:
        return sweep_poles
    factor = 2 if dtype == torch.float64 else 1
    configs = [triton.Config({}, num_warps=factor * warps) for warps in WARPS[size]]
    return triton.autotune(configs, key=[], cache_results=True)(sweep_poles)


def log_by_poles(a: Tensor) -> MatrixFunction:
    """log A^ + log(m) I of matrices [batch, m, m] of trace one but for rounding."""
    batch, m, _ = a.shape
    poles = COUNT[a.dtype]
    size = power_of_2(m, 16)
    count = batch * poles
    of_program = block_of(count, 1, 1, interpreted=max(2**20 // size**2, 1))
    terms = new(a, batch, poles, m, m, dtype=a.dtype)
    inner = new(a, batch, poles, dtype=torch.float64)
    launch(
        tuned_sweep(size, a.dtype),
        ceil_div(count, of_program),
        (a, terms, inner),
        (count, m),
        POLES=poles,
        P=of_program,
        SIZE=size,
    )
    return MatrixFunction(terms, inner, CONSTANT[a.dtype])
