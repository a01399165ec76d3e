"""Compute the pole tables of csrc/common/pole_table.h.

    python csrc/common/make_pole_table.py            rewrite the header
    python csrc/common/make_pole_table.py --check    recompute; fail if the header differs

Needs numpy and mpmath and about half a minute. python_tests/test_pole_table.py measures whether the
header keeps the bounds that it states.

What is computed
----------------
The matrix logarithm is evaluated as a sum of inverses (csrc/README.md, (6)),

    log x ~ r(x) = c0 - sum_k w_k / (x + t_k),    t_k, w_k > 0,    c0 = sum_k w_k / (1 + t_k),

the last of which says r(1) = 0 = log 1. Among all such r with n poles we want the one with the
smallest

    E = max over [x_min, 1] of |e(x)|,    e(x) = sqrt(x) (r(x) - log x).

Which r that is
---------------
r has 2n free parameters, the log t_k and log w_k. By de la Vallee Poussin's argument, where e takes
alternating signs at 2n + 1 points, the smallest |e| among them is a lower bound of E for every r
with n poles; so an r whose e alternates between +E and -E at 2n + 1 points ("levelled") is optimal.

The signs of t_k and w_k need no attention: such an e has 2n zeros, which with the one at x = 1 make
r the rational interpolant of type (n, n) of log at 2n + 1 positive points, and because
log x = int_0^inf [1/(1 + t) - 1/(x + t)] dt is a Stieltjes function, every such interpolant has its
poles on the negative axis, with w_k > 0.

How it is found
---------------
1. Start (`interpolation_points`, `interpolant`): interpolate log at the 2n + 1 points that would be
   nearly optimal if the weight sqrt(x) varied slowly. For weight 1 these are Zolotarev's points of
   [x_min, 1] against the cut (-inf, 0]: with m = 1 - x_min, x = dn(u|m)^2 runs over the interval,
   -t = -cs(u|m)^2 over the cut, and points are equidistant in u. Away from the ends that is
   equidistant in s = log x, and a density of rho poles per unit of s leaves an error of about
   16 exp(-2 pi^2 rho). For the weighted error to be the same everywhere, rho must grow like
   (alpha + s/2) / (2 pi^2), alpha = log(16/E): so s is mapped to a coordinate of that density.
2. Level (`solve`): bring e at its own extrema x_i to a prescribed shape, e(x_i) = h f_i with
   unknown height h, by Newton's method in (log t, log w, h). The residual is evaluated in high
   precision, the linear system (condition about 1/E) solved in double, which costs iterations but
   no digits. f_i = sign(e_i) |e_i|^(1 - tau): tau is such that one round evens out at most a factor
   SPREAD, because Newton's method does not converge from further away; near the end tau = 1.
3. Exchange (`extrema`): find the extrema of the new e; repeat 2 until they agree in modulus. With
   tau = 1 this is Remez' algorithm.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import mpmath as mp
import numpy as np
from mpmath import mpf

HEADER = Path(__file__).resolve().parent / "pole_table.h"
DIGITS = 40  # decimal digits of the working precision
START_DIGITS = 110  # of the interpolation, whose equations are far worse conditioned
SPREAD = 4.0  # see step 2
LEVELLED = 1e-12  # relative difference of the extrema of e at which the exchange ends
AGREEMENT = 1e-12  # relative difference of a recomputed number that --check accepts

# Vectors of mpf are numpy arrays of dtype object; these are mpmath's functions on them.
to_mpf = np.frompyfunc(mpf, 1, 1)
exp = np.frompyfunc(mp.exp, 1, 1)
log = np.frompyfunc(mp.log, 1, 1)
sqrt = np.frompyfunc(mp.sqrt, 1, 1)


@dataclass(frozen=True)
class Spec:
    """What a table is asked for, and the bounds that it must keep."""

    type: str  # that the header has it for
    poles: int
    x_min: str
    bound: float  # on sqrt(x) |r - log x| over [x_min, 1]
    tail: float  # on x |r - log x| over (0, x_min]


# fp64: an eigenvalue below 2e-16 is rounding error of a matrix of trace one, and for m = 4096
# eigenvalues the error of S is at most sqrt(m) * bound + m * tail = 7.7e-13.
SPECS = (
    Spec("float", poles=16, x_min="1e-8", bound=2.66e-8, tail=5.4e-10),
    Spec("double", poles=50, x_min="2e-16", bound=1.16e-14, tail=4.7e-18),
)


@dataclass(frozen=True)
class Table:
    """c0 - sum w / (x + t) in the doubles that the header holds."""

    constant: float
    t: tuple[float, ...]
    w: tuple[float, ...]


# ------------------------------------------------------------------------------------ the function


def pole_sum(x, t, w):
    """r(x), with r(1) = 0 built in: sum_k w_k (x - 1) / ((1 + t_k) (x + t_k))."""
    return (x - 1) * ((1 / (x[:, None] + t)) @ (w / (1 + t)))


def weighted_error(x, t, w):
    """e(x) = sqrt(x) (r(x) - log x)."""
    return sqrt(x) * (pole_sum(x, t, w) - log(x))


def stationary_point(low, high, t, w):
    """The s = log x in [low, high] where de/ds = 0."""

    def derivative(s):  # of e, over sqrt(x)
        x = np.array([mp.exp(s)])
        slope = x[0] * (w @ (1 / (x + t)) ** 2)  # dr/ds
        return (pole_sum(x, t, w)[0] - s) / 2 + slope - 1

    return mp.findroot(derivative, (low, high), solver="anderson", tol=1e-25, verify=False)


def extrema(cuts, t, w, per_interval=10):
    """x and e(x) where |e| is largest in each run of one sign; `cuts` guide the search."""
    s = np.append(log(cuts), mpf(0))
    fractions = to_mpf(np.arange(per_interval)) / per_interval
    grid = np.concatenate([a + (b - a) * fractions for a, b in itertools.pairwise(s)])
    e = weighted_error(exp(grid), t, w)
    changes = [k for k in range(1, len(e)) if (e[k] > 0) != (e[k - 1] > 0)]
    found = []
    for begin, end in itertools.pairwise([0, *changes, len(e)]):
        k = begin + int(np.argmax(np.abs(e[begin:end])))
        if 0 < k < len(grid) - 1:
            found.append(stationary_point(grid[k - 1], grid[k + 1], t, w))
        else:
            found.append(grid[k])
    x = exp(np.array(found))
    return x, weighted_error(x, t, w)


# ----------------------------------------------------------------------------------------- the fit


def interpolation_points(n, x_min):
    """Step 1: the 2n + 1 points, ascending to 1, and guesses of the n poles."""
    m = 1 - x_min
    quarter = mp.ellipk(m)
    length = mp.log(16 / x_min)
    alpha = 2 * mp.pi**2 * n / length + length / 4  # so that the poles number n
    mean = alpha + mp.log(x_min) / 4  # of alpha + s/2 over the interval

    def mapped(y):
        """exp(s) where the integral of the density from s to 0 is that of its mean over log y."""
        return mp.exp(2 * (mp.sqrt(alpha**2 + mean * mp.log(y)) - alpha))

    points = [
        mapped(mp.ellipfun("dn", quarter * j / (2 * n + mpf(1) / 2), m) ** 2)
        for j in range(2 * n, 0, -1)
    ]
    poles = [
        mapped(mp.ellipfun("cs", quarter * (j - mpf(1) / 2) / n, m) ** 2) for j in range(n, 0, -1)
    ]
    return np.array([*points, mpf(1)]), np.array(poles)


def interpolant(points, guess):
    """Step 1: (t, w) of the r of type (n, n) that equals log at 2n + 1 points.

    In barycentric form r = sum_j c_j log(a_j) / (x - a_j) / q(x) with q = sum_j c_j / (x - a_j) and
    every other point an a_j; the others make n linear equations for the c_j. The -t_k are
    the zeros of q, found together by Ehrlich and Aberth's iteration.
    """
    a, b = points[0::2], points[1::2]
    n = len(b)
    loewner = (log(b)[:, None] - log(a)) / (b[:, None] - a)
    c = mp.lu_solve(mp.matrix(loewner[:, :n].tolist()), mp.matrix((-loewner[:, n]).tolist()))
    c = np.array([*c, mpf(1)])
    x = -guess
    for _ in range(200):
        inverse = 1 / (x[:, None] - a)
        q, slope = inverse @ c, -(inverse**2) @ c
        newton = q / (slope + q * inverse.sum(axis=1))  # for the polynomial q prod (x - a_j)
        apart = x[:, None] - x
        apart[np.diag_indices(n)] = mpf(1)
        step = newton / (1 - newton * ((1 / apart).sum(axis=1) - 1))
        limit = np.abs(x) / 2  # keeps x negative
        x = x - np.maximum(np.minimum(step, limit), -limit)
        if np.abs(step / x).max() < mpf(10) ** -DIGITS:
            break
    else:
        raise RuntimeError("the poles of the interpolant were not found")
    inverse = 1 / (x[:, None] - a)
    t, w = -x, (inverse @ (c * log(a))) / (inverse**2 @ c)
    order = np.argsort(t)
    return t[order], w[order]


def solve(x, shape, t, w, accuracy):
    """Step 2: (t, w) with e(x_i) = h shape_i for some h, where max |shape| = 1."""
    n = len(t)
    height = mpf(0)
    xd, right = x.astype(float)[:, None], -shape.astype(float)[:, None]
    for _ in range(30):
        residual = weighted_error(x, t, w) - height * shape
        if height and np.abs(residual).max() < accuracy * abs(height):
            return t, w
        td, wd = t.astype(float), w.astype(float)
        by_w = np.sqrt(xd) * (xd - 1) * wd / ((xd + td) * (1 + td))  # de / d log w
        by_t = -by_w * td * (1 / (xd + td) + 1 / (1 + td))  # de / d log t
        jacobian = np.hstack([by_t, by_w, right])
        scale = np.abs(jacobian).max(axis=0)
        step = to_mpf(np.linalg.solve(jacobian / scale, -residual.astype(float)) / scale)
        t, w, height = t * exp(step[:n]), w * exp(step[n:-1]), height + step[-1]
    raise RuntimeError("Newton's method did not converge")


def minimax(spec):
    """Steps 1 to 3: (t, w) of the best sum of poles, t ascending."""
    x_min = mpf(spec.x_min)
    with mp.workdps(START_DIGITS):
        points, guess = interpolation_points(spec.poles, x_min)
        t, w = interpolant(points, guess)
    cuts = np.array([x_min, *points[:-1]])
    for _ in range(30):
        x, e = extrema(cuts, t, w)
        if len(x) != 2 * spec.poles + 1:
            raise RuntimeError(f"table of {spec.type}: e alternates at {len(x)} points")
        modulus = np.abs(e)
        spread = float(modulus.max() / modulus.min())
        if spread < 1 + LEVELLED:
            return t, w
        tau = min(1.0, math.log(SPREAD) / math.log(spread))
        shape = np.sign(e.astype(float)) * (modulus / modulus.max()) ** (1 - tau)
        t, w = solve(x, shape, t, w, accuracy=1e-2 if tau < 1 else 1e-14)
        cuts = x
    raise RuntimeError(f"table of {spec.type}: the exchange did not converge")


def rounded(t, w):
    """The table in doubles; its constant is that of the rounded t and w, so that r(1) = 0."""
    t, w = tuple(map(float, t)), tuple(map(float, w))
    return Table(float(sum(mpf(b) / (1 + mpf(a)) for a, b in zip(t, w, strict=True))), t, w)


# -------------------------------------------------------------------------------------- the header


def render(tables):
    """The text of the header."""
    lines = [
        "// Poles of the logarithm. Generated by make_pole_table.py (read there how): do not edit.",
        "//",
        "//   log x ~ r(x) = c0 - sum_k w_k / (x + t_k),  0 < x <= 1,  all t_k, w_k > 0,  r(1) = 0",
        "//",
        "// minimizes the largest sqrt(x) |r(x) - log x| on [x_min, 1]. The bounds are verified",
        "// with mpmath for the doubles below. Poles are in the order of ascending t.",
        "//",
        "//   type     poles   x_min   sqrt(x)|r-log| on [x_min, 1]   x|r-log| on (0, x_min]",
        *(f"//   {s.type:6}{s.poles:8d}{s.x_min:>8}{s.bound:31.2e}{s.tail:25.1e}" for s in SPECS),
        "",
        "#pragma once",
        "",
        "namespace vne {",
        "",
        "struct Pole {",
        "  double t, w;",
        "};",
        "",
        "// The table for the type T that is computed in.",
        "template <typename T>",
        "struct PoleTable;",
        "",
    ]
    for spec, table in zip(SPECS, tables, strict=True):
        lines += [
            "template <>",
            f"struct PoleTable<{spec.type}> {{",
            f"  static constexpr int kSize = {spec.poles};",
            f"  static constexpr double kConstant = {table.constant!r};",
            "  static constexpr Pole kPoles[kSize] = {",
            *(f"      {{{t!r}, {w!r}}}," for t, w in zip(table.t, table.w, strict=True)),
            "  };",
            "};",
            "",
        ]
    return "\n".join([*lines, "}  // namespace vne", ""])


def differences(text, computed):
    """What differs between two headers, numbers being compared to AGREEMENT."""
    number = re.compile(r"[+-]?\d+\.?\d*(?:e[+-]?\d+)?")
    if number.sub("#", text) != number.sub("#", computed):
        return ["the header's text is not the one generated"]
    pairs = zip(number.findall(text), number.findall(computed), strict=True)
    return [
        f"the header has {a} where {b} was computed"
        for a, b in pairs
        if abs(float(a) - float(b)) > AGREEMENT * abs(float(b))
    ]


def main():
    parser = argparse.ArgumentParser(description="Compute the pole tables of pole_table.h.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    mp.mp.dps = DIGITS
    text = render([rounded(*minimax(spec)) for spec in SPECS])
    if check:
        sys.exit("\n".join(differences(HEADER.read_text(), text)) or None)
    temporary = HEADER.with_suffix(".h.new")
    temporary.write_text(text)
    os.replace(temporary, HEADER)


if __name__ == "__main__":
    main()
