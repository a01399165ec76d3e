"""Eigenvalues without eigenvectors: the package's solver, torch's LAPACK and SciPy's, in turns.

    python bench/eigenvalues.py                       # one thread, m = 32 to 2048
    python bench/eigenvalues.py --sides 256,1000 --threads 2

Ours is `density_entropy` by "eigh", the operator that needs them of a given matrix; its symmetric
part and the sum over the eigenvalues are in its time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import arguments as options
import harness
import scipy.linalg
import threadpoolctl
import torch

import vne_kernels  # noqa: F401  (the operators)

SIDES = (32, 64, 128, 256, 512, 1000, 2048)


def contenders(m: int, dtype: torch.dtype) -> list[harness.Contender]:
    x = torch.randn(m, m + 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    rho = x @ x.mT
    rho /= rho.trace()
    calls = {
        "ours": partial(torch.ops.vne_kernels.density_entropy, rho, "eigh"),
        "torch": partial(torch.linalg.eigvalsh, rho),
        "SciPy": partial(scipy.linalg.eigvalsh, rho.numpy()),
    }
    return [harness.Contender(name, call, lambda: None) for name, call in calls.items()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="eigenvalues.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--sides", type=options.positives, default=SIDES, help="such as 256,1000")
    add("--threads", type=options.positive, default=1)
    add("--case-seconds", type=options.duration, default=3.0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    print("| m | dtype | ours | torch | SciPy |\n|---|---|---|---|---|")
    for m in arguments.sides:
        for dtype in (torch.float32, torch.float64):
            running = contenders(m, dtype)
            with threadpoolctl.threadpool_limits(arguments.threads):
                harness.time_interleaved(running, torch.device("cpu"), arguments.case_seconds)
            times = [f"{contender.quantiles_ms()[1]:.3g}" for contender in running]
            name = str(dtype).removeprefix("torch.")
            print(f"| {m:,} | {name} | {' | '.join(times)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
