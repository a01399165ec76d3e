"""Every benchmark program runs and writes its columns; a run resumes. No time is judged."""

from __future__ import annotations

import csv
import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import compare_vs_torch as compare
import pivoting
import runner

TINY = "--threads 1 --case-seconds 0.05"

#: Program -> options, rows, columns with a finite number in every row, a package that it needs.
PROGRAMS = {
    "compare_vs_torch": (
        f"{TINY} --sizes 4x6 --batches 2 --dtypes float64 --providers svd,gram,ours",
        2 * 3,
        "p20_ms p50_ms p80_ms speedup_vs_gram value_rel_error",
        "",
    ),
    "training_step": (
        "--providers ours,algorithm1 --sizes 8 --batches 4 --dim 8 --backbone resnet18 "
        "--case-seconds 0.02",
        2,
        "loss_samples loss_p50_ms step_samples step_p50_ms loss_share",
        "torchvision",
    ),
    "compare_family": (
        "--functions participation rankme --sizes 16x8 --case-seconds 0.02",
        2 * 2 * 2,
        "samples p20_ms p50_ms p80_ms times_ours value deviation",
        "threadpoolctl",
    ),
    "scaling": (
        "--processes 1 2 --sizes 8x4 --seconds 0.02",
        2 * 2,
        "samples time_p50_ms computing_p50_ms messages ring_bytes loopback_bytes",
        "pandas",
    ),
    "accumulator": (
        f"{TINY} --sizes 8 --batches 64,7 --rate-rows 64 --memory-sizes 100x8",
        3 + 1,
        "rows_per_s gflops",
        "",
    ),
    "overhead": (TINY, 8, "samples p50_ms fastest_us", ""),
    "stages": (TINY, 14, "samples time_ms floor_share", ""),
    "estimator": ("--m 390 --trials 1 --spectra iid low_rank", 4, "entropy estimate seconds", ""),
}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, needs: Callable[[str], ModuleType], tmp_path: Path) -> None:
    options, count, finite, needed = PROGRAMS[name]
    if needed:
        needs(needed)
    out, program = tmp_path / "new" / "r.csv", importlib.import_module(name)
    assert program.main([*options.split(), "--out", str(out)]) == 0
    assert list(out.parent.glob("*.csv*")) == [out]
    rows = read(out)
    assert len(rows) == count
    for row in rows:
        assert tuple(row) == program.COLUMNS
        assert not row.get("note")
        assert all(math.isfinite(float(row[column])) for column in finite.split()), row
        if name == "scaling" and row["processes"] != "1":  # the formula, and headers
            assert float(row["loopback_bytes"]) >= 0.9 * float(row["ring_bytes"]) > 0


def test_pivoting() -> None:
    """The order of pivots keeps the error that floors alone let grow."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, 17, 3, generator=generator) @ torch.randn(8, 3, 33, generator=generator)
    assert pivoting.ratios(z, "floor+order").max() < 1.5 < pivoting.ratios(z, "floor").max()


@dataclass(frozen=True)
class Case:
    n: int
    threads: int = 1


def run(out: Path, *options: str, fail: type | None = None) -> int:
    """Two cases of two rows each, of which the second raises `fail`."""

    def measure(case: Case) -> list[dict[str, object]]:
        if fail is not None and case.n == 2:
            raise fail("n")
        return [{"p50_ms": case.n / 2}, {"p50_ms": case.n}]

    arguments = runner.parse(runner.make_parser("", "r"), ["--out", str(out), *options])
    columns = ("commit", "torch", "threads", "n", "p50_ms")
    return runner.run_cases(arguments, [Case(1), Case(2)], measure, columns, ("p50_ms",))


def test_an_interrupted_run_resumes(tmp_path: Path) -> None:
    out, partial = tmp_path / "r.csv", tmp_path / "r.csv.partial"
    assert run(out, fail=KeyboardInterrupt) == 130
    assert [row["n"] for row in read(partial)] == ["1", "1"]
    assert not out.exists()
    assert run(out, "--resume", fail=ValueError) == 2
    assert run(out, "--stop-after", "1e-9", fail=ValueError) == 0
    assert read(out) == read(partial)
    other = partial.read_text().replace(torch.__version__, "other")
    (tmp_path / "s.csv.partial").write_text(other)
    assert run(tmp_path / "s.csv", "--resume") == 2
    assert (tmp_path / "s.csv.partial").read_text() == other
    assert run(out, "--resume") == 0
    assert [row["p50_ms"] for row in read(out)] == ["0.5", "1", "1.0", "2"]
    assert not partial.exists()


@pytest.mark.parametrize("writes", [True, False])
def test_variants_of_a_gpu(writes: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A replay is the call itself; one that writes nothing is noticed; one provider raises."""

    def capture(call: runner.Call, device: torch.device) -> runner.Call:
        call()
        return call if writes else runner.nothing

    def refuses(z: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("not for this dtype")

    providers = {provider.name: provider for provider in compare.PROVIDERS}
    chosen = (providers["gram"], compare.Provider("refuses", refuses), providers["ours"])
    monkeypatch.setattr(compare, "PROVIDERS", chosen)
    monkeypatch.setattr(compare.machine, "capture", capture)
    monkeypatch.setattr(compare.machine, "l2_bytes", lambda device: 400)
    options = [*TINY.split(), "--sizes", "4x6", "--batches", "2", "--out", str(tmp_path / "r.csv")]
    arguments = compare.parse_arguments(options)
    (_, case), bench = compare.cases_of(arguments), compare.Bench(arguments)
    bench.variants = [("eager", "cold"), ("graph", "hot"), ("graph", "cold")]
    rows = bench.measure(case)
    assert [bool(row["note"]) for row in rows[:5]] == [False, False, True, True, True]
    assert rows[4]["p50_ms"] == "nan"
    assert [bool(row["note"]) for row in rows[5:]] == [False, False, not writes, not writes]
    assert rows[8]["calls"] == 1 + math.ceil(2 * 400 / (2 * 4 * 6 * 4))
    assert all(math.isfinite(float(row["speedup_vs_gram"])) for row in rows[5:])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--sizes", "0x5"), ("--batches", "1,-8"), ("--dtypes", "int8"), ("--threads", "two")),
        *(("--providers", "ours,theirs"), ("--case-seconds", "nan"), ("--device", "tpu")),
    ],
)
def test_wrong_values_name_the_option(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare.main([option, value])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {option}: " in error
    assert value in error
