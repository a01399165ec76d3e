"""Every benchmark program runs and writes its columns; a run resumes. No time is judged."""

from __future__ import annotations

import csv
import importlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import capturable
import compare_vs_torch as compare
import pivoting
import runner

#: Program -> options of a run of seconds, columns in which every row has a finite number, and
#: packages that it needs besides those of the tests.
PROGRAMS = {
    "compare_vs_torch": (
        "--sizes 6x10 --batches 2 --threads 1 --dtypes float64 --case-seconds 0.1 "
        "--providers svd,gram,ours,ours-poles",
        ("p20_ms", "p50_ms", "p80_ms", "speedup_vs_gram", "value_rel_error"),
        (),
    ),
}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, tmp_path: Path) -> None:
    options, numbers, needed = PROGRAMS[name]
    for package in needed:
        pytest.importorskip(package)
    out, program = tmp_path / "new" / "r.csv", importlib.import_module(name)
    assert program.main([*options.split(), "--out", str(out)]) == 0
    rows = read(out)
    assert rows
    for row in rows:
        assert tuple(row) == program.COLUMNS
        assert row["torch"] == torch.__version__
        assert all(math.isfinite(float(row[column])) for column in numbers), row
        assert not row.get("note")
    assert list(out.parent.iterdir()) == [out]


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
    assert run(out, "--resume") == 0
    assert [row["p50_ms"] for row in read(out)] == ["0.5", "1", "1.0", "2"]
    assert not partial.exists()


def test_resume_refuses_rows_of_another_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / "r.csv.partial"
    partial.write_text(f"commit,torch,threads,n,p50_ms\nother,{torch.__version__},1,1,1\n")
    before = partial.read_bytes()
    assert run(tmp_path / "r.csv", "--resume") == 2
    assert "commit 'other'" in capsys.readouterr().err
    assert partial.read_bytes() == before


def test_a_failing_provider_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuses(z: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("not for this dtype")

    out = tmp_path / "r.csv"
    providers = (compare.Provider("gram", lambda: refuses), *compare.PROVIDERS[-4:-3])
    monkeypatch.setattr(compare, "PROVIDERS", providers)
    options = f"--sizes 4x6 --batches 1 --threads 1 --case-seconds 0.1 --out {out}"
    assert compare.main(options.split()) == 0
    refused, ours = read(out)[:2]
    assert (refused["provider"], refused["p50_ms"]) == ("gram", "nan")
    assert "NotImplementedError" in refused["note"]
    assert (ours["provider"], ours["note"]) == ("ours", "")


@pytest.mark.parametrize("writes", [True, False])
def test_variants_of_a_gpu(writes: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A replay is the call itself; one that writes nothing is noticed."""

    def capture(call: runner.Call, device: torch.device) -> runner.Call:
        call()
        return call if writes else runner.nothing

    monkeypatch.setattr(compare.machine, "capture", capture)
    monkeypatch.setattr(compare.machine, "l2_bytes", lambda device: 400)
    options = "--sizes 4x6 --batches 2 --threads 1 --case-seconds 0.1 --providers gram,ours-poles"
    arguments = compare.parse_arguments([*options.split(), "--out", str(tmp_path / "r.csv")])
    (_, case), bench = compare.cases_of(arguments), compare.Bench(arguments, [])
    bench.variants, bench.refused = [("eager", "cold"), ("graph", "hot"), ("graph", "cold")], {}
    rows = bench.measure(case)
    assert [bool(row["note"]) for row in rows[:4]] == [False, False, True, True]  # gram waits
    assert [bool(row["note"]) for row in rows[4:]] == [False, False, not writes, not writes]
    assert rows[7]["calls"] == 1 + math.ceil(2 * 400 / (2 * 4 * 6 * 4))
    assert all(math.isfinite(float(row["speedup_vs_gram"])) for row in rows[4:])


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
    assert value.split(",")[-1] in error


def test_trials_of_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process reports a failure, one dies, one hangs: each costs one trial or the time."""
    child = """if True:
        import json, os, sys, time
        print("not an answer")
        for name, m, many in json.load(sys.stdin):
            if name == "dies": os.abort()
            if name == "hangs": time.sleep(60)
            print(json.dumps([name, m, many, "why" if name == "fails" else None]), flush=True)
            if name == "fails": break
    """
    monkeypatch.setattr(capturable, "COMMAND", (sys.executable, "-c", child))
    names = ("fine", "fails", "dies", "fine too", "hangs", "late")
    refused = capturable.refused([(name, 8, True) for name in names], 1.0)
    assert [name for name, _, _ in refused] == ["fails", "dies", "hangs", "late"]
