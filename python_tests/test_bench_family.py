"""bench/compare_family.py: every function against every package at its smallest size; no speed is
judged."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
AGREEMENT = {"float64": 1e-6, "float32": 3e-5}


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    import compare_family

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vendi-score's, of SciPy and of logarithms of 0
        yield compare_family


def test_everyone_gives_the_same_answer(family: ModuleType) -> None:
    for one in family.FAMILIES:
        for dtype in one.dtypes:
            given = one.make(*one.sizes[0], family.DTYPES[dtype])
            ours = float(one.ours(given))
            for name, of in one.others.items():
                theirs = float(of(given)())
                assert math.isclose(theirs, ours, rel_tol=AGREEMENT[dtype]), (one.name, name)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_short_run_and_its_resumption(family: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "family.csv"
    options = ["--functions", "participation", "mutual", "--quick", "--threads", "1"]
    options += ["--case-seconds", "0.02", "--out", str(out)]
    assert family.main(options) == 0
    rows = rows_of(out)
    assert list(rows[0]) == list(family.COLUMNS)
    assert len(rows) == 4 * 2 + 2 * 3
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert row["note"] == ""
        if row["by"] == family.OURS:
            assert float(row["times_ours"]) == 1
    partial = out.with_name("family.csv.partial")
    assert not partial.exists()
    family.harness.write_csv(partial, family.COLUMNS, rows[:2])
    assert family.main([*options, "--resume"]) == 0
    again = rows_of(out)
    assert again[:2] == rows[:2]
    assert [row["by"] for row in again] == [row["by"] for row in rows]
    family.harness.write_csv(partial, family.COLUMNS, [{**rows[0], "commit": "another"}])
    assert family.main([*options, "--resume"]) == 2


def test_unknown_functions_are_told(family: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        family.main(["--functions", "shannon"])
    assert ended.value.code == 2
    assert "wanted some of vendi_score" in capsys.readouterr().err


def test_a_package_that_fails_is_a_note(family: ModuleType, tmp_path: Path) -> None:
    def fails(given: object) -> object:
        def call() -> float:
            raise ArithmeticError("no answer")

        return call

    broken = family.Family(
        "broken", ((4, 3),), ("float32",), family.embeddings, lambda z: 1.0, {"theirs": fails}
    )
    case = {"function": "broken", "n": 4, "d": 3, "dtype": "float32", "threads": 1}
    ours, theirs = family.measure(broken, case, 0.01)
    assert ours["note"] == ""
    assert theirs["note"] == "ArithmeticError: no answer"
    assert theirs["p50_ms"] == "nan"
