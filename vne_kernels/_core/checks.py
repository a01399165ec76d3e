"""What the public functions demand of their arguments, and the errors where it is not met."""

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


def wrong(name: str, wanted: str, got: object, error: type[Exception] = ValueError) -> Exception:
    """The error about an argument: its name, what was wanted and what came."""
    return error(f"{name} must be {wanted}, got {_plain(got)}")


def same(
    names: str, what: str, one: object, other: object, error: type[Exception] = ValueError
) -> None:
    """Whether two arguments agree in what is compared: their shape, dtype or device."""
    if one != other:
        raise error(f"{names} must have the same {what}, got {_plain(one)} and {_plain(other)}")


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


# ---- numbers and options -------------------------------------------------------------------------


def number(name: str, value: Any) -> float:
    """value, a number of Python or of NumPy, as a float."""
    if type(value) is float:  # at once: an instance check of an abstract class takes a while
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong(name, "a number", type(value).__name__, TypeError)
    return float(value)


def is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def integer(name: str, value: Any, least: int) -> int:
    """value, a whole number of Python or of NumPy, as an int."""
    if not is_integer(value):
        raise wrong(name, "a whole number", type(value).__name__, TypeError)
    if value < least:
        raise wrong(name, f"at least {least}", value)
    return int(value)


def max_rows(max_rows: int | None) -> int | None:
    return None if max_rows is None else integer("max_rows", max_rows, 1)


def beta(beta: Any) -> float | Tensor:
    """beta, a number or a tensor of one number, such as one that is learned."""
    if isinstance(beta, Tensor) and beta.numel() == 1 and not beta.is_complex():
        return beta
    return number("beta", beta)


def base(base: float | None) -> float | None:
    """log(base), the natural logarithm by which an entropy in nats is divided; None for nats."""
    if base is None:
        return None
    value = number("base", base)
    if not 0 < value < math.inf or value == 1:
        raise wrong("base", "positive and finite and not 1", base)
    return math.log(value)


def method(method: str) -> None:
    if method not in METHODS:
        raise wrong("method", "'auto', 'poles' or 'eigh'", repr(method))


def normalize(normalize: bool) -> None:
    if not isinstance(normalize, bool):
        raise wrong("normalize", "True or False", type(normalize).__name__, TypeError)


def eps(eps: float) -> float:
    """eps as a float."""
    value = number("eps", eps)
    if not 0 <= value < math.inf:
        raise wrong("eps", "finite and not negative", eps)
    return value


def order(name: str, order: float) -> float:
    """order, of an entropy, as a float."""
    value = number(name, order)
    if not value >= 0:  # NaN too
        raise wrong(name, "at least 0", order)
    return value


# ---- tensors -------------------------------------------------------------------------------------


def dtype(name: str, tensor: Tensor, others: tuple[torch.dtype, ...] = ()) -> None:
    """Whether it is a dense tensor of a floating dtype, or of one of the others."""
    if not isinstance(tensor, Tensor):
        raise wrong(name, "a torch.Tensor", type(tensor).__name__, TypeError)
    if tensor.dtype not in DTYPES + others:
        names = [str(dtype).removeprefix("torch.") for dtype in DTYPES + others]
        raise wrong(name, f"{', '.join(names[:-1])} or {names[-1]}", tensor.dtype, TypeError)
    if tensor.is_nested:
        raise wrong(name, "a dense tensor", "a nested one", TypeError)
    if tensor.layout != torch.strided:
        raise wrong(name, "a dense tensor", tensor.layout, TypeError)


def samples(name: str, z: Tensor, *, may_be_empty: bool = False) -> None:
    dtype(name, z)
    shape = z.shape
    if len(shape) < 2 or (shape[-2] == 0 and not may_be_empty) or shape[-1] == 0:
        raise wrong(name, "(..., n, d) with n, d >= 1", shape)


def weights(weights: Tensor | None, z: Tensor) -> Tensor | None:
    """weights, expanded to (..., n) and in the dtype the operators compute in."""
    if weights is None:
        return None
    dtype("weights", weights, INTEGER_DTYPES)
    shape, rows = weights.shape, z.shape[:-1]
    fits = 0 < len(shape) <= len(rows) and all(
        size in (1, count) for size, count in zip(shape[::-1], rows[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"weights must broadcast to {tuple(rows)}, got {tuple(shape)}")
    return weights.to(z.device, compute_dtype(z.dtype)).expand(rows)


def matrices(name: str, matrices: Tensor) -> None:
    dtype(name, matrices, COMPLEX_DTYPES)
    shape = matrices.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] == 0:
        raise wrong(name, "(..., d, d) with d >= 1", shape)


def matrix_method(name: str, rho: Tensor) -> None:
    """Whether it is a method for these matrices."""
    method(name)
    if name == "poles" and rho.is_complex():
        raise wrong("method", "'auto' or 'eigh' for a complex rho", "'poles'")


def density(name: str, rho: Tensor, look: bool, *, unit_trace: bool) -> None:
    """Matrices (..., d, d); with ``look`` density matrices, by their numbers: the host waits.

    Within eps^(3/4) of the largest entry, eps that of the dtype (2e-12 in float64, 6e-6 in
    float32), and for the trace within eps^(1/2).
    """
    matrices(name, rho)
    if not look:
        return
    eps = torch.finfo(rho.dtype).eps
    rho = to_float64(rho.detach())

    def at_most(tolerance: Tensor | float, excess: Tensor, wanted: str, found: str) -> None:
        above = excess > tolerance
        if bool(above.any()):
            sample = tuple(int(index) for index in above.nonzero()[0])
            of_sample = f" in sample {sample}" if sample else ""
            raise wrong(name, wanted, found.format(float(excess[sample])) + of_sample)

    not_finite = (~rho.isfinite()).sum((-2, -1)).double()
    at_most(0, not_finite, "finite", "{:.0f} entries that are not")
    size = eps**0.75 * rho.abs().amax((-2, -1))
    asymmetry = (rho - rho.mH).abs().amax((-2, -1))
    at_most(size, asymmetry, "Hermitian", "|rho - rho^H| up to {:.3g}")
    lowest = torch.linalg.eigvalsh(rho)[..., 0]
    at_most(size, -lowest, "positive semidefinite", "the eigenvalue -{:.3g}")
    if unit_trace:
        trace = rho.diagonal(dim1=-2, dim2=-1).real.sum(-1)
        at_most(eps**0.5, (trace - 1).abs(), "of trace 1", "|trace - 1| = {:.3g}")
