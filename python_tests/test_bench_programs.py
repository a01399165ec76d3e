"""The benchmark programs: each runs once on tiny inputs; no number is judged for speed."""

from __future__ import annotations

import csv
import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
# program -> (options, rows, columns with a finite number in every row, modules it needs)
PROGRAMS = {
    "training_step": (
        "--providers ours,algorithm1 --sizes 8 --batches 4 --dim 8 --backbone resnet18 "
        "--case-seconds 0.02",
        2,
        "loss_samples loss_p50_ms step_samples step_p50_ms loss_share",
        ("torchvision",),
    ),
    "compare_family": (
        "--functions participation rankme --sizes 16x8 --case-seconds 0.02",
        2 * 2 * 2,
        "samples p20_ms p50_ms p80_ms times_ours value deviation",
        ("threadpoolctl",),
    ),
    "scaling": (
        "--processes 1 2 --sizes 8x4 --seconds 0.02",
        2 * 2,
        "samples time_p50_ms computing_p50_ms messages ring_bytes loopback_bytes",
        ("pandas",),
    ),
    "accumulator": (
        "--sizes 8 --batches 64,7 --threads 1 --rate-rows 64 --case-seconds 0.02 "
        "--memory-sizes 100x8",
        3 + 1,
        "rows_per_s gflops",
        (),
    ),
    "estimator": ("--m 390 --trials 1 --spectra iid low_rank", 4, "entropy estimate seconds", ()),
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, bench: None, tmp_path: Path) -> None:
    options, count, finite, needed = PROGRAMS[name]
    for package in needed:
        pytest.importorskip(package)
    out = tmp_path / "results.csv"
    command = [sys.executable, str(BENCH / f"{name}.py"), *options.split(), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    assert tuple(rows[0]) == importlib.import_module(name).COLUMNS
    for row in rows:
        assert not row.get("note")
        assert all(math.isfinite(float(row[column])) for column in finite.split()), row
        if name == "scaling" and row["processes"] != "1":  # the formula, and headers
            assert float(row["loopback_bytes"]) >= 0.9 * float(row["ring_bytes"]) > 0


@pytest.mark.parametrize(("message_ms", "byte_ms"), [(0.05, 1e-6), (0.0, 1e-6), (0.05, 0.0)])
def test_the_model_finds_invented_constants(message_ms: float, byte_ms: float, bench: None) -> None:
    pandas = pytest.importorskip("pandas")
    import scaling

    model = {"message_ms": message_ms, "byte_ms": byte_ms}
    rows = []
    for world in (1, 2, 3, 4):
        for d in (64, 256):
            messages, sent = scaling.traffic("reduce", world, 128, d)
            row = {"processes": world, "cores": 2, "n": 128, "d": d, "computing_p50_ms": d / 100}
            row |= {"messages": messages, "ring_bytes": sent}
            row |= {"computing_of_many_p50_ms": d / 200 if world == 1 else None}
            rows.append(row | {"time_p50_ms": scaling.modelled(row, model)})
    found = scaling.summary(pandas.DataFrame(rows))
    assert found["model"] == pytest.approx(model, rel=1e-6, abs=1e-15)
    assert max(found["error_max"], found["held_out_error_max"]) < 1e-9
    eight = next(row for row in found["predicted"] if (row["processes"], row["d"]) == (8, 256))
    transport = message_ms * 42 + byte_ms * 2 * 7 / 8 * 4 * (257 * 256 + 4)
    assert eight["model_ms"] == pytest.approx(1.28 + transport)


def test_a_package_that_is_not_installed_is_a_note(
    bench: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("threadpoolctl")
    import compare_family as family

    monkeypatch.setitem(sys.modules, "vendi_score", None)
    case = family.Case("vendi_score", 16, 8, "float32", 1)
    ours, *theirs = family.measure(family.FAMILIES[0], case, family.PACKAGES, 0.01)
    assert not ours["note"]
    assert all("vendi_score" in row["note"] and row["p50_ms"] == "nan" for row in theirs)
