"""The least time that value and gradient of S can take on a device, by the method of poles.

Two rates of the device are measured: bytes copied and float32 operations, per second. The floor of
a call is the larger of two times, as if both overlapped perfectly, with K = max(n, d):

    bytes    z read once, the gradient written once
    work     the Gram matrix, m² K operations (half of it is enough: it is symmetric)
             + on a GPU 16 sweeps of m³ (likewise); on a CPU a reduction of 4/3 m³, for the
             gradient also its way back, 4 m³
             + for the gradient the product 2 m² K

Another method has another amount of work, and the same bytes. On a GPU small matrices take longer:
the m pivots of a sweep depend on each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

POLES = 16


def floor_ms(
    device: torch.device, n: int, d: int, batch: int, dtype: torch.dtype, *, gradient: bool
) -> float:
    """Returns milliseconds that a call takes at least; NaN in float64, which is not measured."""
    if dtype == torch.float64:
        return math.nan
    bytes_per_s, flop_per_s = _rates(device, torch.get_num_threads())
    m, k = min(n, d), max(n, d)
    moved = n * d * dtype.itemsize * (1 + gradient)
    log_a = POLES if device.type == "cuda" else 4 / 3 + 4 * gradient
    work = m * m * k * (1 + 2 * gradient) + log_a * m**3
    return 1e3 * batch * max(moved / bytes_per_s, work / flop_per_s)


@functools.cache
def _rates(device: torch.device, threads: int) -> tuple[float, float]:
    """Times a copy far larger than any cache and a large float32 product; per second of both."""

    def fastest(call: Callable[[], object]) -> float:
        timer = Timer("call()", globals={"call": call}, num_threads=threads)
        return min(timer.timeit(1).mean for _ in range(5))  # each after a warm-up

    count, m = (2**30, 8192) if device.type == "cuda" else (2**28, 1536)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target, a = torch.empty_like(source), torch.randn(m, m, device=device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # on the units for float32
    try:
        bytes_per_s = 2 * count / fastest(lambda: target.copy_(source))
        flop_per_s = 2 * m**3 / fastest(lambda: a @ a)
    finally:
        torch.set_float32_matmul_precision(precision)
    print(f"threads {threads}: {bytes_per_s:.4g} bytes/s, {flop_per_s:.4g} flop/s")
    return bytes_per_s, flop_per_s
