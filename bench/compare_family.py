"""How much faster the functions of the family are than the packages and lines people use today.

    python bench/compare_family.py            # every case, to bench/results/family.csv
    python bench/compare_family.py --quick    # small sizes, a minute

Each case is one function and one input; all that can compute it take turns, so that the noise of
the machine falls on all alike. They get the same numbers, in what they take (NumPy arrays, torch
tensors, QuTiP's and PennyLane's own), made beforehand; the answers are compared. What a package
computes needlessly is part of its time, as its user waits for it: vendi-score's `score_X` takes the
n x n kernel whatever n is. Its `score_dual`, the d x d way, stands beside it.

On one thread: torch's, MKL's and OpenBLAS's threads go on spinning for a while after each call, and
take the processor from whoever is next. On a CPU: these packages know no other. They come with
``pip install '.[test]'``.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arguments as options
import harness
import threadpoolctl
import torch
from torch import Tensor

import vne_kernels
from vne_kernels import reference

Evaluate = Callable[[], Any]
DTYPES = {"float32": torch.float32, "float64": torch.float64}
CASE = ("function", "n", "d", "dtype", "threads")
COLUMNS = (
    "date",
    "commit",
    "torch",
    "device",
    "device_name",
    *CASE,
    "by",
    "samples",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "times_ours",
    "value",
    "deviation",
    "note",
)
OURS = "vne_kernels"
DEFAULT_SECONDS = 4.0


@dataclass(frozen=True)
class Family:
    """One function: inputs of a size, ours, and the others by name."""

    name: str
    sizes: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]
    make: Callable[[int, int, torch.dtype], Any]
    ours: Callable[[Any], Any]
    others: dict[str, Callable[[Any], Callable[[], Any]]]
    """Name -> of an input, what is timed: converting the input is not."""


# ---------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------


def embeddings(n: int, d: int, dtype: torch.dtype) -> Tensor:
    """Of a decaying spectrum, as embeddings have: singular values like 1/sqrt(k)."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (z / torch.arange(1, d + 1, dtype=torch.float64).sqrt()).to(dtype)


def kernel(n: int, d: int, dtype: torch.dtype) -> Tensor:
    """A Gaussian kernel of n samples of d features."""
    z = embeddings(n, d, torch.float64)
    return torch.exp(-torch.cdist(z, z).square() / (2 * z.square().sum(1).mean())).to(dtype)


def state(n: int, d: int, dtype: torch.dtype) -> Tensor:
    """A mixed quantum state of two systems of n and d levels."""
    return density_matrix(n * d, torch.complex64 if dtype == torch.float32 else torch.complex128)


def complex_matrix(n: int, _: int, dtype: torch.dtype) -> Tensor:
    return density_matrix(n, torch.complex64 if dtype == torch.float32 else torch.complex128)


def real_matrix(n: int, _: int, dtype: torch.dtype) -> Tensor:
    return density_matrix(n, dtype)


def density_matrix(size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator, dtype=dtype)
    rho = a @ a.mH
    return rho / rho.trace()


def two_states(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rho = state(n, d, dtype)
    return rho, (rho + torch.eye(n * d) / (n * d)) / 2


# ---------------------------------------------------------------------------------------------
# What people use today
# ---------------------------------------------------------------------------------------------


def vendi(name: str, **keywords: Any) -> Callable[[Tensor], Evaluate]:
    def of(z: Tensor) -> Evaluate:
        from vendi_score import vendi as package

        return functools.partial(getattr(package, name), z.numpy(), **keywords)

    return of


def qutip(name: str, *parts: int) -> Callable[[Any], Evaluate]:
    """Of a state of two halves of equal size, which are named where there are `parts`."""

    def of(states: Any) -> Evaluate:
        import qutip as package

        states = states if isinstance(states, tuple) else (states,)
        side = math.isqrt(len(states[0]))
        dims = [[side, side], [side, side]] if parts else None
        made = [package.Qobj(rho.numpy(), dims=dims) for rho in states]
        return functools.partial(getattr(package, name), *made, *parts)

    return of


def pennylane(name: str, parts: int) -> Callable[[Any], Evaluate]:
    """Of qubits, in `parts` groups of equal size, named qubit by qubit; 0: it takes no names."""

    def of(states: Any) -> Evaluate:
        import pennylane as package

        states = states if isinstance(states, tuple) else (states,)
        wires = list(range(int(math.log2(len(states[0])))))
        size = len(wires) // max(parts, 1)
        groups = [wires[k * size : (k + 1) * size] for k in range(parts)]
        return functools.partial(
            getattr(package.math, name), *(rho.numpy() for rho in states), *groups
        )

    return of


def in_torch(function: Callable[[Any], Any]) -> Callable[[Any], Evaluate]:
    return lambda z: functools.partial(function, z)


def published_rankme(z: Tensor, eps: float = 1e-7) -> Tensor:
    """RankMe as its paper's equation (1) is written everywhere."""
    s = torch.linalg.svdvals(z)
    p = s / torch.linalg.vector_norm(s, 1) + eps
    return torch.exp(-torch.sum(p * torch.log(p)))


def eigenvalues(z: Tensor) -> Tensor:
    """Of the smaller matrix: what a careful user takes."""
    u = torch.nn.functional.normalize(z, dim=-1)
    n, d = z.shape
    return torch.linalg.eigvalsh(u @ u.mT if n <= d else u.mT @ u) / n


def renyi_by_eigvalsh(z: Tensor, alpha: float) -> Tensor:
    return (eigenvalues(z).clamp_min(0) ** alpha).sum().log() / (1 - alpha)


def participation_by_eigvalsh(z: Tensor) -> Tensor:
    values = eigenvalues(z)
    return values.sum().square() / values.square().sum()


def official_get_vne(z: Tensor) -> Tensor:
    """The first form of the VNE paper's code."""
    u = torch.nn.functional.normalize(z, dim=1)
    values = torch.linalg.eigh(u.mT @ u / len(z))[0][-len(z) :]
    return -(values * torch.log(values)).nansum()


def entropy_by_eigvalsh(rho: Tensor) -> Tensor:
    return torch.special.entr(torch.linalg.eigvalsh(rho).clamp_min(0)).sum()


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------

BOTH = ("float32", "float64")
ROWS = (
    (16, 8),
    (64, 32),
    (128, 512),
    (500, 64),
    (1000, 1000),
    (2000, 256),
    (2000, 1024),
    (4000, 128),
)
SAMPLES = ((16, 8), (128, 512), (500, 64), (2000, 256))
KERNELS = ((16, 8), (128, 64), (500, 64), (2000, 64))
PAIRS = ((2, 2), (2, 8), (8, 8), (16, 16))
MATRICES = ((4, 4), (64, 64), (256, 256), (1024, 1024))

FAMILIES = (
    Family(
        "vendi_score",
        ROWS,
        BOTH,
        embeddings,
        vne_kernels.vendi_score,
        {"vendi-score, score_X": vendi("score_X"), "vendi-score, score_dual": vendi("score_dual")},
    ),
    *(
        Family(
            f"vendi_score, q = {q}",
            SAMPLES,
            BOTH,
            embeddings,
            functools.partial(lambda z, q: vne_kernels.vendi_score(z, q), q=q),
            {"vendi-score, score_dual": vendi("score_dual", q="inf" if q == math.inf else q)},
        )
        for q in (0.5, 2, math.inf)
    ),
    Family(
        "vendi_score of a kernel",
        KERNELS,
        BOTH,
        kernel,
        lambda k: vne_kernels.vendi_score(k, is_kernel=True),
        {"vendi-score, score_K": vendi("score_K")},
    ),
    Family(
        "renyi_entropy, alpha = 3",
        SAMPLES,
        BOTH,
        embeddings,
        lambda z: vne_kernels.renyi_entropy(z, 3),
        {"torch, eigvalsh": in_torch(lambda z: renyi_by_eigvalsh(z, 3))},
    ),
    Family(
        "participation_ratio",
        SAMPLES,
        BOTH,
        embeddings,
        vne_kernels.participation_ratio,
        {"torch, eigvalsh": in_torch(participation_by_eigvalsh)},
    ),
    Family(
        "rankme",
        ROWS,
        BOTH,
        embeddings,
        vne_kernels.rankme,
        {"torch, svdvals": in_torch(published_rankme)},
    ),
    Family(
        "get_vne",
        SAMPLES,
        BOTH,
        embeddings,
        vne_kernels.get_vne,
        {
            "get_vne, eigh": in_torch(official_get_vne),
            "get_vne, svd": in_torch(reference.official_svd),
        },
    ),
    *(
        Family(
            f"vn_entropy_from_density, {kind}",
            MATRICES,
            ("float64",),
            make,
            vne_kernels.vn_entropy_from_density,
            {
                "QuTiP": qutip("entropy_vn"),
                "PennyLane": pennylane("vn_entropy", 1),
                "torch, eigvalsh": in_torch(entropy_by_eigvalsh),
            },
        )
        for kind, make in (("real", real_matrix), ("complex", complex_matrix))
    ),
    Family(
        "mutual_information",
        PAIRS,
        ("float64",),
        state,
        lambda rho: vne_kernels.mutual_information(rho, (math.isqrt(len(rho)),) * 2),
        {"QuTiP": qutip("entropy_mutual", 0, 1), "PennyLane": pennylane("mutual_info", 2)},
    ),
    Family(
        "conditional_entropy",
        PAIRS,
        ("float64",),
        state,
        lambda rho: vne_kernels.conditional_entropy(rho, (math.isqrt(len(rho)),) * 2),
        {"QuTiP": qutip("entropy_conditional", 1)},
    ),
    Family(
        "relative_entropy",
        PAIRS,
        ("float64",),
        two_states,
        lambda states: vne_kernels.relative_entropy(*states),
        {"QuTiP": qutip("entropy_relative"), "PennyLane": pennylane("relative_entropy", 0)},
    ),
)


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------


def cases(arguments: argparse.Namespace) -> Iterator[tuple[Family, dict[str, object]]]:
    for threads in arguments.threads:
        for family in FAMILIES:
            if not any(wanted in family.name for wanted in arguments.functions):
                continue
            for n, d in family.sizes[: 2 if arguments.quick else None]:
                for dtype in family.dtypes:
                    yield (
                        family,
                        {
                            "function": family.name,
                            "n": n,
                            "d": d,
                            "dtype": dtype,
                            "threads": threads,
                        },
                    )


def measure(family: Family, case: dict[str, object], budget_s: float) -> list[dict[str, object]]:
    """A row for ours and for each of the others."""
    n, d, dtype = int(str(case["n"])), int(str(case["d"])), DTYPES[str(case["dtype"])]
    given = family.make(n, d, dtype)
    calls = {OURS: functools.partial(family.ours, given)}
    calls |= {name: of(given) for name, of in family.others.items()}
    contenders, values = [], {}
    for name, call in calls.items():
        contender = harness.Contender(name, call, lambda: None)
        try:
            values[name] = float(call())
            contender.estimate_s = min(
                harness.time_once(contender, torch.device("cpu")) for _ in range(2)
            )
        except Exception as error:  # whatever another package raises is its result
            contender.error = harness.reason(error)
        contenders.append(contender)
    harness.time_interleaved(contenders, torch.device("cpu"), budget_s)
    ours_ms = contenders[0].quantiles_ms()[1]
    rows = []
    for contender in contenders:
        p20, p50, p80 = contender.quantiles_ms()
        value = values.get(contender.name, math.nan)
        rows.append(
            {
                **case,
                "by": contender.name,
                "samples": len(contender.samples_s),
                "p20_ms": f"{p20:.5g}",
                "p50_ms": f"{p50:.5g}",
                "p80_ms": f"{p80:.5g}",
                "times_ours": f"{p50 / ours_ms:.4g}",
                "value": f"{value:.12g}",
                "deviation": f"{abs(value / values[OURS] - 1):.2e}",
                "note": contender.error or "",
            }
        )
    return rows


def print_case(rows: Sequence[dict[str, object]]) -> None:
    first = rows[0]
    print(f"\n{first['function']}, {first['n']} x {first['d']}, {first['dtype']}, ", end="")
    print(f"threads {first['threads']}")
    for row in rows:
        print(
            f"  {row['by']:<24}{row['p50_ms']:>10} ms{row['times_ours']:>9} x"
            f"{row['value']:>18}{row['deviation']:>10}  {row['note']}"
        )
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare_family.py",
        description="Time of scores and entropies against the packages that people use today.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--threads", type=options.positives, default=(1,), help="such as 1,2; default: 1")
    add("--functions", nargs="+", default=[""], help="those whose names hold one of these")
    add("--case-seconds", type=options.duration, default=DEFAULT_SECONDS, help="time of a case")
    add("--quick", action="store_true", help="the two smallest sizes of each function")
    add("--out", type=Path, help="CSV file; default: bench/results/family.csv")
    add("--resume", action="store_true", help="go on from <out>.partial")
    arguments = parser.parse_args(argv)
    if arguments.out is None:
        arguments.out = Path(__file__).resolve().parent / "results" / "family.csv"
    if not any(wanted in family.name for family in FAMILIES for wanted in arguments.functions):
        known = ", ".join(family.name for family in FAMILIES)
        parser.error(f"argument --functions: wanted some of {known}, got {arguments.functions}")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    environment = harness.environment(torch.device("cpu"))
    where = {name: value for name, value in environment.items() if name in COLUMNS}
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    so_far = arguments.out.with_name(arguments.out.name + ".partial")
    rows = harness.finished_before(so_far, where) if arguments.resume else []
    done = {tuple(str(row[name]) for name in CASE) for row in rows}
    todo = [
        (family, case)
        for family, case in cases(arguments)
        if tuple(str(value) for value in case.values()) not in done
    ]
    progress = harness.Progress(len(todo))
    for family, case in todo:
        progress.start(" ".join(str(value) for value in case.values()))
        threads = int(str(case["threads"]))
        torch.set_num_threads(threads)
        with threadpoolctl.threadpool_limits(threads):  # of the libraries behind NumPy and SciPy
            measured = measure(family, case, arguments.case_seconds)
        progress.stop()
        print_case(measured)
        rows += [{**where, **row} for row in measured]
        harness.write_csv(so_far, COLUMNS, rows)
    harness.write_csv(arguments.out, COLUMNS, rows)
    so_far.unlink(missing_ok=True)
    print(f"\n{arguments.out}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # vendi-score's, of SciPy
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # its logarithms of 0
    try:
        run(arguments)
    except KeyboardInterrupt:
        print(f"\nstopped; {arguments.out}.partial has what is done, --resume goes on")
        return 130
    except ValueError as error:
        print(f"compare_family: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
