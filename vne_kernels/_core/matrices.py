"""The core of entropies of matrices (..., d, d): equation (15) of csrc/README.md.

Every entropy is a function of the eigenvalues in double precision, whatever the dtype. The CPU has
native operators from the matrix to the number (csrc/cpu/matrices.cpp); other devices have the same
in plain torch, here.

The Hermitian part counts, (rho + rho^H) / 2, and of it the positive part: eigenvalues below 0, as
rounding, tomography or similarities that are no kernel leave them, count as 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vne_kernels._core import ops, spectra
from vne_kernels._core.dtypes import compute_dtype, to_float64
from vne_kernels._core.transforms import is_transformed


def vn_entropy(rho: Tensor, method: str = "auto", normalize_trace: bool = False) -> Tensor:
    """`vne_kernels.vn_entropy_from_density` in nats, of arguments that have been checked."""
    if method == "poles" and _is_positive(rho):
        return _by_poles(rho, normalize_trace)
    return entropy(rho, None, "renyi" if normalize_trace else "as given", 1.0)


def eigenvalues(rho: Tensor) -> Tensor:
    """The eigenvalues of Hermitian matrices in float64, those below 0 as 0, without a derivative.

    Args:
        rho: (..., d, d), real or complex; its Hermitian part counts.

    Returns:
        (..., d), descending, float64; NaN for a matrix that is not finite or has a negative trace.
    """
    values, _, valid = decompose(rho, with_vectors=False)
    return torch.where(valid.unsqueeze(-1), values.clamp_min(0), torch.nan).flip(-1)


def widened(rho: Tensor) -> Tensor:
    """rho, and half precisions in float32, as sums over its entries are taken."""
    return rho if rho.is_complex() else rho.to(compute_dtype(rho.dtype))


def partial_trace(rho: Tensor, sizes: Sequence[int], kept: Sequence[int]) -> Tensor:
    """`vne_kernels.partial_trace` of arguments that have been checked; kept ascends."""
    traced = [part for part in range(len(sizes)) if part not in kept]
    order = [*kept, *traced]
    batch = rho.shape[:-2]
    rows = [len(batch) + part for part in order]
    columns = [len(batch) + len(sizes) + part for part in order]
    apart = rho.reshape(*batch, *sizes, *sizes).permute(*range(len(batch)), *rows, *columns)
    k, t = math.prod([sizes[part] for part in kept]), math.prod([sizes[part] for part in traced])
    return apart.reshape(*batch, k, t, k, t).diagonal(dim1=-3, dim2=-1).sum(-1)


# ---- the operators on devices without native kernels ---------------------------------------------


def decompose(rho: Tensor, with_vectors: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, ascending, and vectors of the Hermitian part in float64; whether it is finite,
    of a trace that is not negative. LAPACK raises on a NaN: a matrix that is not finite is I here.
    """
    precise = to_float64(rho)
    hermitian = (precise + adjoint(precise)) / 2
    finite = hermitian.isfinite().all(-1).all(-1)
    eye = torch.eye(rho.shape[-1], dtype=hermitian.dtype, device=hermitian.device)
    safe = torch.where(finite[..., None, None], hermitian, eye)
    if with_vectors:
        values, vectors = torch.linalg.eigh(safe)
    else:
        values, vectors = torch.linalg.eigvalsh(safe), eye
    trace = hermitian.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    return values, vectors, finite & (trace >= 0)


def adjoint(matrices: Tensor) -> Tensor:
    """Not ``mH``: its conjugation is put off, and lost where torch.compile calls the operator."""
    return torch.conj_physical(matrices.mT)


def _entropy(
    rho: Tensor, scale: Tensor | None, kind: str, order: float, *, with_grad: bool
) -> tuple[Tensor, ...]:
    """Of the eigenvalues as they are, kind "as given", or over their sum, "renyi", "tsallis".

    Of diag(scale) rho diag(scale); what has a scale of 0 is absent, whatever it holds.
    """
    dtype = compute_dtype(rho.dtype)
    s = None if scale is None else to_float64(scale)
    given, vectors, valid = decompose(rho if s is None else _scaled(to_float64(rho), s), with_grad)
    values = given.clamp_min(0)
    if kind == "as given":
        value = spectra.vn_entropy(values)
    else:
        if order < 1:  # what rounding rho to its dtype left of a 0 would count like any other
            values = spectra.resolved(values, dtype)
        of = spectra.renyi_entropy if kind == "renyi" else spectra.tsallis_entropy
        value = of(values, order)
    value = torch.where(valid, value, torch.nan).to(rho.device, dtype)
    if not with_grad:
        return (value,)
    if kind == "as given":
        slope = torch.where(values > 0, -1 - values.log(), 0)
    else:
        slope = spectra.entropy_slope(values, order, renyi=kind == "renyi")
    slope = torch.where(given < 0, 0, slope)
    grad = (vectors * slope.unsqueeze(-2)) @ adjoint(vectors)
    grad = torch.where(valid[..., None, None], grad, torch.nan)
    grad_scale = value.new_empty(0)
    if s is not None:
        products = _scaled(adjoint(grad).mT * to_float64(rho), s).real  # s_i G*_ij rho_ij s_j
        inverse = spectra.unless_zero(torch.reciprocal, s)
        grad_scale = (2 * products.sum(-1) * inverse).to(rho.device, dtype)
        grad = _scaled(grad, s)
    grad_dtype = dtype.to_complex() if rho.is_complex() else dtype
    return value, grad.to(rho.device, grad_dtype).contiguous(), grad_scale


def _scaled(matrices: Tensor, scale: Tensor) -> Tensor:
    present = scale != 0
    present = present.unsqueeze(-1) & present.unsqueeze(-2)
    return torch.where(present, matrices, 0) * scale.unsqueeze(-1) * scale.unsqueeze(-2)


def _parts_entropy(
    rho: Tensor,
    a: int,
    b: int,
    of_whole: float,
    of_a: float,
    of_b: float,
    *,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    """of_whole S(AB) + of_a S(A) + of_b S(B), of states of A and B with a and b levels."""
    whole = to_float64(rho)
    states = (
        (of_whole, whole, None),
        (of_a, partial_trace(whole, (a, b), [0]), (-1, -3)),
        (of_b, partial_trace(whole, (a, b), [1]), (-2, -4)),
    )
    value, grad = (
        torch.zeros(rho.shape[:-2], device=whole.device).double(),
        whole.new_zeros(whole.shape),
    )
    levels = grad.view(*grad.shape[:-2], a, b, a, b)
    for factor, state, others in states:
        if factor == 0:
            continue
        of_state = _entropy(state, None, "as given", 1.0, with_grad=with_grad)
        value += factor * of_state[0]
        if not with_grad:
            continue
        if others is None:
            grad += factor * of_state[1]
        else:
            levels.diagonal(dim1=others[1], dim2=others[0]).add_(factor * of_state[1].unsqueeze(-1))
    dtype = compute_dtype(rho.dtype)
    grad_dtype = dtype.to_complex() if rho.is_complex() else dtype
    value = value.to(rho.device, dtype)
    return (value, grad.to(rho.device, grad_dtype)) if with_grad else (value,)


_ONCE = (
    "entropies and scores of matrices (vn_entropy_from_density, renyi_entropy_from_density, "
    "tsallis_entropy_from_density, conditional_entropy, mutual_information, "
    "vendi_score(is_kernel=True)) are differentiable once; vn_entropy(z, normalize=False) of n "
    "rows, with z^T z / n the matrix, is differentiable twice"
)
entropy = ops.functional("matrix_entropy", kernel=_entropy, once=_ONCE)
"""(...) of (rho, scale, kind, order), as `_entropy` says; scale (..., d) has the results' dtype."""
parts_entropy = ops.functional("parts_entropy", kernel=_parts_entropy, once=_ONCE)
"""(...) of (rho, a, b, of_whole, of_a, of_b), as `_parts_entropy` says."""


# ---- positive definite matrices by poles ---------------------------------------------------------


def _is_positive(rho: Tensor) -> bool:
    """Whether all matrices are positive definite, by Cholesky's factorization: the host looks.

    The poles take the logarithm of an eigenvalue below 0 for that of a small positive one and leave
    its weight. Matrices that are not finite do not count. False where numbers cannot be seen, or
    where derivatives are asked for that the operator lacks.
    """
    if torch.compiler.is_compiling() or is_transformed(rho):
        return False
    with torch.no_grad():
        precise = to_float64(rho)
        failed = torch.linalg.cholesky_ex(precise + precise.mH).info != 0
        try:
            return not failed.any() or not (failed & precise.isfinite().all(-1).all(-1)).any()
        except RuntimeError:  # fake and meta tensors hold no numbers
            return False


def _by_poles(rho: Tensor, normalize_trace: bool) -> Tensor:
    """S of positive definite matrices; NaN of those that are not finite."""
    trace = to_float64(rho.diagonal(dim1=-2, dim2=-1)).sum(-1)
    rho = rho.to(compute_dtype(rho.dtype))
    if normalize_trace:  # in float64, as it may leave the range of float32
        rho = rho * (1 / trace).to(rho)[..., None, None]
    return ops.density_entropy(rho, "poles")
