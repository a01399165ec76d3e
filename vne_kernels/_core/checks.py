"""What the public functions demand of their arguments, and what they say where it is not met."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from vne_kernels._core.dtypes import compute_dtype, to_float64

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
INTEGER_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
METHODS = ("auto", "poles", "eigh")


def check_dtype(name: str, tensor: Tensor, others: tuple[torch.dtype, ...] = ()) -> None:
    """Whether it is a dense tensor of a floating dtype, or of one of the others."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    accepted = DTYPES + others
    if tensor.dtype not in accepted:
        names = [str(dtype).removeprefix("torch.") for dtype in accepted]
        wanted = f"{', '.join(names[:-1])} or {names[-1]}"
        raise TypeError(f"{name} must be {wanted}, got {tensor.dtype}")
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def check_samples(name: str, z: Tensor, *, may_be_empty: bool = False) -> None:
    check_dtype(name, z)
    if z.dim() < 2 or (z.shape[-2] == 0 and not may_be_empty) or z.shape[-1] == 0:
        raise ValueError(f"{name} must be (..., n, d) with n, d >= 1, got {tuple(z.shape)}")


def check_matrices(name: str, matrices: Tensor) -> None:
    check_dtype(name, matrices, COMPLEX_DTYPES)
    shape = matrices.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] == 0:
        raise ValueError(f"{name} must be (..., d, d) with d >= 1, got {tuple(shape)}")


def check_density(name: str, rho: Tensor, *, unit_trace: bool) -> None:
    """Whether matrices (..., d, d) are density matrices: a look at the numbers, the host waits.

    Within eps^(3/4) of the largest entry, eps that of the dtype (2e-12 in float64, 6e-6 in
    float32), and for the trace within eps^(1/2).
    """
    eps = torch.finfo(rho.dtype).eps
    rho = to_float64(rho.detach())
    not_finite = (~rho.isfinite()).sum((-2, -1)).double()
    _demand(name, "finite", not_finite, 0, "{:.0f} entries that are not")
    size = rho.abs().amax((-2, -1))
    _demand(
        name,
        "Hermitian",
        (rho - rho.mH).abs().amax((-2, -1)),
        eps**0.75 * size,
        "|rho - rho^H| up to {:.3g}",
    )
    lowest = torch.linalg.eigvalsh(rho)[..., 0]
    _demand(name, "positive semidefinite", -lowest, eps**0.75 * size, "the eigenvalue -{:.3g}")
    if unit_trace:
        trace = rho.diagonal(dim1=-2, dim2=-1).real.sum(-1)
        _demand(name, "of trace 1", (trace - 1).abs(), eps**0.5, "|trace - 1| = {:.3g}")


def _demand(name: str, what: str, excess: Tensor, tolerance: Tensor | float, told: str) -> None:
    """An error that tells of the first sample whose excess is above the tolerance."""
    above = excess > tolerance
    if not bool(above.any()):
        return
    sample = tuple(int(index) for index in above.nonzero()[0])
    of_sample = f" in sample {sample}" if sample else ""
    raise ValueError(f"{name} must be {what}, got {told.format(float(excess[sample]))}{of_sample}")


def check_number(name: str, value: Any) -> float:
    """value, a number of Python or of NumPy, as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_beta(beta: Any) -> float | Tensor:
    """beta, a number or a tensor of one number, such as one that is learned."""
    if isinstance(beta, Tensor) and beta.numel() == 1 and not beta.is_complex():
        return beta
    return check_number("beta", beta)


def check_integer(name: str, value: Any, least: int) -> int:
    """value, a whole number of Python or of NumPy, as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_max_rows(max_rows: int | None) -> int | None:
    return None if max_rows is None else check_integer("max_rows", max_rows, 1)


def check_base(base: float | None) -> float | None:
    """log(base), the natural logarithm by which an entropy in nats is divided; None for nats."""
    if base is None:
        return None
    value = check_number("base", base)
    if not (0 < value < math.inf) or value == 1:
        raise ValueError(f"base must be positive and finite and not 1, got {base}")
    return math.log(value)


def in_base(entropy: Tensor, log_base: float | None) -> Tensor:
    """An entropy in nats as one to the base that `check_base` took."""
    return entropy if log_base is None else entropy / log_base + 0.0  # not -0.


def check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be 'auto', 'poles' or 'eigh', got {method!r}")


def check_normalize(normalize: bool) -> None:
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be True or False, got {type(normalize).__name__}")


def check_eps(eps: float) -> float:
    """eps as a float."""
    value = check_number("eps", eps)
    if not 0 <= value < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    return value


def check_order(name: str, order: float) -> float:
    """order, of an entropy, as a float."""
    value = check_number(name, order)
    if not value >= 0:  # NaN too
        raise ValueError(f"{name} must be at least 0, got {order}")
    return value


def check_weights(weights: Tensor | None, z: Tensor) -> Tensor | None:
    """weights, expanded to (..., n) and in the dtype the operators compute in."""
    if weights is None:
        return None
    check_dtype("weights", weights, INTEGER_DTYPES)
    shape, wanted = weights.shape, z.shape[:-1]
    fits = len(shape) <= len(wanted) and all(
        size in (1, want) for size, want in zip(shape[::-1], wanted[::-1], strict=False)
    )
    if not fits or len(shape) == 0:
        raise ValueError(f"weights must broadcast to {tuple(wanted)}, got {tuple(shape)}")
    return weights.to(z.device, compute_dtype(z.dtype)).expand(wanted)


def relative(weights: Tensor) -> Tensor:
    """weights (..., n) over their sum, or 0 where that is 0; NaN in a sample with a negative one.

    An absent sample, of weight 0, has the gradient 0.
    """
    precise = torch.where(weights == 0, 0, to_float64(weights))
    total = precise.sum(-1, keepdim=True)
    valid = (precise >= 0).all(-1, keepdim=True)
    divisor = torch.where(valid, torch.where(total == 0, 1, total), torch.nan)
    return (precise / divisor).to(weights)


def check_sample_weights(weights: Tensor | None, z: Tensor, normalize: bool) -> Tensor | None:
    """p of rho = U^T diag(p) U, (..., n): relative where rows are normalized, else as given."""
    checked = check_weights(weights, z)
    return relative(checked) if checked is not None and normalize else checked
