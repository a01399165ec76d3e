"""How much faster the functions of the family are than the packages and lines people use today.

    python bench/compare_family.py            # every case, to bench/results/family.csv
    python bench/compare_family.py --quick    # small sizes, a minute

A case is one function and one input. Everything that can compute it takes turns and gets the same
numbers in its own type (NumPy arrays, torch tensors, QuTiP's states), converted beforehand; the
answers are compared. What a package computes needlessly is part of its time, because its user waits
for it: vendi-score's `score_X` takes the n x n kernel whatever n is, `score_dual` the d x d matrix.

The default is one thread on a CPU, because these packages know no other device, and because the
threads of torch, MKL and OpenBLAS spin for a while after each call and take the processor from
whoever is next. The packages come with `pip install '.[test-full]'`; a missing one is a note.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import runner
import threadpoolctl
import torch
from torch import Tensor

import vne_kernels as vne
from vne_kernels import reference

Row = dict[str, object]
CPU = torch.device("cpu")
OURS = "vne_kernels"
PACKAGES = ("vendi-score", "QuTiP", "PennyLane", "SciPy", "torch", "get_vne")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
SHOWN = ("by", "p50_ms", "times_ours", "value", "deviation", "note")
COLUMNS = (
    *("date", "commit", "torch", "device", "device_name"),
    *("function", "n", "d", "dtype", "threads", "by"),
    *("samples", "p20_ms", "p50_ms", "p80_ms", "times_ours", "value", "deviation", "note"),
)
ROWS = (
    *((16, 8), (64, 32), (128, 512), (500, 64)),
    *((1000, 1000), (2000, 256), (2000, 1024), (4000, 128)),
)
SAMPLES = ((16, 8), (128, 512), (500, 64), (2000, 256))
KERNELS = ((16, 8), (128, 64), (500, 64), (2000, 64))
PAIRS = ((2, 2), (2, 8), (8, 8), (16, 16))
MATRICES = ((4, 4), (64, 64), (256, 256), (1024, 1024))
SQUARES = tuple((m, m) for m in (32, 64, 128, 256, 512, 1000, 2048))

Call = Callable[[], Any]
Convert = Callable[..., Call]  # inputs -> the timed call. The conversion is not timed


# ---- inputs --------------------------------------------------------------------------------------


def embeddings(n: int, d: int, dtype: torch.dtype) -> Tensor:
    """Of a decaying spectrum, as embeddings have: singular values like 1/sqrt(k)."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (z / torch.arange(1, d + 1, dtype=torch.float64).sqrt()).to(dtype)


def kernel(n: int, d: int, dtype: torch.dtype) -> Tensor:
    """A Gaussian kernel of n samples of d features."""
    z = embeddings(n, d, torch.float64)
    return torch.exp(-torch.cdist(z, z).square() / (2 * z.square().sum(1).mean())).to(dtype)


def density_matrix(size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator, dtype=dtype)
    rho = a @ a.mH
    return rho / rho.trace()


def real_matrix(n: int, _: int, dtype: torch.dtype) -> Tensor:
    return density_matrix(n, dtype)


def complex_matrix(n: int, _: int, dtype: torch.dtype) -> Tensor:
    return density_matrix(n, dtype.to_complex())


def state(n: int, d: int, dtype: torch.dtype) -> Tensor:
    """A mixed quantum state of two systems of n and d levels."""
    return density_matrix(n * d, dtype.to_complex())


def two_states(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rho = state(n, d, dtype)
    return rho, (rho + torch.eye(n * d) / (n * d)) / 2


# ---- what people use today -----------------------------------------------------------------------


def vendi(name: str, **keywords: Any) -> Convert:
    def of(z: Tensor) -> Call:
        from vendi_score import vendi as package

        return functools.partial(getattr(package, name), z.numpy(), **keywords)

    return of


def qutip(name: str, *parts: int) -> Convert:
    """Of a state of two halves of equal size, which are named where there are `parts`."""

    def of(*states: Tensor) -> Call:
        import qutip as package

        side = math.isqrt(len(states[0]))
        dims = [[side, side], [side, side]] if parts else None
        made = [package.Qobj(rho.numpy(), dims=dims) for rho in states]
        return functools.partial(getattr(package, name), *made, *parts)

    return of


def pennylane(name: str, parts: int) -> Convert:
    """Of qubits, in `parts` groups of equal size, named qubit by qubit; 0: it takes no names."""

    def of(*states: Tensor) -> Call:
        import pennylane as package

        wires = list(range(int(math.log2(len(states[0])))))
        size = len(wires) // max(parts, 1)
        groups = [wires[k * size : (k + 1) * size] for k in range(parts)]
        arrays = [rho.numpy() for rho in states]
        return functools.partial(getattr(package.math, name), *arrays, *groups)

    return of


def scipy_eigvalsh(rho: Tensor) -> Call:
    from scipy import linalg, special

    matrix = rho.numpy()
    return lambda: special.entr(linalg.eigvalsh(matrix).clip(0)).sum()


def in_torch(function: Callable[..., Any]) -> Convert:
    return lambda *inputs: functools.partial(function, *inputs)


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


def renyi_by_eigvalsh(z: Tensor, alpha: float = 3) -> Tensor:
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


def entropy_by_our_solver(rho: Tensor) -> Tensor:
    return torch.ops.vne_kernels.density_entropy(rho, "eigh")


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One function: ours, the others as "package, what in it", and the inputs of all."""

    name: str
    ours: Callable[..., Any]
    others: dict[str, Convert]
    make: Callable[[int, int, torch.dtype], Tensor | tuple[Tensor, ...]] = embeddings
    sizes: tuple[tuple[int, int], ...] = SAMPLES
    dtypes: tuple[str, ...] = tuple(DTYPES)


def vendi_of_order(q: float) -> Family:
    others = {"vendi-score, score_dual": vendi("score_dual", q="inf" if q == math.inf else q)}
    return Family(f"vendi_score, q = {q}", lambda z: vne.vendi_score(z, q), others)


def of_halves(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """The function of a state of two systems of equal size."""
    return lambda rho: function(rho, (math.isqrt(len(rho)),) * 2)


SCORES = {"vendi-score, score_X": vendi("score_X"), "vendi-score, score_dual": vendi("score_dual")}
OFFICIAL = {
    "get_vne, eigh": in_torch(official_get_vne),
    "get_vne, svd": in_torch(reference.official_svd),
}
ENTROPIES = {
    "QuTiP": qutip("entropy_vn"),
    "PennyLane": pennylane("vn_entropy", 1),
    "torch, eigvalsh": in_torch(entropy_by_eigvalsh),
}
EIGENVALUES = {
    "torch, eigvalsh": in_torch(entropy_by_eigvalsh),
    "SciPy, eigvalsh": scipy_eigvalsh,
}
MUTUAL = {"QuTiP": qutip("entropy_mutual", 0, 1), "PennyLane": pennylane("mutual_info", 2)}
CONDITIONAL = {"QuTiP": qutip("entropy_conditional", 1)}
RELATIVE = {"QuTiP": qutip("entropy_relative"), "PennyLane": pennylane("relative_entropy", 0)}
RENYI = {"torch, eigvalsh": in_torch(renyi_by_eigvalsh)}
PARTICIPATION = {"torch, eigvalsh": in_torch(participation_by_eigvalsh)}
RANKME = {"torch, svdvals": in_torch(published_rankme)}
OF_KERNEL = {"vendi-score, score_K": vendi("score_K")}

kernels = functools.partial(Family, make=kernel, sizes=KERNELS)
matrices = functools.partial(Family, sizes=MATRICES, dtypes=("float64",))
states = functools.partial(Family, make=state, sizes=PAIRS, dtypes=("float64",))
from_density = vne.vn_entropy_from_density
FAMILIES = (
    Family("vendi_score", vne.vendi_score, SCORES, sizes=ROWS),
    *(vendi_of_order(q) for q in (0.5, 2, math.inf)),
    kernels(
        "vendi_score of a kernel", functools.partial(vne.vendi_score, is_kernel=True), OF_KERNEL
    ),
    Family("renyi_entropy, alpha = 3", lambda z: vne.renyi_entropy(z, 3), RENYI),
    Family("participation_ratio", vne.participation_ratio, PARTICIPATION),
    Family("rankme", vne.rankme, RANKME, sizes=ROWS),
    Family("get_vne", vne.get_vne, OFFICIAL),
    matrices("vn_entropy_from_density, real", from_density, ENTROPIES, real_matrix),
    matrices("vn_entropy_from_density, complex", from_density, ENTROPIES, complex_matrix),
    Family("eigenvalues", entropy_by_our_solver, EIGENVALUES, real_matrix, SQUARES),
    states("mutual_information", of_halves(vne.mutual_information), MUTUAL),
    states("conditional_entropy", of_halves(vne.conditional_entropy), CONDITIONAL),
    states("relative_entropy", vne.relative_entropy, RELATIVE, make=two_states),
)


# ---- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One function of one input: the columns that identify it."""

    function: str
    n: int
    d: int
    dtype: str
    threads: int


def cases_of(arguments: argparse.Namespace, families: Sequence[Family]) -> list[Case]:
    return [
        Case(family.name, n, d, dtype, threads)
        for threads, family in itertools.product(arguments.threads, families)
        for n, d in arguments.sizes or family.sizes[: 2 if arguments.quick else None]
        for dtype in family.dtypes
        if arguments.dtypes is None or dtype in arguments.dtypes
    ]


def measure(family: Family, case: Case, packages: Sequence[str], budget_s: float) -> list[Row]:
    """A row for ours and for each of the others."""
    made = family.make(case.n, case.d, DTYPES[case.dtype])
    inputs = made if isinstance(made, tuple) else (made,)
    chosen = {name: of for name, of in family.others.items() if name.split(",")[0] in packages}
    contenders, values = [], {OURS: math.nan}
    for name, of in {OURS: in_torch(family.ours), **chosen}.items():
        contender = runner.Contender(name, runner.nothing)
        try:
            contender.call = of(*inputs)
            values[name] = float(contender.call())
            contender.estimate_s = min(runner.time_once(contender, CPU) for _ in range(2))
        except Exception as error:  # the package is missing, or whatever it raises
            contender.error = runner.reason(error)
        contenders.append(contender)
    runner.time_interleaved(contenders, CPU, budget_s)
    ours_ms = contenders[0].quantiles_ms()[1]
    rows = []
    for contender in contenders:
        value = values.get(contender.name, math.nan)
        rows.append(
            {
                "by": contender.name,
                **contender.columns(),
                "times_ours": f"{contender.quantiles_ms()[1] / ours_ms:.4g}",
                "value": f"{value:.12g}",
                "deviation": f"{abs(value / values[OURS] - 1):.2e}",
                "note": contender.error or "",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = runner.make_parser(
        __doc__,
        "family",
        seconds={"cpu": 4.0, "quick": 4.0},
        quick="the two smallest sizes of each function",
        sizes=runner.pairs,
        dtypes=tuple(DTYPES),
        providers=PACKAGES,
        threads=(1,),
    )
    functions = "those whose names contain one of these"
    parser.add_argument("--functions", nargs="+", default=[""], help=functions)
    arguments = runner.parse(parser, argv)
    named = {f.name: f for f in FAMILIES if any(part in f.name for part in arguments.functions)}
    if not named:
        known = ", ".join(family.name for family in FAMILIES)
        parser.error(f"argument --functions: wanted some of {known}, got {arguments.functions}")
    for category in (DeprecationWarning, RuntimeWarning):  # vendi-score's: SciPy, logarithms of 0
        warnings.filterwarnings("ignore", category=category)

    def measured(case: Case) -> list[Row]:
        packages = arguments.providers or PACKAGES
        with threadpoolctl.threadpool_limits(case.threads):  # of the libraries behind NumPy, SciPy
            return measure(named[case.function], case, packages, arguments.case_seconds)

    cases = cases_of(arguments, list(named.values()))
    return runner.run_cases(arguments, cases, measured, COLUMNS, SHOWN)


if __name__ == "__main__":
    sys.exit(main())
