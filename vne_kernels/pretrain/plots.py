"""PNG plots of a run, drawn from its tables alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vne_kernels.common.figures import ACCENT, INK, MUTED, literal, save, tidy
from vne_kernels.pretrain.config import DIFFERENCES_OF_ENTROPIES
from vne_kernels.pretrain.events import COLLAPSE, RECOVERED, read_events
from vne_kernels.pretrain.tables import read_table

SPECTRA = 12  # at most so many curves in one plot
FEW = 12  # points up to which a curve gets markers: a lone point has no line to be seen by

#: --loss -> what a picture of it is called
TITLES = {
    "vn-doe": "Loss:  −S(U₁) − β·cos(U₁, U₂)",
    "vn-doe-symmetric": "Loss:  −½[S(U₁) + S(U₂)] − β·cos(U₁, U₂)",
    "shannon-doe": "Loss:  −I(Z₁; Z₁) − β·cos(Z₁, Z₂)",
    "simclr": "Loss:  NT-Xent (SimCLR)",
    "simsiam": "Loss:  −cos(prediction, target) (SimSiam)",
    "byol": "Loss:  −cos(prediction, target) (BYOL)",
    "barlow": "Loss:  Barlow Twins",
    "vicreg": "Loss:  VICReg",
}

#: The losses whose information estimate is not the entropy, which has a picture of its own.
INFORMATION = {
    "shannon-doe": "InfoNCE estimate of the entropy, I(Z₁; Z₁)",
    "simclr": "InfoNCE estimate of the mutual information, I(Z₁; Z₂)",
}

#: A table's columns by their names.
Series = dict[str, npt.NDArray[np.float64]]


def new_axes(title: str, ylabel: str, xlabel: str = "step") -> tuple[Figure, Axes]:
    """A figure with one panel."""
    # Created without pyplot, which would need a window system and global state.
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=literal(title), xlabel=xlabel, ylabel=ylabel)
    tidy(axes)
    return figure, axes


def legend_below(figure: Figure, columns: int = 3) -> None:
    """One legend for all panels under the figure, where it can hide no curve."""
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)


def draw_all(out: Path, n: int, d: int, loss: str = "vn-doe") -> list[Path]:
    """Draw what the tables in ``out`` tell of a run with ``loss``, batches of (n, d).

    A table that is missing or has no row yet, as after an early stop, leaves its pictures out.
    """
    pictures = _pictures(out, n, d, loss)
    return [save(figure, out / f"{name}.png") for name, figure in pictures]


def _pictures(out: Path, n: int, d: int, loss: str) -> Iterator[tuple[str, Figure]]:
    drawn = ("step", "loss", "entropy", "cosine")
    series = _columns(out / "metrics.csv", (*drawn, "beta"))
    means = _columns(out / "epochs.csv", (*drawn, "epoch"))
    spectra = _columns(out / "spectrum.csv", ("epoch", "step"))
    if series:
        yield "loss", _loss(series, means, loss)
        yield "entropy", _entropy(series, means, n, d, _collapses(out, series))
        if loss in INFORMATION and "information" in series:
            yield "information", _information(series, means, n, INFORMATION[loss])
        yield "cosine", _cosine(series, means)
    if "effective_rank" in means:
        yield "effective_rank", _effective_rank(means, n, d)
    measured = [name for name in ("online_linear", "online_knn") if _finite(means, name)]
    if measured:
        yield "accuracy", _accuracy(means, measured)
    if spectra:
        yield "spectrum", _spectrum(spectra)


def _columns(path: Path, needed: Sequence[str]) -> Series:
    """A table's columns; none of a table without a row."""
    if not path.exists():
        return {}
    header, rows = read_table(path, needed)
    return dict(zip(header, np.array(rows).T, strict=True)) if rows else {}


def _finite(series: Series, name: str) -> bool:
    return name in series and bool(np.isfinite(series[name]).any())


def _steps_and_means(
    axes: Axes, name: str, series: Series, means: Series, scale: float = 1.0
) -> None:
    axes.plot(series["step"], scale * series[name], color=MUTED, linewidth=0.8, label="step")
    if not means:
        return
    ends = means["step"]
    middles = (ends + np.concatenate([[0.0], ends[:-1]])) / 2
    axes.plot(
        middles,
        scale * means[name],
        color=INK,
        linewidth=1.8,
        marker=_marker(middles),
        markersize=3.5,
        label="mean of an epoch",
    )


def _marker(points: npt.NDArray[np.float64]) -> str:
    return "o" if len(points) <= FEW else ""


def _loss(series: Series, means: Series, loss: str) -> Figure:
    figure, axes = new_axes(TITLES[loss], "loss")
    _steps_and_means(axes, "loss", series, means)
    if loss in DIFFERENCES_OF_ENTROPIES:
        right = axes.twinx()
        right.plot(series["step"], series["beta"], color=ACCENT, linestyle=":", label="β (right)")
        right.set_ylabel("β")
        right.spines["top"].set_visible(False)
    legend_below(figure)
    return figure


def _collapses(out: Path, series: Series) -> list[tuple[float, float]]:
    """(first step, last step) of each time the representation was collapsed."""
    spans: list[tuple[float, float]] = []
    begun: float | None = None
    for step, kind, _ in read_events(out / "events.csv"):
        if kind == COLLAPSE:
            begun = float(step)
        elif kind == RECOVERED and begun is not None:
            spans.append((begun, float(step)))
            begun = None
    return spans if begun is None else [*spans, (begun, float(series["step"][-1]))]


def _entropy(
    series: Series, means: Series, n: int, d: int, collapses: list[tuple[float, float]]
) -> Figure:
    figure, axes = new_axes("Von Neumann entropy of a batch of embeddings", "S (nats)")
    _steps_and_means(axes, "entropy", series, means)
    if means:
        axes.plot(
            means["step"],
            means["probe_entropy"],
            color=ACCENT,
            linewidth=1.2,
            marker=_marker(means["step"]),
            markersize=3,
            label="fixed batch, not augmented",
        )
    for i, (first, last) in enumerate(collapses):
        axes.axvspan(first, last, color=ACCENT, alpha=0.15, label="collapsed" if i == 0 else None)
    side, most = ("n", n) if n <= d else ("d", d)
    label = f"most possible: log {side} = log {most} = {math.log(most):.2f}"
    axes.axhline(math.log(most), color="black", linestyle="--", linewidth=0.9, label=label)
    axes.set_ylim(bottom=0)
    bits = axes.secondary_yaxis("right", functions=(_to_bits, _to_nats))
    bits.set_ylabel("bits")
    legend_below(figure, columns=2)
    return figure


def _to_bits(nats: npt.ArrayLike) -> npt.ArrayLike:
    return np.asarray(nats) / math.log(2)


def _to_nats(bits: npt.ArrayLike) -> npt.ArrayLike:
    return np.asarray(bits) * math.log(2)


def _information(series: Series, means: Series, n: int, title: str) -> Figure:
    figure, axes = new_axes(title, "information (bits)")
    _steps_and_means(axes, "information", series, means, scale=1 / math.log(2))
    label = f"most possible: log₂ n = log₂ {n} = {math.log2(n):.2f}"
    axes.axhline(math.log2(n), color="black", linestyle="--", linewidth=0.9, label=label)
    legend_below(figure)
    return figure


def _cosine(series: Series, means: Series) -> Figure:
    figure, axes = new_axes("Cosine similarity of the two views", "mean cosine")
    _steps_and_means(axes, "cosine", series, means)
    axes.set_ylim(top=1.02)
    legend_below(figure)
    return figure


def _effective_rank(means: Series, n: int, d: int) -> Figure:
    figure, axes = new_axes("Effective rank  exp S  of the fixed batch", "exp S", "epoch")
    epochs, most = means["epoch"], min(n, d)
    axes.plot(epochs, means["effective_rank"], color=INK, marker=_marker(epochs), markersize=3.5)
    label = f"most possible: min(n, d) = min({n}, {d}) = {most}"
    axes.axhline(most, color="black", linestyle="--", linewidth=0.9, label=label)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure)
    return figure


def _accuracy(means: Series, measured: list[str]) -> Figure:
    """Curves through the epochs that were measured; the others hold NaN."""
    figure, axes = new_axes("Test accuracy during training", "top-1 (%)", "epoch")
    looks = {
        "online_linear": ("online linear probe", INK, "o"),
        "online_knn": ("nearest neighbours", ACCENT, "s"),
    }
    for name in measured:
        label, colour, marker = looks[name]
        known = np.isfinite(means[name])
        axes.plot(
            means["epoch"][known],
            100 * means[name][known],
            color=colour,
            marker=marker if known.sum() <= FEW else "",
            markersize=3.5,
            label=label,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure)
    return figure


def _spectrum(spectra: Series) -> Figure:
    """A curve for each of some epochs, cut at 1e-7: below it is round-off."""
    epochs, _, *columns = spectra.values()
    rows = np.array(columns).T
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(SPECTRA, len(rows))).round().astype(int))
    figure, axes = new_axes("Eigenvalues of the density matrix, fixed batch", "λ", "rank of λ")
    scale = mpl.colors.Normalize(epochs[0], max(epochs[-1], epochs[0] + 1))
    colours = mpl.colormaps["viridis"]
    m = rows.shape[1]
    for i in chosen:
        colour = colours(scale(epochs[i]))
        axes.plot(np.arange(1, m + 1), np.maximum(rows[i], 1e-7), color=colour, linewidth=1.3)
    axes.axhline(1 / m, color="black", linestyle="--", linewidth=0.9, label=f"all equal: 1/{m}")
    axes.set_yscale("log")
    legend_below(figure)
    bar = figure.colorbar(mpl.cm.ScalarMappable(scale, colours), ax=axes, label="epoch")
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()
    return figure
