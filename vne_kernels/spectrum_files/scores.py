"""What is computed from a spectrum: scores, the table, the lines that are printed.

No formula stands here but shares of a sum: the others are those of ``vne_kernels._core.spectra``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vne_kernels._core import spectra

HEADER = ("index", "eigenvalue", "share", "cumulative_share")
VENDI_ORDERS = (0.5, 1, 2, math.inf)
TOP = (1, 10, 100)
SHARES = (0.9, 0.99)


def compute(eigenvalues: Tensor, raw: Tensor | None, eps: float) -> dict[str, Any]:
    """All scores.

    Args:
        eigenvalues: (m,) float64, descending, of the density matrix.
        raw: (m,) float64, of the sum over the rows as they are. None: sums are in float32, and the
            scores that small eigenvalues decide are left out, as rounding hides them.
        eps: the rounding of the dtype of the rows.

    Returns:
        Names to plain numbers, or to one such dict; entropies in nats.
    """
    m = len(eigenvalues)
    shares = cumulative_shares(eigenvalues)
    orders = [q for q in VENDI_ORDERS if raw is not None or q >= 1]
    vendi = {f"{q:g}": float(spectra.renyi_entropy(eigenvalues, q).exp()) for q in orders}
    summary = spectra.summary(eigenvalues, raw, eps)
    return {name: score.item() for name, score in summary.items()} | {
        "vendi_score": vendi,
        "share_of_largest": {str(k): float(shares[k - 1]) for k in TOP if k <= m},
        "eigenvalues_for_share": {f"{x:g}": min(m, int((shares < x).sum()) + 1) for x in SHARES},
    }


def cumulative_shares(eigenvalues: Tensor) -> Tensor:
    """(m,): how much of the sum the k largest hold; all zeros if the sum is 0."""
    total = eigenvalues.sum()
    return eigenvalues.cumsum(0) / torch.where(total > 0, total, 1)


def table(eigenvalues: Tensor) -> Iterator[tuple[int, float, float, float]]:
    """Rows of spectrum.csv: index from 1, eigenvalue, its share of the sum, cumulative share."""
    cumulative = cumulative_shares(eigenvalues).tolist()
    total = float(eigenvalues.sum()) or 1.0
    for i, (value, share) in enumerate(zip(eigenvalues.tolist(), cumulative, strict=True), 1):
        yield i, value, value / total, share


def lines(scores: dict[str, Any], m: int) -> list[tuple[str, str, str]]:
    """(name, value, remark) of each score, for people."""
    vendi = scores["vendi_score"]
    found = [
        ("entropy", f"{scores['entropy']:.4f} nats", f"at most log {m} = {math.log(m):.4f}"),
        ("effective rank", _number(scores["effective_rank"]), f"exp S = Vendi score; at most {m}"),
    ]
    if "0.5" in vendi:
        found.append(("Vendi score, q = 0.5", _number(vendi["0.5"]), ""))
    found += [
        ("Vendi score, q = 2", _number(vendi["2"]), "the participation ratio"),
        ("Vendi score, q = ∞", _number(vendi["inf"]), "sum / largest eigenvalue"),
    ]
    if "rankme" in scores:
        found += [
            ("RankMe", _number(scores["rankme"]), "of the rows as they are"),
            ("rank", str(scores["rank"]), ""),
        ]
    shares = {k: f"{100 * share:.4g} %" for k, share in scores["share_of_largest"].items()}
    found.append(
        (
            "largest eigenvalue",
            _number(scores["largest_eigenvalue"]),
            f"{shares.pop('1')} of the sum",
        )
    )
    found += [(f"share of the largest {k}", share, "") for k, share in shares.items()]
    for share, count in scores["eigenvalues_for_share"].items():
        found.append((f"eigenvalues for {100 * float(share):g} %", str(count), f"of {m}"))
    return found


def _number(x: float) -> str:
    return f"{x:.5g}"
