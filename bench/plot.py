"""Draws the pictures of results files, next to their data.

    python bench/plot.py                          # of every file in bench/results
    python bench/plot.py bench/results/cpu.csv    # of one

A picture is a grid of panels of three kinds: lines of a quantity over sizes, processes or views;
bars of shares or ratios; points of error against time.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from tables import RESULTS, gains, long, read, scaling_rows

#: Okabe and Ito's palette, which readers of any color vision can tell apart, but for its yellow.
COLORS = ("#999999", "#E69F00", "#000000", "#CC79A7", "#0072B2", "#D55E00", "#009E73", "#56B4E9")
MARKERS = "v^sD*oPX<>hdp"
#: Series that have the same color, marker and hatch in every picture; others go by their place.
SERIES = (
    *("algorithm1", "svd", "gram", "gram+compile", "ours", "ours-eigh", "ours-poles", "floor"),
    *("syevjBatched", "XsyevBatched"),
)
NOT_DRAWN = ("algorithm1+compile", "svd+compile")  # in the tables alone
Panel = tuple[Any, ...]  # a title, a function that draws into axes, its other arguments
#: The end of the file's name, a title, rows of panels, and their height if it varies.
Picture = tuple[Any, ...]


# ---- three kinds of panels ----------------------------------------------------------------------


def log_ticks(axis: Axis) -> None:
    """Plain numbers at 1, 2, 5 of each decade, or at the decades alone where there are many."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def style(series: str, place: int) -> tuple[str, str, str]:
    """Color, marker and hatch of a series."""
    index = SERIES.index(series) if series in SERIES else place
    return COLORS[index % 8], MARKERS[index % 13], "////" if index >= 8 else ""


def lines(axes: Axes, data: pd.DataFrame, xlabel: str, ylabel: str) -> None:
    """A line for each `series` of y over the categories x, with bars from `low` to `high`.

    What is computed, not measured, has no bars and no markers. Of "ours" and "ours, model" the
    second is dashed, in the color of the first.
    """
    names, bases = list(data.x.unique()), list(data.series.str.split(", ").str[0].unique())
    for series, own in data.groupby("series", sort=False):
        base, *variant = series.split(", ")
        color, marker, _ = style(base, bases.index(base))
        x, measured = [names.index(x) for x in own.x], bool(own.low.notna().any())
        spread = [own.y - own.low, own.high - own.y] if measured else None
        marker, dashes = marker if measured else "", "--" if variant else "-"
        width, size = (3, 9) if series == "ours" else (1.5, 5)
        axes.errorbar(x, own.y, spread, color=color, marker=marker, linestyle=dashes, label=series,
                      linewidth=width, markersize=size)  # fmt: skip
    turned = {"rotation": 45, "ha": "right"} if len(names) > 5 else {}
    axes.set_xticks(range(len(names)), names, **turned)
    axes.set(yscale="log", xlabel=xlabel, ylabel=ylabel)
    log_ticks(axes.yaxis)


def bars(axes: Axes, data: pd.DataFrame, xlabel: str, start: float) -> None:
    """Bars from `start` to `value`, with a `text`, for each `series` of each `group`."""
    groups, names = data.group.cat.categories, list(data.series.unique())
    height = 0.84 / len(names)
    for index, series in enumerate(names):
        own = data[data.series == series].dropna(subset="value")
        y = own.group.cat.codes - 0.42 + (index + 0.5) * height
        color, _, hatch = style(series, index)
        drawn = axes.barh(y, own.value - start, height, left=start, color=color, label=series,
                          hatch=hatch, edgecolor="white")  # fmt: skip
        axes.bar_label(drawn, own.text, padding=2, fontsize=8)
    axes.set_yticks(range(len(groups)), groups)
    axes.set(ylim=(len(groups) - 0.5, -0.5), xlim=(0, 1.8 * data.value.max()), xlabel=xlabel)
    if start == 1:  # ratios
        limits = (min(0.9, 0.5 * data.value.min()), 2.5 * data.value.max())
        axes.set(xscale="log", xlim=limits)
        axes.axvline(1, color="black", linewidth=0.8)
        log_ticks(axes.xaxis)
    axes.grid(visible=False, axis="y")


def points(axes: Axes, data: pd.DataFrame, xlabel: str, ylabel: str) -> None:
    """A point for each `series` at x and y."""
    for index, row in enumerate(data.itertuples()):
        color, marker, _ = style(row.series, index)
        size = 15 if row.series == "ours" else 7
        axes.plot(row.x, row.y, marker, color=color, markersize=size, label=row.series)
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.margins(0.15)
    log_ticks(axes.xaxis)
    log_ticks(axes.yaxis)


def panels(data: pd.DataFrame, by: list[str], title: str, draw: Any, *labels: Any) -> list[Panel]:
    """A panel for each group of the rows; its title is filled in with the group's values."""
    groups = data.groupby(by, sort=False)
    return [(title.format(*values), draw, own, *labels) for values, own in groups]


def save(path: Path, title: str, grid: Sequence[Sequence[Panel]], inches: float = 3.3) -> None:
    """Draws rows of panels, so many inches high, which share a scale, and one legend below."""
    columns = max(map(len, grid))
    size = (max(7.5, 3.2 * columns), inches * len(grid) + 1.2)
    figure = Figure(size, layout="constrained", dpi=130)  # without pyplot: no window system
    FigureCanvasAgg(figure)
    every = figure.subplots(len(grid), columns, squeeze=False, sharey="row")
    found = {}
    for row, of_row in zip(every, grid, strict=True):
        for axes in row[len(of_row) :]:
            axes.set_axis_off()
        for axes, (name, draw, *arguments) in zip(row, of_row, strict=False):
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
            draw(axes, *arguments)
            axes.set_title(name, fontsize=10)
            axes.set_ylabel(axes.get_ylabel() if axes is row[0] else "")
            handles, labels = axes.get_legend_handles_labels()
            found.update(zip(labels, handles, strict=True))
    if len(found) > 1:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=5)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


# ---- the pictures of each kind of file ----------------------------------------------------------


def quantiles(rows: pd.DataFrame, x: str, prefix: str = "") -> pd.DataFrame:
    """The rows with what `lines` draws of a measured time."""
    names = {f"{prefix}p20_ms": "low", f"{prefix}p50_ms": "y", f"{prefix}p80_ms": "high"}
    return rows.assign(x=rows[x]).rename(columns=names)


def computed(rows: pd.DataFrame, series: object, y: str) -> pd.DataFrame:
    """The rows as a series that was not measured."""
    return rows.assign(series=series, y=rows[y], low=math.nan)


def in_order(names: pd.Series) -> pd.Categorical:
    return pd.Categorical(names, names.unique())


def entropy(rows: pd.DataFrame, _: Path) -> Iterator[Picture]:
    """Time, ratios and errors of compare_vs_torch.py; of warm caches and of one dtype alone."""
    dtype = "float32" if "float32" in set(rows["dtype"]) else rows["dtype"].iloc[0]
    rows = rows[(rows["dtype"] == dtype) & (rows.l2 == "hot") & ~rows.provider.isin(NOT_DRAWN)]
    rows = rows.dropna(subset="p50_ms").assign(
        series=rows.provider + rows.launch.map({"eager": "", "graph": ", CUDA graph"}),
        where="batch " + rows.batch.astype(str) + ", threads " + rows.threads.astype(str),
    )
    if rows.empty:
        return
    panels_of_size = rows.groupby("n × d")["where"].transform("nunique")
    rows = rows[panels_of_size == panels_of_size.max()]  # of a GPU: those of every batch
    timed = quantiles(rows, "n × d")
    floor = timed.dropna(subset="floor_ms").drop_duplicates(["mode", "where", "x"])
    timed = pd.concat([timed, computed(floor, "floor", "floor_ms")])
    labels = ("n × d", "median time in ms")
    grid = [
        panels(own, ["mode", "where"], "{}\n{}", lines, *labels) for _, own in timed.groupby("mode")
    ]
    yield "-time", f"Time of the entropy, {dtype}", grid

    mode, rows = list(rows[rows.launch == "eager"].groupby("mode"))[-1]  # the gradient's, if any
    ratios = long(gains(rows)).rename(columns={"provider": "series", "ratio": "value"})
    if len(ratios):
        ratios["text"] = ratios.value.map("{:.3g}".format)
        ratios["group"] = in_order(ratios["n × d"])
        title = "batch {}, threads {}"
        grid = [panels(ratios, ["batch", "threads"], title, bars, "times faster", 1)]
        inches = 1 + 0.15 * len(ratios.drop_duplicates(["group", "series"]))
        yield "-speedup", f"Times faster by `ours`, {mode}, {dtype}", grid, inches

    rows = rows[(rows["where"] == rows["where"].iloc[0]) & (rows.grad_rel_error > 0)]
    rows = rows.assign(x=rows.p50_ms, y=rows.grad_rel_error)
    labels = ("median time in ms", "relative error of dS/dz")
    of_size = panels(rows, ["n × d"], "{}", points, *labels)
    if of_size:
        last = len(of_size) - 1
        chosen = [of_size[i] for i in sorted({last // 8, last // 2, last - last // 8})]
        yield "-error", f"Error, {dtype}, {rows['where'].iloc[0]}", [chosen]


def training_step(rows: pd.DataFrame, _: Path) -> Iterator[Picture]:
    """Shares of the losses in a step; below, the time of the entropies of several views."""
    rows = quantiles(rows, "views", "loss_").dropna(subset="y")
    rows = rows.assign(
        text=[f"{y:.3g} of {s:,.0f} ms" for y, s in zip(rows.y, rows.step_p50_ms, strict=True)],
        value=100 * rows.loss_share,
    )
    several = rows.loss.str.contains(" x")
    one = rows[~several].assign(group=in_order(rows.loss[~several]), series="one loss of two views")
    several = rows[several].assign(series=rows.loss.str.split(" x").str[0])
    case, title = ["image", "batch"], "{0}×{0} images, batch {1}"
    grid = [
        panels(one, case, title, bars, "loss / step in percent", 0),
        panels(several, case, title, lines, "views", "time of the loss in ms"),
    ]
    yield "", "The loss in a training step", [of_row for of_row in grid if of_row]


def scaling(_: pd.DataFrame, path: Path) -> Iterator[Picture]:
    """Time over processes: measured and by the model; below, the model for many of them."""
    rows, found = scaling_rows(path)
    rows = quantiles(rows.sort_values(["processes", "n", "d"]), "processes", "time_")
    rows["series"] = rows.route
    data = pd.concat([rows, computed(rows, rows.route + ", model", "model_ms")])
    more = pd.DataFrame(found["predicted"]).sort_values(["processes", "n", "d"])
    names = "d = " + more.d.astype(str) + ", model"
    more = computed(more.assign(x=more.processes), names, "model_ms")
    labels = ("processes", "value and gradient in ms")
    grid = [
        panels(own, ["n", "d"], "{} rows each, d = {}", lines, *labels)
        for _, own in data.groupby("n")
    ]
    grid.append(panels(more, ["n"], "not measured: {} rows each", lines, *labels))
    yield "", "Difference of entropies over gloo processes", grid


def memory(rows: pd.DataFrame, _: Path) -> Iterator[Picture]:
    """Resident memory of a process that calls every operator, and its errors, many times."""
    warm = rows[rows.calls > 0.2 * rows.calls.max()]  # before, allocators and caches fill up
    slope = 1e5 * np.polyfit(warm.calls, warm.rss_mib, 1)[0]

    def panel(axes: Axes) -> None:
        axes.plot(rows.calls, rows.rss_mib, color=COLORS[4])
        axes.set(xlabel="calls", ylabel="memory in MiB, mapped files aside")
        axes.set(ylim=(rows.rss_mib.min() - 5, rows.rss_mib.max() + 5))
        axes.xaxis.set_major_formatter("{x:,.0f}")

    title = f"Memory of value, gradient and errors: {slope:+.2f} MiB over 100,000 calls"
    yield "", title, [[("", panel)]]


#: By a column that no other file has.
PICTURES = {
    "grad_rel_error": entropy,
    "loss_p50_ms": training_step,
    "ring_bytes": scaling,
    "rss_mib": memory,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of results files.")
    parser.add_argument("files", type=Path, nargs="*", help="CSV; default: those of bench/results")
    paths = parser.parse_args(argv).files
    for path in paths or [*RESULTS.glob("*.csv"), RESULTS / "reliability" / "memory.csv"]:
        rows = read(path)
        for pictures in (PICTURES[column] for column in PICTURES if column in rows):
            for suffix, title, *grid in pictures(rows, path):
                picture = path.with_name(f"{path.stem}{suffix}.png")
                source = f"{rows.device_name.iloc[0]}, torch {rows.torch.iloc[0]}"
                save(picture, f"{title}\n{source}", *grid)
                print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
