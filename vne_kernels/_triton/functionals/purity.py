"""tr(A^2) / tau^2: an eigenvalue is not needed, and every method is the same."""

from __future__ import annotations

import torch
from torch import Tensor

from vne_kernels._triton.stages import MatrixGradient, regular_or


def functional(
    a: Tensor, traces: Tensor, method: str, *, with_grad: bool
) -> tuple[Tensor, MatrixGradient | None]:
    """The value lies within [1/m, 1], which rounding may have left.

    A sample of zeros counts as a pure state, as its entropy is 0. The gradient has A^ - P I over
    tau in the place of the logarithm: the trace moves with X.
    """
    m = a.shape[-1]
    purity = torch.linalg.vector_norm(a.double(), dim=(1, 2)).square()
    value = regular_or(traces, purity.clamp(1 / m, 1).to(a.dtype), of_zeros=1.0)
    if not with_grad:
        return value, None
    centered = a.double() - torch.diag_embed(purity[:, None].expand(-1, m))
    w = (centered / traces[:, None, None]).to(a.dtype)
    return value, MatrixGradient(w, factor=4.0)
