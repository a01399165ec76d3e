"""The core of entropies of matrices (..., d, d): equation (15) of csrc/README.md.

Every entropy is a function of the eigenvalues that ``torch.linalg.eigvalsh`` computes in double
precision, whatever the dtype. Two shorter ways are open to matrices that a Cholesky factorization
proves positive definite: see `_is_positive`.

The Hermitian part counts, (rho + rho^H) / 2, and of it the positive part: eigenvalues below 0, as
rounding, tomography or similarities that are no kernel leave them, count as 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vne_kernels._core import ops, spectra
from vne_kernels._core.dtypes import compute_dtype, to_float64
from vne_kernels._core.transforms import is_transformed, once, step, wants_grad


def vn_entropy(rho: Tensor, method: str = "auto", normalize_trace: bool = False) -> Tensor:
    """`vne_kernels.vn_entropy_from_density` in nats, of arguments that have been checked."""
    if _suits_operator(rho, method):
        entropy = _by_operator(rho, method, normalize_trace)
    else:
        values = positive_part(rho)
        entropy = (
            spectra.renyi_entropy(values, 1) if normalize_trace else spectra.vn_entropy(values)
        )
    return entropy.to(rho.device, compute_dtype(rho.dtype))


def purity(rho: Tensor) -> Tensor | None:
    """tr(rho^2) / tr(rho)^2, at most 1, in float64; None where eigenvalues are a shorter way."""
    if rho.device.type != "cpu" or rho.shape[-1] < _NORM_FROM or not _is_positive(rho):
        return None
    hermitian = _hermitian(rho)
    unit = hermitian / _trace(hermitian)[..., None, None]
    # By the norm, so that one NaN makes the whole gradient NaN.
    squared: Tensor = torch.linalg.vector_norm(unit, dim=(-2, -1)).square()
    return squared - (squared - 1).clamp_min(0).detach()  # rounding alone brings it above


def eigenvalues(rho: Tensor) -> Tensor:
    """The eigenvalues of Hermitian matrices in float64, those below 0 as 0.

    Args:
        rho: (..., d, d), real or complex; its Hermitian part counts.

    Returns:
        (..., d), descending, float64; NaN for a matrix that is not finite or has a negative trace.
        Differentiable once, in reverse and forward mode: the gradient is V diag(grad) V^H.
    """
    return positive_part(rho).flip(-1)


def positive_part(rho: Tensor) -> Tensor:
    """As `eigenvalues`, in no order that is promised."""
    hermitian = _hermitian(rho)
    zero = _zero_or_nan(hermitian)
    # LAPACK raises on a NaN, for the whole batch.
    values = _eigvalsh(torch.where(zero[..., None, None] == 0, hermitian, 0)).clamp_min(0)
    valid = _trace(hermitian) + zero >= 0
    values = torch.where(valid.unsqueeze(-1), values, torch.nan)
    # The gradient of an invalid matrix is NaN too, as 0 times NaN is, not a silent 0.
    return values * (1 + zero.unsqueeze(-1))


def widened(rho: Tensor) -> Tensor:
    """rho, and half precisions in float32, as sums over its entries are taken."""
    return rho if rho.is_complex() else rho.to(compute_dtype(rho.dtype))


# ---- positive definite matrices: ways without eigenvalues ----------------------------------------

_OPERATOR_FROM = {torch.float32: 64, torch.float64: 400}
"""Sizes from which a factorization and the native operator are faster than eigenvalues on a CPU.

On one thread at d = 500 they take 5.9 ms in float32 and 11.3 ms in float64, ``eigvalsh`` 14.7 ms.
A gradient in float64 is slower by the operator at every size.
"""
_NORM_FROM = 16
"""The same of a factorization and a norm, order 2."""


def _suits_operator(rho: Tensor, method: str) -> bool:
    """Whether the native operator is right, and for method "auto" faster than eigenvalues.

    It takes the logarithm of an eigenvalue below 0 for that of a small positive one and leaves its
    weight: a matrix has to be positive definite.
    """
    if rho.is_complex() or method == "eigh":
        return False
    if method == "auto":
        dtype = compute_dtype(rho.dtype)
        too_small = rho.shape[-1] < _OPERATOR_FROM[dtype]
        if rho.device.type != "cpu" or too_small or (dtype == torch.float64 and wants_grad(rho)):
            return False
    return _is_positive(rho)


def _is_positive(rho: Tensor) -> bool:
    """Whether all matrices are positive definite, by Cholesky's factorization: the host looks.

    Those that are not finite do not count; whoever computes with them makes them NaN. False where
    numbers cannot be seen, or where derivatives are asked for that the operators lack.
    """
    if torch.compiler.is_compiling() or is_transformed(rho):
        return False
    with torch.no_grad():
        precise = to_float64(rho)
        failed = torch.linalg.cholesky_ex(precise + precise.mH).info != 0
        try:
            return not failed.any() or not (failed & (_zero_or_nan(precise) == 0)).any()
        except RuntimeError:  # fake and meta tensors hold no numbers
            return False


def _by_operator(rho: Tensor, method: str, normalize_trace: bool) -> Tensor:
    """S of positive definite matrices; NaN of those that are not finite."""
    inverse_trace = 1 / _trace(rho)  # in float64, as it may leave the range of float32
    rho = rho.to(compute_dtype(rho.dtype))
    if normalize_trace:
        rho = rho * inverse_trace.to(rho)[..., None, None]
    return ops.density_entropy(rho, method)


# ---- eigenvalues and their derivatives -----------------------------------------------------------

_ONCE = (
    "entropies and scores of matrices (vn_entropy_from_density, renyi_entropy_from_density, "
    "tsallis_entropy_from_density, conditional_entropy, mutual_information, "
    "vendi_score(is_kernel=True)) are differentiable once; vn_entropy(z, normalize=False) of n "
    "rows, with z^T z / n the matrix, is differentiable twice"
)


def _eigvalsh(hermitian: Tensor) -> Tensor:
    """``torch.linalg.eigvalsh``, whose second derivative is NaN at repeated eigenvalues: refused.

    In a compiled graph it is torch's own, as dynamo takes no function with a jvp.
    """
    values: Tensor
    if torch.compiler.is_compiling() or not (wants_grad(hermitian) or is_transformed(hermitian)):
        values = torch.linalg.eigvalsh(hermitian)
    else:
        values, _ = _eigenvalues(hermitian)
    return values


def _eigenvalue_gradients(values: list[Any], grads: tuple[Any, ...]) -> list[Tensor]:
    hermitian, vectors = values
    v = once(_ONCE, vectors, hermitian)
    return [(v * grads[0].unsqueeze(-2)) @ v.mH]


def _eigenvalue_tangent(values: list[Any], tangents: tuple[Any, ...]) -> Any:
    hermitian, vectors = values
    v = once(_ONCE, vectors, hermitian)
    return (v.conj() * (tangents[0] @ v)).sum(-2).real


_eigenvalues = step(
    lambda hermitian: tuple(torch.linalg.eigh(hermitian)),
    _eigenvalue_gradients,
    _eigenvalue_tangent,
    differentiable=1,
)


# ---- small steps ---------------------------------------------------------------------------------


def _hermitian(rho: Tensor) -> Tensor:
    """(rho + rho^H) / 2 in float64 or complex128."""
    precise = to_float64(rho)
    return (precise + precise.mH) / 2


def _zero_or_nan(matrices: Tensor) -> Tensor:
    """(...), 0, and NaN of a matrix that is not finite."""
    return (0 * matrices).sum((-2, -1)).real


def _trace(rho: Tensor) -> Tensor:
    """In float64."""
    return to_float64(rho.diagonal(dim1=-2, dim2=-1)).real.sum(-1)
