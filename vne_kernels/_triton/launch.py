"""How kernels are launched: on a GPU, by Triton's interpreter, or as nodes of a graph.

`TRITON_INTERPRET=1` has to be set before this package is imported: Triton reads it where a kernel
is defined. The interpreter runs kernels with NumPy, program by program, on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


def launch_traced(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Makes the launch a node of the graph that torch traces."""
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


def launch(
    kernel: Any,
    programs: int,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int],
    **constants: Any,
) -> None:
    """Runs that many programs of `kernel`, whose parameters come in this order.

    A grid has one axis here: along the others a GPU takes 65,535 programs only.
    """
    if programs != 0:
        _launch.get()(kernel, (programs,), *tensors, *sizes, **constants)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int, least: int = 1, most: int = 2**62) -> int:
    """The least power of two that is not below n, within bounds that are powers themselves.

    Found by comparing, so that torch.compile, where n is a symbol, keeps a range and not a number.
    """
    power = least
    while power < most and power < n:
        power *= 2
    return power


blocks_are_large: bool = is_interpreted
"""Whether few programs have all the work: the interpreter takes its time by the operations of a
program, not by their numbers."""


def block_of(n: int, least: int, most: int, *, interpreted: int = 2**18) -> int:
    """A power of two that covers n, within bounds; where blocks are large the upper one is
    another."""
    return power_of_2(n, least, interpreted if blocks_are_large else most)


PROGRAMS = 256
"""Programs wanted of a product: they fill any GPU, and few enough parts have to be added."""


def tile_of(tiles: Callable[[int], int], dtype: torch.dtype) -> int:
    """The side of the tiles of a product, given how many there are of each size: large ones read
    each number less often, small ones are many. float64 has twice the registers to fill."""
    if blocks_are_large:
        return 512
    largest = 64 if dtype == torch.float32 else 32
    return next((tile for tile in (largest, 32) if tiles(tile) >= PROGRAMS), 16)


def new(like: Tensor, *sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device=like.device)
