"""Results files as rows, for the pictures and the tables: reading, choosing, ratios.

A row is what stands in the CSV. Files from before a column was there are read as what they were:
calls from Python, on a warm cache, without a floor.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import linear_regression

Row = dict[str, str]

OURS = "ours"
VENDOR = ("gram@cusolver", "gram@magma", "syevjBatched", "XsyevBatched")  # a GPU's eigensolvers
BEST_VENDOR = "best vendor"
LABELS = {
    "algorithm1": "Algorithm 1",
    "algorithm1+compile": "Algorithm 1, compiled",
    "svd": "svd form",
    "svd+compile": "svd form, compiled",
    "gram": "Gram + eigvalsh",
    "gram+compile": "Gram + eigvalsh, compiled",
    "gram@cusolver": "torch's cuSOLVER",
    "gram@magma": "torch's MAGMA",
    "syevjBatched": "syevjBatched",
    "XsyevBatched": "XsyevBatched",
    BEST_VENDOR: "best of the vendor's eigensolvers",
    "ours": "vne_kernels",
    "ours-eigh": "vne_kernels, eigh",
    "ours-poles": "vne_kernels, poles",
    "ours-triton": "vne_kernels, Triton",
}
TRAINING_LABELS = {
    "ours": "vne_kernels",
    "algorithm1": "Algorithm 1",
    "nt-xent": "NT-Xent",
    "barlow": "Barlow Twins",
    "vicreg": "VICReg",
    "frossl": "FroSSL",
    "mmcr": "MMCR",
}
BACKBONES = {"resnet18": "ResNet-18", "resnet50": "ResNet-50"}

ENTROPY = {"provider", "mode", "n", "d", "m", "batch", "threads", "p50_ms"}
TRAINING = {"loss", "views", "image", "batch", "loss_p50_ms", "step_p50_ms", "loss_share"}
MEMORY = {"calls", "rss_mib", "objects"}
WARM_UP = 0.2  # of the calls that memory is watched over: allocators and caches fill up
ADDED = {
    "device": "cpu",
    "launch": "eager",
    "l2": "hot",
    "dtype": "float32",
    "floor_ms": "",
    "floor_share": "",
}


def read(path: Path) -> list[Row]:
    """All rows of a results file of any kind; ValueError if it is not one."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows")
    wanted = MEMORY if is_memory(rows) else TRAINING if is_training(rows) else ENTROPY
    missing = wanted - rows[0].keys()
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}")
    return [{**ADDED, **row} for row in rows] if wanted is ENTROPY else rows


def files(folder: Path) -> list[Path]:
    """The results files of either kind in a folder, by name; what else is there is left alone."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
        if {"provider", "mode"} <= set(header) or "loss_p50_ms" in header:
            found.append(path)
    return found


def is_training(rows: Sequence[Row]) -> bool:
    """Whether they are of training_step.py; otherwise they are of compare_vs_torch.py."""
    return "loss_p50_ms" in rows[0]


def is_memory(rows: Sequence[Row]) -> bool:
    """Whether they are of python_tests/hostile.py --memory."""
    return "rss_mib" in rows[0]


def growth(rows: Sequence[Row], column: str = "rss_mib") -> float:
    """Of watched memory: the slope of a straight line after the warm-up, per 10^5 calls."""
    last = number(rows[-1], "calls")
    kept = [row for row in rows if number(row, "calls") > WARM_UP * last]
    calls, values = ([number(row, name) for row in kept] for name in ("calls", column))
    return 1e5 * linear_regression(calls, values).slope


def number(row: Row, column: str) -> float:
    """NaN where the file has no such column, or nothing in it."""
    return float(row.get(column) or "nan")


def size(row: Row) -> tuple[int, int, int]:
    """(m, n, d): the order of the sizes."""
    return int(row["m"]), int(row["n"]), int(row["d"])


def unique(rows: Iterable[Row], *columns: str) -> list[tuple[str, ...]]:
    """The combinations that occur, in the order of the file."""
    return list(dict.fromkeys(tuple(row[c] for c in columns) for row in rows))


def where(rows: Iterable[Row], **wanted: str) -> list[Row]:
    return [row for row in rows if all(row[c] == value for c, value in wanted.items())]


def timed(rows: Iterable[Row], column: str = "p50_ms") -> list[Row]:
    """Those that have a time."""
    return [row for row in rows if math.isfinite(number(row, column))]


def panels(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """(batch, threads), ascending."""
    return sorted(
        ((b, t) for b, t in unique(rows, "batch", "threads")), key=lambda k: (int(k[0]), int(k[1]))
    )


def main_dtype(rows: Sequence[Row]) -> str:
    """float32 if the file has it."""
    dtypes = [dtype for (dtype,) in unique(rows, "dtype")]
    return "float32" if "float32" in dtypes else dtypes[0]


def main_mode(rows: Sequence[Row]) -> str:
    """With the gradient if the file has it."""
    modes = [mode for (mode,) in unique(rows, "mode")]
    return "forward+backward" if "forward+backward" in modes else modes[0]


def main_family(rows: Sequence[Row]) -> list[Row]:
    """Of a GPU's sizes (m, 4m), (m, m), (4m, m) the first kind that is there; of a CPU's, all."""
    if rows[0]["device"] != "cuda":
        return list(rows)
    families: dict[float, list[Row]] = {}
    for row in rows:
        families.setdefault(int(row["d"]) / int(row["n"]), []).append(row)
    return families.get(4.0) or max(families.values(), key=lambda f: len(unique(f, "n", "d")))


def plain(rows: Sequence[Row]) -> list[Row]:
    """What the ratios are taken from: eager calls, warm caches, the first of the dtypes."""
    return where(rows, launch="eager", l2="hot", dtype=main_dtype(rows))


def by_provider(case: Sequence[Row]) -> dict[str, Row]:
    """Of one case: the row of each provider that has a time, and the best of the vendor's."""
    found = {row["provider"]: row for row in timed(case)}
    vendor = [found[name] for name in VENDOR if name in found]
    if vendor:
        found[BEST_VENDOR] = min(vendor, key=lambda row: number(row, "p50_ms"))
    return found


def gain(case: Sequence[Row], baseline: str) -> float:
    """How many times faster ours is than the baseline in one case; NaN if one has no time."""
    found = by_provider(case)
    if OURS not in found or baseline not in found:
        return math.nan
    return number(found[baseline], "p50_ms") / number(found[OURS], "p50_ms")


def machine(rows: Sequence[Row]) -> str:
    """Where a file comes from, as a title."""
    first = rows[0]
    name = first.get("device_name") or first.get("device") or "device unknown"
    return f"{name}, torch {first.get('torch') or 'unknown'}"


def figures(value: float) -> str:
    """Three figures, or the whole number."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def ratio(value: float) -> str:
    """Two or three figures; what is not 1 is not written as 1."""
    if value >= 99.95:
        return f"{value:.0f}"
    if value >= 1 or value < 0.995:
        return f"{value:.1f}" if value >= 1 else f"{value:.2f}"
    return f"{value:.3f}"
