"""log det(I + scale A), by one Cholesky factorization in float64, which is torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from vne_kernels._triton.stages import MatrixGradient, regular_or


def functional(
    a: Tensor, traces: Tensor, method: str, scale: float, *, with_grad: bool
) -> tuple[Tensor, MatrixGradient | None]:
    """The gradient has W + identity I = (I + scale A)^-1. Every method is the same.

    Where scale A is small, I is taken out of the inverse before it is rounded: the projection of
    normalized rows removes I.
    """
    eye = torch.eye(a.shape[-1], dtype=torch.float64, device=a.device)
    factor = regular_or(traces, scale * traces).nan_to_num(0)[:, None, None]
    # Rounding may leave A^ an eigenvalue below 0, which a large scale would bring below -1.
    slack = (4 * torch.finfo(a.dtype).eps * factor - 0.5).clamp_min(0)
    lower = torch.linalg.cholesky_ex((1 + slack) * eye + factor * a.double()).L
    logdet = 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    value = regular_or(traces, logdet.to(a.dtype))
    if not with_grad:
        return value, None
    identity = (factor <= 1).double()
    w = (torch.cholesky_inverse(lower) - identity * eye).to(a.dtype)
    return value, MatrixGradient(w, factor=2 * scale, identity=identity.flatten())
