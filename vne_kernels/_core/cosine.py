"""The mean cosine of pairs of rows, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vne_kernels._core.dtypes import compute_dtype, to_float64


def mean_cosine(z1: Tensor, z2: Tensor, p: Tensor | None, eps: float) -> Tensor:
    """sum_i p_i cos(z1_i, z2_i), (...), in plain torch; the mean where p is None.

    The operators have it fused with the entropy: for all rows alike, and in reverse mode.
    """
    # An absent row may hold anything.
    absent = (z1.new_zeros(()) if p is None else p == 0).to(torch.bool).unsqueeze(-1)
    views = [torch.where(absent, 0, to_float64(z)) for z in (z1, z2)]

    def unit(z: Tensor) -> Tensor:
        size = z.detach().abs().amax(-1, keepdim=True)  # the square of a row may overflow
        size = torch.where((size > 0) & (size < math.inf), size, 1)
        zero = (z == 0).all(-1, keepdim=True)  # its gradient is 0
        row = torch.where(zero, 1, z / size)
        norm = torch.linalg.vector_norm(row, dim=-1, keepdim=True)
        return torch.where(zero, 0, row / torch.maximum(norm, eps / size))

    cosines = (unit(views[0]) * unit(views[1])).sum(-1)
    mean = cosines.mean(-1) if p is None else (p.to(cosines) * cosines).sum(-1)
    # Of a sample that is not finite the gradient is NaN throughout, of its zero rows too.
    nothing = (0 * mean.detach())[..., None, None]
    mean = mean + (nothing * (views[0] + views[1])).sum((-2, -1))
    return mean.to(z1.device, compute_dtype(z1.dtype))
