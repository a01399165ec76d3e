"""Chooses the kernels that serve the tensors of each device.

Tensors of a GPU are served by the first of these that there is, or by the one that is asked for:

    cuda      the CUDA kernels of csrc/cuda, if they were built for this torch
    triton    the Triton kernels of vne_kernels/_triton, compiled when they are first needed
    cpu       the CPU kernels, by way of the host

Tensors of the host are served by the CPU kernels, or by Triton's interpreter if that is asked for;
those of MPS and XPU by way of the host. Each choice is a registration of kernels with torch's
dispatcher: the callers of the operators do not see it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from vne_kernels._core import load as _load
from vne_kernels._core.ops import OPERATORS

VARIABLE = "VNE_KERNELS_BACKEND"
NAMES = ("auto", "cuda", "triton", "cpu")

_LEAST_CAPABILITY = (7, 5)


# ---- which backends are usable -------------------------------------------------------------------


def is_interpreted() -> bool:
    """Whether Triton kernels are run by its interpreter, on the host."""
    if _no_triton():
        return False
    if "triton" not in sys.modules and "TRITON_INTERPRET" not in os.environ:
        return False  # without importing Triton, which takes 75 MB
    from vne_kernels._triton import launch

    return launch.is_interpreted


def _no_gpu() -> str | None:
    """Why torch cannot use a GPU, or None if it can."""
    return None if torch.cuda.is_available() else "torch.cuda.is_available() finds no usable GPU"


def _why_no_cuda() -> str | None:
    return _load.cuda_reason or _no_gpu()


def _no_triton() -> str | None:
    found = importlib.util.find_spec("triton")
    return None if found else "triton is not installed: pip install triton"


def _why_no_triton() -> str | None:
    if (reason := _no_triton()) or is_interpreted():
        return reason
    if reason := _no_gpu():
        return f"{reason}; TRITON_INTERPRET=1 runs the Triton kernels on the host"
    capability = torch.cuda.get_device_capability()
    if torch.version.cuda is not None and capability < _LEAST_CAPABILITY:
        needed, found = (".".join(map(str, x)) for x in (_LEAST_CAPABILITY, capability))
        return f"Triton needs a GPU of compute capability {needed}, this one has {found}"
    return None


class Backends(dict[str, str | None]):
    """What `available_backends` returns: None or a reason by name; printed, what serves what."""

    serving: dict[str, str]
    """Device type -> the backend that serves its tensors, and why it."""

    def __str__(self) -> str:
        lines = [f"{name}: {reason or 'usable'}" for name, reason in self.items()]
        lines += [f"{device} tensors: {who}" for device, who in self.serving.items()]
        return "\n".join(lines)


def available_backends() -> Backends:
    """The backends by name: None where one is usable, else a sentence that says why it is not.

    Returns:
        A dict of "cpu", "cuda" and "triton"; printed, and in its attribute ``serving``, it says
        besides which of them serves the tensors of which device, and why: see `use_backend`.

    Example:
        >>> available_backends()["cpu"] is None
        True
    """
    result = Backends(cpu=None, cuda=_why_no_cuda(), triton=_why_no_triton())
    asked = f", asked for by {_asked_by}" if _asked != "auto" else ""
    on_cpu = "triton, by its interpreter" if _on_host_by_triton(_asked) else "cpu"
    result.serving = {"cpu": on_cpu + (asked if on_cpu != "cpu" else "")}
    if _no_gpu() is None:
        result.serving["cuda"] = _description(resolve(_asked)) + asked
    return result


def _description(name: str) -> str:
    if name == "cuda":
        return "cuda"
    if name == "cpu":
        return f"cpu, by way of the host: {_why_no_cuda()}; {_why_no_triton()}"
    from vne_kernels._triton.policy import LIMITS

    return f"triton ({LIMITS})" + (f", as {reason}" if (reason := _why_no_cuda()) else "")


# ---- which one is chosen -------------------------------------------------------------------------


def resolve(name: str) -> str:
    """The backend that serves the tensors of a GPU where `name` is asked for."""
    if name != "auto":
        return name
    if _load.cuda_reason is None:
        return "cuda"
    return "cpu" if _no_triton() else "triton"


def _on_host_by_triton(name: str) -> bool:
    return name == "triton" and is_interpreted()


def names_with_kernels() -> list[str]:
    """The operators that backends implement. The others are plain torch, and run anywhere."""
    return [name for name, operator in OPERATORS.items() if operator.has_kernels]


def _on_host(name: str) -> Callable[..., Any]:
    """The operator of this name for tensors of any device, by the CPU kernels.

    The matrix is small and LAPACK is quick: a copy to the host is right everywhere.
    """
    operator = OPERATORS[name].call

    def call(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        result = operator(*(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args))
        if isinstance(result, Tensor):
            return result.to(device)
        return tuple(out.to(device) for out in result)

    return call


def _by_triton(name: str) -> Callable[..., Any]:
    """The operator in Triton; imported when it is first called, as that takes a second."""

    @cache
    def found() -> Callable[..., Any]:
        reason = _why_no_triton()
        if reason and _asked == "triton":
            raise RuntimeError(f"{_asked_by} is 'triton', which cannot serve: {reason}")
        if reason:
            return _on_host(name)
        from vne_kernels._triton.operators import implementation

        return implementation(name)

    return lambda *args: found()(*args)


def _register(key: str, implement: Callable[[str], Callable[..., Any]]) -> torch.library.Library:
    """Kernels of all operators for one dispatch key, for as long as the result lives."""
    library = torch.library.Library("vne_kernels", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced: it is meant to be
        for operator in names_with_kernels():
            library.impl(  # type: ignore[no-untyped-call]
                operator, implement(operator), key, allow_override=True
            )
    return library


_asked, _asked_by = "auto", ""
_registered: list[torch.library.Library] = []


def _serve(name: str, asked_by: str) -> None:
    global _asked, _asked_by
    if name not in NAMES:
        names = ", ".join(repr(known) for known in NAMES[:-1])
        raise ValueError(f"{asked_by} must be {names} or {NAMES[-1]!r}, got {name!r}")
    if reason := {"cuda": _load.cuda_reason, "triton": _no_triton()}.get(name):
        raise RuntimeError(f"{asked_by} is {name!r}, which cannot serve: {reason}")
    _registered.clear()
    chosen = resolve(name)
    if chosen != "cuda":
        _registered.append(_register("CUDA", {"triton": _by_triton, "cpu": _on_host}[chosen]))
    if _on_host_by_triton(name):
        _registered.append(_register("CPU", _by_triton))
    _asked, _asked_by = name, asked_by


class use_backend:
    """Chooses the kernels that serve the tensors of a GPU, in this process from now on.

    As a context manager it brings back what was before. The environment variable
    VNE_KERNELS_BACKEND, read when the package is imported, does the same for a whole program.
    Results agree to within rounding, whoever serves. Not to be called while another thread is
    inside an operator; what torch.compile has compiled before keeps the kernels it was compiled
    for.

    Args:
        name: "cuda", the CUDA kernels; "triton", the Triton kernels, which with TRITON_INTERPRET=1
            in the environment serve the tensors of the host too; "cpu", the CPU kernels, by way of
            the host; "auto", the first of these that there is.

    Raises:
        ValueError: there is no such name.
        RuntimeError: the kernels cannot be loaded, and why.

    Example:
        >>> with use_backend("cpu"):
        ...     S = vn_entropy(torch.eye(4))
    """

    def __init__(self, name: str) -> None:
        self._before = _asked, _asked_by
        _serve(name, "use_backend")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        _serve(*self._before)


# ---- registration --------------------------------------------------------------------------------


def _dissolve(operator: str) -> None:
    """Where Triton serves, torch.compile sees the launches of the operator: `_triton.operators`."""

    def rule(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if (
            device.type != "cuda"
            or resolve(_asked) != "triton"
            or is_interpreted()
            or custom_triton_ops_decomposition_disabled()  # type: ignore[no-untyped-call]
        ):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        from vne_kernels._triton.operators import decomposition

        with mode:
            return decomposition(operator)(*args, **kwargs)

    torch.library.register_torch_dispatch(f"vne_kernels::{operator}", FunctionalTensorMode, rule)


@cache
def register() -> None:
    """Binds every operator to its kernels, once, when all operators are declared."""
    for name in names_with_kernels():
        torch.library.impl(f"vne_kernels::{name}", ("MPS", "XPU"))(_on_host(name))
        _dissolve(name)
    _serve(os.environ.get(VARIABLE) or "auto", VARIABLE)
