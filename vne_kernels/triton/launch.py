"""How kernels are launched: on a GPU, by Triton's interpreter, or as nodes of a graph.

`TRITON_INTERPRET=1` has to be set before this package is imported: Triton reads it where a kernel
is defined. The interpreter runs kernels with NumPy, program by program, on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor

is_interpreted: bool = triton.knobs.runtime.interpret
"""Whether kernels are run by Triton's interpreter, on tensors of the host."""

Launch = Callable[..., None]


_interpreter = Lock()  # it keeps the index of its program in one place for all threads


def _launch_now(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    with _interpreter if is_interpreted else nullcontext():
        kernel[grid](*args, **options)


def _launch_traced(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    torch.library.wrap_triton(kernel)[grid](*args, **options)


_launch: ContextVar[Launch] = ContextVar("launch", default=_launch_now)


@contextmanager
def launching_by(function: Launch) -> Iterator[None]:
    """Within it `launch` hands everything to `function`, of the same arguments."""
    token = _launch.set(function)
    try:
        yield
    finally:
        _launch.reset(token)


def tracing() -> Any:
    """Within it a launch becomes a node of the graph that torch traces."""
    return launching_by(_launch_traced)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs `kernel` for every index of the grid; `options` as Triton takes them."""
    if 0 not in grid:
        _launch.get()(kernel, grid, *args, **options)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def block_of(n: int, least: int, most: int, *, interpreted: int = 2**18) -> int:
    """A power of two that covers n, within bounds. In the interpreter a program costs by its
    operations, not by its numbers: there the upper bound is another."""
    return min(max(power_of_2(n), least), interpreted if is_interpreted else most)


def new(like: Tensor, *sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device=like.device)
