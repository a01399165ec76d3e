"""Eigenvalues without eigenvectors: the package's solver, torch's LAPACK and SciPy's, in turns.

    python bench/eigenvalues.py                       # one thread, m = 32 to 2048
    python bench/eigenvalues.py --sizes 256,1000 --threads 2

Ours is `density_entropy` by "eigh", the operator that needs them of a given matrix; its symmetric
part and the sum over the eigenvalues are in its time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import runner
import scipy.linalg
import threadpoolctl
import torch

import vne_kernels  # noqa: F401  (the operators)

SIZES = (32, 64, 128, 256, 512, 1000, 2048)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
COLUMNS = (
    *("date", "commit", "torch", "device", "device_name", "clocks"),
    *("threads", "m", "dtype", "provider", "samples", "p20_ms", "p50_ms", "p80_ms"),
)


@dataclass(frozen=True)
class Case:
    threads: int
    m: int
    dtype: str


def measure(case: Case, seconds: float) -> list[runner.Row]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.m, case.m + 8, dtype=DTYPES[case.dtype], generator=generator)
    rho = x @ x.mT
    rho /= rho.trace()
    calls = {
        "ours": partial(torch.ops.vne_kernels.density_entropy, rho, "eigh"),
        "torch": partial(torch.linalg.eigvalsh, rho),
        "SciPy": partial(scipy.linalg.eigvalsh, rho.numpy()),
    }
    contenders = [runner.Contender(name, call) for name, call in calls.items()]
    with threadpoolctl.threadpool_limits(case.threads):
        runner.time_interleaved(contenders, torch.device("cpu"), seconds)
    return [{"provider": contender.name, **contender.columns()} for contender in contenders]


def main(argv: Sequence[str] | None = None) -> int:
    parser = runner.make_parser(
        __doc__,
        "eigenvalues",
        seconds={"cpu": 3.0},
        sizes=runner.positives,
        dtypes=tuple(DTYPES),
        threads=(1,),
    )
    arguments = runner.parse(parser, argv)
    axes = (arguments.threads, arguments.sizes or SIZES, arguments.dtypes or DTYPES)
    cases = [Case(*case) for case in product(*axes)]
    one = partial(measure, seconds=arguments.case_seconds)
    return runner.run_cases(arguments, cases, one, COLUMNS, COLUMNS[-5:])


if __name__ == "__main__":
    sys.exit(main())
