"""PNG plots of a run, drawn from its tables alone."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vne_kernels.pretrain.files import read_table, replacing

SPECTRA = 12  # at most so many curves in one plot
INK, MUTED, ACCENT = "#1f4e79", "#9db7d1", "#c0504d"


def draw_all(out: Path, n: int, d: int) -> list[Path]:
    """Draw loss, entropy, cosine and spectrum of the run in ``out``, batches of (n, d)."""
    header, steps = read_table(out / "metrics.csv")
    series = dict(zip(header, np.array(steps).T, strict=True))
    epoch_header, epochs = read_table(out / "epochs.csv")
    means = dict(zip(epoch_header, np.array(epochs).T, strict=True))
    return [
        _loss(out / "loss.png", series, means),
        _entropy(out / "entropy.png", series, means, n, d),
        _cosine(out / "cosine.png", series, means),
        _spectrum(out / "spectrum.png", out / "spectrum.csv"),
    ]


Series = dict[str, np.ndarray]


def _axes(title: str, ylabel: str, xlabel: str = "step") -> tuple[Figure, Axes]:
    # A Figure of its own, without pyplot: no window system, no global state.
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path


def _steps_and_means(axes: Axes, name: str, series: Series, means: Series) -> None:
    axes.plot(series["step"], series[name], color=MUTED, linewidth=0.8, label="step")
    ends = means["step"]
    middles = (ends + np.concatenate([[0.0], ends[:-1]])) / 2
    axes.plot(middles, means[name], color=INK, linewidth=1.8, label="mean of an epoch")


def _loss(path: Path, series: Series, means: Series) -> Path:
    figure, axes = _axes("Loss:  −S(U₁) − β·cos(U₁, U₂)", "loss")
    _steps_and_means(axes, "loss", series, means)
    right = axes.twinx()
    right.plot(series["step"], series["beta"], color=ACCENT, linestyle=":", label="β (right)")
    right.set_ylabel("β")
    right.spines["top"].set_visible(False)
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, frameon=False, loc="upper center")
    return _save(figure, path)


def _entropy(path: Path, series: Series, means: Series, n: int, d: int) -> Path:
    figure, axes = _axes("Von Neumann entropy of a batch of embeddings", "S (nats)")
    _steps_and_means(axes, "entropy", series, means)
    axes.plot(
        means["step"],
        means["probe_entropy"],
        color=ACCENT,
        linewidth=1.2,
        label="fixed batch, not augmented",
    )
    for name, limit, style in (("d", d, "--"), ("n", n, "-.")):
        label = f"log {name} = log {limit} = {math.log(limit):.2f}"
        axes.axhline(math.log(limit), color="black", linestyle=style, linewidth=0.9, label=label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")
    return _save(figure, path)


def _cosine(path: Path, series: Series, means: Series) -> Path:
    figure, axes = _axes("Cosine similarity of the two views", "mean cosine")
    _steps_and_means(axes, "cosine", series, means)
    axes.set_ylim(top=1.0)
    axes.legend(frameon=False, loc="lower right")
    return _save(figure, path)


def _spectrum(path: Path, table: Path) -> Path:
    """A curve for each of some epochs, cut at 1e-7: below it is round-off."""
    _, rows = read_table(table)
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(SPECTRA, len(rows))).round().astype(int))
    figure, axes = _axes("Eigenvalues of the density matrix, fixed batch", "λ", "rank of λ")
    scale = mpl.colors.Normalize(rows[0][0], max(rows[-1][0], rows[0][0] + 1))
    colours = mpl.colormaps["viridis"]
    for i in chosen:
        epoch, _, *values = rows[i]
        rank = np.arange(1, len(values) + 1)
        axes.plot(rank, np.maximum(values, 1e-7), color=colours(scale(epoch)), linewidth=1.3)
    m = len(rows[0]) - 2
    axes.axhline(1 / m, color="black", linestyle="--", linewidth=0.9, label=f"all equal: 1/{m}")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    figure.colorbar(mpl.cm.ScalarMappable(scale, colours), ax=axes, label="epoch")
    return _save(figure, path)
