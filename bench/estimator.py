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

import runner
import torch
from runner import Row
from torch import Tensor

from vne_kernels import estimate_vn_entropy, vn_entropy

M = 4096
TRIALS = 100
REFLECTIONS = 4
EXACT = "exact"
LARGEST_EXACT = 8192
COLUMNS = (
    *("date", "commit", "torch", "device_name", "threads"),
    *("spectrum", "m", "trial", "entropy", "estimate", "error", "probes", "seconds"),
)

# ---- spectra: m -> m eigenvalues, float64, up to a factor --------------------------------------


def iid(m: int) -> Tensor:
    """Of m independent Gaussian rows of m features: quantiles of the Marchenko-Pastur law."""
    angles = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    below = (2 * angles + (2 * angles).sin()) / math.pi  # of 2 sin(angle), the quarter circle law
    levels = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    singular = 2 * angles[torch.searchsorted(below, levels)].sin()
    return singular.square()


def duplicated(m: int) -> Tensor:
    """Every row twice: half of the eigenvalues are 0."""
    return torch.cat([iid(m // 2), torch.zeros(m - m // 2, dtype=torch.float64)])


def power_law(m: int) -> Tensor:
    """1 / k, as of natural data."""
    return 1 / torch.arange(1, m + 1, dtype=torch.float64)


def decades(m: int) -> Tensor:
    """Six decades, each with as many eigenvalues."""
    return torch.logspace(0, -6, m, dtype=torch.float64)


def low_rank(m: int) -> Tensor:
    """Rank 50 and a tenth of noise."""
    eigenvalues = 0.1 * iid(m) / m
    eigenvalues[:50] += 0.9 * torch.linspace(0.5, 1.5, 50, dtype=torch.float64) / 50
    return eigenvalues


def near_collapse(m: int) -> Tensor:
    """One direction, and 1e-4 of noise around it."""
    eigenvalues = 1e-4 * iid(m) / m
    eigenvalues[0] += 1
    return eigenvalues


SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "iid": iid,
    "duplicated": duplicated,
    "power_law": power_law,
    "decades": decades,
    "low_rank": low_rank,
    "near_collapse": near_collapse,
}


def dense(eigenvalues: Tensor, generator: torch.Generator) -> Tensor:
    """(m, m) float32 with the roots of these as singular values, between random rotations."""
    z = torch.diag(eigenvalues.sqrt().float())
    for side in (z, z.mT):
        for _ in range(REFLECTIONS):
            v = torch.randn(len(z), generator=generator)
            v /= v.norm()
            side.addr_(v, v @ side, alpha=-2)
    return z


# ---- trials ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A trial; with EXACT for the spectrum the exact entropy of a matrix."""

    spectrum: str
    m: int
    trial: int


def measure(case: Case) -> list[Row]:
    eigenvalues = SPECTRA["iid" if case.spectrum == EXACT else case.spectrum](case.m)
    eigenvalues /= eigenvalues.sum()
    z = dense(eigenvalues, torch.Generator().manual_seed(2 * case.trial))
    generator = torch.Generator().manual_seed(2 * case.trial + 1)
    ones = torch.ones(1)
    start = time.perf_counter()
    if case.spectrum == EXACT:
        value, error, probes = vn_entropy(z, normalize=False, weights=ones), math.nan, 0
    else:
        found = estimate_vn_entropy(z, normalize=False, weights=ones, generator=generator)
        value, error, probes = found.entropy, float(found.error), int(found.probes)
    seconds = time.perf_counter() - start
    entropy = float(torch.special.entr(eigenvalues).sum())
    row: Row = {"entropy": repr(entropy), "estimate": repr(float(value)), "error": repr(error)}
    return [{**row, "probes": probes, "seconds": f"{seconds:.4g}"}]


def cases_of(m: int, trials: int, spectra: Sequence[str]) -> list[Case]:
    """Every trial; the exact entropy, where its time is bearable, first and last."""
    cases = [Case(spectrum, m, trial) for trial in range(trials) for spectrum in spectra]
    return [Case(EXACT, m, 0), *cases, Case(EXACT, m, 1)] if m <= LARGEST_EXACT else cases


def main(argv: Sequence[str] | None = None) -> int:
    parser = runner.make_parser(__doc__, "estimator")
    add = parser.add_argument
    add("--m", type=runner.positive, default=M, help=f"rows and features; default: {M}")
    add("--trials", type=runner.positive, default=TRIALS, help=f"per spectrum; default: {TRIALS}")
    add("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA), help="default: all")
    arguments = runner.parse(parser, argv)
    cases = cases_of(arguments.m, arguments.trials, arguments.spectra)
    others = [row for row in runner.read_csv(arguments.out) if row["m"] != str(arguments.m)]
    shown = ("entropy", "estimate", "error", "seconds")
    return runner.run_cases(arguments, cases, measure, COLUMNS, shown, earlier=others)


if __name__ == "__main__":
    sys.exit(main())
