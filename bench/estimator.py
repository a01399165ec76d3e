"""Whether the error bar of the randomised estimate covers S, and what the estimate costs.

    python bench/estimator.py              # 100 trials of each spectrum at m = 4,096
    python bench/estimator.py --resume     # goes on with what an interrupted run lacks
    python bench/tables.py                 # the table, bench/results/estimator.md
    python bench/estimator.py --m 20000 --trials 1 --spectra power_law    # beyond the exact ones

A trial is a new matrix and new probes: singular values that are given, so that S is known exactly,
between random rotations (Householder's reflections, which make the matrix dense). Trials of the
spectra alternate, so that an interrupted run has seen all of them. The exact entropy of one such
matrix is timed before and after the trials, in the same process. Rows of other m stay in the file.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import runner
import torch
from runner import Row
from torch import Tensor

from vne_kernels import estimate_vn_entropy, vn_entropy

EXACT = "exact"
LARGEST_EXACT = 8192
COLUMNS = (
    *("date", "commit", "torch", "device_name", "threads"),
    *("spectrum", "m", "trial", "entropy", "estimate", "error", "probes", "seconds"),
)


def iid(m: int) -> Tensor:
    """Of m independent Gaussian rows of m features: quantiles of the Marchenko-Pastur law."""
    angles = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    below = (2 * angles + (2 * angles).sin()) / math.pi  # of 2 sin(angle), the quarter circle law
    levels = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    return (2 * angles[torch.searchsorted(below, levels)].sin()).square()


def padded(eigenvalues: Tensor, m: int) -> Tensor:
    """These, and 0 for the rest of m."""
    return torch.nn.functional.pad(eigenvalues.double(), (0, m - len(eigenvalues)))


LEADING = 0.9 * torch.linspace(0.5, 1.5, 50, dtype=torch.float64) / 50
#: m -> m eigenvalues, up to a factor.
SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "iid": iid,
    # every row twice: half of the eigenvalues are 0
    "duplicated": lambda m: padded(iid(m // 2), m),
    # 1 / k, as of natural data
    "power_law": lambda m: 1 / torch.arange(1, m + 1, dtype=torch.float64),
    # six decades, each with as many eigenvalues
    "decades": lambda m: torch.logspace(0, -6, m, dtype=torch.float64),
    # rank 50 and a tenth of noise
    "low_rank": lambda m: 0.1 * iid(m) / m + padded(LEADING, m),
    # one direction, and 1e-4 of noise around it
    "near_collapse": lambda m: 1e-4 * iid(m) / m + padded(torch.ones(1), m),
}


def dense(eigenvalues: Tensor, generator: torch.Generator) -> Tensor:
    """(m, m) float32 with the roots of these as singular values, between random rotations."""
    z = torch.diag(eigenvalues.sqrt().float())
    for side in (z, z.mT):
        for _ in range(4):
            v = torch.randn(len(z), generator=generator)
            v /= v.norm()
            side.addr_(v, v @ side, alpha=-2)
    return z


@dataclass(frozen=True)
class Case:
    spectrum: str  # EXACT: the exact entropy of a matrix
    m: int
    trial: int


def measure(case: Case) -> list[Row]:
    eigenvalues = SPECTRA["iid" if case.spectrum == EXACT else case.spectrum](case.m)
    eigenvalues /= eigenvalues.sum()
    z = dense(eigenvalues, torch.Generator().manual_seed(2 * case.trial))
    generator = torch.Generator().manual_seed(2 * case.trial + 1)
    as_it_is = {"normalize": False, "weights": torch.ones(1)}
    start = time.perf_counter()
    if case.spectrum == EXACT:
        value, error, probes = vn_entropy(z, **as_it_is).item(), math.nan, 0
    else:
        found = estimate_vn_entropy(z, **as_it_is, generator=generator)
        value, error, probes = (part.item() for part in found)
    seconds = time.perf_counter() - start
    entropy = torch.special.entr(eigenvalues).sum().item()
    row: Row = {"entropy": entropy, "estimate": value, "error": error, "probes": probes}
    return [row | {"seconds": f"{seconds:.4g}"}]


def main(argv: Sequence[str] | None = None) -> int:
    parser = runner.make_parser(__doc__, "estimator")
    add = parser.add_argument
    add("--m", type=runner.positive, default=4096, help="rows and features; default: 4096")
    add("--trials", type=runner.positive, default=100, help="per spectrum; default: 100")
    add("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA), help="default: all")
    arguments = runner.parse(parser, argv)
    m, trials = arguments.m, product(range(arguments.trials), arguments.spectra)
    cases = [Case(spectrum, m, trial) for trial, spectrum in trials]
    if m <= LARGEST_EXACT:  # its time is bearable
        cases = [Case(EXACT, m, 0), *cases, Case(EXACT, m, 1)]
    others = [row for row in runner.read_csv(arguments.out) if row["m"] != str(m)]
    shown = ("entropy", "estimate", "error", "seconds")
    return runner.run_cases(arguments, cases, measure, COLUMNS, shown, earlier=others)


if __name__ == "__main__":
    sys.exit(main())
