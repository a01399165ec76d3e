"""The picture of a spectrum: eigenvalues, their cumulative share, and the scores beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vne_kernels.common.figures import ACCENT, INK, MUTED, save, tidy
from vne_kernels.spectrum_files.scores import lines

FLOOR = 1e-16  # eigenvalues below this share of the largest are rounding: not drawn
FEW = 40  # eigenvalues up to which each gets a point

Numbers = npt.NDArray[np.float64]


def draw(
    path: Path, title: str, eigenvalues: Numbers, cumulative: Numbers, scores: dict[str, Any]
) -> Path:
    """Draw the eigenvalues (m,), descending, and their cumulative shares (m,)."""
    figure = Figure(figsize=(10.5, 5.4), layout="constrained")
    figure.suptitle(title, fontsize=13)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.75, 1])[0]
    above, below = left.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    _draw_spectrum(above, eigenvalues, scores["effective_rank"])
    _draw_shares(below, cumulative, scores["eigenvalues_for_share"])
    _write_scores(right.subplots(), lines(scores, len(eigenvalues)))
    return save(figure, path)


def _marker(m: int) -> str:
    return "o" if m <= FEW else ""


def _draw_spectrum(axes: Axes, eigenvalues: Numbers, effective_rank: float) -> None:
    tidy(axes)
    m = len(eigenvalues)
    drawn = np.where(eigenvalues > FLOOR * eigenvalues[0], eigenvalues, np.nan)
    index = np.arange(1, m + 1)
    axes.plot(index, drawn, color=INK, linewidth=1.8, marker=_marker(m), markersize=3.5)
    mean = eigenvalues.sum() / m
    if mean > 0:
        axes.set_yscale("log")
        axes.axhline(
            mean, color="black", linestyle="--", linewidth=0.9, label=f"all equal: {mean:.3g}"
        )
    axes.axvline(
        effective_rank, color=ACCENT, linewidth=1.4, label=f"effective rank {effective_rank:.4g}"
    )
    axes.set_ylabel("eigenvalue λ")
    axes.legend(loc="upper right", frameon=False)


def _draw_shares(axes: Axes, cumulative: Numbers, counts: dict[str, int]) -> None:
    tidy(axes)
    m = len(cumulative)
    index = np.arange(1, m + 1)
    axes.plot(index, cumulative, color=INK, linewidth=1.8, marker=_marker(m), markersize=3.5)
    axes.fill_between(index, cumulative, color=MUTED, alpha=0.3, linewidth=0)
    for share, count in counts.items():
        axes.plot(count, cumulative[count - 1], "o", color=ACCENT, markersize=5)
        axes.annotate(
            f"{100 * float(share):g} %: {count}",
            (count, cumulative[count - 1]),
            (6, -12),
            textcoords="offset points",
            color=ACCENT,
        )
    axes.set(ylim=(0, 1.05), xlabel="rank of λ", ylabel="cumulative share")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _write_scores(axes: Axes, scores: list[tuple[str, str, str]]) -> None:
    """A line for each score, its remark in small letters below it."""
    axes.set_axis_off()
    axes.set(xlim=(-0.12, 1.04), ylim=(0, 1))
    step = 1 / (len(scores) + 0.5)
    for i, (name, value, remark) in enumerate(scores):
        y = 1 - (i + 0.5) * step
        axes.text(0, y, name, va="center", fontsize=10.5)
        axes.text(1, y, value, va="center", ha="right", fontsize=10.5, color=INK, weight="bold")
        if remark:
            axes.text(0, y - 0.42 * step, remark, va="center", fontsize=8, color="0.45")
