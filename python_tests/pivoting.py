"""Why the poles need an order of pivots: sweeps in float32 on random matrices of low rank.

    python python_tests/pivoting.py [--draws 60]

Each draw is a random z (n x d) of rank r. Its log A is summed from the poles, every inverse swept
unblocked in plain torch in one of two ways, and the error of dS/dz is compared with that of a
float32 eigendecomposition (`reference.eigh_grad`):

  floor           pivots raised to max(t / 2, 4 u |A|_F), in the order of the rows
  floor+order     the floor, with the largest remaining pivot first

Columns: median and worst ratio of the two errors, and how many draws are above 1.5.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from vne_kernels import reference
from vne_kernels._core.ops import POLE_TABLE

SHAPES = ((17, 33), (33, 33), (64, 128))
RANKS = (1, 3, 8, 11)
WAYS = ("floor", "floor+order")


def inverses(a: Tensor, floor: Tensor, way: str) -> Tensor:
    """The inverses of a (b, m, m) by symmetric sweeps with pivots of at least floor (b,)."""
    b, m, _ = a.shape
    done, each = torch.zeros(b, m, dtype=torch.bool), torch.arange(b)
    for k in range(m):
        diagonal = a.diagonal(dim1=-2, dim2=-1).masked_fill(done, -math.inf)
        index = diagonal.argmax(-1) if way == "floor+order" else torch.full((b,), k)
        done[each, index] = True
        column = a[each, index]
        pivot = torch.maximum(column[each, index], floor)
        scaled = column / pivot[:, None]
        a = a - scaled[:, :, None] * column[:, None, :]
        a[each, index] = scaled
        a[each, :, index] = scaled
        a[each, index, index] = -1 / pivot
    return -a


def ratios(z: Tensor, way: str) -> Tensor:
    """Error of dS/dz by the poles over that by eigh: z (s, n, d), n <= d -> (s,)."""
    (constant, _), *poles = POLE_TABLE[torch.float32]
    t, w = torch.tensor(poles).T
    s, n, _ = z.shape
    identity = torch.eye(n)
    norm = z.norm(dim=-1, keepdim=True)
    u = z / norm
    x = u / n**0.5
    a = x @ x.mT
    floor = torch.maximum(t / 2, 4 * 2.0**-24 * a.flatten(1).norm(dim=1)[:, None])
    shifted = a[:, None] + t[:, None, None] * identity
    inverse = inverses(shifted.flatten(0, 1), floor.flatten(), way).unflatten(0, (s, -1))
    log_a = (constant + math.log(n)) * identity - (w[:, None, None] * inverse).sum(1)
    grad = -2 * (log_a @ x) / n**0.5
    grad = (grad - (grad * u).sum(-1, keepdim=True) * u) / norm
    exact = reference.oracle_grad(z)
    error, yardstick = (
        (of.double() - exact).flatten(1).norm(dim=1) for of in (grad, reference.eigh_grad(z))
    )
    return (error / yardstick).nan_to_num(math.inf)


def low_rank(draws: int, n: int, d: int, rank: int, generator: torch.Generator) -> Tensor:
    """Random matrices of a rank: (draws, n, d)."""
    left = torch.randn(draws, n, rank, generator=generator)
    return left @ torch.randn(draws, rank, d, generator=generator)


def summary(ratio: Tensor) -> str:
    """Median and worst of some ratios, and how many of them are above 1.5."""
    bad = int((~(ratio <= 1.5)).sum())
    return f"{ratio.median():5.2f} {ratio.max():10.3g} {bad:3d}/{len(ratio)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=60)
    draws = parser.parse_args().draws
    generator = torch.Generator().manual_seed(0)
    for n, d in SHAPES:
        for rank in RANKS:
            z = low_rank(draws, n, d, rank, generator)
            cells = [f"{way}: {summary(ratios(z, way))}" for way in WAYS]
            print(f"rank {rank:>2} {n} x {d}", *cells, sep="    ", flush=True)


if __name__ == "__main__":
    main()
