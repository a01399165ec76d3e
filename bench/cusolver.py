"""cuSOLVER's batched eigensolvers called directly, by ctypes.

They run without torch's choice of a routine, its checks of the result and its wait for the host.

    eigvalsh = cusolver.eigvalsh("XsyevBatched")
    eigvalsh(a)  # (..., m, m) float32 or float64 -> (..., m) ascending, differentiable

The library is the one that torch has loaded. Convergence is not checked: that would be a wait.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import byref, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import torch
from torch import Tensor

NOVECTOR, VECTOR = 0, 1  # cusolverEigMode_t
LOWER = 0  # cublasFillMode_t
CUDA_TYPE = {torch.float32: 0, torch.float64: 1}  # CUDA_R_32F, CUDA_R_64F
LETTER = {torch.float32: "S", torch.float64: "D"}
SONAMES = ("libcusolver.so.12", "libcusolver.so.11")  # CUDA 13, CUDA 12
ROUTINES = {
    "syevjBatched": "cusolverDnSsyevjBatched",
    "XsyevBatched": "cusolverDnXsyevBatched",
}
"""A symbol that the library has where the routine can be called."""


@functools.cache
def library() -> ctypes.CDLL:
    """OSError where there is none."""
    if torch.version.cuda is None:
        raise OSError(f"torch {torch.__version__} is a build without CUDA, it has no cuSOLVER")
    for name in SONAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"cuSOLVER was not found, tried {', '.join(SONAMES)}")


def version() -> str:
    """Of the library, such as 12.0.4; '-' without one."""
    try:
        number = c_int()
        _check(library().cusolverGetVersion(byref(number)), "cusolverGetVersion")
    except OSError:
        return "-"
    return f"{number.value // 1000}.{number.value // 100 % 10}.{number.value % 100}"


def why_not(routine: str) -> str | None:
    """None if the routine can be called, otherwise the reason."""
    try:
        found = hasattr(library(), ROUTINES[routine])
    except OSError as error:
        return str(error)
    return None if found else f"cuSOLVER {version()} has no {ROUTINES[routine]}"


def _check(status: int, call: str) -> None:
    if status != 0:
        raise RuntimeError(f"{call} failed: cusolverStatus_t {status}")


@functools.cache
def _state(device: torch.device) -> tuple[c_void_p, c_void_p, c_void_p]:
    """cuSOLVER's handle, parameters and Jacobi settings for one device."""
    state = c_void_p(), c_void_p(), c_void_p()
    creators = ("cusolverDnCreate", "cusolverDnCreateParams", "cusolverDnCreateSyevjInfo")
    for pointer, name in zip(state, creators, strict=True):
        _check(getattr(library(), name)(byref(pointer)), name)
    return state


def _pointer(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _syevj_batched(a: Tensor, w: Tensor, info: Tensor, job: int) -> None:
    handle, _, jacobi = _state(a.device)
    name = f"cusolverDn{LETTER[a.dtype]}syevjBatched"
    batch, m, _ = a.shape
    what = (handle, c_int(job), c_int(LOWER), c_int(m), _pointer(a), c_int(m), _pointer(w))
    length = c_int()
    size = getattr(library(), f"{name}_bufferSize")
    _check(size(*what, byref(length), jacobi, c_int(batch)), size.__name__)
    work = a.new_empty(length.value)
    rest = (_pointer(work), length, _pointer(info), jacobi, c_int(batch))
    _check(getattr(library(), name)(*what, *rest), name)


def _xsyev_batched(a: Tensor, w: Tensor, info: Tensor, job: int) -> None:
    handle, params, _ = _state(a.device)
    batch, m, _ = a.shape
    dtype, n, count = c_int(CUDA_TYPE[a.dtype]), c_int64(m), c_int64(batch)
    what: tuple[Any, ...] = (handle, params, c_int(job), c_int(LOWER), n)
    what += (dtype, _pointer(a), n, dtype, _pointer(w), dtype)
    device_bytes, host_bytes = c_size_t(), c_size_t()
    size = library().cusolverDnXsyevBatched_bufferSize
    _check(size(*what, byref(device_bytes), byref(host_bytes), count), size.__name__)
    # zeroed: cuSOLVER 11.7.1 reads it before it writes it (pytorch#192483)
    work = torch.zeros(device_bytes.value, dtype=torch.uint8, device=a.device)
    host = ctypes.create_string_buffer(max(1, host_bytes.value))
    rest = (_pointer(work), device_bytes, host, host_bytes, _pointer(info), count)
    _check(library().cusolverDnXsyevBatched(*what, *rest), "cusolverDnXsyevBatched")


def eigh(routine: str, a: Tensor, *, vectors: bool) -> tuple[Tensor, Tensor]:
    """(..., m, m) symmetric -> eigenvalues (..., m), ascending, and eigenvectors as columns.

    Without `vectors` the second result means nothing.
    """
    copy = a.detach().contiguous().clone().reshape(-1, *a.shape[-2:])
    w = copy.new_empty(copy.shape[:2])
    info = torch.empty(len(copy), dtype=torch.int32, device=a.device)
    stream = c_void_p(torch.cuda.current_stream(a.device).cuda_stream)
    _check(library().cusolverDnSetStream(_state(a.device)[0], stream), "cusolverDnSetStream")
    solve = _syevj_batched if routine == "syevjBatched" else _xsyev_batched
    solve(copy, w, info, VECTOR if vectors else NOVECTOR)
    # cuSOLVER writes column by column, so row k of `copy` is eigenvector k
    return w.reshape(a.shape[:-1]), copy.reshape(a.shape).mT


class _Eigvalsh(torch.autograd.Function):
    """d(lambda_k) = v_k^T dA v_k."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, routine: str) -> Tensor:
        w, v = eigh(routine, a, vectors=ctx.needs_input_grad[0])
        ctx.save_for_backward(v)
        return w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (v,) = ctx.saved_tensors
        return (v * grad.unsqueeze(-2)) @ v.mT, None


def eigvalsh(routine: str) -> Callable[[Tensor], Tensor]:
    """A replacement of `torch.linalg.eigvalsh` by one of ROUTINES."""
    return lambda a: _Eigvalsh.apply(a, routine)
