"""The cosine term of the difference of entropies, equation (8)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vne_kernels._core.dtypes import compute_dtype
from vne_kernels._triton.launch import launch, new
from vne_kernels._triton.normalize import load_rows, row_grid, row_norms, store_rows, unit_factor

ROW_STATS = 4
"""What the backward needs of row i: 1 / |z1_i|, 1 / |z2_i|, and the projections: cos_i, or 0 for a
row shorter than eps, which is divided by a constant."""


@triton.jit
def measure_views(
    z1,  # [batch n, d]
    z2,
    cosines,  # [batch n] <- cos_i, float64
    row_stats,  # [batch, 4, n]
    row_count,
    n,
    d,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = row_stats.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    norm1 = row_norms(z1, rows, row_count, d, ROWS, BLOCK)
    norm2 = row_norms(z2, rows, row_count, d, ROWS, BLOCK)
    inverse1, inverse2 = unit_factor(norm1, EPS), unit_factor(norm2, EPS)
    cosine = tl.zeros([ROWS], tl.float64)
    for start in range(0, d, BLOCK):
        u1 = load_rows(z1, rows, row_count, start, d, BLOCK).to(tl.float64) * inverse1[:, None]
        u2 = load_rows(z2, rows, row_count, start, d, BLOCK).to(tl.float64) * inverse2[:, None]
        cosine += tl.sum(u1 * u2, axis=1)
    inside = rows < row_count
    tl.store(cosines + rows, cosine, mask=inside)
    stats = row_stats + rows // n * 4 * n + rows % n
    eps = tl.full([1], EPS, tl.float64)
    tl.store(stats, inverse1.to(dtype), mask=inside)
    tl.store(stats + n, inverse2.to(dtype), mask=inside)
    tl.store(stats + 2 * n, tl.where(norm1 > eps, cosine, 0.0).to(dtype), mask=inside)
    tl.store(stats + 3 * n, tl.where(norm2 > eps, cosine, 0.0).to(dtype), mask=inside)


def cosine_terms(z1: Tensor, z2: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The mean cosine [batch] of views [batch, n, d], and row_stats [batch, 4, n]; both NaN
    throughout a sample that is not finite.
    """
    batch, n, d = z1.shape
    programs, constants = row_grid(z1)
    dtype = compute_dtype(z1.dtype)
    cosines = new(z1, batch, n, dtype=torch.float64)
    row_stats = new(z1, batch, ROW_STATS, n, dtype=dtype)
    tensors = z1, z2, cosines, row_stats
    launch(measure_views, programs, tensors, (batch * n, n, d), EPS=eps, **constants)
    mean = cosines.mean(-1)
    return mean.to(dtype), torch.where(mean.isnan()[:, None, None], torch.nan, row_stats)


@triton.jit
def add_gradients(
    grad_entropy,  # [batch]
    grad_cosine,  # [batch]
    z1,
    z2,
    entropy_grad,  # [batch n, d]
    row_stats,
    grad_z1,  # [batch n, d]
    grad_z2,
    row_count,
    n,
    d,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_z1 <- grad_entropy dS/dz1 + scale r1 (r2 z2 - projection_1 r1 z1), and its mirror image;
    scale is grad_cosine / n. A zero row has r = 0.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < row_count
    stats = row_stats + rows // n * 4 * n + rows % n
    r1 = tl.load(stats, mask=inside, other=0.0).to(tl.float64)
    r2 = tl.load(stats + n, mask=inside, other=0.0).to(tl.float64)
    projection1 = tl.load(stats + 2 * n, mask=inside, other=0.0)[:, None]
    projection2 = tl.load(stats + 3 * n, mask=inside, other=0.0)[:, None]
    scale = tl.load(grad_cosine + rows // n, mask=inside, other=0.0).to(tl.float64) / n
    outer1, outer2 = (scale * r1)[:, None], (scale * r2)[:, None]
    of_entropy = tl.load(grad_entropy + rows // n, mask=inside, other=0.0)[:, None]
    for start in range(0, d, BLOCK):
        # Not z by the product of two factors, which may be below the range of float64.
        u1 = load_rows(z1, rows, row_count, start, d, BLOCK).to(tl.float64) * r1[:, None]
        u2 = load_rows(z2, rows, row_count, start, d, BLOCK).to(tl.float64) * r2[:, None]
        s = load_rows(entropy_grad, rows, row_count, start, d, BLOCK)
        of_z1 = outer1 * (u2 - projection1 * u1) + of_entropy * s
        store_rows(grad_z1, rows, row_count, start, d, of_z1, BLOCK)
        store_rows(grad_z2, rows, row_count, start, d, outer2 * (u1 - projection2 * u2), BLOCK)


def cosine_gradients(
    grad_entropy: Tensor,
    grad_cosine: Tensor,
    z1: Tensor,
    z2: Tensor,
    entropy_grad: Tensor,
    row_stats: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of grad_entropy S(z1) + grad_cosine mean_i cos_i in both views [batch, n, d]."""
    batch, n, d = z1.shape
    programs, constants = row_grid(z1)
    grad_z1 = torch.empty_like(entropy_grad)
    grad_z2 = torch.empty_like(entropy_grad)
    given = grad_entropy, grad_cosine, z1, z2, entropy_grad, row_stats
    launch(add_gradients, programs, (*given, grad_z1, grad_z2), (batch * n, n, d), **constants)
    return grad_z1, grad_z2
