"""Entropies of every order, Rényi's and Tsallis', of samples and of matrices: equation (13).

`entropy` takes the shortest way to one of them: order 1 is von Neumann's entropy, order 2 the norm
of rho, without an eigenvalue, and the others are functions of the spectrum, which `_core.spectra`
holds. All are of rho over its trace: a zero row counts as absent, and a common factor of all rows
or weights does not matter. The scores are built on the same core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vne_kernels._core import checks, matrices, ops, spectra
from vne_kernels._core.dtypes import compute_dtype, to_float64
from vne_kernels._core.rows import relative

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
    log_base = checks.base(base)
    order = checks.order("alpha", alpha)
    rows = samples(z, normalize, weights, order)
    return spectra.in_base(entropy(rows, order, RENYI), log_base)


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
    order = checks.order("q", q)
    return entropy(samples(z, normalize, weights, order), order, TSALLIS)


def linear_entropy(z: Tensor, *, normalize: bool = True, weights: Tensor | None = None) -> Tensor:
    """Linear entropy 1 - tr(rho^2) of representations, of rho over its trace.

    The Tsallis entropy of order 2, (13), by the norm of rho: no eigenvalue is computed. It is the
    first term of -tr(rho log rho) around a pure state, and much cheaper.

    Args:
        z: (..., n, d), as for `renyi_entropy`.
        normalize, weights: as for `renyi_entropy`.

    Returns:
        (...), from 0 (all rows parallel) to 1 - 1 / min(n, d); otherwise as `renyi_entropy` of
        order 2: differentiable once in z and weights.

    Raises:
        ValueError, TypeError: as `renyi_entropy`.

    Source: Zurek, Habib and Paz, "Coherent States via Decoherence", Phys. Rev. Lett. 1993.

    Example:
        >>> linear_entropy(torch.eye(4))
        tensor(0.7500)
    """
    return entropy(samples(z, normalize, weights, 2), 2, TSALLIS)


def renyi_entropy_from_density(
    rho: Tensor, alpha: float, *, check: bool = False, base: float | None = None
) -> Tensor:
    """Rényi entropy of density matrices; see `vne_kernels.renyi_entropy`.

    R_alpha = log(tr(rho^alpha)) / (1 - alpha), equation (13), of the positive part of rho over its
    own trace.

    Args:
        rho: (..., d, d), as for `vne_kernels.vn_entropy_from_density`, of any trace.
        alpha: the order, at least 0; ``math.inf`` too.
        check, base: as for `vne_kernels.vn_entropy_from_density`.

    Returns:
        (...), between 0 and log d, as `vne_kernels.vn_entropy_from_density`; 0 of a matrix of
        zeros. Computed in float64. Orders below 1 take eigenvalues below d times the rounding of
        the largest for 0, the rounding that of the dtype of the result.

    Raises:
        ValueError, TypeError, NotImplementedError: as `vne_kernels.vn_entropy_from_density` and
            `renyi_entropy`.

    Source: as `renyi_entropy`.

    Example:
        >>> renyi_entropy_from_density(torch.diag(torch.tensor([0.5, 0.5, 0.0])), 0)  # log 2
        tensor(0.6931)
    """
    log_base = checks.base(base)
    order = checks.order("alpha", alpha)
    checks.density("rho", rho, check, unit_trace=False)
    return spectra.in_base(entropy(Matrices(rho), order, RENYI), log_base)


def tsallis_entropy_from_density(rho: Tensor, q: float, *, check: bool = False) -> Tensor:
    """Tsallis entropy of density matrices, in nats; see `vne_kernels.tsallis_entropy`.

    T_q = (1 - tr(rho^q)) / (q - 1), equation (13), of the positive part of rho over its own trace.

    Args:
        rho, check: as for `renyi_entropy_from_density`.
        q: the order, at least 0; ``math.inf`` too.

    Returns:
        (...), from 0 on; otherwise as `renyi_entropy_from_density`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `renyi_entropy_from_density`, naming q.

    Source: as `tsallis_entropy`.

    Example:
        >>> tsallis_entropy_from_density(torch.eye(4), 2)
        tensor(0.7500)
    """
    order = checks.order("q", q)
    checks.density("rho", rho, check, unit_trace=False)
    return entropy(Matrices(rho), order, TSALLIS)


# ---- the core: arguments are checked already -----------------------------------------------------


class Family(NamedTuple):
    """An entropy of the purity for order 2, and of samples and of matrices for any order."""

    of_purity: Callable[[Tensor], Tensor]
    of_samples: Callable[..., Tensor]
    kind: str


RENYI = Family(lambda purity: 0 - purity.log(), ops.renyi_entropy, "renyi")  # not -0.
TSALLIS = Family(lambda purity: 1 - purity, ops.tsallis_entropy, "tsallis")


def entropy(source: Samples | Matrices, order: float, family: Family) -> Tensor:
    """The entropy of this order of rho over its trace, by the shortest way to it."""
    return source.vn_entropy() if order == 1 else source.of_order(order, family)


class Samples(NamedTuple):
    """Rows to normalize, or of trace 1, with relative weights p; made by `samples`."""

    z: Tensor
    p: Tensor | None
    normalize: bool

    def vn_entropy(self) -> Tensor:
        value = ops.vn_entropy(self.z, self.p, self.normalize, "auto", EPS)
        if not self.normalize:
            return value
        least, largest = self.z.detach().amin(-1), self.z.detach().amax(-1)  # faster than any()
        squares = ((least != 0) | (largest != 0)).to(value.dtype)  # |u_i|^2
        trace = _mean_or_1(squares, self.p)
        return value / trace + trace.log()  # equation (10)

    def of_order(self, order: float, family: Family) -> Tensor:
        if order == 2:
            return family.of_purity(ops.purity(self.z, self.p, self.normalize, "auto", EPS))
        return family.of_samples(self.z, self.p, order, self.normalize, "auto", EPS)


def samples(z: Tensor, normalize: bool, weights: Tensor | None, order: float) -> Samples:
    """The samples of a public function, checked."""
    checks.samples("z", z)
    checks.normalize(normalize)
    p = relative(checks.weights(weights, z))
    if not normalize and order in (1, 2):
        z = _scaled_to_unit_trace(z, p)
    return Samples(z, p, normalize)


def _scaled_to_unit_trace(z: Tensor, p: Tensor | None) -> Tensor:
    """Rows of any length, so that nothing overflows with them."""
    precise = to_float64(z)
    if p is not None:  # an absent row may hold anything
        precise = torch.where((p == 0).unsqueeze(-1), 0, precise)
    trace = _mean_or_1(precise.square().sum(-1), p)
    unit = precise / trace.sqrt()[..., None, None]
    return unit.to(z.device, compute_dtype(z.dtype))


def _mean_or_1(x: Tensor, p: Tensor | None) -> Tensor:
    """The weighted mean over the last dimension, and 1 where that is 0."""
    mean = x.mean(-1) if p is None else (p.to(x) * x).sum(-1)
    return torch.where(mean == 0, 1, mean)


class Matrices(NamedTuple):
    """Hermitian matrices diag(scale) rho diag(scale), (..., d, d); their positive part counts."""

    rho: Tensor
    scale: Tensor | None = None

    def vn_entropy(self) -> Tensor:
        return self.of_order(1, RENYI)

    def of_order(self, order: float, family: Family) -> Tensor:
        return matrices.entropy(self.rho, self.scale, family.kind, order)
