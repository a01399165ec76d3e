"""Why the poles need an order of pivots: sweeps in float32 on random matrices of low rank.

    python bench/pivoting.py [--draws 60]

Each draw is a random z (n x d) of rank r. Its log A is summed from the poles, every inverse swept
unblocked in plain torch in one of three ways, and the error of dS/dz is compared with that of a
float32 eigendecomposition (`reference.eigh_grad`):

  floor           pivots raised to max(t / 2, 4 u |A|_F), in the order of the rows
  floor+raise     and to max_i c_i^2 / a_ii, which a positive semidefinite matrix never needs
  floor+order     the floor, with the largest remaining pivot first

Columns: median and worst ratio of the two errors, and how many draws are above 1.5.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from vne_kernels import reference
from vne_kernels.ops import POLE_TABLE

SHAPES = ((17, 33), (33, 33), (64, 128))
RANKS = (1, 3, 8, 11)
WAYS = ("floor", "floor+raise", "floor+order")


def inverses(a: Tensor, t: Tensor, way: str) -> Tensor:
    """(a + t_k I)^-1 by symmetric sweeps: a (s, m, m), t (p,) -> (s, p, m, m), float32."""
    s, m, _ = a.shape
    p = len(t)
    floor = torch.maximum(t / 2, 4 * 2.0**-24 * a.flatten(1).norm(dim=1)[:, None])
    a = a[:, None] + t[None, :, None, None] * torch.eye(m)
    done = torch.zeros(s, p, m, dtype=torch.bool)
    samples, poles = torch.arange(s)[:, None], torch.arange(p)[None]
    for k in range(m):
        diagonal = a.diagonal(dim1=-2, dim2=-1)
        if way == "floor+order":
            index = diagonal.masked_fill(done, -math.inf).argmax(-1)
        else:
            index = torch.full((s, p), k)
        column = a[samples, poles, index]
        done[samples, poles, index] = True
        pivot = torch.maximum(column.gather(-1, index[..., None]).squeeze(-1), floor)
        if way == "floor+raise":
            least = column.square() / torch.maximum(diagonal, floor[..., None])
            pivot = torch.maximum(pivot, least.masked_fill(done, 0).amax(-1))
        scaled = column / pivot[..., None]
        a = a - scaled[..., :, None] * column[..., None, :]
        a[samples, poles, index] = scaled
        a[samples, poles, :, index] = scaled
        a[samples, poles, index, index] = -1 / pivot
    return -a


def ratios(z: Tensor, way: str) -> Tensor:
    """Error of dS/dz by the poles over that by eigh: z (s, n, d), n <= d -> (s,)."""
    (constant, _), *poles = POLE_TABLE[torch.float32]
    t, w = torch.tensor(poles).T
    exact = reference.oracle_grad(z)
    yardstick = (reference.eigh_grad(z).double() - exact).flatten(1).norm(dim=1)
    n = z.shape[-2]
    norm = z.norm(dim=-1, keepdim=True)
    u = z / norm
    x = u / n**0.5
    summed = (w[None, :, None, None] * inverses(x @ x.mT, t, way)).sum(1)
    log_a = (constant + math.log(n)) * torch.eye(n) - summed
    grad = -2 * (log_a @ x) / n**0.5
    grad = (grad - (grad * u).sum(-1, keepdim=True) * u) / norm
    ratio = (grad.double() - exact).flatten(1).norm(dim=1) / yardstick
    return ratio.nan_to_num(math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=60)
    draws = parser.parse_args().draws
    generator = torch.Generator().manual_seed(0)
    print(f"{'n x d':>9} {'rank':>4}", *(f"{way:>28}" for way in WAYS))
    for n, d in SHAPES:
        for rank in RANKS:
            left = torch.randn(draws, n, rank, generator=generator)
            z = left @ torch.randn(draws, rank, d, generator=generator)
            cells = []
            for way in WAYS:
                ratio = ratios(z, way)
                bad = int((ratio > 1.5).sum())
                cells.append(f"{ratio.median():8.2f} {ratio.max():10.3g} {bad:5d}/{draws}")
            print(f"{n:>4} x {d:>3} {rank:>4}", *(f"{cell:>28}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
