"""Every picture of the README and of a results file, drawn from the data in `results` alone.

    python bench/plot.py                          # of every file in bench/results
    python bench/plot.py bench/results/cpu.csv    # of one

Beside `<name>.csv` of compare_vs_torch.py it writes `<name>-time.png`, `<name>-speedup.png`,
`<name>-error.png`, for a GPU also `<name>-time-cold.png` and `<name>-shapes.png`; beside that of
training_step.py and of scaling.py, and beside reliability/memory.csv, `<name>.png`. The folder of a
vne-pretrain run is drawn as that program does it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rows as results
import scaling
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Annotation, Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from rows import BEST_VENDOR, LABELS, Row, number, timed, unique, where

from vne_kernels.common.files import replacing
from vne_kernels.pretrain import plots as pretrain_plots

RESULTS = Path(__file__).resolve().parent / "results"

# Okabe and Ito's colours, told apart by readers of any colour vision. Ours are drawn heavier; a
# hollow marker is a variant of the filled one of its colour.
BLACK, GREY, ORANGE, SKY, GREEN = "#000000", "#999999", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
STYLES = {  # colour, marker, filled, width
    "algorithm1": (GREY, "v", True, 1.1),
    "svd": (ORANGE, "^", True, 1.1),
    "gram": (BLACK, "s", True, 1.1),
    "gram+compile": (BLACK, "s", False, 1.1),
    "gram@cusolver": (SKY, "D", True, 1.1),
    "gram@magma": (SKY, "D", False, 1.1),
    "syevjBatched": (PURPLE, ">", True, 1.1),
    "XsyevBatched": (PURPLE, ">", False, 1.1),
    "ours": (BLUE, "*", True, 3.2),
    "ours-eigh": (VERMILION, "o", True, 1.8),
    "ours-poles": (GREEN, "o", True, 1.8),
    "ours-triton": (GREEN, "o", False, 1.8),
}
OTHER = (GREY, "x", True, 1.1)
# In the CSV alone: a picture has no room for every line.
NOT_DRAWN = ("algorithm1+compile", "svd+compile")
BASELINES = {"algorithm1": GREY, "svd": ORANGE, "gram": BLACK, BEST_VENDOR: PURPLE}

DPI = 130
FONT = 8.5
ERROR_SIZE = (128, 512)  # of the README; the error is drawn for it and for its neighbours
NOTE_LENGTH = 60
# Of a name from its point, in points: the near ones first.
OFFSETS = tuple(
    (dx * r, dy * r)
    for r in (8, 13, 19, 26, 34, 44, 56, 70, 86)
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
)
SCALING = "scaling.csv"
RUN = "seed0.json"  # of the run whose tables are there


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def _figure(
    rows: int, columns: int, width: float, height: float
) -> tuple[Figure, list[list[Axes]]]:
    """Of so many panels of that many inches; without pyplot: no window system, no global state."""
    figure = Figure(
        figsize=(max(7.5, width * columns), height * rows + 1.2), layout="constrained", dpi=DPI
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=FONT)
    return figure, [list(line) for line in grid]


def source(path: Path) -> str:
    """What a picture keeps of its data, so that one can see whether it is still theirs."""
    return f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _save(figure: Figure, path: Path, data: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI, metadata={"Source": source(data)})
    return path


def _title(figure: Figure, rows: Sequence[Row], what: str) -> None:
    figure.suptitle(f"{what}\n{results.machine(rows)}", fontsize=FONT + 2)


def _plural(count: str, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != '1')}"


def _where(row: Row, batch: str, threads: str) -> str:
    """Threads say nothing about a GPU."""
    on_gpu = row["device"] == "cuda"
    return f"batch {batch}" if on_gpu else f"batch {batch}, {_plural(threads, 'thread')}"


def _log_ticks(axis: Axis) -> None:
    """Plain numbers at 1, 2, 5 of each decade, or at the decades where there are many."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _legend(
    figure: Figure, panels: Iterable[Axes], extra: Sequence[Line2D], small_print: str
) -> None:
    """One for all panels, in the order of LABELS: a provider may be in some of them only."""
    found: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    order = list(LABELS.values())
    labels = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    handles = [*(found[label] for label in labels), *extra]
    labels += [str(handle.get_label()) for handle in extra]
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, fontsize=FONT + 1,
        title=small_print or None, title_fontsize=FONT - 1,
    )  # fmt: skip


def _absent(rows: Sequence[Row]) -> str:
    """Which providers have no time at all, and why not."""
    with_time = {row["provider"] for row in timed(rows)}
    notes: dict[str, str] = {}
    for row in rows:
        if row["provider"] not in with_time:
            notes[row["provider"]] = notes.get(row["provider"]) or row.get("note", "")
    named = [
        LABELS.get(name, name) + (f" ({note[:NOTE_LENGTH]})" if note else "")
        for name, note in notes.items()
    ]
    return f"No time at all: {'; '.join(named)}" if named else ""


# ---------------------------------------------------------------------------------------------
# Time against size
# ---------------------------------------------------------------------------------------------


def _positions(rows: Sequence[Row]) -> dict[tuple[int, int, int], float]:
    """Where each size stands: at m if that tells the sizes apart, else one beside the other."""
    sizes = sorted({results.size(row) for row in rows})
    if rows[0]["device"] == "cuda" and len({m for m, _, _ in sizes}) == len(sizes):
        return {size: float(size[0]) for size in sizes}
    return {size: float(index) for index, size in enumerate(sizes)}


def _size_axis(axes: Axes, at: dict[tuple[int, int, int], float]) -> None:
    if all(m == x for (m, _, _), x in at.items()):
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(at.values()), [str(m) for m, _, _ in at])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("m = min(n, d)", fontsize=FONT)
    else:
        labels = [f"{n}×{d}" for _, n, d in at]
        axes.set_xticks(list(at.values()), labels, rotation=45, ha="right")
        axes.set_xlabel("n×d, ordered by m = min(n, d)", fontsize=FONT)


def _line(axes: Axes, rows: Sequence[Row], at: dict[tuple[int, int, int], float]) -> None:
    """One provider, eager or replayed: the median, and p20 to p80 as a band."""
    name, graph = rows[0]["provider"], rows[0]["launch"] == "graph"
    colour, marker, filled, width = STYLES.get(name, OTHER)
    rows = sorted(rows, key=results.size)
    x = [at[results.size(row)] for row in rows]
    low, middle, high = ([number(row, f"p{q}_ms") for row in rows] for q in (20, 50, 80))
    axes.plot(
        x, middle, color=colour, marker=marker, markersize=4, linewidth=width,
        linestyle=":" if graph else "-", markerfacecolor=colour if filled else "white",
        label="_graph" if graph else LABELS.get(name, name),
    )  # fmt: skip
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _floor(axes: Axes, rows: Sequence[Row], at: dict[tuple[int, int, int], float]) -> None:
    """What no version of the poles can beat on this device: the same for all providers."""
    floors = {at[results.size(r)]: number(r, "floor_ms") for r in timed(rows, "floor_ms")}
    if floors:
        axes.plot(
            sorted(floors), [floors[x] for x in sorted(floors)], color=BLACK, linestyle="--",
            linewidth=1.0, label="floor of the poles on this device",
        )  # fmt: skip


def _time_panel(axes: Axes, rows: Sequence[Row]) -> None:
    at = _positions(rows)
    for name, launch in unique(timed(rows), "provider", "launch"):
        if name not in NOT_DRAWN:
            _line(axes, timed(where(rows, provider=name, launch=launch)), at)
    _floor(axes, rows, at)
    _size_axis(axes, at)
    axes.set_yscale("log")
    _log_ticks(axes.yaxis)


def _same_height(line: Sequence[Axes]) -> None:
    """Panels beside each other share their scale; the first has its numbers."""
    low, high = (f(axes.get_ylim()[i] for axes in line) for i, f in enumerate((min, max)))
    for i, axes in enumerate(line):
        axes.set_ylim(low, high)
        axes.tick_params(labelleft=i == 0)


def _time_figure(
    rows: Sequence[Row], panels: Sequence[Sequence[tuple[str, Sequence[Row]]]]
) -> Figure:
    """Lines of titled panels."""
    figure, grid = _figure(len(panels), max(map(len, panels)), 3.0, 3.1)
    for line, contents in zip(grid, panels, strict=True):
        for axes, (title, own) in zip(line, contents, strict=False):
            axes.set_title(title, fontsize=FONT + 1)
            _time_panel(axes, own)
        for axes in line[len(contents) :]:
            axes.set_axis_off()
        _same_height(line[: len(contents)])
        line[0].set_ylabel("median time in ms\n(lower is better)", fontsize=FONT + 1)
    used = [axes for line in grid for axes in line]
    extra = []
    if timed(where(rows, launch="graph")):
        extra = [
            Line2D([], [], color=BLACK, linestyle="-", label="called from Python"),
            Line2D([], [], color=BLACK, linestyle=":", label="replayed as a CUDA graph"),
        ]
    _legend(figure, used, extra, _absent(rows))
    return figure


def time(rows: Sequence[Row], l2: str) -> Figure | None:
    """Median time against size, a panel for each mode and batch; None without such a time."""
    rows = where(results.main_family(rows), l2=l2, dtype=results.main_dtype(rows))
    if not timed(rows):
        return None
    modes = [mode for (mode,) in unique(timed(rows), "mode")]
    panels = [
        [
            (f"{mode}\n{_where(rows[0], batch, threads)}", own)
            for batch, threads in results.panels(timed(where(rows, mode=mode)))
            if timed(own := where(rows, mode=mode, batch=batch, threads=threads))
        ]
        for mode in modes
    ]
    figure = _time_figure(rows, panels)
    caches = ", cold L2" if l2 == "cold" else ""
    _title(
        figure, rows, f"Time of the von Neumann entropy, {rows[0]['dtype']}{caches}{_shape(rows)}"
    )
    return figure


def _shape(rows: Sequence[Row]) -> str:
    """Of a GPU's picture: the shape that its sizes have in common."""
    ratios = {int(row["d"]) / int(row["n"]) for row in rows}
    if rows[0]["device"] != "cuda" or len(ratios) > 1:
        return ""
    return f", {_family(ratios.pop())}"


def _family(ratio: float) -> str:
    if ratio == 1:
        return "n = d"
    return f"d = {ratio:g} n" if ratio > 1 else f"n = {1 / ratio:g} d"


def _kinds(rows: Sequence[Row]) -> list[tuple[float, str]]:
    """(d / n, dtype) of a GPU's file."""
    return list(dict.fromkeys((int(r["d"]) / int(r["n"]), r["dtype"]) for r in timed(rows)))


def shapes(rows: Sequence[Row]) -> Figure:
    """What the picture of the time leaves out: a panel for each family of shapes and dtype."""
    mode = results.main_mode(timed(rows))
    batch, threads = results.panels(timed(rows))[0]
    rows = where(rows, l2="hot", mode=mode, batch=batch, threads=threads)
    kinds = _kinds(rows)
    panels = [
        [
            (f"{_family(ratio)}, {dtype}", own)
            for ratio in sorted({r for r, _ in kinds}, reverse=True)
            if timed(
                own := [r for r in where(rows, dtype=dtype) if int(r["d"]) / int(r["n"]) == ratio]
            )
        ]
        for dtype in dict.fromkeys(dtype for _, dtype in kinds)
    ]
    figure = _time_figure(rows, panels)
    _title(figure, rows, f"Shapes and dtypes: {mode}, {_where(rows[0], batch, threads)}")
    return figure


# ---------------------------------------------------------------------------------------------
# Ratios
# ---------------------------------------------------------------------------------------------


def _bars(axes: Axes, rows: Sequence[Row], baselines: Sequence[str]) -> None:
    """Groups of horizontal bars from 1: to the right ours is faster, to the left slower."""
    sizes = sorted({results.size(row) for row in rows})
    height = 0.84 / len(baselines)
    for i, baseline in enumerate(baselines):
        gains = [
            results.gain([row for row in rows if results.size(row) == size], baseline)
            for size in sizes
        ]
        y = [index - 0.42 + (i + 0.5) * height for index in range(len(sizes))]
        known = [(a, g) for a, g in zip(y, gains, strict=True) if math.isfinite(g)]
        bars = axes.barh(
            [a for a, _ in known], [g - 1 for _, g in known], height * 0.94, left=1.0,
            color=[BASELINES[baseline] if g >= 1 else VERMILION for _, g in known],
            label=LABELS[baseline],
        )  # fmt: skip
        _label_bars(axes, bars, [g for _, g in known])
    axes.axvline(1, color=BLACK, linewidth=0.8)
    axes.set_yticks(range(len(sizes)), [f"{n}×{d}" for _, n, d in sizes])
    axes.set_ylim(len(sizes) - 0.5, -0.5)


def _label_bars(axes: Axes, bars: BarContainer, gains: Sequence[float]) -> None:
    for bar, gain in zip(bars, gains, strict=True):
        slower = gain < 1
        bar.set_hatch("////" if slower else "")
        bar.set_edgecolor("white" if slower else "none")
        axes.annotate(
            results.ratio(gain), (gain, bar.get_y() + bar.get_height() / 2),
            (-2 if slower else 2, 0), textcoords="offset points", fontsize=FONT,
            ha="right" if slower else "left", va="center",
            color=VERMILION if slower else BLACK,
        )  # fmt: skip


def speedup(rows: Sequence[Row]) -> Figure | None:
    """How many times faster ours is than each baseline, called from Python alike.

    None if the file has no two to compare.
    """
    mode = results.main_mode(timed(rows))
    rows = timed(where(results.plain(results.main_family(rows)), mode=mode))
    keys = results.panels(where(rows, provider=results.OURS))
    panels = [where(rows, batch=batch, threads=threads) for batch, threads in keys]
    baselines = [b for b in BASELINES if any(b in results.by_provider(own) for own in panels)]
    if not baselines:
        return None
    sizes = len({results.size(row) for row in rows})
    figure, grid = _figure(1, len(keys), 3.0, 0.8 + 0.17 * sizes * (len(baselines) + 0.6))
    for i, (axes, own, key) in enumerate(zip(grid[0], panels, keys, strict=True)):
        _bars(axes, own, baselines)
        axes.set_title(_where(rows[0], *key), fontsize=FONT + 1)
        axes.set_xlabel("times faster (log scale)", fontsize=FONT)
        axes.tick_params(labelleft=i == 0)
        axes.grid(False, axis="y")
    _ratio_axes(grid[0])
    grid[0][0].set_ylabel("n×d", fontsize=FONT + 1)
    handles: list[Line2D | Patch] = [Patch(color=BASELINES[b], label=LABELS[b]) for b in baselines]
    if any(results.gain(c, b) < 1 for own in panels for c in _cases(own) for b in baselines):
        handles.append(Patch(facecolor=VERMILION, edgecolor="white", hatch="////", label="slower"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=FONT + 1)
    _title(figure, rows, f"vne_kernels: times faster, {mode}, {rows[0]['dtype']}")
    return figure


def _cases(rows: Sequence[Row]) -> list[list[Row]]:
    return [where(rows, n=n, d=d) for n, d in unique(rows, "n", "d")]


def _ratio_axes(line: Sequence[Axes]) -> None:
    """One scale for all panels, with room for the numbers at both ends."""
    bars = [bar for axes in line for bar in axes.patches if isinstance(bar, Rectangle)]
    ends = [bar.get_x() + bar.get_width() for bar in bars]
    low, high = min(0.95, *ends), max(2.0, *ends)
    room = (high / low) ** 0.2
    low, high = low / (room if low < 0.95 else 1), high * room
    every = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
    ticks = [t for t in (every if high < 300 * low else every[::3]) if low <= t <= high]
    for axes in line:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.xaxis.set_minor_locator(NullLocator())


# ---------------------------------------------------------------------------------------------
# Error against time
# ---------------------------------------------------------------------------------------------


def _error_sizes(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """ERROR_SIZE, or the middle one, and its neighbours of the same shape (or of any)."""
    sizes = [(n, d) for _, n, d in sorted({results.size(row) for row in rows})]
    centre = ERROR_SIZE if ERROR_SIZE in sizes else sizes[len(sizes) // 2]
    alike = [s for s in sizes if s[0] * centre[1] == s[1] * centre[0]]
    chosen = alike if len(alike) >= 3 else sizes
    first = max(0, min(chosen.index(centre) - 1, len(chosen) - 3))
    return [(str(n), str(d)) for n, d in chosen[first : first + 3]]


def _error_panel(axes: Axes, rows: Sequence[Row]) -> None:
    """A point for each provider; a dotted line leads to the same, replayed as a graph."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    replayed = {row["provider"]: row for row in where(rows, launch="graph")}
    for row in where(rows, launch="eager"):
        name = row["provider"]
        x, y = number(row, "p50_ms"), number(row, "grad_rel_error")
        colour, marker, filled, width = STYLES.get(name, OTHER)
        face = colour if filled else "white"
        own = width > OTHER[3]
        axes.plot(
            [x], [y], marker=marker, color=colour, markerfacecolor=face, linestyle="none",
            markersize=15 if marker == "*" else 8 if own else 6, label=LABELS.get(name, name),
            zorder=2 if marker == "*" else 3,
        )  # fmt: skip
        if name in replayed:
            x2 = number(replayed[name], "p50_ms")
            axes.plot([x, x2], [y, y], color=colour, linestyle=":", marker="|", label="_graph")
    axes.margins(0.25, 0.2)
    for axis in (axes.xaxis, axes.yaxis):
        _log_ticks(axis)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-"))
    axes.set_xlabel("median time in ms", fontsize=FONT)


def error(rows: Sequence[Row]) -> Figure | None:
    """Who is both fast and accurate; None if no gradient is in the file."""
    rows = where(results.main_family(rows), l2="hot", dtype=results.main_dtype(rows))
    rows = [r for r in timed(timed(rows), "grad_rel_error") if r["provider"] not in NOT_DRAWN]
    rows = [r for r in rows if number(r, "grad_rel_error") > 0]
    if not rows:
        return None
    batch, threads = results.panels(rows)[0]
    rows = where(rows, batch=batch, threads=threads)
    sizes = _error_sizes(rows)
    figure, grid = _figure(1, len(sizes), 3.7, 3.7)
    for axes, (n, d) in zip(grid[0], sizes, strict=True):
        _error_panel(axes, where(rows, n=n, d=d))
        axes.set_title(f"n×d = {n}×{d}", fontsize=FONT + 1)
    _same_height(grid[0])
    grid[0][0].set_ylabel("relative error of dS/dz\nagainst float64", fontsize=FONT + 1)
    what = f"{rows[0]['dtype']}, {_where(rows[0], batch, threads)}"
    if where(rows, launch="graph"):
        what += "; dotted: replayed as a CUDA graph"
    _title(figure, rows, f"Error against time, bottom left is best\nvalue and gradient, {what}")
    for axes in grid[0]:
        _name_points(figure, axes)
    return figure


def _inside(box: Bbox, frame: Bbox) -> bool:
    return bool(
        frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    )


def _position(point: Line2D) -> tuple[float, float]:
    x, y = np.asarray(point.get_xydata(), dtype=float)[0]
    return float(x), float(y)


def _name_at(axes: Axes, point: Line2D, dx: float, dy: float) -> Annotation:
    """The name of a point at an offset from it, with a thin line where that is far."""
    line = {
        "arrowstyle": "-",
        "linewidth": 0.5,
        "color": GREY,
        "shrinkA": 0,
        "relpos": ((1 - np.sign(dx)) / 2, (1 - np.sign(dy)) / 2),  # of the name: its near corner
    }
    return axes.annotate(
        str(point.get_label()), _position(point), (dx, dy),
        textcoords="offset points", fontsize=FONT,
        ha="left" if dx > 0 else "right" if dx < 0 else "center",
        va="bottom" if dy > 0 else "top" if dy < 0 else "center",
        arrowprops=line if abs(dx) + abs(dy) > 16 else None,
    )  # fmt: skip


def _name_points(figure: Figure, axes: Axes) -> None:
    """The name beside each point, where it hides neither a point nor another name."""
    figure.draw_without_rendering()  # the layout decides where the points are
    assert isinstance(figure.canvas, FigureCanvasAgg)
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer).padded(-4)
    points = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    centres = [axes.transData.transform(_position(point)) for point in points]
    half = 5 * figure.dpi / 72  # of a marker
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in centres]
    for point in points:
        for dx, dy in OFFSETS:
            name = _name_at(axes, point, dx, dy)
            name.update_positions(renderer)
            box = Text.get_window_extent(name, renderer)  # an Annotation's own takes in its line
            if (dx, dy) == OFFSETS[-1] or (
                _inside(box, frame) and not any(box.overlaps(other) for other in taken)
            ):
                taken.append(box)
                break
            name.remove()


# ---------------------------------------------------------------------------------------------
# The loss in a training step
# ---------------------------------------------------------------------------------------------


def _case_title(image: str, batch: str) -> str:
    return f"{image}×{image} images, batch {batch}"


def _loss_label(row: Row) -> str:
    return results.TRAINING_LABELS.get(row["loss"], row["loss"])


def _share_panel(axes: Axes, rows: Sequence[Row]) -> None:
    """A bar for each loss of two views: its share of the step; its time beside it."""
    shares = [100 * number(row, "loss_share") for row in rows]
    colours = [BLUE if row["loss"] == results.OURS else GREY for row in rows]
    bars = axes.barh(range(len(rows)), shares, 0.7, color=colours)
    for bar, row in zip(bars, rows, strict=True):
        loss, step = (results.figures(number(row, f"{what}_p50_ms")) for what in ("loss", "step"))
        axes.annotate(
            f"{loss} of {step} ms",
            (bar.get_width(), bar.get_y() + bar.get_height() / 2), (3, 0),
            textcoords="offset points", fontsize=FONT, va="center",
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [_loss_label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.8 * max(shares))  # room for the times
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(False, axis="y")
    axes.set_xlabel("share of the step in percent", fontsize=FONT)


def _views_panel(axes: Axes, rows: Sequence[Row]) -> None:
    """Time against the number of views: a call for each view, and ours for all at once."""
    for loss, label, colour, marker in (
        ("get_vne", "get_vne, a call for each view", ORANGE, "^"),
        ("ours", "vne_kernels, one call for all", BLUE, "o"),
    ):
        own = [row for row in rows if row["loss"].startswith(f"{loss} x")]
        own = sorted(own, key=lambda row: int(row["views"]))
        x = [int(row["views"]) for row in own]
        low, middle, high = ([number(row, f"loss_p{q}_ms") for row in own] for q in (20, 50, 80))
        axes.plot(x, middle, color=colour, marker=marker, markersize=5, label=label)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(views := sorted({int(r["views"]) for r in rows}), [str(v) for v in views])
    axes.xaxis.set_minor_locator(NullLocator())
    _log_ticks(axes.yaxis)
    axes.set_xlabel("views V", fontsize=FONT)
    axes.set_ylabel("time of the loss in ms", fontsize=FONT)
    axes.legend(fontsize=FONT)


def training_step(rows: Sequence[Row]) -> Figure:
    """What the losses cost of a step; below, how the entropies of several views scale."""
    known = timed(rows, "loss_p50_ms")
    several = [row for row in known if " x" in row["loss"]]
    pairs = [row for row in timed(known, "loss_share") if " x" not in row["loss"]]
    cases = sorted(unique(pairs or several, "image", "batch"), key=lambda c: tuple(map(int, c)))
    kinds = [(own, panel) for own, panel in ((pairs, _share_panel), (several, _views_panel)) if own]
    if not cases:
        raise ValueError("no row with a time")
    figure, grid = _figure(len(kinds), len(cases), 3.4, 3.1)
    for line, (own, panel) in zip(grid, kinds, strict=True):
        for axes, (image, batch) in zip(line, cases, strict=True):
            here = where(own, image=image, batch=batch)
            if not here:
                axes.set_axis_off()
                continue
            panel(axes, here)
            axes.set_title(_case_title(image, batch), fontsize=FONT + 1)
    first = rows[0]
    backbone = results.BACKBONES.get(
        first.get("backbone", ""), first.get("backbone") or "ResNet-50"
    )
    _title(figure, rows, f"The loss in a step of {backbone}, {first.get('dtype', '')}")
    lost = [
        f"{_loss_label(r)} ({_case_title(r['image'], r['batch'])})" for r in rows if r not in known
    ]
    if lost:
        figure.supxlabel(f"No time: {', '.join(lost)}", fontsize=FONT - 1)
    return figure


# ---------------------------------------------------------------------------------------------
# The loss of a batch spread over processes
# ---------------------------------------------------------------------------------------------

ROUTES = {"reduce": (BLUE, "o"), "gather": (VERMILION, "s")}


def _processes_axis(axes: Axes, counts: Iterable[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted(set(counts)), [f"{count:,}" for count in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("processes", fontsize=FONT)


def _measured_panel(axes: Axes, rows: Sequence[Row], model: dict[str, float]) -> None:
    """Points are medians, bars from p20 to p80; lines are the model at the same processes."""
    for route, (colour, marker) in ROUTES.items():
        own = sorted(where(rows, route=route), key=lambda row: int(row["processes"]))
        x = [int(row["processes"]) for row in own]
        low, middle, high = ([number(row, f"time_p{q}_ms") for row in own] for q in (20, 50, 80))
        spread = [np.subtract(middle, low), np.subtract(high, middle)]
        axes.errorbar(
            x, middle, spread, color=colour, marker=marker, markersize=5, linestyle="none",
            label=f"{route}, measured",
        )  # fmt: skip
        told = [scaling.modelled(row, model) for row in own]
        axes.plot(x, told, color=colour, linewidth=1.1, label=f"{route}, model")
    _processes_axis(axes, (int(row["processes"]) for row in rows))
    axes.set_yscale("log")
    _log_ticks(axes.yaxis)
    axes.set_ylabel("value and gradient in ms", fontsize=FONT)


def _predicted_panel(axes: Axes, told: Sequence[dict[str, Any]]) -> None:
    """One line per number of features: the batch of a process makes next to no difference."""
    for d, colour in zip(
        sorted({row["d"] for row in told}), (SKY, BLUE, BLACK, GREEN), strict=False
    ):
        most = max(row["n"] for row in told if row["d"] == d)
        own = [row for row in told if (row["n"], row["d"]) == (most, d)]
        x = [row["processes"] for row in own]
        axes.plot(x, [row["model_ms"] for row in own], color=colour, marker="o", markersize=4,
                  label=f"d = {d}, {most} rows each")  # fmt: skip
    _processes_axis(axes, (row["processes"] for row in told))
    axes.tick_params(axis="x", labelrotation=45)
    axes.set_yscale("log")
    _log_ticks(axes.yaxis)
    axes.set_ylabel("value and gradient in ms", fontsize=FONT)
    axes.legend(fontsize=FONT)


def scaling_figure(rows: Sequence[Row], found: dict[str, Any]) -> Figure:
    """Measured and modelled time of few processes, and what the model tells of many."""
    cases = sorted({(int(row["n"]), int(row["d"])) for row in rows})
    counts, features = sorted({n for n, _ in cases}), sorted({d for _, d in cases})
    figure, grid = _figure(len(counts), len(features) + 1, 3.1, 2.7)
    for line, n in zip(grid, counts, strict=True):
        for axes, d in zip(line, features, strict=False):
            _measured_panel(axes, where(rows, n=str(n), d=str(d)), found["model"])
            axes.set_title(f"{n} rows each, d = {d}", fontsize=FONT + 1)
        _same_height(line[:-1])
    tell, *others = (line[-1] for line in grid)
    _predicted_panel(tell, found["predicted"])
    tell.set_title("more: the model, not measured", fontsize=FONT + 1)
    for axes in others:
        axes.set_axis_off()
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=FONT)
    what = f"Difference of entropies over gloo processes, {rows[0]['cores']} cores"
    _title(figure, rows, what)
    return figure


def _draw_scaling(path: Path) -> Path:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return _save(scaling_figure(rows, found), path.with_suffix(".png"), path)


# ---------------------------------------------------------------------------------------------
# Memory over many calls
# ---------------------------------------------------------------------------------------------


def memory(rows: Sequence[Row]) -> Figure:
    """Resident memory of a process that calls every operator, and its errors, again and again."""
    figure, grid = _figure(1, 1, 7.5, 2.6)
    axes = grid[0][0]
    calls, resident = ([number(row, name) for row in rows] for name in ("calls", "rss_mib"))
    axes.plot(calls, resident, color=BLUE, linewidth=1.8)
    axes.axvspan(0, results.WARM_UP * calls[-1], color=GREY, alpha=0.2, linewidth=0)
    axes.set_xlim(0, calls[-1])
    axes.set_ylim(min(resident) - 5, max(resident) + 5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("calls (grey: left out of the slope)", fontsize=FONT)
    axes.set_ylabel("MiB, mapped files aside", fontsize=FONT)
    slope = f"{results.growth(rows):+.2f} MiB over 100,000 calls"
    _title(figure, rows, f"Memory of value, gradient and errors in turn: {slope}")
    return figure


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def _draw_run(folder: Path) -> list[Path]:
    """The pictures of a vne-pretrain run, by that program's own functions."""
    config = json.loads((folder / RUN).read_text(encoding="utf-8"))["config"]
    return pretrain_plots.draw_all(
        folder,
        n=config["batch_size"],
        d=config["projector_dim"],
        loss=config.get("loss", "vn-doe"),  # older runs had no other
    )


def _draw_entropy(rows: Sequence[Row], path: Path) -> list[Path]:
    if not timed(rows):
        raise ValueError(f"{path} has no row with a time")
    figures: dict[str, Figure | None] = {
        "time": time(rows, "hot"),
        "time-cold": time(rows, "cold"),
        "speedup": speedup(rows),
        "error": error(rows),
    }
    if rows[0]["device"] == "cuda" and len(_kinds(rows)) > 1:
        figures["shapes"] = shapes(rows)
    return [
        _save(figure, path.with_name(f"{path.stem}-{name}.png"), path)
        for name, figure in figures.items()
        if figure is not None
    ]


def draw(path: Path) -> list[Path]:
    """Draw every picture of a results file, or of a run's folder; returns where they are."""
    if path.is_dir():
        return _draw_run(path)
    if path.name == SCALING:
        return [_draw_scaling(path)]
    rows = results.read(path)
    if results.is_memory(rows):
        return [_save(memory(rows), path.with_suffix(".png"), path)]
    if results.is_training(rows):
        return [_save(training_step(rows), path.with_suffix(".png"), path)]
    return _draw_entropy(rows, path)


def everything(folder: Path) -> list[Path]:
    """All that can be drawn in a folder of results."""
    runs = [table.parent for table in sorted(folder.glob("*/metrics.csv"))]
    others = (SCALING, "reliability/memory.csv")
    return [*results.files(folder), *(path for name in others for path in folder.glob(name)), *runs]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of results files.")
    parser.add_argument(
        "csv", type=Path, nargs="*", help="results files, run folders; default: bench/results"
    )
    paths = parser.parse_args(argv).csv or everything(RESULTS)
    try:
        for path in paths:
            print(*draw(path), sep="\n")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
