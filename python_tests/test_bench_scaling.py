"""bench/scaling.py: rows of a real short run, the model on invented ones; no speed is judged."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
SHORT = "--processes 1 2 3 --rows 8 --features 4 40 --seconds 0.05"


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import scaling

    return scaling


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results file of a short run."""
    path = tmp_path_factory.mktemp("bench") / "scaling.csv"
    command = [sys.executable, str(BENCH / "scaling.py"), *SHORT.split(), "--out", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model: ")
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows(scaling: ModuleType, finished: Path) -> None:
    rows = rows_of(finished)
    assert list(rows[0]) == list(scaling.COLUMNS)
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        world, d = int(row["processes"]), int(row["d"])
        assert float(row["time_p20_ms"]) <= float(row["time_p50_ms"]) <= float(row["time_p80_ms"])
        assert float(row["computing_p50_ms"]) > 0
        told_of_many = world == 1 and row["route"] == "reduce"
        assert bool(row["computing_of_many_p50_ms"]) == told_of_many
        if row["route"] == "reduce":
            expected = scaling.reduce_traffic(world, d)
            assert int(row["messages"]) == expected.messages
            assert float(row["ring_bytes"]) == pytest.approx(expected.bytes, abs=1)
        else:  # the rows and their presence to each other; cosine; two gradients
            sums = 2 * 2 * 2 * (world - 1) / world * 4
            gathered = (world - 1) * 8 * (d + 1) * 4
            assert float(row["ring_bytes"]) == pytest.approx(gathered + sums, abs=1)
        if world > 1:  # what really went over the loopback device: the same, and headers
            assert float(row["loopback_bytes"]) >= 0.9 * float(row["ring_bytes"])


def test_reduce_moves_less_where_rows_are_many_and_gather_where_features_are(
    finished: Path,
) -> None:
    sent = {
        (row["route"], row["d"]): float(row["ring_bytes"])
        for row in rows_of(finished)
        if row["processes"] == "3"
    }
    assert sent["reduce", "4"] < sent["gather", "4"]
    assert sent["gather", "40"] < sent["reduce", "40"]


def invented(scaling: ModuleType, message_ms: float, byte_ms: float) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for world in (1, 2, 3, 4):
        for d in (64, 256):
            traffic = scaling.reduce_traffic(world, d)
            row: dict[str, object] = {
                "processes": world,
                "cores": 2,
                "route": "reduce",
                "n": 128,
                "d": d,
                "computing_p50_ms": d / 100 * max(1, world / 2),
                "computing_of_many_p50_ms": d / 200,
                "messages": traffic.messages,
                "ring_bytes": traffic.bytes,
            }
            model = {"message_ms": message_ms, "byte_ms": byte_ms}
            rows.append(row | {"time_p50_ms": scaling.modelled(row, model)})
    return rows


@pytest.mark.parametrize(("message_ms", "byte_ms"), [(0.05, 1e-6), (0.0, 1e-6), (0.05, 0.0)])
def test_the_model_is_found_again(scaling: ModuleType, message_ms: float, byte_ms: float) -> None:
    rows = invented(scaling, message_ms, byte_ms)
    found = scaling.summary(rows)
    assert found["model"]["message_ms"] == pytest.approx(message_ms, rel=1e-6, abs=1e-12)
    assert found["model"]["byte_ms"] == pytest.approx(byte_ms, rel=1e-6, abs=1e-15)
    assert found["error_max"] < 1e-9
    assert found["held_out_processes"] == 4
    assert found["held_out_error_max"] < 1e-9
    told = {(row["processes"], row["d"]): row for row in found["predicted"]}
    assert len(told) == 2 * 8
    eight = told[8, 256]
    assert eight["bytes"] == pytest.approx(2 * 7 / 8 * 4 * (257 * 256 + 4))
    transport = message_ms * 3 * 2 * 7 + byte_ms * eight["bytes"]
    assert eight["model_ms"] == pytest.approx(1.28 + transport, rel=1e-6)  # alone on its core


def test_the_error_is_that_of_a_wrong_row(scaling: ModuleType) -> None:
    rows = invented(scaling, 0.05, 1e-6)
    rows[-1]["time_p50_ms"] = 2 * float(rows[-1]["time_p50_ms"])  # type: ignore[arg-type]
    assert scaling.summary(rows)["error_max"] > 0.2


def test_fit_only(scaling: ModuleType, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(finished.with_suffix(".json").read_text())
    finished.with_suffix(".json").unlink()
    assert scaling.main(["--fit-only", "--out", str(finished)]) == 0
    assert json.loads(finished.with_suffix(".json").read_text()) == before
    assert "of 3 processes told from fewer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--processes 2 3 4", "--processes: must be 1 and at least two more, got [2, 3, 4]"),
        ("--rows 0", "--rows: must be integers >= 1, got [0]"),
    ],
)
def test_bad_option(
    arguments: str, message: str, scaling: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        scaling.main(arguments.split())
    assert message in capsys.readouterr().err


def test_picture(
    scaling: ModuleType, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import plot

    (picture,) = plot.draw(finished)
    assert picture == finished.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")
