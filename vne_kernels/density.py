"""Entropies of matrices: for those who have a density matrix, not the samples it is made of.

Equation (15) of csrc/README.md. Real matrices go to the operators that serve a batch spread over
processes; complex ones, and orders that need eigenvalues, to ``torch.linalg.eigvalsh`` in double
precision. Their Hermitian part counts, (rho + rho^H) / 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vne_kernels import spectra
from vne_kernels.checks import check_density, check_matrices, check_method, check_order
from vne_kernels.ops import compute_dtype, to_float64

_ops = torch.ops.vne_kernels


def vn_entropy_from_density(
    rho: Tensor, *, method: str = "auto", normalize_trace: bool = False, check: bool = False
) -> Tensor:
    """Von Neumann entropy -tr(rho log rho) of density matrices, in nats: equation (15).

    Args:
        rho: (..., d, d), symmetric or Hermitian, positive semidefinite; float16, bfloat16, float32,
            float64, complex64 or complex128. Leading dimensions are a batch. Its Hermitian part
            counts; eigenvalues that rounding made negative count as 0.
        method: as for `vne_kernels.vn_entropy`; of a complex rho "auto" and "eigh" alone.
        normalize_trace: S of rho / tr(rho). Otherwise of rho as given: -sum(l log l) whatever its
            trace, which is 1 of a density matrix.
        check: refuse what is no density matrix. It looks at the numbers, which the host waits for.

    Returns:
        (...), float64 for float64 and complex128, otherwise float32. NaN for a matrix with a NaN or
        an infinity, or a negative trace; the other matrices of the batch are not touched by it.
        Differentiable once: the gradient -(log rho + I) is Hermitian, and finite where rho lacks
        rank.

    Raises:
        ValueError: rho is not (..., d, d) with d >= 1; method is unknown, or "poles" with a complex
            rho; with ``check``, rho is not finite, not Hermitian, has an eigenvalue below 0 by more
            than eps^(3/4) of its largest entry, or (unless ``normalize_trace``) not the trace 1
            within eps^(1/2), eps that of its dtype.
        TypeError: rho is not a dense tensor of one of these dtypes.

    Source: von Neumann, "Mathematische Grundlagen der Quantenmechanik", 1932.

    Example:
        >>> vn_entropy_from_density(torch.eye(4) / 4)  # log 4
        tensor(1.3863)
    """
    check_matrices("rho", rho)
    check_method(method)
    if rho.is_complex() and method == "poles":
        raise ValueError("method must be 'auto' or 'eigh' for a complex rho, got 'poles'")
    if check:
        check_density("rho", rho, unit_trace=not normalize_trace)
    if rho.is_complex():
        return _of_hermitian(rho, normalize_trace)
    unit = _over_trace(to_float64(rho)).to(rho.device) if normalize_trace else rho
    rho = unit.to(compute_dtype(rho.dtype))
    if torch.is_grad_enabled() and rho.requires_grad:
        entropy: Tensor = _ops.density_entropy_grad(rho, method)[0]
    else:
        entropy = _ops.density_entropy(rho, method)
    return entropy


def renyi_entropy_from_density(rho: Tensor, alpha: float, *, check: bool = False) -> Tensor:
    """Rényi entropy of density matrices, in nats; see `vne_kernels.renyi_entropy`.

    R_alpha = log(tr(rho^alpha)) / (1 - alpha) of rho / tr(rho), equation (13).

    Args:
        rho: (..., d, d), as for `vn_entropy_from_density`, of any trace.
        alpha: the order, at least 0; ``math.inf`` too.
        check: as for `vn_entropy_from_density`.

    Returns:
        (...), between 0 and log d, as `vn_entropy_from_density`; 0 of a matrix of zeros. Order 2
        takes no eigenvalue; the others but 1 are computed in float64. Orders below 1 take
        eigenvalues below d times the rounding of the largest for 0, the rounding that of the dtype
        of the result.

    Raises:
        ValueError, TypeError: as `vn_entropy_from_density` and `vne_kernels.renyi_entropy`.

    Source: as `vne_kernels.renyi_entropy`.

    Example:
        >>> renyi_entropy_from_density(torch.diag(torch.tensor([0.5, 0.5, 0.0])), 0)  # log 2
        tensor(0.6931)
    """
    return _entropy("alpha", alpha, spectra.renyi_of_purity, spectra.renyi_entropy, rho, check)


def tsallis_entropy_from_density(rho: Tensor, q: float, *, check: bool = False) -> Tensor:
    """Tsallis entropy of density matrices, in nats; see `vne_kernels.tsallis_entropy`.

    T_q = (1 - tr(rho^q)) / (q - 1) of rho / tr(rho), equation (13).

    Args:
        rho, check: as for `renyi_entropy_from_density`.
        q: the order, at least 0; ``math.inf`` too.

    Returns:
        (...), from 0 on; otherwise as `renyi_entropy_from_density`.

    Raises:
        ValueError, TypeError: as `renyi_entropy_from_density`, naming q.

    Source: as `vne_kernels.tsallis_entropy`.

    Example:
        >>> tsallis_entropy_from_density(torch.eye(4), 2)
        tensor(0.7500)
    """
    return _entropy("q", q, spectra.tsallis_of_purity, spectra.tsallis_entropy, rho, check)


def eigenvalues(rho: Tensor) -> Tensor:
    """The eigenvalues of Hermitian matrices, none below 0, in float64 whatever the dtype of rho.

    Args:
        rho: (..., d, d), real or complex; its Hermitian part counts.

    Returns:
        (..., d), descending, float64; NaN for a matrix that is not finite. Differentiable: the
        gradient is V diag(grad) V^H.
    """
    precise = to_float64(rho)
    hermitian = (precise + precise.mH) / 2
    finite = hermitian.isfinite().all(-1).all(-1)
    eye = torch.eye(rho.shape[-1], dtype=precise.dtype, device=precise.device)
    # LAPACK raises on a NaN, for the whole batch.
    values = torch.linalg.eigvalsh(torch.where(finite[..., None, None], hermitian, eye))
    values = torch.where(finite[..., None], values.flip(-1).clamp_min(0), torch.nan)
    # The gradient of a matrix that is not finite is NaN too, as 0 times NaN is, not a silent 0.
    return values * (1 + (0 * hermitian).sum((-2, -1)).real[..., None])


def result_dtype(rho: Tensor) -> torch.dtype:
    """The dtype of what is computed of rho: float64 for float64 and complex128, else float32."""
    return torch.float64 if rho.dtype == torch.complex128 else compute_dtype(rho.dtype)


def _entropy(
    name: str,
    order: float,
    of_purity: Callable[[Tensor], Tensor],
    of_spectrum: Callable[[Tensor, float], Tensor],
    rho: Tensor,
    check: bool,
) -> Tensor:
    """An entropy of the family by the shortest way to it."""
    order = check_order(name, order)
    check_matrices("rho", rho)
    if check:
        check_density("rho", rho, unit_trace=False)
    if order == 1:
        return vn_entropy_from_density(rho, normalize_trace=True)
    unit = _over_trace(to_float64(rho))
    if order == 2:
        entropy = of_purity(_purity(unit))
    else:
        values = eigenvalues(unit)
        if order < 1:  # what rounding rho to its dtype left of a 0 would count like any other
            unresolved = spectra.resolved(values.to(result_dtype(rho))) == 0
            values = torch.where(unresolved, 0, values)
        entropy = of_spectrum(values, order)
    return entropy.to(rho.device, result_dtype(rho))


def _of_hermitian(rho: Tensor, normalize_trace: bool) -> Tensor:
    precise = to_float64(rho)
    entropy = spectra.renyi_entropy(eigenvalues(_over_trace(precise)), 1)
    if not normalize_trace:  # equation (10)
        trace = _trace(precise)
        entropy = trace * (entropy - _divisor(trace).log())
    return entropy.to(rho.device, result_dtype(rho))


def _purity(unit: Tensor) -> Tensor:
    """tr(rho^2) of a rho of trace 1, at most 1; 1 of a matrix of zeros, as its entropy is 0."""
    hermitian = (unit + unit.mH) / 2
    # By the norm, so that one NaN makes the whole gradient NaN.
    purity = torch.linalg.vector_norm(hermitian, dim=(-2, -1)).square()
    purity = purity - (purity - 1).clamp_min(0).detach()  # rounding alone brings it above
    return torch.where(_trace(unit) == 0, 1, purity)


def _over_trace(rho: Tensor) -> Tensor:
    """rho / tr(rho); NaN where that is negative, and a matrix of zeros stays one."""
    return rho / _divisor(_trace(rho))[..., None, None]


def _trace(rho: Tensor) -> Tensor:
    return rho.diagonal(dim1=-2, dim2=-1).real.sum(-1)


def _divisor(trace: Tensor) -> Tensor:
    return torch.where(trace > 0, trace, torch.where(trace == 0, 1, torch.nan))
