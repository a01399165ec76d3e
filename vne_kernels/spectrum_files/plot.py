"""The picture of a spectrum: eigenvalues, their cumulative share, and the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vne_kernels.common.figures import ACCENT, INK, MUTED, literal, save, tidy
from vne_kernels.spectrum_files.scores import lines

FEW = 40  # eigenvalues up to which each gets a point

Numbers = npt.NDArray[np.float64]


def draw(
    path: Path, title: str, eigenvalues: Numbers, cumulative: Numbers, scores: dict[str, Any]
) -> Path:
    """Draw a spectrum.

    Args:
        path: of the picture, a PNG file.
        title: of the whole.
        eigenvalues: (m,), descending; 0 for those that are no larger than rounding.
        cumulative: (m,), their cumulative shares.
        scores: all, as they are computed.
    """
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    figure.suptitle(literal(title), fontsize=13)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.75, 1])[0]
    above, below = left.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    m, seen = len(eigenvalues), np.count_nonzero(eigenvalues) or len(eigenvalues)
    looks: dict[str, Any] = {
        "color": INK,
        "linewidth": 1.8,
        "marker": "o" if seen <= FEW else "",
        "markersize": 3.5,
    }
    _draw_spectrum(above, eigenvalues[:seen], eigenvalues.sum() / m, looks)
    rank = scores["effective_rank"]
    above.axvline(rank, color=ACCENT, linewidth=1.4, label=f"effective rank: {rank:.4g}")
    above.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=2, frameon=False)
    _draw_shares(below, cumulative[:seen], scores["eigenvalues_for_share"], looks)
    others = f"   (the other {m - seen} are 0 but for rounding)" if seen < m else ""
    below.set_xlabel(f"rank of λ{others}")
    left.align_ylabels()
    _write_scores(right.subplots(), lines(scores, m))
    return save(figure, path)


def _draw_spectrum(axes: Axes, eigenvalues: Numbers, mean: float, looks: dict[str, Any]) -> None:
    tidy(axes)
    axes.plot(np.arange(1, len(eigenvalues) + 1), eigenvalues, **looks)
    if mean > 0:
        axes.set_yscale("log")
    label = f"all equal: {mean:.3g}"
    axes.axhline(mean, color="black", linestyle="--", linewidth=0.9, label=label)
    axes.set_ylabel("eigenvalue λ")


def _draw_shares(
    axes: Axes, cumulative: Numbers, counts: dict[str, int], looks: dict[str, Any]
) -> None:
    tidy(axes)
    index = np.arange(1, len(cumulative) + 1)
    axes.plot(index, cumulative, **looks)
    axes.fill_between(index, cumulative, color=MUTED, alpha=0.3, linewidth=0)
    at = np.minimum(list(counts.values()), len(cumulative))
    shares = " and ".join(f"{100 * float(share):g} %" for share in counts)
    axes.plot(at, cumulative[at - 1], "o", color=ACCENT, markersize=5, label=shares)
    axes.legend(loc="lower right", frameon=False)
    axes.set(ylim=(0, 1.05), ylabel="cumulative share")
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
