"""Writes the pages of tables in `results`: one Markdown page for each results file or topic.

    python bench/tables.py            # every page of bench/results that its data changed
    python bench/tables.py --check    # names these pages, writes nothing; exit 1 if there are any

Which tables a CSV file gets depends on its columns, so a new device needs no change here. A ratio
below 1, where vne_kernels is the slower one, is bold.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "ours"
#: Columns that say where a file comes from: of the whole page, not of a row.
SOURCE = (
    *("device", "device_name", "processor", "cores", "dim", "backbone"),
    *("torch", "cuda", "cusolver", "driver", "date", "started", "commit"),
)
#: Measures of compare_vs_torch.py that have a table for each mode.
MEASURES = {
    "p50_ms": "Median time in ms",
    "grad_rel_error": "Relative error of dS/dz against float64",
    "value_rel_error": "Relative error of S against float64",
    "peak_mib": "Peak memory in MiB",
}
Section = tuple[str, pd.DataFrame]


# ---- parts ------------------------------------------------------------------------------------


def read(path: Path) -> pd.DataFrame:
    """Reads all rows of a CSV file, with the size as one column."""
    rows = pd.read_csv(path, na_values=["-"], dtype={"commit": str})
    if "launch" in rows:
        rows = rows.sort_values(["m", "n", "d", "batch", "threads"], kind="stable")
    if {"n", "d"} <= set(rows):
        rows.insert(0, "n × d", [f"{n} × {d}" for n, d in zip(rows.n, rows.d, strict=True)])
    return rows


def every_row(rows: pd.DataFrame, title: str = "Every row") -> list[Section]:
    """The rows as they are, without the columns of the source and n and d twice."""
    twice = ["n", "d", "m"] if "n × d" in rows else []
    return [(title, rows.drop(columns=[*SOURCE, "clocks", *twice], errors="ignore"))]


def cell(value: object, ratio: bool) -> str:
    """Three significant digits, and bold for a ratio below 1."""
    if isinstance(value, float) and not math.isnan(value):
        text = f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
        return f"**{text}**" if ratio and value < 1 else text
    return "–" if pd.isna(value) else f"{value:,}" if isinstance(value, int) else str(value)


def page(name: str, command: str, sections: Sequence[Section], rows: pd.DataFrame) -> str:
    """A whole page: heading, command, machine, tables; without empty columns and tables."""
    parts = [f"# {name}", "<!-- Written by `python bench/tables.py`. -->", f"```sh\n{command}\n```"]
    known = {column: rows[column].dropna().unique() for column in SOURCE if column in rows}
    source = [f"{column} {' / '.join(map(str, of))}" for column, of in known.items() if len(of)]
    parts += [", ".join(source)] if source else []
    for title, frame in sections:
        frame = frame.dropna(axis=1, how="all")
        if frame.size:
            frame = frame.reset_index() if any(frame.index.names) else frame
            cells = {
                column: [cell(value, str(column).startswith("times")) for value in values.tolist()]
                for column, values in frame.items()
            }
            lines = pd.DataFrame(cells).to_markdown(index=False, disable_numparse=True)
            parts += [f"## {title}", lines]
    return "\n\n".join(parts) + "\n"


def ranges(rows: pd.DataFrame, by: list[str], ratio: str) -> pd.DataFrame:
    """How the ratios of several cases spread, and how many of them are below 1: slower."""
    rows = rows.dropna(subset=ratio).assign(slower=rows[ratio] < 1)
    found = rows.groupby(by, sort=False)[ratio].agg(["count", "min", "max"])
    return found.assign(slower=rows.groupby(by).slower.sum()).rename(
        columns={"min": "times faster, least", "max": "times faster, most"}
    )


# ---- results files of the benchmarks ------------------------------------------------------------


def by_provider(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A line for each case of one mode, a column for each provider, in the order of the file."""
    varying = [name for name in ("dtype", "l2", "launch") if rows[name].nunique() > 1]
    case = ["n × d", "batch", "threads", *varying]
    wide = rows.set_index([*case, "provider"])[measure].unstack(sort=False)
    return wide.assign(floor=rows.groupby(case).floor_ms.max()) if measure == "p50_ms" else wide


def gains(rows: pd.DataFrame) -> pd.DataFrame:
    """How many times faster vne_kernels is than each other provider in each case of one mode."""
    times = by_provider(rows, "p50_ms").drop(columns="floor")
    others = [name for name in times if not name.startswith(OURS)]
    return times[others].div(times.get(OURS, math.nan), axis=0)


def long(wide: pd.DataFrame) -> pd.DataFrame:
    """The ratios of `gains`, one a row."""
    return wide.melt(ignore_index=False, value_name="ratio").dropna(subset="ratio").reset_index()


def entropy(rows: pd.DataFrame, _: Path) -> list[Section]:
    """The tables of compare_vs_torch.py, the gradient's first."""
    sections, ratios = [], []
    for mode, own in list(rows.groupby("mode", sort=False))[::-1]:
        wide = gains(own)
        ratios.append(long(wide).assign(mode=mode))
        title = f"Median time of a provider / of `ours`: {mode}"
        sections.append((title, wide.rename(columns="times {}".format)))
        for measure, title in MEASURES.items():
            sections.append((f"{title}: {mode}", by_provider(own, measure)))
    summary = ranges(pd.concat(ratios), ["mode", "provider"], "ratio")
    notes = rows.groupby(["provider", "note"]).size().rename("rows").to_frame()
    return [("Times faster, over all cases", summary), *sections, ("Notes", notes)]


def scaling_rows(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What scaling.py measured, with the time of its model, and the model."""
    import scaling

    rows, found = read(path), json.loads(path.with_suffix(".json").read_bytes())
    rows["model_ms"] = [scaling.modelled(row, found["model"]) for row in rows.to_dict("records")]
    return rows, found


def scaling_tables(_: pd.DataFrame, path: Path) -> list[Section]:
    """The tables of scaling.py: few processes are measured, many are predicted by the model."""
    rows, found = scaling_rows(path)
    more, model = pd.DataFrame(found.pop("predicted")), pd.json_normalize(found)
    step = read(path.with_name("cpu-training-step.csv")).groupby("loss").step_p50_ms.max()[OURS]
    more[f"% of a step of {step:.0f} ms"] = 100 * more.model_ms / step
    return [
        *every_row(rows, "Measured: value and gradient of the loss"),
        ("The model, fitted to these rows", model.T.rename(columns={0: "value"}).rename_axis("of")),
        ("Not measured: what the model says of more processes", more),
    ]


def family(rows: pd.DataFrame, _: Path) -> list[Section]:
    """The tables of compare_family.py: what other packages take over what ours takes."""
    others = rows[rows.by != "vne_kernels"]
    case = ["function", "by", "threads"]
    sizes = others.groupby(case, sort=False)["n × d"]
    exact = others[others.dtype == "float64"].groupby(case).deviation.max()
    summary = ranges(others, case, "times_ours").assign(
        **{"smallest n × d": sizes.first(), "largest": sizes.last(), "differs by, float64": exact}
    )
    return [("Times faster, over all cases", summary), *every_row(rows, "Every case")]


def estimator(rows: pd.DataFrame, _: Path) -> list[Section]:
    """The table of estimator.py: whether the error bar covers S, its width, the time."""
    exact = rows[rows.spectrum == "exact"].groupby("m").seconds.median()
    trials = rows[rows.spectrum != "exact"].copy()
    trials["bar / S"] = trials.error / trials.entropy
    trials["error / bar"] = (trials.estimate - trials.entropy).abs() / trials.error
    groups = trials.groupby(["spectrum", "m"], sort=False)
    found = groups[["bar / S", "error / bar", "seconds"]].median()
    found["covered"] = groups["error / bar"].agg(lambda of: f"{sum(of <= 1)} of {len(of)}")
    slower = exact.reindex(found.index.get_level_values("m")).to_numpy() / found.seconds
    return [("Medians of the trials", found.assign(times_of_exact_entropy=slower))]


def folder_tables(folder: Path) -> list[Section]:
    """The JSON files of a folder, one a column, and its short CSV files."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        values = pd.json_normalize(json.loads(path.read_bytes())).iloc[0]
        values = values.drop(["environment.command", "environment.platform"], errors="ignore")
        found[path.stem] = values[[not isinstance(value, list) for value in values]]
    tables = {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
    short = [(name, rows) for name, rows in tables.items() if rows.size < 500]
    return [("Records", pd.DataFrame(found).rename_axis("what")), *short]


# ---- all pages ----------------------------------------------------------------------------------

#: By a column that no other file has: the program, and the tables of its file.
PROGRAMS = {
    "grad_rel_error": ("compare_vs_torch", entropy),
    "loss_p50_ms": ("training_step", lambda rows, _: every_row(rows)),
    "ring_bytes": ("scaling", scaling_tables),
    "times_ours": ("compare_family", family),
    "overhead_us": ("overhead", lambda rows, _: every_row(rows)),
    "time_ms": ("stages", lambda rows, _: every_row(rows)),
    "sgemm_share": ("accumulator", lambda rows, _: every_row(rows)),
    "trial": ("estimator", estimator),
}
#: The options that the committed files were measured with.
OPTIONS = {
    "cpu": " --case-seconds 3",
    "cpu-training-step": " --batches 64",
    "family": " --case-seconds 1.2 --threads 1,2",
    "scaling": " --seconds 1.2",
}
#: Folders that have a page, and the commands of their files.
FOLDERS = {
    "digits": "vne-pretrain --seed 0    # and 1, 2",
    "cifar10": "vne-pretrain batch-size ...    # whole in README.md",
    "reliability": "python python_tests/fuzz_operators.py ...    # whole in README.md",
}


def pages(folder: Path) -> dict[Path, str]:
    """The content of every page of a folder of results."""
    found = {}
    for path in sorted(folder.glob("*.csv")):
        rows = read(path)
        for program, tables in (PROGRAMS[column] for column in PROGRAMS if column in rows):
            device = " --device cuda" if "cuda" in set(rows.get("device", [])) else ""
            command = f"python bench/{program}.py{OPTIONS.get(path.stem, device)}"
            found[path.with_suffix(".md")] = page(path.stem, command, tables(rows, path), rows)
    for name, command in FOLDERS.items():
        if (folder / name).is_dir():
            tables = folder_tables(folder / name)
            found[folder / f"{name}.md"] = page(name, command, tables, pd.DataFrame())
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the pages of tables of results files.")
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="of the results")
    parser.add_argument("--check", action="store_true", help="exit 1 if a page would change")
    arguments = parser.parse_args(argv)
    status = 0
    for path, text in pages(arguments.folder).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            print(path)
            status |= arguments.check
            if not arguments.check:
                path.write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
