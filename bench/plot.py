"""Pictures of a results file, drawn from the CSV alone.

    python bench/plot.py bench/results/cpu.csv

writes, beside it, `cpu-speedup.png` (against Gram + eigvalsh) and `cpu-time.png`.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, str]

LABELS = {
    "algorithm1": "Algorithm 1 of the paper",
    "svd": "official svd form",
    "gram": "Gram + eigvalsh",
    "gram+compile": "Gram + eigvalsh, torch.compile",
    "ours": "vne_kernels (auto)",
    "ours-eigh": "vne_kernels, eigh",
    "ours-poles": "vne_kernels, poles",
}
# Okabe and Ito's colours, told apart by readers of any colour vision; ours are drawn heavier.
STYLES = {
    "algorithm1": ("#999999", "v", 1.2),
    "svd": ("#E69F00", "^", 1.2),
    "gram": ("#000000", "s", 1.2),
    "gram+compile": ("#56B4E9", "D", 1.2),
    "ours": ("#0072B2", "*", 3.2),
    "ours-eigh": ("#D55E00", "o", 1.8),
    "ours-poles": ("#009E73", "o", 1.8),
}
QUANTITIES = {
    "speedup": ("speedup_vs_gram", "speed-up over Gram + eigvalsh\n(higher is better)"),
    "time": ("p50_ms", "median time in ms\n(lower is better)"),
}


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows")
    missing = {"provider", "mode", "n", "d", "m", "batch", "threads", "p50_ms"} - rows[0].keys()
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}")
    return rows


def _size(row: Row) -> tuple[int, int, int]:
    return int(row["m"]), int(row["n"]), int(row["d"])


def _unique(rows: Sequence[Row], *columns: str) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(row[c] for c in columns) for row in rows))


def _panel(axes: Axes, rows: Sequence[Row], quantity: str) -> None:
    """One mode, batch and number of threads: a line per provider over the sizes."""
    column, _ = QUANTITIES[quantity]
    sizes = sorted({_size(row) for row in rows})
    for (name,) in _unique(rows, "provider"):
        colour, marker, width = STYLES.get(name, ("#CC79A7", "x", 1.2))
        own = sorted((row for row in rows if row["provider"] == name), key=_size)
        x = [sizes.index(_size(row)) for row in own]
        y = [float(row[column]) for row in own]
        axes.plot(
            x, y, color=colour, marker=marker, markersize=4, linewidth=width,
            label=LABELS.get(name, name),
        )  # fmt: skip
        if quantity == "time":
            low, high = ([float(row[c]) for row in own] for c in ("p20_ms", "p80_ms"))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if quantity == "speedup":
        axes.yaxis.set_minor_formatter(
            lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""
        )
        axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xticks(range(len(sizes)), [f"{n}×{d}" for _, n, d in sizes], rotation=45, ha="right")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _figure(rows: Sequence[Row], quantity: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = _unique(rows, "mode")
    columns = sorted(_unique(rows, "batch", "threads"), key=lambda c: tuple(map(int, c)))
    figure, grid = pyplot.subplots(
        len(modes), len(columns), squeeze=False, sharey="row", layout="constrained",
        figsize=(max(7.5, 3.6 * len(columns)), 3.4 * len(modes) + 1.0),
    )  # fmt: skip
    for i, (mode,) in enumerate(modes):
        for j, (batch, threads) in enumerate(columns):
            key = {"mode": mode, "batch": batch, "threads": threads}
            panel = [r for r in rows if all(r[c] == v for c, v in key.items())]
            _panel(grid[i][j], panel, quantity)
            plural = "s" * (threads != "1")
            grid[i][0].set_ylabel(QUANTITIES[quantity][1], fontsize=9)
            grid[i][j].set_xlabel("n×d, ordered by m = min(n, d)", fontsize=8)
            grid[i][j].set_title(f"{mode}\nbatch {batch}, {threads} thread{plural}", fontsize=9)
    first = rows[0]
    figure.suptitle(
        f"{first['device_name']}, torch {first['torch']}, {first['dtype']}", fontsize=10
    )
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def draw(path: Path) -> list[Path]:
    """Draw every picture of the results file `path` beside it; returns where they are."""
    rows = [row for row in read(path) if math.isfinite(float(row["p50_ms"]))]
    if not rows:
        raise ValueError(f"{path} has no row with a time")
    pictures = []
    for quantity in QUANTITIES:
        out = path.with_name(f"{path.stem}-{quantity}.png")
        _figure(rows, quantity, out)
        pictures.append(out)
    return pictures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of a results file.")
    parser.add_argument("csv", type=Path)
    path = parser.parse_args(argv).csv
    try:
        pictures = draw(path)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(*pictures, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
