"""Entropies of every order: Rényi's and Tsallis', of representations.

Equation (13) of csrc/README.md. Order 1 is von Neumann's entropy, by its own operator; order 2 is
the norm of rho, without an eigenvalue; the others are functions of the spectrum, which stand in
`_core.spectra`. All are of rho over its trace: a zero row counts as absent, and a factor that
all rows or weights have in common does not matter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vne_kernels._core import ops, spectra
from vne_kernels._core.checks import (
    check_base,
    check_normalize,
    check_order,
    check_samples,
    check_weights,
    in_base,
    relative,
)
from vne_kernels._core.ops import compute_dtype, to_float64

EPS = 0.0
"""Every row that is not zero is divided by its own norm, so that no scale matters."""


def renyi_entropy(
    z: Tensor,
    alpha: float,
    *,
    normalize: bool = True,
    weights: Tensor | None = None,
    base: float | None = None,
) -> Tensor:
    """Rényi entropy of representations: equation (13) of csrc/README.md.

    R_alpha = log(sum_k p_k^alpha) / (1 - alpha), with p_k the eigenvalues of rho over their sum.
    R_0 is the log of the rank, R_1 von Neumann's entropy, R_2 = -log tr(rho^2), R_inf = -log of the
    largest p. It falls as alpha grows, from log(rank) on.

    Args:
        z: (..., n, d), n samples of d features; float16, bfloat16, float32 or float64. Leading
            dimensions are a batch.
        alpha: the order, at least 0; ``math.inf`` too.
        normalize: divide each row by its norm, however small; a row of zeros is absent.
        weights: (..., n) or broadcastable to it, not negative; a mask of bool or integers too. They
            are relative: a common factor does not matter. A sample of weight 0 is absent, whatever
            it holds. Default: all alike.
        base: of the logarithm, such as 2 for bits. Default: e, for nats.

    Returns:
        (...), between 0 and log(min(n, d)); float64 for float64 input, otherwise float32; NaN for a
        sample that holds a NaN or an infinity, or has a negative weight; 0 for a sample of zeros.
        Differentiable once in z and weights (of order 1 as `vne_kernels.vn_entropy`). Orders below
        2, except 1, are computed in float64, as their slope is steep at 0; those below 1 count
        eigenvalues down to m times the rounding of the largest, m = min(n, d), and take the rest
        for 0.

    Raises:
        ValueError: z is not (..., n, d) with n, d >= 1; weights do not broadcast to (..., n);
            alpha is negative or NaN; base is not positive and finite, or 1.
        TypeError: z or weights is not a dense tensor of one of these dtypes; alpha or base is not a
            number; normalize is not a bool.

    Source: Rényi, "On Measures of Entropy and Information", 1961; of density matrices:
    Müller-Lennert et al., "On quantum Rényi entropies", J. Math. Phys. 2013.

    Example:
        >>> renyi_entropy(torch.eye(4), 2)  # log 4, as of every order
        tensor(1.3863)
    """
    log_base = check_base(base)
    entropy = _entropy(
        "alpha", alpha, spectra.renyi_of_purity, spectra.renyi_entropy, z, normalize, weights
    )
    return in_base(entropy, log_base)


def tsallis_entropy(
    z: Tensor, q: float, *, normalize: bool = True, weights: Tensor | None = None
) -> Tensor:
    """Tsallis entropy of representations, in nats: equation (13) of csrc/README.md.

    T_q = (1 - sum_k p_k^q) / (q - 1), with p_k the eigenvalues of rho over their sum. T_0 is the
    rank - 1, T_1 von Neumann's entropy, T_2 = 1 - tr(rho^2) the linear entropy, T_inf = 0.

    Args:
        z: (..., n, d), as for `renyi_entropy`.
        q: the order, at least 0; ``math.inf`` too.
        normalize, weights: as for `renyi_entropy`.

    Returns:
        (...), from 0 on; otherwise as `renyi_entropy`.

    Raises:
        ValueError, TypeError: as `renyi_entropy`, naming q.

    Source: Tsallis, "Possible generalization of Boltzmann-Gibbs statistics", J. Stat. Phys. 1988.

    Example:
        >>> tsallis_entropy(torch.eye(4), 2)
        tensor(0.7500)
    """
    return _entropy(
        "q", q, spectra.tsallis_of_purity, spectra.tsallis_entropy, z, normalize, weights
    )


def _entropy(
    name: str,
    order: float,
    of_purity: Callable[[Tensor], Tensor],
    of_spectrum: Callable[[Tensor, float], Tensor],
    z: Tensor,
    normalize: bool,
    weights: Tensor | None,
) -> Tensor:
    """An entropy of the family by the shortest way to it."""
    order = check_order(name, order)
    check_samples("z", z)
    check_normalize(normalize)
    p = check_weights(weights, z)
    p = None if p is None else relative(p)
    device, dtype = z.device, compute_dtype(z.dtype)
    if order < 2 and order != 1:  # steep at 0: see the docstrings
        z, p = to_float64(z), None if p is None else to_float64(p)
    if not normalize:
        z = _scaled_to_unit_trace(z, p)
    if order == 1:
        return _vn_entropy(z, p, normalize)
    if order == 2:
        return of_purity(ops.purity(z, p, normalize, "auto", EPS))
    return of_spectrum(ops.spectrum(z, p, normalize, EPS), order).to(device, dtype)


def _vn_entropy(z: Tensor, p: Tensor | None, normalize: bool) -> Tensor:
    """S of rho over its trace."""
    entropy = ops.vn_entropy(z, p, normalize, "auto", EPS)
    if not normalize:  # the trace is 1 already
        return entropy
    least, largest = z.detach().amin(-1), z.detach().amax(-1)  # faster than any()
    squares = ((least != 0) | (largest != 0)).to(entropy.dtype)  # |u_i|^2
    trace = _nonzero(_mean(squares, p))
    return entropy / trace + trace.log()  # equation (10)


def _scaled_to_unit_trace(z: Tensor, p: Tensor | None) -> Tensor:
    """Rows of any length, so that nothing overflows with them."""
    precise = to_float64(z)
    if p is not None:  # an absent row may hold anything
        precise = torch.where((p == 0).unsqueeze(-1), 0, precise)
    trace = _nonzero(_mean(precise.square().sum(-1), p))
    unit = precise / trace.sqrt()[..., None, None]
    return unit.to(z.device, compute_dtype(z.dtype))


def _mean(x: Tensor, p: Tensor | None) -> Tensor:
    return x.mean(-1) if p is None else (p.to(x) * x).sum(-1)


def _nonzero(trace: Tensor) -> Tensor:
    return torch.where(trace == 0, 1, trace)
