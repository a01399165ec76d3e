"""How steady three information estimates are during training, as in the paper's Figures 2 and 4.

Each is what its loss maximises: InfoNCE's estimate of the mutual information for SimCLR, InfoNCE's
self-information for the Shannon difference of entropies, the von Neumann entropy for the paper's.
From a batch of n images none of them can be more than log n: InfoNCE by its form, the entropy since
the density matrix has a rank of at most n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vne_kernels.common import figures
from vne_kernels.common.files import write_table
from vne_kernels.common.reading import read_json
from vne_kernels.pretrain import paper
from vne_kernels.pretrain.config import Config, load_config
from vne_kernels.pretrain.protocol import Accuracy
from vne_kernels.pretrain.tables import read_table

TITLES = {
    "simclr": "SimCLR:  I$_{NCE}$(Z₁; Z₂)",
    "shannon-doe": "Shannon DoE:  I$_{NCE}$(Z₁; Z₁)",
    "vn-doe": "von Neumann DoE:  S(Z₁)",
}

#: the two rows of the picture, by their names in Curve and Row
QUANTITIES = ("information", "loss_value")

Numbers = npt.NDArray[np.float64]


class Spread(NamedTuple):
    """Of a quantity over the steps of an epoch."""

    mean: float
    std: float
    min: float
    max: float
    #: standard deviation from the straight line that fits the epoch best: without the trend
    step_std: float


#: of the table
HEADER = (
    *("loss", "epoch", "steps"),
    *(f"{what}_{name}" for what in QUANTITIES for name in Spread._fields),
)


class Row(NamedTuple):
    """An epoch of a run: its information in bits, and its loss."""

    loss: str
    epoch: int
    steps: int
    information: Spread
    loss_value: Spread


class Curve(NamedTuple):
    """A run: what it was, its metrics by step (each of shape (steps,)), and its epochs."""

    config: Config
    accuracy: float  # of linear-eval, 0 to 1
    epochs: Numbers  # fractional, at the end of the step
    information: Numbers  # bits
    loss_value: Numbers
    rows: list[Row]


def write(runs: Sequence[Path], out: Path) -> list[Curve]:
    """Write ``variance.csv`` and ``variance.png`` of trained and evaluated runs into ``out``."""
    curves = [read(run) for run in runs]
    rows = [
        [*row[:3], *(f"{x:.6g}" for x in (*row.information, *row.loss_value))]
        for curve in curves
        for row in curve.rows
    ]
    write_table(out / "variance.csv", HEADER, rows)
    draw(curves, out / "variance.png")
    return curves


def read(run: Path) -> Curve:
    """The curve of the run in the folder ``run``."""
    config = load_config(run)
    needed = ("step", "epoch", "loss", "information")
    header, table = read_table(run / "metrics.csv", needed)
    columns = dict(zip(header, np.array(table).T, strict=True))
    information, loss_value = columns["information"] / math.log(2), columns["loss"]
    steps_per_epoch = len(table) / config.epochs
    rows = []
    for epoch in range(1, config.epochs + 1):
        steps = columns["epoch"] == epoch
        spreads = spread(information[steps]), spread(loss_value[steps])
        rows.append(Row(config.loss, epoch, int(steps.sum()), *spreads))
    accuracy = read_json(run / "linear_eval.json", Accuracy)["accuracy"]
    epochs = columns["step"] / steps_per_epoch
    return Curve(config, accuracy, epochs, information, loss_value, rows)


def spread(values: Numbers) -> Spread:
    """Of the values (steps,) of an epoch; ``step_std`` is nan of fewer than three."""
    steps = np.arange(len(values))
    step_std = math.nan
    if len(values) > 2:
        residuals = values - np.polyval(np.polyfit(steps, values, 1), steps)
        step_std = math.sqrt(np.sum(residuals**2) / (len(values) - 2))  # two went into the line
    return Spread(
        float(values.mean()),
        float(values.std()),
        float(values.min()),
        float(values.max()),
        step_std,
    )


def step_std(rows: Sequence[Row], what: str) -> float:
    """Standard deviation from step to step over all epochs, each without its trend."""
    freedoms = np.array([max(0, row.steps - 2) for row in rows])
    if not freedoms.any():
        return math.nan
    variances = np.array([getattr(row, what).step_std for row in rows]) ** 2
    return math.sqrt(np.average(np.nan_to_num(variances), weights=freedoms))


def summary(curves: Sequence[Curve]) -> str:
    """A line for each loss: how steady, and how good what was learnt."""
    lines = [f"{'loss':<14}{'step std, bits':>16}{'step std, loss':>16}{'linear evaluation':>20}"]
    lines += [
        f"{curve.config.loss:<14}{step_std(curve.rows, 'information'):16.4f}"
        f"{step_std(curve.rows, 'loss_value'):16.4f}{100 * curve.accuracy:18.2f} %"
        for curve in curves
    ]
    return "\n".join(lines)


def draw(curves: Sequence[Curve], picture: Path) -> Path:
    """Information (above) and loss (below) of each step and in the mean of each epoch.

    The paper's accuracies are named where the images are those of its figure.
    """
    figure = Figure(figsize=(1 + 3.7 * len(curves), 7), layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False, sharex="col")
    least = min(0, *(curve.information.min() for curve in curves))  # one scale for all
    for (above, below), curve in zip(panels.T, curves, strict=True):
        loss, n = curve.config.loss, curve.config.batch_size
        bound = math.log2(n)
        _draw_steps(above, curve, "information")
        above.axhline(
            bound,
            color="black",
            linestyle="--",
            linewidth=0.9,
            label=f"log₂ {n} = {bound:.3g} bits",
        )
        above.set_ylim(least, 1.06 * bound)
        _draw_steps(below, curve, "loss_value")
        theirs = f"  (paper: {paper.FIGURE_2[loss]} %)" if _is_papers(curve.config) else ""
        judged = f"linear evaluation {100 * curve.accuracy:.1f} %{theirs}"
        steady = [f"σ from step to step {step_std(curve.rows, x):.3g}" for x in QUANTITIES]
        above.set_title(f"{TITLES[loss]}\n{judged}\n{steady[0]} bits", fontsize=10)
        below.set_title(f"loss;  {steady[1]}", fontsize=10)
        below.set_xlabel("epoch")
    panels[0, 0].set_ylabel("information (bits)")
    panels[1, 0].set_ylabel("loss")
    figure.suptitle(_protocol(curves[0].config), fontsize=10, color="0.35")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    legend.get_lines()[0].set_linewidth(2)  # of the steps, too thin to be found
    return figures.save(figure, picture)


def _draw_steps(axes: Axes, curve: Curve, what: str) -> None:
    axes.plot(
        curve.epochs, getattr(curve, what), color=figures.MUTED, linewidth=0.5, label="a step"
    )
    middles = [row.epoch - 0.5 for row in curve.rows]
    means = [getattr(row, what).mean for row in curve.rows]
    axes.plot(middles, means, color=figures.INK, linewidth=1.8, label="mean of an epoch")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _is_papers(config: Config) -> bool:
    return paper.data_name(config) == "cifar10"


def _protocol(config: Config) -> str:
    data = paper.data_name(config)
    backbone = config.backbone.replace("resnet", "ResNet-")
    name = paper.DATA.get(data, figures.literal(data))
    ours = f"{name}, {backbone}, {config.epochs} epochs, n = {config.batch_size}"
    theirs = "\npaper, Figure 2: ResNet-50, 100 epochs, n = 128" if _is_papers(config) else ""
    return ours + theirs
