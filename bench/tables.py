"""Writes the pages of tables in `results`: one Markdown page for each results file or topic.

    python bench/tables.py            # every page of bench/results
    python bench/tables.py --check    # exit 1 and a diff if a page is not that of the data

Which tables a CSV file gets depends on its columns, so a new device needs no change here. A ratio
below 1, where vne_kernels is the slower one, is bold.
"""

from __future__ import annotations

import argparse
import difflib
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
#: Columns that older files lack, and what these files are.
ADDED = {"device": "cpu", "launch": "eager", "l2": "hot", "dtype": "float32", "floor_ms": math.nan}
#: The commands that measured the committed files, where they have options.
COMMANDS = {
    "cpu": "python bench/compare_vs_torch.py --case-seconds 3",
    "cpu-training-step": "python bench/training_step.py --batches 64",
    "family": "python bench/compare_family.py --case-seconds 1.2",
    "scaling": "python bench/scaling.py --seconds 1.2",
    "digits": "vne-pretrain --seed 0    # and 1, 2",
    "cifar10": "vne-pretrain batch-size ...    # whole in README.md",
    "reliability": "python python_tests/hostile.py ...    # whole in README.md",
}

Section = tuple[str, pd.DataFrame]


# ---- parts ------------------------------------------------------------------------------------


def read(path: Path) -> pd.DataFrame:
    """All rows of a CSV file, with the size as one column; ValueError if it has none."""
    rows = pd.read_csv(path, na_values=["-"], dtype={"commit": str})
    if rows.empty:
        raise ValueError(f"{path} has no rows")
    if {"provider", "mode"} <= set(rows):
        rows = rows.assign(**{name: rows.get(name, what) for name, what in ADDED.items()})
        rows = rows.sort_values(["m", "n", "d", "batch", "threads"], kind="stable")
    if {"n", "d"} <= set(rows):
        rows.insert(0, "n × d", [f"{n} × {d}" for n, d in zip(rows.n, rows.d, strict=True)])
    return rows


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def source(rows: pd.DataFrame) -> str:
    """The machine, the versions, the day and the commit of the rows."""
    known = [(name, rows[name].dropna().unique()) for name in SOURCE if name in rows]
    return ", ".join(f"{name} {' / '.join(map(str, of))}" for name, of in known if len(of))


def plain(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows as they are, without empty columns, those of the source, and n and d twice."""
    twice = ["n", "d", "m"] if "n × d" in rows else []
    return rows.drop(columns=[*SOURCE, "clocks", *twice], errors="ignore").dropna(axis=1, how="all")


def cell(value: object, ratio: bool = False) -> str:
    """Three significant digits, and bold for a ratio below 1."""
    if isinstance(value, float) and not math.isnan(value):
        text = f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
        return f"**{text}**" if ratio and value < 1 else text
    return "–" if pd.isna(value) else f"{value:,}" if isinstance(value, int) else str(value)


def table(frame: pd.DataFrame) -> str:
    """A Markdown table; an index that has a name becomes columns."""
    frame = frame.reset_index() if any(frame.index.names) else frame
    lines = {
        name: [cell(value, str(name).startswith("times")) for value in column.tolist()]
        for name, column in frame.items()
    }
    return pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)


def page(name: str, command: str, where: str, sections: Sequence[Section]) -> str:
    """A whole page: heading, command, machine, tables."""
    parts = [f"# {name}", "<!-- Written by `python bench/tables.py`. -->"]
    parts += [f"```sh\n{command}\n```", *([where] if where else [])]
    for title, frame in sections:
        parts += [f"## {title}", table(frame)]
    return "\n\n".join(parts) + "\n"


def ranges(rows: pd.DataFrame, by: list[str], ratio: str) -> pd.DataFrame:
    """How the ratios of several cases spread, and how many of them are below 1: slower."""
    rows = rows.dropna(subset=ratio).assign(slower=rows[ratio] < 1)
    found = rows.groupby(by, sort=False)[ratio].agg(["count", "min", "max"])
    return found.assign(slower=rows.groupby(by).slower.sum()).rename(
        columns={"min": "times faster, least", "max": "times faster, most"}
    )


# ---- results files of the benchmarks ------------------------------------------------------------


def case_columns(rows: pd.DataFrame) -> list[str]:
    """What tells the cases of one mode apart."""
    varying = [name for name in ("dtype", "l2", "launch") if rows[name].nunique() > 1]
    return ["n × d", "batch", "threads", *varying]


def by_provider(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A line for each case of one mode, a column for each provider, in the order of the file."""
    case = case_columns(rows)
    wide = rows.pivot(index=case, columns="provider", values=measure)
    order = pd.MultiIndex.from_frame(rows[case].drop_duplicates())
    return wide.reindex(index=order, columns=pd.Index(rows.provider.unique(), name="provider"))


def gains(rows: pd.DataFrame) -> pd.DataFrame:
    """How many times faster vne_kernels is than each other provider in each case of one mode."""
    times = by_provider(rows, "p50_ms")
    others = [name for name in times if not name.startswith(OURS)]
    return times[others].div(times.get(OURS, math.nan), axis=0)


def long(wide: pd.DataFrame) -> pd.DataFrame:
    """The ratios of `gains`, one a row."""
    return wide.melt(ignore_index=False, value_name="ratio").dropna(subset="ratio").reset_index()


def entropy(rows: pd.DataFrame, path: Path) -> list[Section]:
    """The tables of compare_vs_torch.py."""
    modes = list(rows.groupby("mode", sort=False))[::-1]  # the gradient first
    faster = {mode: gains(own) for mode, own in modes}
    every = pd.concat([long(wide).assign(mode=mode) for mode, wide in faster.items()])
    sections = [("Times faster, over all cases", ranges(every, ["mode", "provider"], "ratio"))]
    for mode, own in modes:
        wide = faster[mode].rename(columns=lambda name: f"times {name}")
        sections.append((f"Median time of a provider / of `ours`: {mode}", wide))
        times = by_provider(own, "p50_ms")
        times["floor"] = own.groupby(case_columns(own)).floor_ms.max().reindex(times.index)
        sections.append((f"Median time in ms: {mode}", times.dropna(axis=1, how="all")))
        for measure, title in (
            ("grad_rel_error", "Relative error of dS/dz against float64"),
            ("value_rel_error", "Relative error of S against float64"),
            ("peak_mib", "Peak memory in MiB"),
        ):
            if measure in own and own[measure].notna().any():
                sections.append((f"{title}: {mode}", by_provider(own, measure)))
    if "note" in rows and rows.note.notna().any():
        notes = rows.groupby(["provider", "note"]).size().rename("rows").to_frame()
        sections.append(("Notes", notes))
    return sections


def scaling_rows(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What scaling.py measured, with the time of its model, and the model."""
    import scaling

    rows, found = read(path), load(path.with_suffix(".json"))
    rows["model_ms"] = [scaling.modelled(row, found["model"]) for row in rows.to_dict("records")]
    return rows, found


def scaling_pages(_: pd.DataFrame, path: Path) -> list[Section]:
    """The tables of scaling.py: few processes are measured, many are predicted by the model."""
    rows, found = scaling_rows(path)
    more, model = pd.DataFrame(found.pop("predicted")), pd.json_normalize(found)
    steps = path.with_name("cpu-training-step.csv")
    if steps.exists():
        step = read(steps).groupby("loss").step_p50_ms.max()[OURS]
        more[f"% of a step of {step:.0f} ms"] = 100 * more.model_ms / step
    return [
        ("Measured: value and gradient of the loss", plain(rows)),
        ("The model, fitted to these rows", model.T.rename(columns={0: "value"}).rename_axis("of")),
        ("Not measured: what the model says of more processes", more),
    ]


def family(rows: pd.DataFrame, path: Path) -> list[Section]:
    """The tables of compare_family.py: what other packages take over what ours takes."""
    others = rows[rows.by != "vne_kernels"]
    sizes = others.groupby(["function", "by"], sort=False)["n × d"]
    exact = others[others.dtype == "float64"].groupby(["function", "by"]).deviation.max()
    summary = ranges(others, ["function", "by"], "times_ours").assign(
        **{"smallest n × d": sizes.first(), "largest": sizes.last(), "differs by, float64": exact}
    )
    return [("Times faster, over all cases", summary), ("Every case", plain(rows))]


def estimator(rows: pd.DataFrame, path: Path) -> list[Section]:
    """The table of estimator.py: whether the error bar covers S, its width, the time."""
    exact = rows[rows.spectrum == "exact"].groupby("m").seconds.median()
    trials = rows[rows.spectrum != "exact"].copy()
    trials["bar / S"] = trials.error / trials.entropy
    trials["error / bar"] = (trials.estimate - trials.entropy).abs() / trials.error
    groups = trials.groupby(["spectrum", "m"], sort=False)
    found = groups[["bar / S", "error / bar", "seconds"]].median()
    found["covered"] = groups["error / bar"].agg(
        lambda errors: f"{sum(errors <= 1)} of {len(errors)}"
    )
    slower = exact.reindex(found.index.get_level_values("m")).to_numpy() / found.seconds
    return [("Medians of the trials", found.assign(times_of_exact_entropy=slower))]


def folder_sections(folder: Path) -> list[Section]:
    """The JSON files of a folder, one a column, and its short CSV files."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        values = pd.json_normalize(load(path)).iloc[0]
        values = values.drop(["environment.command", "environment.platform"], errors="ignore")
        found[path.stem] = values[[not isinstance(value, list) for value in values]]
    sections = [("Records", pd.DataFrame(found).rename_axis("what"))]
    tables = {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
    return sections + [(name, rows) for name, rows in tables.items() if rows.size < 500]


# ---- all pages ----------------------------------------------------------------------------------


def every_row(rows: pd.DataFrame, _: Path) -> list[Section]:
    return [("Every row", plain(rows))]


#: By a column that no other file has: the program, and the tables of its file.
PROGRAMS = {
    "grad_rel_error": ("compare_vs_torch", entropy),
    "loss_p50_ms": ("training_step", every_row),
    "ring_bytes": ("scaling", scaling_pages),
    "times_ours": ("compare_family", family),
    "sgemm_share": ("accumulator", every_row),
    "trial": ("estimator", estimator),
}
FOLDERS = ("reliability", "digits", "cifar10")


def pages(folder: Path) -> dict[Path, str]:
    """The content of every page of a folder of results."""
    found = {}
    for path in sorted(folder.glob("*.csv")):
        rows = read(path)
        for column, (name, make) in PROGRAMS.items():
            if column in rows:
                device = " --device cuda" if "cuda" in set(rows.get("device", [])) else ""
                command = COMMANDS.get(path.stem, f"python bench/{name}.py{device}")
                sections = make(rows, path)
                found[path.with_suffix(".md")] = page(path.stem, command, source(rows), sections)
    for name in FOLDERS:
        if (folder / name).is_dir():
            sections = folder_sections(folder / name)
            found[folder / f"{name}.md"] = page(name, COMMANDS[name], "", sections)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the pages of tables of results files.")
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="of the results")
    parser.add_argument("--check", action="store_true", help="exit 1 if a page is another")
    arguments = parser.parse_args(argv)
    status = 0
    for path, text in pages(arguments.folder).items():
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
            print(path)
            continue
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = (part.splitlines(keepends=True) for part in (old, text))
        sys.stdout.writelines(difflib.unified_diff(*lines, str(path), "made from the data"))
        status |= old != text
    return status


if __name__ == "__main__":
    sys.exit(main())
