"""Compute the pole tables of csrc/common/pole_table.h.

    python csrc/common/make_pole_table.py            print the bounds and rewrite the header
    python csrc/common/make_pole_table.py --check    recompute; fail if the header differs or a bound is broken

Needs numpy and mpmath.  The arithmetic that decides the digits is mpmath's, so every machine gets the same table.

What is computed
----------------
The matrix logarithm is evaluated as a sum of inverses (csrc/README.md, (6)),

    log x ~ r(x) = c0 - sum_k w_k / (x + t_k),      t_k > 0,  w_k > 0,  c0 = sum_k w_k / (1 + t_k),

the last of which says r(1) = 0 = log 1.  Among all such r with n poles we want the one that minimises

    E = max over [x_min, 1] of |e(x)|,      e(x) = sqrt(x) (r(x) - log x).

Which r is best
---------------
r has 2n free parameters, (log t_k, log w_k), so it is the best one if e takes its largest modulus with alternating sign at
2n + 1 points ("levelled"; de la Vallee Poussin: wherever e alternates at 2n + 1 points, the smallest modulus among them
is a lower bound for the error of every r with n poles).  No sign constraint has to be imposed on t_k and w_k: e then has
2n zeros, which with the one at x = 1 makes r the rational interpolant, of type (n, n), of log at 2n + 1 positive points, and
since log x = int_0^inf [1/(1 + t) - 1/(x + t)] dt is a Stieltjes function, the poles of every such interpolant lie on the
negative axis and have residues of one sign.

How it is found: Remez' exchange
--------------------------------
1. Start: the Zolotarev points of [x_min, 1] against (-inf, 0].  With m = 1 - x_min, K = K(m) and u in (0, K), x = dn(u)^2 runs
   over the interval and -t = -cs(u)^2 over the cut, and equal steps in u are the optimal distribution for weight 1.
2. Level: solve sqrt(x_i) (r(x_i) - log x_i) = (-1)^i E for (log t, log w, E) at the 2n + 1 current points by Newton's method.
   Residuals are in high precision; the linear systems are solved in double, whose error only costs iterations.
3. Exchange: replace the points by the extrema of e, and repeat 2 until the extrema agree in modulus.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import mpmath as mp
import numpy as np
from mpmath import mpf

HEADER = Path(__file__).resolve().parent / "pole_table.h"
DIGITS = 40  # working precision in decimal digits
LEVELLED = 1e-9  # stop when the extrema of e agree in modulus to this
AGREEMENT = 1e-10  # relative difference of a recomputed digit that --check accepts

# Vectors of mpf are numpy arrays of dtype object; these are mpmath's functions on them.
to_mpf = np.frompyfunc(mpf, 1, 1)
exp = np.frompyfunc(mp.exp, 1, 1)
log = np.frompyfunc(mp.log, 1, 1)
sqrt = np.frompyfunc(mp.sqrt, 1, 1)


@dataclass(frozen=True)
class Spec:
    """One table: what is asked for, and the bounds that the result must keep."""

    suffix: str  # of the names in the header
    poles: int
    x_min: str  # decimal
    bound: float  # on sqrt(x) |r - log x| over [x_min, 1]
    tail: float  # on x |r - log x| over (0, x_min]


SPECS = (Spec("32", poles=16, x_min="1e-8", bound=2.66e-8, tail=5.4e-10),)


@dataclass(frozen=True)
class Table:
    """The sum of poles c0 - sum w / (x + t), in the doubles that the header holds."""

    constant: float
    t: tuple[float, ...]
    w: tuple[float, ...]


# ---------------------------------------------------------------------------------------------- the function


def pole_sum(x, t, w):
    """r(x) with r(1) = 0 built in: sum_k w_k (x - 1) / ((1 + t_k) (x + t_k))."""
    return (x - 1) * ((1 / (x[:, None] + t)) @ (w / (1 + t)))


def weighted_error(x, t, w):
    """e(x) = sqrt(x) (r(x) - log x)."""
    return sqrt(x) * (pole_sum(x, t, w) - log(x))


def refine_extremum(s, low, high, t, w):
    """The stationary point of e as a function of s = log x near s, by Newton's method inside [low, high]."""
    for _ in range(4):
        x = mp.exp(s)
        inverse = 1 / (x + t)
        gap = pole_sum(np.array([x]), t, w)[0] - s
        slope = x * (w @ inverse**2)  # dr/ds
        gap1 = slope - 1
        gap2 = slope - 2 * x * x * (w @ inverse**3)
        step = -(gap / 2 + gap1) / (gap / 4 + gap1 + gap2)
        s = min(max(s + step, low), high)
        if abs(step) < 1e-15:
            break
    return s


def extrema(points, t, w, per_interval=10):
    """(x, e(x)) at the largest |e| of every run of one sign; `points`, ascending, cut the interval for the search."""
    s = np.append(log(points), mpf(0))
    fractions = to_mpf(np.arange(per_interval)) / per_interval
    grid = np.concatenate([a + (b - a) * fractions for a, b in zip(s[:-1], s[1:])])
    e = weighted_error(exp(grid), t, w)
    cuts = [0, *(k for k in range(1, len(e)) if (e[k] > 0) != (e[k - 1] > 0)), len(e)]
    found = []
    for begin, end in zip(cuts[:-1], cuts[1:]):
        k = begin + int(np.argmax(np.abs(e[begin:end])))
        inside = 0 < k < len(grid) - 1
        found.append(refine_extremum(grid[k], grid[k - 1], grid[k + 1], t, w) if inside else grid[k])
    x = exp(np.array(found))
    x[0] = points[0] if found[0] == s[0] else x[0]
    return x, weighted_error(x, t, w)


# ------------------------------------------------------------------------------------------------- the fit


def zolotarev(n, x_min):
    """Step 1: poles, weights and 2n + 1 points from the elliptic functions of the interval."""
    m = 1 - x_min
    quarter = mp.ellipk(m)
    t, w = [], []
    for k in range(n, 0, -1):
        u = (k - mpf(1) / 2) * quarter / n
        sn, cn, dn = (mp.ellipfun(name, u, m) for name in ("sn", "cn", "dn"))
        t.append((cn / sn) ** 2)
        w.append(2 * cn * dn / sn**3 * quarter / n)  # |dt/du| du
    steps = [quarter * (j - mpf(1) / 2) / (2 * n + mpf(1) / 2) for j in range(2 * n, 0, -1)]
    points = [x_min, *(mp.ellipfun("dn", u, m) ** 2 for u in steps)]
    return np.array(t), np.array(w), np.array(points)


def newton_step(points, t, w, level):
    """One step of step 2; also returns the largest change of a log t or log w before damping."""
    n = len(t)
    sign = (-1.0) ** np.arange(2 * n + 1)
    residual = (weighted_error(points, t, w) - to_mpf(sign) * level).astype(float)
    x = points.astype(float)[:, None]
    td, wd = t.astype(float), w.astype(float)
    by_w = np.sqrt(x) * (x - 1) * wd / ((x + td) * (1 + td))  # de / d log w
    by_t = -by_w * td * (1 / (x + td) + 1 / (1 + td))  # de / d log t
    jacobian = np.hstack([by_t, by_w, -sign[:, None]])
    scale = np.abs(jacobian).max(axis=0)
    step = np.linalg.solve(jacobian / scale, -residual) / scale
    size = np.abs(step[:-1]).max()
    step = to_mpf(step / max(1.0, size))
    return t * exp(step[:n]), w * exp(step[n : 2 * n]), level + step[-1], size


def minimax(spec):
    """Steps 1 to 3: (t, w, E) of the best sum of poles, t ascending."""
    t, w, points = zolotarev(spec.poles, mpf(spec.x_min))
    level = mpf(0)
    for _ in range(40):
        for _ in range(40):
            t, w, level, size = newton_step(points, t, w, level)
            if size < 1e-6:
                break
        else:
            raise RuntimeError(f"table {spec.suffix}: Newton's method did not converge")
        points, e = extrema(points, t, w)
        if len(points) != 2 * spec.poles + 1:
            raise RuntimeError(f"table {spec.suffix}: e alternates at {len(points)} points")
        modulus = np.abs(e)
        if modulus.max() < (1 + LEVELLED) * modulus.min():
            return t, w, level
    raise RuntimeError(f"table {spec.suffix}: the exchange did not converge")


def rounded(t, w):
    """The table in doubles, its constant computed from the rounded poles so that r(1) = 0 to the last digit."""
    t, w = tuple(map(float, t)), tuple(map(float, w))
    return Table(float(sum(mpf(b) / (1 + mpf(a)) for a, b in zip(t, w))), t, w)


# ---------------------------------------------------------------------------------------------- the bounds


def measure(table, spec, per_decade=1000):
    """(max of sqrt(x) |r - log x| on [x_min, 1], max of x |r - log x| below, r(1)) of the doubles of a table."""
    t, w, c0 = to_mpf(np.array(table.t)), to_mpf(np.array(table.w)), mpf(table.constant)

    def gap(x):
        return c0 - (1 / (x[:, None] + t)) @ w - log(x)

    def largest(function, low, high):
        s = np.array(mp.linspace(low, high, int((high - low) / mp.log(10) * per_decade) + 2))
        size = np.abs(function(exp(s)))
        peaks = [k for k in range(1, len(s) - 1) if size[k - 1] <= size[k] >= size[k + 1]]
        best = max(size[0], size[-1])
        for k in peaks:  # vertex of the parabola through the three samples
            a, b, c = size[k - 1 : k + 2]
            best = max(best, b + (a - c) ** 2 / (8 * (2 * b - a - c)))
        return float(best)

    low = mp.log(mpf(spec.x_min))
    bound = largest(lambda x: sqrt(x) * gap(x), low, mpf(0))
    tail = largest(lambda x: x * gap(x), low - 40, low)  # x |r - log x| falls like x log x further down
    return bound, tail, float(gap(np.array([mpf(1)]))[0])


# ---------------------------------------------------------------------------------------------- the header


def render(tables):
    """The text of the header."""
    rows = []
    for spec, table in zip(SPECS, tables):
        rows.append(
            f"//   {spec.poles:>5} {spec.x_min:>8} {spec.bound:>25.2e} {spec.tail:>21.2e}   kPoleTable{spec.suffix}"
        )
    text = (
        "// Poles of the logarithm.  Generated by make_pole_table.py (which explains how): do not edit.\n"
        "//\n"
        "//   log x ~ r(x) = c0 - sum_k w_k / (x + t_k),   0 < x <= 1,   all t_k, w_k > 0,   r(1) = 0,\n"
        "//\n"
        "// minimises the largest sqrt(x) |r(x) - log x| on [x_min, 1].  Bounds, verified with mpmath for\n"
        "// the doubles below, which are in the order of ascending t:\n"
        "//\n"
        "//   poles    x_min   sqrt(x)|r-log| >= x_min   x|r-log| below it   table\n"
        + "\n".join(rows)
        + "\n\n#pragma once\n\nnamespace vne {\n\n"
        "struct Pole {\n  double t;\n  double w;\n};\n"
    )
    for spec, table in zip(SPECS, tables):
        pairs = "".join(f"    {{{a!r}, {b!r}}},\n" for a, b in zip(table.t, table.w))
        text += (
            f"\ninline constexpr int kPoles{spec.suffix} = {spec.poles};\n"
            f"inline constexpr double kPoleConstant{spec.suffix} = {table.constant!r};\n"
            f"inline constexpr Pole kPoleTable{spec.suffix}[kPoles{spec.suffix}] = {{\n{pairs}}};\n"
        )
    return text + "\n}  // namespace vne\n"


def differences(text, expected):
    """What differs between two headers, numbers being compared to AGREEMENT."""
    number = re.compile(r"[+-]?\d+\.?\d*(?:e[+-]?\d+)?")
    found = []
    if number.sub("#", text) != number.sub("#", expected):
        found.append("the text around the numbers")
    for a, b in zip(number.findall(text), number.findall(expected)):
        if abs(float(a) - float(b)) > AGREEMENT * abs(float(b)):
            found.append(f"{a} where {b} was computed")
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description="Compute the pole tables of pole_table.h.")
    parser.add_argument("--check", action="store_true", help="compare with the header instead of writing it")
    check = parser.parse_args(argv).check
    mp.mp.dps = DIGITS
    tables, broken = [], []
    print("table  poles  x_min   best possible  sqrt(x)|r-log|  x|r-log| below  r(1)      t_min     t_max")
    for spec in SPECS:
        t, w, level = minimax(spec)
        table = rounded(t, w)
        bound, tail, at_one = measure(table, spec)
        print(
            f"fp{spec.suffix}   {spec.poles:5d}  {spec.x_min:6}  {float(abs(level)):13.6e}  {bound:14.6e}"
            f"  {tail:15.3e}  {at_one:8.1e}  {table.t[0]:8.2e}  {table.t[-1]:8.2e}",
            flush=True,
        )
        if not (bound <= spec.bound and tail <= spec.tail and min(table.t + table.w) > 0):
            broken.append(f"table {spec.suffix} does not keep its bounds")
        tables.append(table)
    text = render(tables)
    if check:
        broken += differences(HEADER.read_text(), text)
    if broken:
        sys.exit("\n".join(broken))
    if not check:
        temporary = HEADER.with_suffix(".h.new")
        temporary.write_text(text)
        os.replace(temporary, HEADER)


if __name__ == "__main__":
    main()
