"""Draws the pictures of results files, each beside its data.

    python bench/plot.py                          # of every file in bench/results
    python bench/plot.py bench/results/cpu.csv    # of one

A picture is a grid of panels of three kinds: lines of a quantity over sizes, processes or calls;
bars of shares or ratios; points of error against time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
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
    *("gram@cusolver", "gram@magma", "syevjBatched", "XsyevBatched", "ours-triton"),
)
NOT_DRAWN = ("algorithm1+compile", "svd+compile")  # in the tables alone
Panel = tuple[Any, ...]  # a title, a function that draws into axes, its other arguments


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
    """A line for each `series` of x and y, with bars from `low` to `high` where these are known.

    x is a category. What is computed, not measured, has no markers. Of "ours" and "ours, model"
    the second is dashed, in the color of the first.
    """
    names, bases = list(data.x.unique()), list(data.series.str.split(", ").str[0].unique())
    for series, own in data.groupby("series", sort=False):
        base, *variant = series.split(", ")
        color, marker, _ = style(base, bases.index(base))
        computed = bool(own.low.isna().all())
        axes.errorbar(
            [names.index(x) for x in own.x],
            own.y,
            None if computed else [own.y - own.low, own.high - own.y],
            color=color,
            marker="" if computed else marker,
            linestyle="--" if variant else "-",
            label=series,
            linewidth=3 if series == "ours" else 1.5,
            markersize=9 if series == "ours" else 5,
        )
    turned = {"rotation": 45, "ha": "right"} if len(names) > 5 else {}
    axes.set_xticks(range(len(names)), names, **turned)
    axes.set(yscale="log", xlabel=xlabel, ylabel=ylabel)
    log_ticks(axes.yaxis)


def bars(axes: Axes, data: pd.DataFrame, xlabel: str, start: float, groups: list[str]) -> None:
    """Bars from `start` to `value`, with a `text`, for each `series` of each `group`."""
    names = list(data.series.unique())
    height = 0.84 / len(names)
    for index, series in enumerate(names):
        own = data[data.series == series].dropna(subset="value")
        y = [groups.index(group) - 0.42 + (index + 0.5) * height for group in own.group]
        color, _, hatch = style(series, index)
        drawn = axes.barh(y, own.value - start, height, left=start, color=color, label=series,
                          hatch=hatch, edgecolor="white")  # fmt: skip
        axes.bar_label(drawn, own.text, padding=2, fontsize=8)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(0, 1.8 * data.value.max())
    if start == 1:  # ratios
        axes.set_xscale("log")
        axes.set_xlim(min(0.9, 0.5 * data.value.min()), 2.5 * data.value.max())
        axes.axvline(1, color="black", linewidth=0.8)
        log_ticks(axes.xaxis)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(xlabel)


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


def save(
    path: Path,
    rows: pd.DataFrame,
    title: str,
    grid: Sequence[Sequence[Panel]],
    size: tuple[float, float] = (3.2, 3.3),
) -> Path:
    """Draws rows of panels of so many inches, which share a scale, and one legend below."""
    columns = max(map(len, grid))
    inches = (max(7.5, size[0] * columns), size[1] * len(grid) + 1.2)
    figure = Figure(inches, layout="constrained", dpi=130)  # without pyplot: no window system
    FigureCanvasAgg(figure)
    every = figure.subplots(len(grid), columns, squeeze=False, sharey="row")
    found = {}
    for row, panels in zip(every, grid, strict=True):
        for axes in row[len(panels) :]:
            axes.set_axis_off()
        for axes, (name, draw_panel, *arguments) in zip(row, panels, strict=False):
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
            draw_panel(axes, *arguments)
            axes.set_title(name, fontsize=10)
            axes.set_ylabel(axes.get_ylabel() if axes is row[0] else "")
            handles, labels = axes.get_legend_handles_labels()
            found.update(zip(labels, handles, strict=True))
    if len(found) > 1:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=5)
    first = rows.iloc[0]
    figure.suptitle(f"{title}\n{first.get('device_name')}, torch {first.get('torch')}", fontsize=11)
    figure.savefig(path)
    return path


# ---- the pictures of each kind of file ----------------------------------------------------------


def computed(rows: pd.DataFrame, series: object, y: str) -> pd.DataFrame:
    """The rows as a series that was not measured."""
    return rows.assign(series=series, y=rows[y], low=float("nan"))


def entropy(path: Path) -> list[Path]:
    """Time, ratios and errors of compare_vs_torch.py; of warm caches and of one dtype alone."""
    rows = read(path)
    dtype = "float32" if "float32" in set(rows["dtype"]) else rows["dtype"].iloc[0]
    rows = rows[(rows["dtype"] == dtype) & (rows.l2 == "hot") & ~rows.provider.isin(NOT_DRAWN)]
    rows = rows.dropna(subset="p50_ms").assign(
        series=rows.provider + rows.launch.map({"eager": "", "graph": ", CUDA graph"}),
        where="batch " + rows.batch.astype(str) + ", threads " + rows.threads.astype(str),
    )
    if rows.empty:
        return []
    panels_of_size = rows.groupby("n × d")["where"].transform("nunique")
    rows = rows[panels_of_size == panels_of_size.max()]  # of a GPU: those of every batch
    timed = rows.rename(columns={"n × d": "x", "p20_ms": "low", "p50_ms": "y", "p80_ms": "high"})
    grid = []
    for mode, of_mode in timed.groupby("mode"):
        grid.append([])
        for where, own in of_mode.groupby("where", sort=False):
            floor = own.dropna(subset="floor_ms").drop_duplicates("x")
            data = pd.concat([own, computed(floor, "floor", "floor_ms")])
            panel = (f"{mode}\n{where}", lines, data, "n × d", "median time in ms")
            grid[-1].append(panel)
    name = f"{path.stem}-time.png"
    found = [save(path.with_name(name), rows, f"Time of the entropy, {dtype}", grid)]

    mode, rows = list(rows[rows.launch == "eager"].groupby("mode"))[-1]  # the gradient's, if any
    ratios = long(gains(rows))
    if len(ratios):
        ratios = ratios.rename(columns={"n × d": "group", "provider": "series", "ratio": "value"})
        ratios["text"] = ratios.value.map("{:.3g}".format)
        panels = [
            (
                f"batch {batch}, threads {threads}",
                bars,
                own,
                "times faster",
                1,
                list(ratios.group.unique()),
            )
            for (batch, threads), own in ratios.groupby(["batch", "threads"])
        ]
        name, title = f"{path.stem}-speedup.png", f"Times faster by `ours`, {mode}, {dtype}"
        size = (3.2, 1 + 0.15 * len(ratios.drop_duplicates(["group", "series"])))
        found.append(save(path.with_name(name), rows, title, [panels], size))

    rows = rows[(rows["where"] == rows["where"].iloc[0]) & (rows.grad_rel_error > 0)]
    rows = rows.assign(x=rows.p50_ms, y=rows.grad_rel_error)
    of_size = list(rows.groupby("n × d", sort=False))
    if of_size:
        last = len(of_size) - 1
        panels = [
            (size, points, own, "median time in ms", "relative error of dS/dz")
            for size, own in (of_size[i] for i in sorted({last // 8, last // 2, last - last // 8}))
        ]
        name, title = f"{path.stem}-error.png", f"Error, {dtype}, {rows['where'].iloc[0]}"
        found.append(save(path.with_name(name), rows, title, [panels]))
    return found


def training_step(path: Path) -> list[Path]:
    """Shares of the losses in a step; below, the time of the entropies of several views."""
    rows = read(path).dropna(subset="loss_p50_ms")
    rows = rows.rename(columns={"loss_p20_ms": "low", "loss_p50_ms": "y", "loss_p80_ms": "high"})
    rows = rows.assign(
        case=[f"{i}×{i} images, batch {b}" for i, b in zip(rows.image, rows.batch, strict=True)],
        text=[f"{y:.3g} of {s:,.0f} ms" for y, s in zip(rows.y, rows.step_p50_ms, strict=True)],
        value=100 * rows.loss_share,
    )
    several = rows.loss.str.contains(" x")
    one = rows[~several].assign(group=rows.loss, series="one loss of two views")
    several = rows[several].assign(x=rows.views, series=rows.loss.str.split(" x").str[0])
    grid = [
        [(case, bars, own, "loss / step in percent", 0, list(one.loss.unique()))
         for case, own in one.groupby("case", sort=False)],
        [(case, lines, own, "views", "time of the loss in ms")
         for case, own in several.groupby("case", sort=False)],
    ]  # fmt: skip
    grid = [panels for panels in grid if panels]
    return [save(path.with_suffix(".png"), rows, "The loss in a training step", grid)]


def scaling(path: Path) -> list[Path]:
    """Time over processes: measured and by the model; below, the model for many of them."""
    rows, found = scaling_rows(path)
    rows = rows.sort_values("processes").rename(
        columns={"processes": "x", "time_p20_ms": "low", "time_p50_ms": "y", "time_p80_ms": "high"}
    )
    more = pd.DataFrame(found["predicted"]).sort_values("processes")
    more = more.assign(x=more.processes)
    rows["series"] = rows.route
    data = pd.concat([rows, computed(rows, rows.route + ", model", "model_ms")])
    labels = ("processes", "value and gradient in ms")
    grid = [
        [(f"{n} rows each, d = {d}", lines, own, *labels) for d, own in of_n.groupby("d")]
        for n, of_n in data.groupby("n")
    ]
    more = computed(more, "d = " + more.d.astype(str) + ", model", "model_ms")
    panels = [(f"not measured: {n} rows each", lines, own, *labels) for n, own in more.groupby("n")]
    title = "Difference of entropies over gloo processes"
    return [save(path.with_suffix(".png"), rows, title, [*grid, panels])]


def memory(path: Path) -> list[Path]:
    """Resident memory of a process that calls every operator, and its errors, many times."""
    rows = read(path)
    warm = rows[rows.calls > 0.2 * rows.calls.max()]  # before, allocators and caches fill up
    slope = 1e5 * np.polyfit(warm.calls, warm.rss_mib, 1)[0]

    def panel(axes: Axes) -> None:
        axes.plot(rows.calls, rows.rss_mib, color=COLORS[4])
        axes.set(xlabel="calls", ylabel="memory in MiB, mapped files aside")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(rows.rss_mib.min() - 5, rows.rss_mib.max() + 5)

    title = f"Memory of value, gradient and errors: {slope:+.2f} MiB over 100,000 calls"
    return [save(path.with_suffix(".png"), rows, title, [[("", panel)]])]


#: By a column that no other file has.
PICTURES = {
    "grad_rel_error": entropy,
    "loss_p50_ms": training_step,
    "ring_bytes": scaling,
    "rss_mib": memory,
}


def draw(path: Path) -> list[Path]:
    """Draws every picture of a results file and returns where they are."""
    columns = pd.read_csv(path, nrows=0).columns
    return [picture for name, make in PICTURES.items() if name in columns for picture in make(path)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of results files.")
    parser.add_argument("files", type=Path, nargs="*", help="CSV; default: those of bench/results")
    paths = parser.parse_args(argv).files
    try:
        for path in paths or [*RESULTS.glob("*.csv"), RESULTS / "reliability" / "memory.csv"]:
            for picture in draw(path):
                print(picture)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
