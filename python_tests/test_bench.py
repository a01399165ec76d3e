"""The benchmark as a program: columns, ratio, pictures, messages; no number is judged for speed."""

from __future__ import annotations

import csv
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
PNG = b"\x89PNG\r\n\x1a\n"
HAS_C_COMPILER = any(map(shutil.which, (os.environ.get("CC", "cc"), "cc", "gcc", "clang")))
PROVIDERS = ["algorithm1", "svd", "gram", "gram+compile", "ours", "ours-eigh", "ours-poles"]


def run(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / program), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
    )


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import harness

    return harness


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import compare_vs_torch

    return compare_vs_torch


# ---------------------------------------------------------------------------------------------
# The whole program, once
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """Output, errors and results file of a tiny run with every provider and mode."""
    folder = tmp_path_factory.mktemp("bench")
    options = "--sizes 6x10 --batches 2 --threads 1 --case-seconds 0.1 --out results/tiny.csv"
    done = run("compare_vs_torch.py", *options.split(), cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, folder / "results" / "tiny.csv"


@pytest.fixture(scope="module")
def rows(finished: tuple[str, str, Path]) -> list[dict[str, str]]:
    with finished[2].open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_per_provider_and_mode(rows: list[dict[str, str]]) -> None:
    cases = [(row["batch"], row["mode"], row["provider"]) for row in rows]
    modes = ("forward", "forward+backward")
    assert cases == [("2", mode, provider) for mode in modes for provider in PROVIDERS]


def test_rows_say_where_they_come_from(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert row["torch"] == torch.__version__
        assert row["cuda"] == (torch.version.cuda or "-")
        assert (row["device"], row["threads"], row["dtype"]) == ("cpu", "1", "float32")
        assert (row["n"], row["d"], row["m"]) == ("6", "10", "6")
        assert all(row[name] for name in ("date", "commit", "driver", "device_name"))


def test_numbers_are_plausible(rows: list[dict[str, str]]) -> None:
    has_compiler = os.environ.get("CXX") or shutil.which("g++")
    for row in rows:
        if row["provider"] == "gram+compile" and not has_compiler:
            assert row["note"]
            continue
        assert row["note"] == ""
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert int(row["samples"]) >= 1
        assert float(row["peak_mib"]) > 0 or not HAS_C_COMPILER
        assert float(row["value_rel_error"]) < 1e-5
        if row["mode"] == "forward":
            assert row["grad_rel_error"] == ""
        else:
            assert float(row["grad_rel_error"]) < 1e-4


def test_ratio_is_to_gram_in_the_same_case(rows: list[dict[str, str]]) -> None:
    gram = {
        (row["batch"], row["mode"]): float(row["p50_ms"])
        for row in rows
        if row["provider"] == "gram"
    }
    for row in rows:
        want = gram[row["batch"], row["mode"]] / float(row["p50_ms"])
        if math.isfinite(want):
            assert float(row["speedup_vs_gram"]) == pytest.approx(want, rel=2e-3)


def test_columns_are_those_the_readme_states(
    rows: list[dict[str, str]], compare: ModuleType
) -> None:
    assert tuple(rows[0]) == compare.COLUMNS
    section = (BENCH / "README.md").read_text().split("## Columns")[1]
    for column in compare.COLUMNS:
        assert f"`{column}`" in section


def test_pictures_and_nothing_half_written(finished: tuple[str, str, Path]) -> None:
    out = finished[2]
    names = sorted(path.name for path in out.parent.iterdir())
    assert names == ["tiny-speedup.png", "tiny-time.png", "tiny.csv"]
    for name in names[:2]:
        assert (out.parent / name).read_bytes().startswith(PNG)


def test_table_on_screen_and_progress_on_stderr(finished: tuple[str, str, Path]) -> None:
    table, progress, _ = finished
    for provider in PROVIDERS:
        assert table.count(f"\n  {provider} ") == 2
    assert "[1/2] n=6 d=10 batch=2 forward threads=1" in progress
    assert "[1/2]" not in table


def test_pictures_from_the_csv_alone(finished: tuple[str, str, Path], tmp_path: Path) -> None:
    shutil.copy(finished[2], tmp_path / "moved.csv")
    done = run("plot.py", "moved.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("moved-speedup.png", "moved-time.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_plot_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("provider,n\ngram,3\n")
    done = run("plot.py", "other.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert "other.csv lacks the columns batch, d, m, mode" in done.stderr


# ---------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--bogus", "unrecognized arguments: --bogus"),
        ("--sizes 128", "argument --sizes: wanted NxD,NxD,... such as 128x512, got '128'"),
        ("--sizes 0x5", "argument --sizes: wanted NxD,NxD,... such as 128x512, got '0x5'"),
        ("--batches 1,-8", "argument --batches: wanted positive whole numbers, got '-8'"),
        ("--threads two", "argument --threads: wanted positive whole numbers, got 'two'"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--case-seconds nan", "argument --case-seconds: wanted a positive number of seconds"),
        ("--device tpu", "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_wrong_arguments(
    arguments: str, message: str, compare: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare.parse_arguments(arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_cuda_without_a_device_says_so(
    compare: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        compare.parse_arguments(["--device", "cuda"])
    assert stopped.value.code == 2
    assert f"no CUDA device: torch {torch.__version__}" in capsys.readouterr().err


def test_quick_gives_way_to_what_is_given(compare: ModuleType) -> None:
    arguments = compare.parse_arguments(["--quick", "--sizes", "3x4,3X5"])
    assert arguments.sizes == ((3, 4), (3, 5))
    assert arguments.case_seconds == 1.0
    assert arguments.out == BENCH / "results" / "cpu.csv"
    assert len(compare.parse_arguments([]).sizes) == 9


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def test_a_provider_that_fails_stays_in_the_table(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(z: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("not for this dtype\nand more")

    def not_finite(z: torch.Tensor) -> torch.Tensor:
        return z.sum() * math.nan

    gram = next(p for p in compare.PROVIDERS if p.name == "gram")
    others = [
        compare.Provider("refuses", lambda: refuses, batched=True),
        compare.Provider("not finite", lambda: not_finite, batched=False),
    ]
    monkeypatch.setattr(compare, "PROVIDERS", (*others, gram))
    cpu = torch.device("cpu")
    case = compare.Case(n=4, d=6, batch=2, threads=1, mode="forward+backward")
    problem = compare.make_problem(4, 6, 2, torch.float32, cpu)
    refused, nan, fine = compare.measure_case(case, problem, cpu, 0.01)
    assert refused["note"] == "NotImplementedError: not for this dtype"
    numbers = ("p50_ms", "speedup_vs_gram", "peak_mib", "value_rel_error", "grad_rel_error")
    assert {refused[column] for column in numbers} == {"nan"}
    assert refused["samples"] == 0
    assert nan["note"] == "the result is not finite"
    assert (nan["value_rel_error"], nan["grad_rel_error"]) == ("nan", "nan")
    assert float(nan["p50_ms"]) > 0
    assert (fine["note"], fine["peak_mib"]) == ("", "nan")  # malloc is counted in the program only
    assert float(fine["speedup_vs_gram"]) == 1.0


def test_looped_providers_see_one_sample_at_a_time(compare: ModuleType) -> None:
    svd = next(p for p in compare.PROVIDERS if p.name == "svd")
    cpu = torch.device("cpu")
    assert compare.make_problem(5, 7, 1, torch.float64, cpu).z.shape == (5, 7)
    z = compare.make_problem(5, 7, 3, torch.float64, cpu).z
    torch.testing.assert_close(
        svd.entropy()(z), torch.stack([svd.entropy()(sample) for sample in z])
    )


def test_slow_and_fast_share_the_time(harness: ModuleType) -> None:
    slow = harness.Contender("slow", lambda: time.sleep(0.02), lambda: None)
    fast = harness.Contender("fast", lambda: time.sleep(0.0002), lambda: None)
    failed = harness.Contender("failed", lambda: 1 / 0, lambda: None, error="no")
    harness.time_interleaved([slow, fast, failed], torch.device("cpu"), 0.2)
    assert 3 <= len(slow.samples_s) < len(fast.samples_s)
    assert failed.samples_s == []
    assert slow.quantiles_ms()[1] >= 20
    assert all(math.isnan(q) for q in failed.quantiles_ms())


PEAKS = """
import sys, torch, memory
memory.restart_with_counter()
kept = []
def call():
    kept.append(torch.empty(1 << 20, dtype=torch.uint8))  # stays
    torch.empty(1 << 18, dtype=torch.uint8)  # gone before the next
    torch.empty(1 << 19, dtype=torch.uint8)
for _ in range(3):
    kept.clear()
    print(memory.peak_bytes(call, torch.device("cpu")))
"""


@pytest.mark.skipif(not HAS_C_COMPILER, reason="the counter of malloc needs a C compiler")
def test_peak_memory_is_what_is_held_at_once(tmp_path: Path) -> None:
    """What a call keeps is not counted in the next; tensor headers and rounding take some bytes."""
    (tmp_path / "peaks.py").write_text(PEAKS)
    done = subprocess.run(
        [sys.executable, "peaks.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(BENCH)},
        check=True,
    )
    peaks = [float(line) for line in done.stdout.split()]
    assert len(peaks) == 3
    for peak in peaks[1:]:
        assert (1 << 20) + (1 << 19) <= peak <= (1 << 20) + (1 << 19) + 16384


def test_a_failed_write_leaves_the_old_file(harness: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    harness.write_csv(path, ["a"], [{"a": 1}])
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        harness.write_csv(path, ["a"], [{"a": 2}, {"b": 3}])
    assert path.read_text() == "a\n1\n"
    assert list(tmp_path.iterdir()) == [path]
