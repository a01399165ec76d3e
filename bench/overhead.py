"""What an eager call costs beyond the operator's kernels: one small sample, float32.

    python bench/overhead.py            # to bench/results/overhead.csv: half a minute

Interleaved, at 8 x 16 unless `--sizes` says otherwise: the raw operators with and without gradient,
`vne_kernels.vn_entropy` and its backward, which should take little longer, an `autograd.Function`
around the raw operator, what autograd takes for a sum alone, and the same entropy in plain torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import runner
import torch
from runner import Contender, Row
from torch import Tensor

import vne_kernels

SIZES = ((8, 16),)
CALLS = 50
COLUMNS = (
    *("date", "commit", "torch", "cuda", "driver", "device", "device_name", "clocks", "threads"),
    *("n", "d", "provider", "samples", "p20_ms", "p50_ms", "p80_ms", "fastest_us", "overhead_us"),
)
SHOWN = ("provider", "p50_ms", "fastest_us", "overhead_us")

_ops = torch.ops.vne_kernels
OPTIONS = (None, True, "auto", 1e-12)


@dataclass(frozen=True)
class Case:
    threads: int
    n: int
    d: int


class Around(torch.autograd.Function):
    """The shortest way to a gradient that a user could write."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        value, gradient, _ = _ops.vn_entropy_grad(z, *OPTIONS)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


def in_torch(z: Tensor) -> Tensor:
    u = torch.nn.functional.normalize(z, dim=-1)
    return torch.special.entr(torch.linalg.eigvalsh(u @ u.mT / len(z)).clamp_min(0)).sum()


def measure(case: Case, device: torch.device, seconds: float) -> list[Row]:
    z = torch.randn(case.n, case.d, generator=torch.Generator().manual_seed(0)).to(device)
    leaf = z.clone().requires_grad_()

    def backward(function: Callable[[Tensor], Tensor]) -> None:
        leaf.grad = None
        function(leaf).backward()

    calls = {
        "operator": partial(_ops.vn_entropy, z, *OPTIONS),
        "operator with gradient": partial(_ops.vn_entropy_grad, z, *OPTIONS),
        "vn_entropy": partial(vne_kernels.vn_entropy, z),
        "vn_entropy, backward": partial(backward, vne_kernels.vn_entropy),
        "autograd.Function, backward": partial(backward, Around.apply),
        "sum, backward": partial(backward, torch.sum),
        "torch": partial(in_torch, z),
        "torch, backward": partial(backward, in_torch),
    }

    def repeat(call: Callable[[], object]) -> None:
        for _ in range(CALLS):
            call()

    contenders = [Contender(name, partial(repeat, f), calls=CALLS) for name, f in calls.items()]
    runner.time_interleaved(contenders, device, seconds)
    fastest_us = {contender.name: 1e6 * min(contender.samples_s) for contender in contenders}
    rows = []
    for contender in contenders:
        name, row = contender.name, {"provider": contender.name, **contender.columns()}
        row["fastest_us"] = f"{fastest_us[name]:.1f}"
        if name.startswith(("vn_entropy", "autograd")):
            below = "operator with gradient" if "backward" in name else "operator"
            row["overhead_us"] = f"{fastest_us[name] - fastest_us[below]:.1f}"
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    options = {"seconds": {"cpu": 20.0, "cuda": 20.0}, "device": True, "threads": (1,)}
    parser = runner.make_parser(__doc__, "overhead", sizes=runner.pairs, **options)
    arguments = runner.parse(parser, argv)
    sizes = arguments.sizes or SIZES
    cases = [Case(threads, n, d) for threads in arguments.threads for n, d in sizes]
    timed = partial(measure, device=arguments.device, seconds=arguments.case_seconds)
    return runner.run_cases(arguments, cases, timed, COLUMNS, SHOWN)


if __name__ == "__main__":
    sys.exit(main())
