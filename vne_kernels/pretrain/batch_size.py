"""Accuracy against batch size, as in the paper's Figure 3 and Table 1a: a table and its picture."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from typing_extensions import Required  # of typing from Python 3.11 on

from vne_kernels.common import figures
from vne_kernels.common.files import write_table
from vne_kernels.common.reading import read_json
from vne_kernels.pretrain import paper
from vne_kernels.pretrain.config import LOSSES, load_config
from vne_kernels.pretrain.protocol import Accuracy
from vne_kernels.pretrain.tables import read_rows

# Okabe and Ito's colors, which readers of any color vision can tell apart.
MARKS = {  # colour, marker
    "vn-doe": ("#0072B2", "o"),
    "vn-doe-symmetric": ("#56B4E9", "D"),
    "shannon-doe": ("#E69F00", "v"),
    "simclr": ("#D55E00", "s"),
    "simsiam": ("#009E73", "^"),
    "byol": ("#CC79A7", "P"),
    "barlow": ("#000000", "X"),
    "vicreg": ("#7F7F7F", "*"),
}
Dashes = Literal["-", "--", ":", "-."]
DASHES: tuple[Dashes, ...] = ("-", "--", ":", "-.")  # most epochs first
DODGE = 0.03  # octaves between two losses, whose points would hide each other


class Training(TypedDict):
    last_epoch: dict[str, float]


class Data(TypedDict):
    train_images: int


class Results(TypedDict, total=False):
    """What is read of a run's ``results.json``."""

    training: Required[Training]
    data: Required[Data]
    evaluation: dict[str, dict[str, float]]


class Row(NamedTuple):
    """A finished run. Accuracies are 0 to 1, on the test images; nan: not measured."""

    data: str
    train_images: int
    backbone: str
    loss: str
    batch_size: int
    epochs: int
    seed: int
    linear_accuracy: float  # of linear-eval
    knn: float  # of the knn command, where it was called, else of the run's own evaluation
    online_linear: float  # these of the last epoch of training
    online_knn: float
    effective_rank: float

    @classmethod
    def of_run(cls, run: Path) -> Row:
        """Read from the files of a trained and evaluated run."""
        config = load_config(run)
        results = read_json(run / "results.json", Results)
        last = results["training"]["last_epoch"]
        neighbours = run / "knn.json"
        trained = results["evaluation"].get("trained", {}) if "evaluation" in results else {}
        return cls(
            paper.data_name(config),
            results["data"]["train_images"],
            config.backbone,
            config.loss,
            config.batch_size,
            config.epochs,
            config.seed,
            read_json(run / "linear_eval.json", Accuracy)["accuracy"],
            read_json(neighbours, Accuracy)["accuracy"]
            if neighbours.exists()
            else trained.get("knn", math.nan),
            last.get("online_linear", math.nan),
            last.get("online_knn", math.nan),
            last.get("effective_rank", math.nan),
        )


def write(rows: Iterable[Row], table: Path) -> Path:
    """Write ``table`` (.csv) and, next to it, its picture (.png); returns the picture's path."""
    write_table(table, Row._fields, sorted(rows))
    return draw(table)


def draw(table: Path) -> Path:
    """Draw the table of :func:`write`: a line through the means, every seed a point.

    Where the paper has the same images and losses its numbers stand in a panel of their own.
    """
    rows = _read(table)
    measured: Lines = defaultdict(lambda: defaultdict(list))
    for row in rows:
        measured[row.loss, row.epochs][row.batch_size].append(100 * row.linear_accuracy)
    of_paper = _paper_lines(rows)
    losses = [loss for loss in LOSSES if any(key[0] == loss for key in measured)]
    dashes = _dashes(measured, of_paper)
    panels = 2 if of_paper else 1
    figure = Figure(figsize=(6.5 if panels == 1 else 11, 4.8), layout="constrained")
    axes, *others = figure.subplots(1, panels, squeeze=False, sharex=True, sharey=True)[0]
    data = ", ".join(sorted({paper.DATA.get(row.data, figures.literal(row.data)) for row in rows}))
    backbones = ", ".join(sorted({row.backbone.replace("resnet", "ResNet-") for row in rows}))
    images = " and ".join(f"{count:,}" for count in sorted({row.train_images for row in rows}))
    axes.set_title(_title("measured", f"{data} ({images} images)", backbones, measured))
    axes.set_ylabel("linear evaluation, Top-1 accuracy (%)")
    _draw_lines(axes, measured, losses, dashes)
    for axes in others:
        title = _title("not measured here: the paper's Table 1a", data, "ResNet-50", of_paper)
        axes.set_title(title, color="0.4")
        axes.set_facecolor("0.96")
        _draw_lines(axes, of_paper, losses, dashes, muted=True)
    sizes = sorted({size for line in [*measured.values(), *of_paper.values()] for size in line})
    axes.set_xticks(sizes, labels=[str(size) for size in sizes])
    handles = _legend(losses, dashes, seeds=len({row.seed for row in rows}) > 1)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figures.save(figure, table.with_suffix(".png"))


#: (loss, epochs) -> batch size -> accuracies of the seeds, %
Lines = dict[tuple[str, int], dict[int, list[float]]]


def _paper_lines(rows: Sequence[Row]) -> Lines:
    """The paper's lines for the losses measured, at the epochs nearest to those measured."""
    if len({row.data for row in rows}) != 1:
        return {}
    losses = {row.loss for row in rows}
    nearest = {
        min(paper.EPOCHS, key=lambda epochs: abs(math.log(epochs / row.epochs))) for row in rows
    }
    return {
        (loss, epochs): {size: [accuracy] for size, accuracy in line.items()}
        for (loss, epochs), line in paper.table_1a(rows[0].data).items()
        if loss in losses and epochs in nearest
    }


def _draw_lines(
    axes: Axes,
    lines: Lines,
    losses: Sequence[str],
    dashes: Mapping[int, Dashes],
    muted: bool = False,
) -> None:
    for (loss, count), line in lines.items():
        colour, marker = MARKS[loss]
        shift = 2 ** (DODGE * (losses.index(loss) - (len(losses) - 1) / 2))
        sizes = sorted(line)
        at = [size * shift for size in sizes]
        axes.plot(
            at,
            [sum(line[size]) / len(line[size]) for size in sizes],
            color=colour,
            linestyle=dashes.get(count, "-"),
            linewidth=1.2 if muted else 1.8,
            alpha=0.5 if muted else 1,
            marker=marker,
            markersize=5,
            markerfacecolor="none" if muted else colour,
        )
        for x, size in zip(at, sizes, strict=True):
            if len(line[size]) > 1:
                seeds = [x] * len(line[size])
                axes.scatter(seeds, line[size], s=14, color=colour, alpha=0.45, linewidths=0)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch size (images)")
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _epochs(lines: Lines) -> list[int]:
    return sorted({epochs for _, epochs in lines}, reverse=True)


def _dashes(*panels: Lines) -> dict[int, Dashes]:
    """A line style for each number of epochs; none where the titles alone tell them."""
    if all(len(_epochs(lines)) <= 1 for lines in panels):
        return {}
    different = dict.fromkeys(epochs for lines in panels for epochs in _epochs(lines))
    return dict(zip(different, itertools.cycle(DASHES), strict=False))


def _title(what: str, data: str, backbones: str, lines: Lines) -> str:
    epochs = _epochs(lines)
    only = f", {epochs[0]} epochs" if len(epochs) == 1 else ""
    return f"{what}\n{data}, {backbones}{only}"


def _legend(losses: Sequence[str], dashes: Mapping[int, Dashes], seeds: bool) -> list[Line2D]:
    handles = []
    for loss in losses:
        colour, marker = MARKS[loss]
        handles.append(
            Line2D([], [], color=colour, marker=marker, markersize=5, label=LOSSES[loss])
        )
    for epochs, style in dashes.items():
        handles.append(Line2D([], [], color="0.3", linestyle=style, label=f"{epochs} epochs"))
    if seeds:
        point = Line2D([], [], color="0.65", linestyle="", marker="o", markersize=4, label="a seed")
        handles.append(point)
    return handles


def _read(table: Path) -> list[Row]:
    kinds = (str, int, str, str, int, int, int, float, float, float, float, float)
    _, rows = read_rows(table)
    return [Row(*(kind(x) for kind, x in zip(kinds, row, strict=True))) for row in rows]
