"""The pole tables of csrc/common/pole_table.h against mpmath: csrc/README.md, (6) and (7)."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import emulation
import mpmath as mp
import numpy as np
import numpy.typing as npt
import pytest
from mpmath import mpf

COMMON = Path(__file__).resolve().parents[1] / "csrc" / "common"
HEADER = (COMMON / "pole_table.h").read_text()
Vector = npt.NDArray[np.object_]  # of mpf

to_mpf = np.frompyfunc(mpf, 1, 1)
exp = np.frompyfunc(mp.exp, 1, 1)
log = np.frompyfunc(mp.log, 1, 1)
sqrt = np.frompyfunc(mp.sqrt, 1, 1)


@dataclass(frozen=True)
class Bounds:
    poles: int
    x_min: str
    error: float  # of sqrt(x) |r - log x| on [x_min, 1]
    optimum: float  # what no sum of as many poles can go below
    tail: float  # of x |r - log x| on (0, x_min]


# Measured for the doubles of the header: error 2.65397e-8 and 1.15261e-14, tail 5.264e-10 and
# 4.581e-18.
BOUNDS = {
    "float": Bounds(poles=16, x_min="1e-8", error=2.66e-8, optimum=2.65e-8, tail=5.4e-10),
    "double": Bounds(poles=50, x_min="2e-16", error=1.16e-14, optimum=1.09e-14, tail=4.7e-18),
}


@dataclass(frozen=True)
class Table:
    constant: str
    poles: tuple[tuple[str, str], ...]  # (t, w) as written

    def gap(self, x: Vector) -> Vector:
        """r(x) - log x."""
        t = to_mpf(np.array([float(t) for t, _ in self.poles]))
        w = to_mpf(np.array([float(w) for _, w in self.poles]))
        return mpf(float(self.constant)) - (1 / (x[:, None] + t)) @ w - log(x)

    def error(self, x: Vector) -> Vector:
        return sqrt(x) * self.gap(x)

    def at_one(self) -> Fraction:
        """r(1), exactly."""
        terms = (Fraction(float(w)) / (1 + Fraction(float(t))) for t, w in self.poles)
        return Fraction(float(self.constant)) - sum(terms)


def parse(header: str, kind: str) -> tuple[int, Table]:
    """(declared number of poles, table)."""
    table = re.search(rf"struct PoleTable<{kind}> {{\n(.*?)\n}};", header, re.DOTALL)
    assert table
    count = re.search(r"int kSize = (\d+);", table[1])
    constant = re.search(r"double kConstant = (\S+);", table[1])
    assert count
    assert constant
    pairs = re.findall(r"{(\S+), (\S+)},", table[1])
    return int(count[1]), Table(constant[1], tuple(pairs))


def peaks(table: Table, x_min: str, points: int = 1500) -> tuple[Vector, Vector]:
    """(x, error) at the local extrema of the error on [x_min, 1], x_min included."""
    # Even in sqrt(-log x): the extrema lie closest together near x = 1.
    s = mp.log(mpf(x_min)) * np.array(mp.linspace(1, 0, points)) ** 2
    size = np.abs(table.error(exp(s)))
    centres = [k for k in range(1, points - 1) if size[k - 1] <= size[k] >= size[k + 1]]
    best = s[centres]
    width = best - s[np.array(centres) - 1]
    for _ in range(2):  # each pass narrows every peak by 3
        fan = best[:, None] + to_mpf(np.arange(-3, 4)) * (width[:, None] / 3)
        error = np.abs(table.error(exp(fan.ravel()))).reshape(fan.shape)
        best = fan[np.arange(len(best)), np.argmax(error, axis=1)]
        width = width / 3
    x = exp(np.concatenate([s[:1], best]))
    return x, table.error(x)


def fault(table: Table, bounds: Bounds, x: Vector) -> str | None:
    """What is wrong with a table, its error being looked at in the points x only."""
    if min(float(number) for pole in table.poles for number in pole) <= 0:
        return "a pole or a weight is not positive"
    if abs(table.at_one()) > Fraction(float(np.spacing(float(table.constant)))) / 2:
        return f"r(1) = {float(table.at_one())}"
    error = float(np.abs(table.error(x)).max())
    return None if error <= bounds.error else f"sqrt(x) |r - log x| reaches {error}"


@pytest.fixture(autouse=True)
def _digits() -> object:
    with mp.workdps(34):
        yield


@pytest.fixture(scope="module", params=BOUNDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def bounds(kind: str) -> Bounds:
    return BOUNDS[kind]


@pytest.fixture(scope="module")
def table(kind: str) -> Table:
    return parse(HEADER, kind)[1]


@pytest.fixture(scope="module")
def extrema(table: Table, bounds: Bounds) -> tuple[Vector, Vector]:
    with mp.workdps(34):
        return peaks(table, bounds.x_min)


def test_declared_size_and_order(kind: str, bounds: Bounds, table: Table) -> None:
    t = [float(t) for t, _ in table.poles]
    assert parse(HEADER, kind)[0] == len(t) == bounds.poles
    assert t == sorted(t)


@pytest.mark.slow
def test_bounds_hold(table: Table, bounds: Bounds, extrema: tuple[Vector, Vector]) -> None:
    assert fault(table, bounds, extrema[0]) is None


@pytest.mark.slow
def test_no_better_table_of_this_size_exists(
    bounds: Bounds, extrema: tuple[Vector, Vector]
) -> None:
    """de la Vallee Poussin: 2n + 1 alternations bound the error of every n poles from below."""
    error = extrema[1]
    assert len(error) == 2 * bounds.poles + 1
    assert all((a > 0) != (b > 0) for a, b in itertools.pairwise(error))
    assert np.abs(error).min() >= bounds.optimum


def test_harmless_below_x_min(table: Table, bounds: Bounds) -> None:
    """x |r - log x|, an eigenvalue's share of the error of S, is tiny and vanishes at 0."""
    low = mp.log(mpf(bounds.x_min))
    x = exp(np.array(mp.linspace(low - 50, low, 1500)))
    assert np.abs(x * table.gap(x)).max() <= bounds.tail
    # Further down r lies between r(0) and 0, and x (|r(0)| + |log x|) rises with x up to 1/e.
    at_zero = abs(table.gap(np.array([x[0] * mpf(10) ** -40]))[0] + log(x[0] * mpf(10) ** -40))
    assert x[0] * (at_zero - log(x[0])) <= bounds.tail


@pytest.mark.parametrize(("kind", "limit"), [("float", 4e-6), ("double", 1e-12)])
def test_entropy_of_4096_eigenvalues(kind: str, limit: float) -> None:
    """sum lambda |r - log| <= sqrt(m) error + m tail when sum lambda = 1 (Cauchy-Schwarz).

    S is at most log 4096 = 8.3, whose last place in fp32 is 1e-6: the fp32 limit is four of it.
    """
    bounds = BOUNDS[kind]
    assert np.sqrt(4096) * bounds.error + 4096 * bounds.tail <= limit


def test_a_changed_digit_is_noticed(
    table: Table, bounds: Bounds, extrema: tuple[Vector, Vector]
) -> None:
    """Every number counts to at least six digits."""
    for k, pole in enumerate(table.poles):
        for which in (0, 1):
            digits = f"{float(pole[which]):.16e}"
            wrong = f"{digits[:6]}{(int(digits[6]) + 1) % 10}{digits[7:]}"
            changed = list(pole)
            changed[which] = wrong
            poles = (*table.poles[:k], (changed[0], changed[1]), *table.poles[k + 1 :])
            assert fault(Table(table.constant, poles), bounds, extrema[0]), (k, which, wrong)


def test_script_reproduces_the_header() -> None:
    """The fp32 table, which takes seconds; `make_pole_table.py --check` recomputes both."""
    module = emulation.import_module(COMMON / "make_pole_table.py")
    with mp.workdps(module.DIGITS):
        computed = module.rounded(*module.minimax(module.SPECS[0]))
    _, table = parse(HEADER, "float")
    found = [float(number) for pole in table.poles for number in pole]
    wanted = [number for pole in zip(computed.t, computed.w, strict=True) for number in pole]
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=0)
    np.testing.assert_allclose(float(table.constant), computed.constant, rtol=1e-12, atol=0)
