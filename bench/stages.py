"""What the stages of an entropy and its gradient take of the least time: one sample, float32.

    python bench/stages.py            # to bench/results/stages.csv: half a minute

The floor is torch's own time for the Gram matrix X X^T and for one product W X, and 4/3 m^3
operations of a reduction at the rate of that product. A stage is the difference of two
operators, of which one has the stage and the other lacks it: `purity` is the Gram matrix alone,
`purity_grad` adds the product of the gradient, `vn_entropy` the reduction and the poles.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import runner
import torch
from runner import Contender, Row

import vne_kernels

SIZES = ((128, 512),)
COLUMNS = (
    *("date", "commit", "torch", "cuda", "driver", "device", "device_name", "clocks", "threads"),
    *("n", "d", "provider", "samples", "time_ms", "floor_share"),
)
SHOWN = ("provider", "time_ms", "floor_share")

_ops = torch.ops.vne_kernels


@dataclass(frozen=True)
class Case:
    threads: int
    n: int
    d: int


def measure(case: Case, device: torch.device, seconds: float) -> list[Row]:
    m, generator = min(case.n, case.d), torch.Generator().manual_seed(0)
    z = torch.randn(case.n, case.d, generator=generator).to(device)
    x, w = z if case.n <= case.d else z.mT.contiguous(), torch.randn(m, m).to(device)
    leaf = z.clone().requires_grad_()

    def backward() -> None:
        leaf.grad = None
        vne_kernels.vn_entropy(leaf).backward()

    options = (z, None, True, "poles", 1e-12)
    calls = {
        "mm(x, x.T)": partial(torch.mm, x, x.mT),
        "mm(w, x)": partial(torch.mm, w, x),
        **{
            name: partial(getattr(_ops, name), *options)
            for name in ("purity", "purity_grad", "vn_entropy", "vn_entropy_grad")
        },
        "vn_entropy, backward": backward,
    }
    contenders = [Contender(name, call) for name, call in calls.items()]
    runner.time_interleaved(contenders, device, seconds)
    ms = {one.name: 1e3 * min(one.samples_s) for one in contenders}
    product = ms["purity_grad"] - ms["purity"]
    ms |= {
        "4/3 m^3 operations": ms["mm(w, x)"] * 4 / 3 * m / (2 * max(case.n, case.d)),
        "stage: rows, Gram matrix": ms["purity"],
        "stage: reduction, poles' pivots": ms["vn_entropy"] - ms["purity"],
        "stage: logarithm, way back": ms["vn_entropy_grad"] - ms["vn_entropy"] - product,
        "stage: gradient's product": product,
        "stage: call, autograd": ms["vn_entropy, backward"] - ms["vn_entropy_grad"],
    }
    floor = ms["mm(x, x.T)"] + ms["mm(w, x)"] + ms["4/3 m^3 operations"]
    samples = min(len(one.samples_s) for one in contenders)
    return [
        {
            "provider": name,
            "samples": samples,
            "time_ms": f"{time:.5g}",
            "floor_share": f"{time / floor:.3f}",
        }
        for name, time in (ms | {"floor": floor}).items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    options = {"seconds": {"cpu": 20.0, "cuda": 20.0}, "device": True, "threads": (1,)}
    parser = runner.make_parser(__doc__, "stages", sizes=runner.pairs, **options)
    arguments = runner.parse(parser, argv)
    sizes = arguments.sizes or SIZES
    cases = [Case(threads, n, d) for threads in arguments.threads for n, d in sizes]
    timed = partial(measure, device=arguments.device, seconds=arguments.case_seconds)
    return runner.run_cases(arguments, cases, timed, COLUMNS, SHOWN)


if __name__ == "__main__":
    sys.exit(main())
