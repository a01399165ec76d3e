"""The accumulator's benchmark: rows, resuming, messages; no number is judged for speed."""

from __future__ import annotations

import csv
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
TINY = (
    "--features 8,16 --chunks 64,7 --threads 1 --rate-rows 64 --case-seconds 0.05 "
    "--memory-features 8 --memory-rows 1000"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import accumulator

    return accumulator


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rates_and_memory_after_an_interruption(
    bench: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole program, stopped before the last case and gone on with."""
    out = tmp_path / "results.csv"
    arguments = [*TINY.split(), "--out", str(out)]
    memory = bench._memory

    def interrupted(case: object, chunk: int) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "_memory", interrupted)
    assert bench.main(arguments) == 130
    assert "--resume goes on" in capsys.readouterr().out
    assert not out.exists()
    monkeypatch.setattr(bench, "_memory", memory)
    monkeypatch.setattr(bench, "_rate", None)  # is not measured again
    assert bench.main([*arguments, "--resume"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    assert "memory threads=1 d=8 rows=1000\n  update  chunk    64 " in capsys.readouterr().out

    rows = read(out)
    assert tuple(rows[0]) == bench.COLUMNS
    keys = [(row["measure"], row["provider"], row["d"], row["chunk"], row["rows"]) for row in rows]
    rates = [("sgemm", "64"), ("update", "64"), ("update", "7")]
    assert keys == [
        *(("rate", name, d, chunk, "64") for d in ("8", "16") for name, chunk in rates),
        ("memory", "update", "8", "64", "1000"),
    ]
    for row in rows:
        assert (row["torch"], row["threads"]) == (torch.__version__, "1")
        flops = 2 * float(row["rows_per_s"]) * int(row["d"]) ** 2
        assert float(row["gflops"]) == pytest.approx(flops / 1e9, rel=1e-3)
        if row["measure"] == "memory":
            assert 0 < float(row["before_mib"]) <= float(row["peak_mib"])
        else:
            assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
            sgemm = next(r for r in rows if r["provider"] == "sgemm" and r["d"] == row["d"])
            share = float(sgemm["p50_ms"]) / float(row["p50_ms"])
            assert float(row["sgemm_share"]) == pytest.approx(share, rel=1e-3)


def test_a_process_that_fails_says_why(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--memory-rows", "0"])
    assert "--memory-rows: wanted positive whole numbers, got '0'" in capsys.readouterr().err
    broken = tmp_path / "broken.py"
    broken.write_text("raise OSError('no memory is told of')")
    bench.__file__, before = str(broken), bench.__file__
    try:
        with pytest.raises(ArithmeticError, match="rows=9: OSError: no memory is told of"):
            bench._memory(bench.Case("memory", 1, 4, 9), 2)
    finally:
        bench.__file__ = before
