"""log det(I + scale rho) of representations, which the coding rate is made of."""

from __future__ import annotations

import math

from torch import Tensor

from vne_kernels._core import checks
from vne_kernels._core.ops import functional
from vne_kernels._core.rows import probabilities
from vne_kernels.functional.entropy import EPS

_logdet = functional(
    "logdet",
    once="logdet is differentiable once; torch.linalg.slogdet(torch.eye(n) + scale * x @ x.mT)[1] "
    "of the n rows x = torch.nn.functional.normalize(z, dim=-1) / n**0.5 has further derivatives",
)


def logdet(
    z: Tensor, scale: float = 1.0, *, normalize: bool = True, weights: Tensor | None = None
) -> Tensor:
    """log det(I + scale rho) of representations, with rho of equation (1) of csrc/README.md.

    It is sum_k log(1 + scale l_k) over the eigenvalues l_k of rho. Of normalized rows it lies
    between log(1 + scale), where all rows are parallel, and m log(1 + scale / m), m = min(n, d),
    where all directions are used alike. Half of it, with scale = d / epsilon^2, is the coding rate
    that maximal coding rate reduction (MCR2) maximizes.

    Args:
        z: (..., n, d), n samples of d features; float16, bfloat16, float32 or float64. Leading
            dimensions are a batch.
        scale: the factor of rho, positive and finite.
        normalize, weights: see `vne_kernels.vn_entropy`.

    Returns:
        (...), in nats; float64 for float64 input, otherwise float32. 0 for a sample of zeros; NaN
        for a sample that holds a NaN or an infinity, or has a negative weight. Differentiable once
        in z and weights, in reverse and forward mode; the gradient in the rows X of equation (2) is
        2 scale (I + scale A)^-1 X.

    Raises:
        ValueError: z is not (..., n, d) with n, d >= 1; weights do not broadcast to (..., n); scale
            is not positive and finite.
        TypeError: z or weights is not a dense tensor of one of these dtypes; scale is not a number;
            normalize is not a bool.

    Source: Yu, Chan, You, Song and Ma, "Learning Diverse and Discriminative Representations via the
    Principle of Maximal Coding Rate Reduction", NeurIPS 2020.

    Example:
        >>> logdet(torch.eye(4), 4.0)  # 4 log(1 + 4 / 4)
        tensor(2.7726)
    """
    p = probabilities(z, normalize, weights)
    factor = checks.number("scale", scale)
    if not 0 < factor < math.inf:
        raise checks.wrong("scale", "positive and finite", scale)
    return _logdet(z, p, factor, normalize, "auto", EPS)
