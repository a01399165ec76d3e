"""cuSOLVER's batched eigensolvers called directly, by ctypes.

They run without torch's choice of a routine, its checks of the result and its wait for the host.

    eigvalsh = cusolver.eigvalsh("XsyevBatched")
    eigvalsh(a)  # (..., m, m) float32 or float64 -> (..., m) ascending, differentiable

The library is the one that torch has loaded. Convergence is not checked: that would be a wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from ctypes import byref, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import torch
from torch import Tensor

LOWER = 0  # cublasFillMode_t
CUDA_TYPE = {torch.float32: 0, torch.float64: 1}  # CUDA_R_32F, CUDA_R_64F
SONAMES = ("libcusolver.so.12", "libcusolver.so.11")  # CUDA 13, CUDA 12
ROUTINES = {"syevjBatched": "cusolverDnSsyevjBatched", "XsyevBatched": "cusolverDnXsyevBatched"}
"""A symbol that the library has where the routine can be called."""


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Returns cuSOLVER, if there is one."""
    for name in SONAMES if torch.version.cuda else ():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _call(name: str, *arguments: object) -> None:
    """Calls a function of cuSOLVER. RuntimeError if it does not succeed."""
    status = getattr(_library(), name)(*arguments)
    if status != 0:
        raise RuntimeError(f"{name} failed: cusolverStatus_t {status}")


def version() -> str:
    """Returns the version of the library, such as 12.0.4; '-' without one."""
    if _library() is None:
        return "-"
    number = c_int()
    _call("cusolverGetVersion", byref(number))
    return f"{number.value // 1000}.{number.value // 100 % 10}.{number.value % 100}"


def why_not(routine: str) -> str | None:
    """Returns None if the routine can be called, otherwise the reason."""
    found = hasattr(_library(), ROUTINES[routine])
    return None if found else f"cuSOLVER {version()} has no {ROUTINES[routine]}"


@functools.cache
def _created(what: str, device: torch.device) -> c_void_p:
    """Returns the handle ("") of cuSOLVER, its "Params" or "SyevjInfo", one for each device."""
    pointer = c_void_p()
    _call(f"cusolverDnCreate{what}", byref(pointer))
    return pointer


def _pointer(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _syevj_batched(handle: c_void_p, a: Tensor, w: Tensor, info: Tensor, vectors: bool) -> None:
    name = f"cusolverDn{'S' if a.dtype == torch.float32 else 'D'}syevjBatched"
    batch, m, _ = a.shape
    last = (_created("SyevjInfo", a.device), batch)
    what = (handle, int(vectors), LOWER, m, _pointer(a), m, _pointer(w))
    length = c_int()
    _call(f"{name}_bufferSize", *what, byref(length), *last)
    work = a.new_empty(length.value)
    _call(name, *what, _pointer(work), length, _pointer(info), *last)


def _xsyev_batched(handle: c_void_p, a: Tensor, w: Tensor, info: Tensor, vectors: bool) -> None:
    dtype, m, batch = CUDA_TYPE[a.dtype], c_int64(a.shape[1]), c_int64(len(a))
    what = (handle, _created("Params", a.device), int(vectors), LOWER, m)
    what += (dtype, _pointer(a), m, dtype, _pointer(w), dtype)
    on_device, on_host = c_size_t(), c_size_t()
    _call("cusolverDnXsyevBatched_bufferSize", *what, byref(on_device), byref(on_host), batch)
    # zeroed: cuSOLVER 11.7.1 reads it before it writes it (pytorch#192483)
    work = torch.zeros(on_device.value, dtype=torch.uint8, device=a.device)
    host = ctypes.create_string_buffer(max(1, on_host.value))
    rest = (_pointer(work), on_device, host, on_host, _pointer(info), batch)
    _call("cusolverDnXsyevBatched", *what, *rest)


class _Eigvalsh(torch.autograd.Function):
    """Eigenvalues of a (..., m, m), with d(lambda_k) = v_k^T dA v_k; vectors only for that."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, routine: str) -> Tensor:
        copy = a.detach().contiguous().clone().reshape(-1, *a.shape[-2:])
        w = copy.new_empty(copy.shape[:2])
        info = torch.empty(len(copy), dtype=torch.int32, device=a.device)
        handle = _created("", a.device)
        stream = c_void_p(torch.cuda.current_stream(a.device).cuda_stream)
        _call("cusolverDnSetStream", handle, stream)
        solve = _syevj_batched if routine == "syevjBatched" else _xsyev_batched
        solve(handle, copy, w, info, ctx.needs_input_grad[0])
        # cuSOLVER writes column by column, so row k of `copy` is eigenvector k
        ctx.save_for_backward(copy.reshape(a.shape).mT)
        return w.reshape(a.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (v,) = ctx.saved_tensors
        return (v * grad.unsqueeze(-2)) @ v.mT, None


def eigvalsh(routine: str) -> Callable[[Tensor], Tensor]:
    """Returns a replacement of `torch.linalg.eigvalsh` by one of ROUTINES."""
    return lambda a: _Eigvalsh.apply(a, routine)
