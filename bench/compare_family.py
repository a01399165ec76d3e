"""How much faster the functions of the family are than the packages and lines people use today.

    python bench/compare_family.py            # every case, to bench/results/family.csv
    python bench/compare_family.py --quick    # small sizes, a minute

A case is one function and one input. Everything that can compute it takes turns and gets the same
numbers in its own type (NumPy arrays, torch tensors, QuTiP's states), converted beforehand; the
answers are compared. What a package computes needlessly is part of its time, because its user waits
for it: vendi-score's `score_X` takes the n x n kernel whatever n is, `score_dual` the d x d matrix.

The default is one thread on a CPU, because these packages know no other device. With more, the
threads of torch, MKL and OpenBLAS sleep between calls here: by default they spin for a while, and
take the processor from the next contender. The packages come with
`pip install '.[test-full]'`; a missing one is a note.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

# Read when the libraries are loaded. A thread of OpenBLAS sleeps after 2^4 cycles without work.
os.environ |= {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "4"} | os.environ

import runner
import threadpoolctl
import torch
from runner import Row
from torch import Tensor
from torch.nn.functional import normalize

import vne_kernels as vne
from vne_kernels import reference

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

Call = Callable[[], Any]


def embeddings(n: int, d: int, dtype: torch.dtype) -> Tensor:
    """Of a decaying spectrum, as embeddings have: singular values like 1/sqrt(k)."""
    torch.manual_seed(0)
    z = torch.randn(n, d, dtype=torch.float64)
    return (z / torch.arange(1, d + 1, dtype=torch.float64).sqrt()).to(dtype)


def kernel(n: int, d: int, dtype: torch.dtype) -> Tensor:
    """A Gaussian kernel of n samples of d features."""
    z = embeddings(n, d, torch.float64)
    return torch.exp(-torch.cdist(z, z).square() / (2 * z.square().sum(1).mean())).to(dtype)


def density_matrix(size: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    a = torch.randn(size, size, dtype=dtype)
    rho = a @ a.mH
    return rho / rho.trace()


def states(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two mixed quantum states of two systems of n and d levels."""
    rho = density_matrix(n * d, dtype.to_complex())
    return rho, (rho + torch.eye(n * d) / (n * d)) / 2


@dataclass(frozen=True)
class Inputs:
    make: Callable[[int, int, torch.dtype], Tensor | tuple[Tensor, ...]]
    sizes: Sequence[tuple[int, int]]
    dtypes: Sequence[str] = tuple(DTYPES)


SMALLER = ((16, 8), (64, 32), (128, 512), (500, 64))
LARGER = ((1000, 1000), (2000, 256), (2000, 1024), (4000, 128))
MATRICES = (((4, 4), (64, 64), (256, 256), (1024, 1024)), ("float64",))
PAIRS = (((2, 2), (2, 8), (8, 8), (16, 16)), ("float64",))
OF_ROWS = Inputs(embeddings, SMALLER + LARGER)
OF_SAMPLES = Inputs(embeddings, ((16, 8), (128, 512), (500, 64), (2000, 256)))
OF_KERNELS = Inputs(kernel, ((16, 8), (128, 64), (500, 64), (2000, 64)))
REAL = Inputs(lambda n, _, dtype: density_matrix(n, dtype), *MATRICES)
COMPLEX = Inputs(lambda n, _, dtype: density_matrix(n, dtype.to_complex()), *MATRICES)
SYMMETRIC = Inputs(REAL.make, tuple((m, m) for m in (32, 64, 128, 256, 512, 1000, 2048)))
STATE = Inputs(lambda *size_and_dtype: states(*size_and_dtype)[0], *PAIRS)
TWO_STATES = Inputs(states, *PAIRS)


def vendi(name: str, z: Tensor, **keywords: Any) -> Call:
    from vendi_score import vendi as package

    return partial(getattr(package, name), z.numpy(), **keywords)


def qutip(name: str, parts: Sequence[int], *states: Tensor) -> Call:
    """Of a state of two halves of equal size, which are named where there are `parts`."""
    import qutip as package

    dims = [[math.isqrt(len(states[0]))] * 2] * 2 if parts else None
    made = [package.Qobj(rho.numpy(), dims=dims) for rho in states]
    return partial(getattr(package, name), *made, *parts)


def pennylane(name: str, parts: int, *states: Tensor) -> Call:
    """Of qubits, in `parts` groups of equal size, named qubit by qubit; 0: it takes no names."""
    import pennylane as package

    wires = list(range(int(math.log2(len(states[0])))))
    size = len(wires) // max(parts, 1)
    groups = [wires[k * size : (k + 1) * size] for k in range(parts)]
    return partial(getattr(package.math, name), *(rho.numpy() for rho in states), *groups)


def scipy_eigvalsh(rho: Tensor) -> Call:
    from scipy import linalg, special

    matrix = rho.numpy()
    return lambda: special.entr(linalg.eigvalsh(matrix).clip(0)).sum()


def in_torch(function: Callable[..., Any]) -> Callable[..., Call]:
    return lambda *inputs: partial(function, *inputs)


def published_rankme(z: Tensor, eps: float = 1e-7) -> Tensor:
    """RankMe as its paper's equation (1) is written everywhere."""
    s = torch.linalg.svdvals(z)
    p = s / torch.linalg.vector_norm(s, 1) + eps
    return torch.exp(-torch.sum(p * torch.log(p)))


def eigenvalues(z: Tensor) -> Tensor:
    """Of the smaller matrix: what a careful user takes."""
    u, (n, d) = normalize(z, dim=-1), z.shape
    return torch.linalg.eigvalsh(u @ u.mT if n <= d else u.mT @ u) / n


def renyi_by_eigvalsh(z: Tensor, alpha: float = 3) -> Tensor:
    return (eigenvalues(z).clamp_min(0) ** alpha).sum().log() / (1 - alpha)


def participation_by_eigvalsh(z: Tensor) -> Tensor:
    values = eigenvalues(z)
    return values.sum().square() / values.square().sum()


def official_get_vne(z: Tensor) -> Tensor:
    """The first form of the VNE paper's code."""
    u = normalize(z, dim=1)
    values = torch.linalg.eigh(u.mT @ u / len(z))[0][-len(z) :]
    return -(values * torch.log(values)).nansum()


def entropy_by_eigvalsh(rho: Tensor) -> Tensor:
    return torch.special.entr(torch.linalg.eigvalsh(rho).clamp_min(0)).sum()


def entropy_by_our_solver(rho: Tensor) -> Tensor:
    """Of a positive matrix: `vn_entropy_from_density` has to allow for negative eigenvalues."""
    return torch.ops.vne_kernels.density_entropy(rho, "eigh")


def of_halves(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """The function of a state of two systems of equal size."""
    return lambda rho: function(rho, (math.isqrt(len(rho)),) * 2)


@dataclass(frozen=True)
class Family:
    name: str
    inputs: Inputs
    ours: Callable[..., Any]


FAMILIES = (
    Family("vendi_score", OF_ROWS, vne.vendi_score),
    Family("vendi_score, q = 0.5", OF_SAMPLES, partial(vne.vendi_score, q=0.5)),
    Family("vendi_score, q = 2", OF_SAMPLES, partial(vne.vendi_score, q=2)),
    Family("vendi_score, q = inf", OF_SAMPLES, partial(vne.vendi_score, q=math.inf)),
    Family("vendi_score of a kernel", OF_KERNELS, partial(vne.vendi_score, is_kernel=True)),
    Family("renyi_entropy, alpha = 3", OF_SAMPLES, partial(vne.renyi_entropy, alpha=3)),
    Family("participation_ratio", OF_SAMPLES, vne.participation_ratio),
    Family("rankme", OF_ROWS, vne.rankme),
    Family("get_vne", OF_SAMPLES, vne.get_vne),
    Family("vn_entropy_from_density, real", REAL, vne.vn_entropy_from_density),
    Family("vn_entropy_from_density, complex", COMPLEX, vne.vn_entropy_from_density),
    Family("eigenvalues", SYMMETRIC, entropy_by_our_solver),
    Family("mutual_information", STATE, of_halves(vne.mutual_information)),
    Family("conditional_entropy", STATE, of_halves(vne.conditional_entropy)),
    Family("relative_entropy", TWO_STATES, vne.relative_entropy),
)
#: The others: what they compute, "package, what in it", and inputs -> the timed call.
OTHERS: tuple[tuple[str, str, Callable[..., Call]], ...] = (
    ("vendi_score", "vendi-score, score_X", partial(vendi, "score_X")),
    ("vendi_score", "vendi-score, score_dual", partial(vendi, "score_dual")),
    ("vendi_score, q = 0.5", "vendi-score, score_dual", partial(vendi, "score_dual", q=0.5)),
    ("vendi_score, q = 2", "vendi-score, score_dual", partial(vendi, "score_dual", q=2)),
    ("vendi_score, q = inf", "vendi-score, score_dual", partial(vendi, "score_dual", q="inf")),
    ("vendi_score of a kernel", "vendi-score, score_K", partial(vendi, "score_K")),
    ("renyi_entropy, alpha = 3", "torch, eigvalsh", in_torch(renyi_by_eigvalsh)),
    ("participation_ratio", "torch, eigvalsh", in_torch(participation_by_eigvalsh)),
    ("rankme", "torch, svdvals", in_torch(published_rankme)),
    ("get_vne", "get_vne, eigh", in_torch(official_get_vne)),
    ("get_vne", "get_vne, svd", in_torch(reference.official_svd)),
    ("vn_entropy_from_density, real", "QuTiP", partial(qutip, "entropy_vn", ())),
    ("vn_entropy_from_density, real", "PennyLane", partial(pennylane, "vn_entropy", 1)),
    ("vn_entropy_from_density, real", "torch, eigvalsh", in_torch(entropy_by_eigvalsh)),
    ("vn_entropy_from_density, complex", "QuTiP", partial(qutip, "entropy_vn", ())),
    ("vn_entropy_from_density, complex", "PennyLane", partial(pennylane, "vn_entropy", 1)),
    ("vn_entropy_from_density, complex", "torch, eigvalsh", in_torch(entropy_by_eigvalsh)),
    ("eigenvalues", "torch, eigvalsh", in_torch(entropy_by_eigvalsh)),
    ("eigenvalues", "SciPy, eigvalsh", scipy_eigvalsh),
    ("mutual_information", "QuTiP", partial(qutip, "entropy_mutual", (0, 1))),
    ("mutual_information", "PennyLane", partial(pennylane, "mutual_info", 2)),
    ("conditional_entropy", "QuTiP", partial(qutip, "entropy_conditional", (1,))),
    ("relative_entropy", "QuTiP", partial(qutip, "entropy_relative", ())),
    ("relative_entropy", "PennyLane", partial(pennylane, "relative_entropy", 0)),
)


@dataclass(frozen=True)
class Case:
    function: str
    n: int
    d: int
    dtype: str
    threads: int


def measure(family: Family, case: Case, packages: Sequence[str], budget_s: float) -> list[Row]:
    """A row for ours and for each of the others."""
    made = family.inputs.make(case.n, case.d, DTYPES[case.dtype])
    inputs = made if isinstance(made, tuple) else (made,)
    others = [(by, of) for name, by, of in OTHERS if name == family.name]
    chosen = [(by, of) for by, of in others if by.split(",")[0] in packages]
    contenders, values = [], []
    for by, of in [(OURS, in_torch(family.ours)), *chosen]:
        contender, value = runner.Contender(by, runner.nothing), math.nan
        try:
            contender.call = of(*inputs)
            value = float(contender.call())
            contender.estimate_s = min(runner.time_once(contender, CPU) for _ in range(2))
        except Exception as error:  # the package is missing, or whatever it raises
            contender.error = runner.reason(error)
        contenders.append(contender)
        values.append(value)
    runner.time_interleaved(contenders, CPU, budget_s)
    return [
        {
            "by": contender.name,
            **contender.columns(),
            "times_ours": f"{contender.quantiles_ms()[1] / contenders[0].quantiles_ms()[1]:.4g}",
            "value": f"{value:.12g}",
            "deviation": f"{abs(value / values[0] - 1):.2e}",
            "note": contender.error or "",
        }
        for contender, value in zip(contenders, values, strict=True)
    ]


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
        known = [family.name for family in FAMILIES]
        parser.error(f"argument --functions: wanted some of {known}, got {arguments.functions}")
    for category in (DeprecationWarning, RuntimeWarning):  # vendi-score's: SciPy, logarithms of 0
        warnings.filterwarnings("ignore", category=category)
    cases = [
        Case(family.name, n, d, dtype, threads)
        for threads in arguments.threads
        for family in named.values()
        for n, d in arguments.sizes or family.inputs.sizes[: 2 if arguments.quick else None]
        for dtype in family.inputs.dtypes
        if dtype in (arguments.dtypes or DTYPES)
    ]

    def measured(case: Case) -> list[Row]:
        packages = arguments.providers or PACKAGES
        with threadpoolctl.threadpool_limits(case.threads):  # of the libraries behind NumPy, SciPy
            return measure(named[case.function], case, packages, arguments.case_seconds)

    return runner.run_cases(arguments, cases, measured, COLUMNS, SHOWN)


if __name__ == "__main__":
    sys.exit(main())
