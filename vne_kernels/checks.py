"""What the public functions demand of their arguments, and what they say where it is not met."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vne_kernels.ops import compute_dtype, to_float64

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
METHODS = ("auto", "poles", "eigh")


def check_dtype(name: str, tensor: Tensor, *, may_be_complex: bool = False) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    accepted = DTYPES + (COMPLEX_DTYPES if may_be_complex else ())
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
    check_dtype(name, matrices, may_be_complex=True)
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


def check_max_rows(max_rows: int | None) -> int | None:
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    return max_rows


def check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be 'auto', 'poles' or 'eigh', got {method!r}")


def check_normalize(normalize: bool) -> None:
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be True or False, got {type(normalize).__name__}")


def check_eps(eps: float) -> None:
    if not isinstance(eps, int | float):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")


def check_order(name: str, order: float) -> float:
    """order, of an entropy, as a float."""
    if isinstance(order, bool) or not isinstance(order, int | float):
        raise TypeError(f"{name} must be a number, got {type(order).__name__}")
    if not order >= 0:  # NaN too
        raise ValueError(f"{name} must be at least 0, got {order}")
    return float(order)


def check_weights(weights: Tensor | None, z: Tensor) -> Tensor | None:
    """weights, expanded to (..., n) and in the dtype the operators compute in."""
    if weights is None:
        return None
    check_dtype("weights", weights)
    shape, wanted = weights.shape, z.shape[:-1]
    fits = len(shape) <= len(wanted) and all(
        size in (1, want) for size, want in zip(shape[::-1], wanted[::-1], strict=False)
    )
    if not fits or len(shape) == 0:
        raise ValueError(f"weights must broadcast to {tuple(wanted)}, got {tuple(shape)}")
    return weights.to(z.device, compute_dtype(z.dtype)).expand(wanted)
