"""Whether the error bar of the randomised estimate covers S, and what the estimate costs.

    python bench/estimator.py              # 100 trials of each spectrum at m = 4,096
    python bench/estimator.py --resume     # goes on with what an interrupted run lacks
    python bench/estimator.py --report     # the table anew, from the results file alone
    python bench/estimator.py --m 20000 --trials 1 --spectra power_law    # beyond the exact ones

A trial is a new matrix and new probes: singular values that are given, so that S is known exactly,
between random rotations (Householder's reflections, which make the matrix dense). Trials of the
spectra alternate, so that an interrupted run has seen all of them. The exact entropy of one such
matrix is timed before and after the trials, in the same process. Rows of other m stay in the file.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import harness
import rows as results
import torch
from arguments import positive
from torch import Tensor

from vne_kernels import estimate_vn_entropy, vn_entropy
from vne_kernels.common.files import append_rows

RESULTS = Path(__file__).resolve().parent / "results" / "estimator.csv"
M = 4096
TRIALS = 100
REFLECTIONS = 4
EXACT = "exact"
LARGEST_EXACT = 8192
COLUMNS = (
    "date",
    "commit",
    "torch",
    "device_name",
    "threads",
    "spectrum",
    "m",
    "trial",
    "entropy",
    "estimate",
    "error",
    "probes",
    "seconds",
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


def measure(spectrum: str, m: int, trial: int, describe: dict[str, str]) -> dict[str, object]:
    """One row: a trial, or with a trial of EXACT the exact entropy of such a matrix."""
    exact = spectrum == EXACT
    eigenvalues = SPECTRA["iid" if exact else spectrum](m)
    eigenvalues /= eigenvalues.sum()
    z = dense(eigenvalues, torch.Generator().manual_seed(2 * trial))
    generator = torch.Generator().manual_seed(2 * trial + 1)
    ones = torch.ones(1)
    start = time.perf_counter()
    if exact:
        value, error, probes = vn_entropy(z, normalize=False, weights=ones), math.nan, 0
    else:
        found = estimate_vn_entropy(z, normalize=False, weights=ones, generator=generator)
        value, error, probes = found.entropy, float(found.error), int(found.probes)
    seconds = time.perf_counter() - start
    return {
        **describe,
        "spectrum": spectrum,
        "m": m,
        "trial": trial,
        "entropy": repr(float(torch.special.entr(eigenvalues).sum())),
        "estimate": repr(float(value)),
        "error": repr(error),
        "probes": probes,
        "seconds": f"{seconds:.4g}",
    }


def plan(m: int, trials: int, spectra: Sequence[str]) -> list[tuple[str, int, int]]:
    """(spectrum, m, trial) of every row; the exact entropy, where it ends, first and last."""
    cases = [(spectrum, m, trial) for trial in range(trials) for spectrum in spectra]
    return [(EXACT, m, 0), *cases, (EXACT, m, 1)] if m <= LARGEST_EXACT else cases


def report(rows: Sequence[results.Row]) -> str:
    """A line for each spectrum: trials, covered, the bar over S, time against the exact entropy."""
    lines = [
        f"{'spectrum':14}{'m':>7}{'covered':>12}{'bar / S':>10}{'error / bar':>13}{'seconds':>9}"
        f"{'exact takes':>13}"
    ]
    for spectrum, m in results.unique(rows, "spectrum", "m"):
        if spectrum == EXACT:
            continue
        trials = results.where(rows, spectrum=spectrum, m=m)
        exact = results.where(rows, spectrum=EXACT, m=m)
        entropies, estimates, errors, seconds = (
            [results.number(row, column) for row in trials]
            for column in ("entropy", "estimate", "error", "seconds")
        )
        excess = [
            abs(estimate - entropy) / error
            for entropy, estimate, error in zip(entropies, estimates, errors, strict=True)
        ]
        wide = median(error / s for error, s in zip(errors, entropies, strict=True))
        slower = "-"
        if exact:
            whole = median(results.number(row, "seconds") for row in exact)
            slower = f"{results.ratio(whole / median(seconds))}x"
        covered = f"{sum(one <= 1 for one in excess)} of {len(excess)}"
        lines.append(
            f"{spectrum:14}{m:>7}{covered:>12}{wide:>10.1e}{median(excess):>13.2f}"
            f"{median(seconds):>9.3g}{slower:>13}"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--m", type=positive, default=M, help=f"rows and features of a matrix (default {M})")
    add("--trials", type=positive, default=TRIALS, help=f"of each spectrum (default {TRIALS})")
    add("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA), help="default: all")
    add("--out", type=Path, default=RESULTS, help="the results file")
    add("--resume", action="store_true", help="go on with an interrupted run of this commit")
    add("--report", action="store_true", help="only print the table of the results file")
    return parser.parse_args(argv)


def read(path: Path) -> list[results.Row]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(arguments: argparse.Namespace) -> None:
    described = harness.environment(torch.device("cpu"))
    described["threads"] = str(torch.get_num_threads())
    describe = {key: described[key] for key in COLUMNS[:5]}
    partial = arguments.out.with_suffix(".csv.partial")
    if not arguments.resume or not partial.is_file():
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    done = {
        (row["spectrum"], int(row["m"]), int(row["trial"]))
        for row in read(partial)
        if all(row[key] == describe[key] for key in ("commit", "torch", "device_name", "threads"))
    }
    cases = plan(arguments.m, arguments.trials, arguments.spectra)
    missing = [case for case in cases if case not in done]
    progress = harness.Progress(len(missing))
    for case in missing:
        progress.start(case)
        row = measure(*case, describe)
        append_rows(partial, [[row[column] for column in COLUMNS]])
        progress.stop()
    measured = read(partial)
    sizes = {row["m"] for row in measured}
    others = [row for row in read(arguments.out) if row["m"] not in sizes]
    harness.write_csv(arguments.out, COLUMNS, [*others, *measured])
    partial.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if not arguments.report:
        run(arguments)
    print(report(read(arguments.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
