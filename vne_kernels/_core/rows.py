"""Rows and their weights: what functions, accumulator and metrics have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from vne_kernels._core import checks, transforms
from vne_kernels._core.dtypes import compute_dtype, to_float64

_ops = torch.ops.vne_kernels

BLOCK_ROWS = 2048
"""Rows of one product. Fewer, and adding d x d numbers in float64 costs more than a tenth of it;
more, and a block leaves the cache. Its float32 sums stay short."""


def relative(weights: Tensor | None) -> Tensor | None:
    """weights (..., n) over their sum, or 0 where that is 0; NaN in a sample with a negative one.

    An absent sample, of weight 0, has the gradient 0.
    """
    if weights is None:
        return None
    precise = torch.where(weights == 0, 0, to_float64(weights))
    total = precise.sum(-1, keepdim=True)
    valid = (precise >= 0).all(-1, keepdim=True)
    divisor = torch.where(valid, torch.where(total == 0, 1, total), torch.nan)
    return (precise / divisor).to(weights)


def probabilities(z: Tensor, normalize: bool, weights: Tensor | None) -> Tensor | None:
    """p of rho = U^T diag(p) U, (..., n), of arguments that this checks; None: 1/n each.

    Weights are relative where rows are normalized, and taken as given otherwise.
    """
    checks.samples("z", z)
    checks.normalize(normalize)
    w = checks.weights(weights, z)
    return relative(w) if normalize else w


def check_rows(
    z: Tensor, weights: Tensor | None, total: Tensor, double: bool
) -> tuple[Tensor, Tensor | None]:
    """z as (rows, d) and w as (rows,) float64, if they can be added to the d x d matrix `total`.

    The weights are rounded to the dtype of the products, as those see them.
    """
    transforms.refuse(
        "DensityAccumulator and the metrics have no derivatives of torch.func and forward mode; "
        "vn_entropy and the scores of all rows at once have",
        z,
    )
    checks.samples("z", z, may_be_empty=True)
    d = total.shape[-1]
    if z.shape[-1] != d:
        raise checks.wrong("z", f"(..., n, {d})", z.shape)
    if z.device != total.device:
        raise checks.wrong("z", f"on {total.device}, as the sum is", z.device)
    w = checks.weights(weights, z)
    if weights is not None and w is not None:
        exact = weights.to(z.device, torch.float64).expand(z.shape[:-1])
        w = (exact if double else w.double()).flatten()
    return z.flatten(0, -2), w


def add_rows(
    total: Tensor, x: Tensor, w: Tensor | None, *, normalize: bool, eps: float, double: bool
) -> None:
    """total += sum_i w_i u_i u_i^T, by blocks.

    Args:
        total: (d, d) float64, added to in place.
        x: (n, d), n from 0 on.
        w: (n,), not negative; None: 1 each.
        normalize, eps, double: as for `vne_kernels.DensityAccumulator`.
    """
    for begin in range(0, len(x), BLOCK_ROWS):
        block = x[begin : begin + BLOCK_ROWS]
        u = block.double() if double else block
        dtype = compute_dtype(u.dtype)
        if w is None:
            p = torch.ones(len(u), dtype=dtype, device=u.device)
        else:
            p = w[begin : begin + BLOCK_ROWS].to(dtype)
        total += _ops.density(u, p, normalize, eps)


def density_of(total: Tensor, weight: Tensor) -> Tensor:
    """rho, (d, d), of the sum and the weight of all rows; zeros if that is 0."""
    return total / torch.where(weight == 0, 1, weight)
