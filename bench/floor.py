"""The least time that value and gradient of S can take on a device, by the method of poles.

Three numbers of the device are measured: bytes copied per second, float32 operations per second,
and, on a GPU, the time of one dependent pivot. The floor of a call is the largest of

    bytes    z read once, the gradient written once                          / bytes per second
    work     Gram matrix m² K (half of it is enough: it is symmetric)
             + on a GPU 16 sweeps of m³ (likewise); on a CPU a reduction of 4/3 m³, for the
             gradient also its way back, 4 m³
             + for the gradient the product 2 m² K                           / operations per second
    chain    m pivots, each of which needs the one before: a store to shared memory, a barrier, a
             load, a reciprocal and a multiply-add                           * time of one

with K = max(n, d). It assumes that these overlap perfectly. Another method has another amount of
work, and the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

POLES = 16


@dataclass(frozen=True)
class Ceilings:
    """What the device reached; NaN where that could not be measured."""

    bytes_per_s: float
    flop_per_s: float
    pivot_s: float


def floor_s(
    ceilings: Ceilings, n: int, d: int, batch: int, itemsize: int, *, gradient: bool, on_gpu: bool
) -> float:
    """Seconds that a call takes at least."""
    m, k = min(n, d), max(n, d)
    moved = batch * n * d * itemsize * (2 if gradient else 1)
    log_a = POLES * m**3 if on_gpu else (4 / 3 + (4 if gradient else 0)) * m**3
    work = batch * (m * m * k + log_a + (2 * m * m * k if gradient else 0))
    terms = (moved / ceilings.bytes_per_s, work / ceilings.flop_per_s, m * ceilings.pivot_s)
    return max((t for t in terms if not math.isnan(t)), default=math.nan)


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of five calls, after one warm-up each: what the device can do."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return min(timer.timeit(1).mean for _ in range(5))


def _bytes_per_s(device: torch.device) -> float:
    """Bytes read and bytes written by a copy far larger than any cache."""
    count = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / _fastest(lambda: target.copy_(source))


def _flop_per_s(device: torch.device) -> float:
    """A large float32 matrix product, on the units for float32."""
    m = 8192 if device.type == "cuda" else 1536
    a = torch.randn(m, m, device=device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return 2 * m**3 / _fastest(lambda: a @ a)
    finally:
        torch.set_float32_matmul_precision(precision)


PIVOTS = r"""
extern "C" __global__ void pivots(float* out, int count) {
  __shared__ float column[2];
  float a = 2.0f + threadIdx.x;
  int owner = 0;
  for (int k = 0; k < count; ++k) {
    if (threadIdx.x == owner) column[k & 1] = a;
    __syncthreads();
    const float p = column[k & 1];
    a = fmaf(-1e-3f * p, __frcp_rn(p), a + 1e-3f);
    owner = owner + 1 < blockDim.x ? owner + 1 : 0;
  }
  out[threadIdx.x] = a;
}
"""
"""One block of as many threads as sweep 128 x 128; each step needs the number of the one before."""

PIVOT_THREADS = 160


def _pivot_s(device: torch.device) -> float:
    """From the difference of a long and a short chain, which takes the launch away."""
    if device.type != "cuda":
        return math.nan
    build = getattr(torch.cuda, "compile_kernel", None) or torch.cuda._compile_kernel
    with torch.cuda.device(device):
        kernel = build(PIVOTS, "pivots")
        out = torch.empty(PIVOT_THREADS, device=device)

        def chain(count: int) -> Callable[[], object]:
            return lambda: kernel((1, 1, 1), (PIVOT_THREADS, 1, 1), [out, count])

        short, long = 1_000, 101_000
        return (_fastest(chain(long)) - _fastest(chain(short))) / (long - short)


def measure(device: torch.device) -> Ceilings:
    """On a CPU with torch's number of threads, without a chain of pivots."""
    return Ceilings(_bytes_per_s(device), _flop_per_s(device), _pivot_s(device))
