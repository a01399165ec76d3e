"""Quantum information in density matrices: the paper's Definition 3.2, and relative entropy.

The entropies are those of `vne_kernels.density`; relative entropy is an operator of its own, (15).
Eigenvalues below 0 count as 0, as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from vne_kernels._core import checks, matrices, spectra
from vne_kernels._core.dtypes import compute_dtype
from vne_kernels._core.ops import functional
from vne_kernels._core.spectra import in_base

# ---- parts of a composite system -----------------------------------------------------------------


def partial_trace(rho: Tensor, dims: Sequence[int], keep: int | Sequence[int]) -> Tensor:
    """State of some subsystems of a composite system: the trace over the others, equation (15).

    Args:
        rho: (..., D, D), of the composite system, whose basis is the Kronecker product of those of
            its subsystems, in order; float16, bfloat16, float32, float64, complex64 or complex128.
        dims: sizes of the subsystems, D their product.
        keep: the subsystems that remain, counted from 0; they remain in their order in ``dims``.

    Returns:
        (..., K, K), K the product of the sizes that remain, in the dtype of rho. Differentiable.

    Raises:
        ValueError: rho is not (..., D, D); the product of dims is not D; keep is empty, not among
            the subsystems, or names one twice.
        TypeError: rho is not a dense tensor of one of these dtypes; dims or keep are not integers.

    Source: Nielsen and Chuang, "Quantum Computation and Quantum Information", section 2.4.3.

    Example:
        >>> bell = torch.tensor([1.0, 0, 0, 1]) / 2**0.5
        >>> partial_trace(torch.outer(bell, bell), (2, 2), keep=1)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    checks.matrices("rho", rho)
    sizes = _check_dims("rho", rho, dims)
    parts = _integers("keep", [keep] if isinstance(keep, Integral) else keep)
    if not parts or len(set(parts)) < len(parts) or not all(0 <= p < len(sizes) for p in parts):
        raise checks.wrong("keep", f"different ones of 0 to {len(sizes) - 1}", keep)
    return matrices.partial_trace(rho, sizes, sorted(parts))


def conditional_entropy(
    rho_ab: Tensor,
    dims: Sequence[int],
    *,
    method: str = "auto",
    check: bool = False,
    base: float | None = None,
) -> Tensor:
    """Quantum conditional entropy S(A|B) = S(AB) - S(B): the paper's Definition 3.2.

    From -log(min(d_A, d_B)) to log d_A; negative only where A and B are entangled.

    Args:
        rho_ab: (..., D, D), density matrices of the composite system AB, of trace 1: as ``rho`` of
            `partial_trace`. The states of A and B are parts of rho_ab as given; eigenvalues of all
            three that are below 0 count as 0.
        dims: (d_A, d_B), D = d_A d_B. Each may be a group of subsystems: of a batch of states of A,
            B and C, ``(d_A, d_B * d_C)`` gives S(A|BC).
        method, check, base: as for `vne_kernels.vn_entropy_from_density`.

    Returns:
        (...), float64 for float64 and complex128, otherwise float32; NaN for a matrix with a NaN or
        an infinity. Differentiable once, in reverse and forward mode.

    Raises:
        ValueError: rho_ab is not (..., D, D); dims are not two sizes with the product D; method is
            unknown, or "poles" with a complex rho_ab; base is not positive and finite, or 1; with
            ``check``, rho_ab is no density matrix.
        TypeError: rho_ab is not a dense tensor of one of these dtypes; dims are not integers; base
            is not a number.
        NotImplementedError: as `vne_kernels.vn_entropy_from_density`.

    Source: "Formulating A Non-contrastive Loss As A Difference Of Entropies Using A Von Neumann
    Entropy Bound", Definition 3.2; Cerf and Adami, "Negative Entropy and Information in Quantum
    Mechanics", Phys. Rev. Lett. 1997.

    Example:
        >>> bell = torch.tensor([1.0, 0, 0, 1]) / 2**0.5
        >>> conditional_entropy(torch.outer(bell, bell), (2, 2), base=2)  # -1 bit
        tensor(-1.0000)
    """
    log_base = checks.base(base)
    return in_base(_entropies(rho_ab, dims, method, check, (1, 0, -1)), log_base)


def mutual_information(
    rho_ab: Tensor,
    dims: Sequence[int],
    *,
    method: str = "auto",
    check: bool = False,
    base: float | None = None,
) -> Tensor:
    """Quantum mutual information S(A;B) = S(A) + S(B) - S(AB): Definition 3.2.

    From 0, of independent A and B, to 2 log(min(d_A, d_B)).

    Args:
        rho_ab, dims, method, check, base: as for `conditional_entropy`.

    Returns:
        (...), as `conditional_entropy`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `conditional_entropy`.

    Source: as `conditional_entropy`, S(A) - S(A|B) there.

    Example:
        >>> bell = torch.tensor([1.0, 0, 0, 1]) / 2**0.5
        >>> mutual_information(torch.outer(bell, bell), (2, 2))  # 2 log 2
        tensor(1.3863)
    """
    log_base = checks.base(base)
    return in_base(_entropies(rho_ab, dims, method, check, (-1, 1, 1)), log_base)


def _entropies(
    rho: Tensor, dims: Sequence[int], method: str, check: bool, factors: tuple[int, int, int]
) -> Tensor:
    """The sum of S(AB), S(A) and S(B), each times its factor."""
    checks.density("rho_ab", rho, check, unit_trace=True)
    checks.matrix_method(method, rho)
    sizes = _check_dims("rho_ab", rho, dims)
    if len(sizes) != 2:
        raise checks.wrong("dims", "two sizes, of A and of B", tuple(sizes))
    if method != "poles":
        return matrices.parts_entropy(rho, *sizes, *map(float, factors))
    whole = matrices.widened(rho)
    parts = whole, *(matrices.partial_trace(whole, sizes, [kept]) for kept in (0, 1))
    pairs = zip(factors, parts, strict=True)
    return torch.stack([factor * matrices.vn_entropy(x, method) for factor, x in pairs]).sum(0)


def _check_dims(name: str, rho: Tensor, dims: Sequence[int]) -> list[int]:
    sizes = _integers("dims", dims)
    size = rho.shape[-1]
    if not sizes or min(sizes) < 1 or math.prod(sizes) != size:
        wanted = f"positive sizes with the product {size}, as {name} is {tuple(rho.shape)}"
        raise checks.wrong("dims", wanted, tuple(sizes))
    return sizes


def _integers(name: str, values: Any) -> list[int]:
    """Of Python or of NumPy, as ints."""
    if not isinstance(values, Sequence) or not all(map(checks.is_integer, values)):
        raise checks.wrong(name, "integers", repr(values), TypeError)
    return [int(value) for value in values]


# ---- relative entropy ----------------------------------------------------------------------------


def relative_entropy(
    rho: Tensor, sigma: Tensor, *, check: bool = False, base: float | None = None
) -> Tensor:
    """Quantum relative entropy S(rho||sigma) = tr(rho (log rho - log sigma)): (15).

    Not negative, and 0 where rho = sigma alone (Klein's inequality).

    Args:
        rho: (..., d, d), density matrices, as for `vne_kernels.vn_entropy_from_density`.
        sigma: (..., d, d), as rho; leading dimensions broadcast. If the dtypes differ, both are
            taken in the wider one, in which a complex one makes both complex. Of rho and sigma
            alike the positive part counts.
        check: refuse what is no density matrix; the host waits for the numbers.
        base: the base of the logarithm, positive and not 1: 2 for bits. Default: e, nats.

    Returns:
        (...), float64 for float64 and complex128, otherwise float32; computed in float64.
        Infinite where the support of rho is not in that of sigma: where sigma has k eigenvalues
        below 4 eps of its trace, and rho more than 4 k eps of its own in their directions, eps the
        rounding of the dtype of the result (1.2e-7 or 2.2e-16). NaN where rho or sigma holds a NaN
        or an infinity, or has a negative trace; the rest of the batch is not touched by it.

        Differentiable once, in rho and sigma, in reverse and forward mode. The gradients are finite
        and Hermitian, and 0 in the directions of eigenvalues below 0; where sigma counts as 0 they
        stay within its support.

    Raises:
        ValueError: rho or sigma is not (..., d, d) with d >= 1; their d differ; their leading
            dimensions do not broadcast; they are on different devices; base is not positive and
            finite, or 1; with ``check``, one of them is no density matrix.
        TypeError: one is not a dense tensor of one of the dtypes; base is not a number.
        NotImplementedError: a second derivative is asked for.

    Source: Umegaki, "Conditional expectation in an operator algebra, IV", 1962; Nielsen and
    Chuang, "Quantum Computation and Quantum Information", section 11.3.1.

    Example:
        >>> relative_entropy(torch.diag(torch.tensor([0.0, 1.0])), torch.eye(2) / 2)  # log 2
        tensor(0.6931)
    """
    checks.density("rho", rho, check, unit_trace=True)
    checks.density("sigma", sigma, check, unit_trace=True)
    log_base = checks.base(base)
    checks.same("rho and sigma", "device", rho.device, sigma.device)
    if rho.shape[-1] != sigma.shape[-1] or not _broadcast(rho.shape[:-2], sigma.shape[:-2]):
        raise ValueError(
            "rho and sigma must be (..., d, d) of one d, and their leading dimensions broadcast, "
            f"got {tuple(rho.shape)} and {tuple(sigma.shape)}"
        )
    dtype = torch.promote_types(rho.dtype, sigma.dtype)
    both = rho.to(dtype), sigma.to(dtype)
    rho, sigma = torch.broadcast_tensors(*both)  # type: ignore[no-untyped-call]
    return in_base(_relative_entropy(rho, sigma), log_base)


def _broadcast(one: Sequence[int], other: Sequence[int]) -> bool:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return all(a == b or 1 in (a, b) for a, b in pairs)


torch.library.define(
    "vne_kernels::relative_entropy_grad",
    "(Tensor rho, Tensor sigma) -> (Tensor entropy, Tensor grad_rho, Tensor grad_sigma)",
)


def _in_torch(rho: Tensor, sigma: Tensor, *, with_grad: bool) -> tuple[Tensor, ...]:
    """In plain torch, for any device: two eigendecompositions take most of the time."""
    device, result, is_complex = rho.device, compute_dtype(rho.dtype), rho.is_complex()
    resolution = 4 * torch.finfo(result).eps  # of the trace
    lam, v, rho_valid = matrices.decompose(rho)
    mu, w, sigma_valid = matrices.decompose(sigma)
    lam_positive, mu_positive = lam.clamp_min(0), mu.clamp_min(0)
    log_lam = _floored(lam_positive, resolution).log()
    floored = _floored(mu_positive, resolution)
    log_mu = floored.log()
    in_support = mu_positive >= floored

    overlap = matrices.adjoint(w) @ v
    inside = (overlap * lam_positive.unsqueeze(-2)) @ matrices.adjoint(
        overlap
    )  # rho in sigma's basis
    weights = inside.diagonal(dim1=-2, dim2=-1).real  # of rho in the directions of sigma
    outside = torch.where(in_support, 0, weights).sum(-1)
    allowed = resolution * (~in_support).sum(-1) * lam_positive.sum(-1)
    entropy = 0 - (weights * log_mu).sum(-1) - torch.special.entr(lam_positive).sum(-1)  # not -0.
    entropy = torch.where(outside > allowed, torch.inf, entropy)

    valid = rho_valid & sigma_valid
    entropy = torch.where(valid, entropy, torch.nan).to(device, result)
    if not with_grad:
        return (entropy,)

    # In the positive part of rho, then, in rho's basis, in rho.
    of_positive = torch.diag_embed(log_lam + 1) - matrices.adjoint(overlap) @ (
        log_mu.unsqueeze(-1) * overlap
    )
    grad_rho = v @ (_divided_differences_of_positive_part(lam) * of_positive) @ matrices.adjoint(v)
    # Where sigma is 0 so is rho, and the derivative: computed, it would be rounding over rounding.
    supported = in_support.unsqueeze(-1) & in_support.unsqueeze(-2)
    gamma = torch.where(supported, spectra.divided_differences_of_log(floored), 0)
    grad_sigma = -(w @ (gamma * inside) @ matrices.adjoint(w))

    of_matrix = valid[..., None, None]
    dtype = result.to_complex() if is_complex else result
    return (
        entropy,
        torch.where(of_matrix, grad_rho, torch.nan).to(device, dtype).contiguous(),
        torch.where(of_matrix, grad_sigma, torch.nan).to(device, dtype).contiguous(),
    )


def _divided_differences_of_positive_part(values: Tensor) -> Tensor:
    """(max(l_i, 0) - max(l_j, 0)) / (l_i - l_j), (..., m, m), and 1 or 0 where they meet."""
    positive = values.clamp_min(0)
    gap = values.unsqueeze(-1) - values.unsqueeze(-2)
    quotient = (positive.unsqueeze(-1) - positive.unsqueeze(-2)) / torch.where(gap == 0, 1, gap)
    return torch.where(gap == 0, (values > 0).to(values.dtype).unsqueeze(-1), quotient)


def _floored(values: Tensor, resolution: float) -> Tensor:
    """Eigenvalues raised to `resolution` times their sum, the trace: all have a logarithm."""
    floor = resolution * values.sum(-1, keepdim=True)
    return torch.maximum(values, floor.clamp_min(torch.finfo(values.dtype).tiny))


_relative_entropy = functional(
    "relative_entropy",
    kernel=_in_torch,
    once="relative_entropy is differentiable once; take differences of its gradient",
)
