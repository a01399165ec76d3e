"""Binds the functions of operators.py to the operators of the package.

This is what `torch.library.triton_op` does for an operator that it defines itself: called, the
kernels are launched; traced by torch.compile, the operator dissolves into its launches, which
Inductor sees, orders and allocates for; exported, it stays one operator, so that the program does
not depend on who serves it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from vne_kernels._triton import operators
from vne_kernels._triton.launch import is_interpreted, tracing

_ops = torch.ops.vne_kernels


def implementation(name: str) -> Callable[..., Any]:
    """The operator `name`, on tensors with data."""
    function: Callable[..., Any] = getattr(operators, name)
    check = getattr(_ops, f"check_{name}")

    def call(*args: Any) -> Any:
        check(*args)
        # Triton launches on the current device.
        with nullcontext() if is_interpreted else torch.cuda.device_of(args[0]):
            return function(*args)

    return call


def decomposition(name: str) -> Callable[..., Any]:
    """The operator `name` as its launches, on the tensors of a trace."""
    function: Callable[..., Any] = getattr(operators, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with tracing():
            return function(*args, **kwargs)

    return call
