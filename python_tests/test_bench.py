"""The benchmark as a program: columns, ratio, pictures, messages; no number is judged for speed."""

from __future__ import annotations

import csv
import importlib.util
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
HAS_MEMRAY = importlib.util.find_spec("memray") is not None
PROVIDERS = ["algorithm1", "svd", "gram", "gram+compile", "ours", "ours-eigh", "ours-poles"]
COMPILED = [*PROVIDERS[:1], "algorithm1+compile", "svd", "svd+compile", *PROVIDERS[2:]]
"""With those that are compiled for one sample only."""
CPU = torch.device("cpu")


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
    options = "--sizes 6x10 --batches 2 --threads 1 --case-seconds 0.5 --out results/tiny.csv"
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
        assert (row["launch"], row["l2"], row["calls"]) == ("eager", "hot", "1")
        assert (row["n"], row["d"], row["m"]) == ("6", "10", "6")
        assert all(row[name] for name in ("date", "commit", "driver", "device_name", "clocks"))
        assert row["cusolver"] == "-" or row["cusolver"][0].isdigit()


def test_numbers_are_plausible(rows: list[dict[str, str]]) -> None:
    has_compiler = os.environ.get("CXX") or shutil.which("g++")
    for row in rows:
        if row["provider"] == "gram+compile" and not has_compiler:
            assert row["note"]
            continue
        assert row["note"] == ""
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert int(row["samples"]) >= 1
        assert float(row["peak_mib"]) > 0 or not HAS_MEMRAY
        assert float(row["value_rel_error"]) < 1e-5
        share = float(row["floor_ms"]) / float(row["p50_ms"])
        assert 0 < float(row["floor_share"]) == pytest.approx(share, rel=1e-2)
        assert row["launches"] == ""  # of a GPU
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
    names = {path.name for path in out.parent.iterdir()}
    assert {"tiny.csv", "tiny-speedup.png", "tiny-time.png"} <= names
    assert all(name == "tiny.csv" or name.endswith(".png") for name in names)
    for name in names - {"tiny.csv"}:
        assert (out.parent / name).read_bytes().startswith(PNG)


def test_table_on_screen_and_progress_on_stderr(finished: tuple[str, str, Path]) -> None:
    table, progress, _ = finished
    for provider in PROVIDERS:
        assert table.count(f"\n  {provider} ") == 2
    assert "[1/2] n=6 d=10 batch=2 float32 forward threads=1" in progress
    assert "[1/2]" not in table


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
        ("--dtypes int8", "argument --dtypes: wanted some of float32, float64, bfloat16, float16"),
        ("--case-seconds nan", "argument --case-seconds: wanted a positive number"),
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
    assert (arguments.sizes, arguments.batches) == (((3, 4), (3, 5)), (1,))
    assert arguments.case_seconds == 1.0
    assert arguments.out == BENCH / "results" / "cpu.csv"


def test_cases_of_the_whole_table(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = compare.cases_of(compare.parse_arguments(["--threads", "1,2"]))
    assert len(set(on_cpu)) == len(on_cpu) == 9 * 2 * 2 * 2
    assert {case.dtype for case in on_cpu} == {"float32"}
    arguments = compare.parse_arguments(["--threads", "1"])
    arguments.device = "cuda"
    on_cuda = compare.cases_of(arguments)
    assert len(set(on_cuda)) == len(on_cuda)
    assert {min(case.n, case.d) for case in on_cuda} == {32, 64, 128, 256, 512, 1024, 2048}
    assert {case.batch for case in on_cuda} == {1, 2, 8, 64}
    assert {case.dtype for case in on_cuda} == {"float32", "bfloat16"}
    signs = {(case.n > case.d) - (case.n < case.d) for case in on_cuda}
    assert signs == {-1, 0, 1}
    assert (on_cuda[0].n, on_cuda[0].d) == (128, 512)


def test_quick_run_is_resumed_where_it_stopped(tmp_path: Path) -> None:
    settings = "--batches 1 --threads 1 --case-seconds 0.2 --out r.csv"
    options = ["--sizes", "3x4,4x5", *settings.split()]
    stopped = run("compare_vs_torch.py", *options, "--stop-after", "0.001", cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped after 0 of 4 cases" in stopped.stdout
    assert list(tmp_path.iterdir()) == []
    first = run("compare_vs_torch.py", *options[:1], "3x4", *options[2:], cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    done = (tmp_path / "r.csv").rename(tmp_path / "r.csv.partial").read_text()
    rest = run("compare_vs_torch.py", *options, "--resume", cwd=tmp_path)
    assert rest.returncode == 0, rest.stderr
    assert "[1/2] n=4 d=5" in rest.stderr
    assert (tmp_path / "r.csv").read_text().startswith(done)
    assert not (tmp_path / "r.csv.partial").exists()


def test_resume_refuses_the_rows_of_another_build(compare: ModuleType, tmp_path: Path) -> None:
    where = dict.fromkeys(("commit", "torch", "cusolver", "driver", "device_name"), "a")
    partial = tmp_path / "r.csv.partial"
    assert compare.harness.finished_before(partial, where) == []
    partial.write_text(f"{','.join(where)},n\na,b,a,a,a,3\n")
    with pytest.raises(ValueError, match="has torch 'b', this run has 'a'"):
        compare.harness.finished_before(partial, where)


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


NOWHERE = float("nan"), float("nan"), float("nan")


def bench_of(compare: ModuleType, *providers: object, seconds: float = 0.1, **more: object):
    """A CPU's Bench with these providers."""
    settings = {"variants": compare.VARIANTS["cpu"], "case_seconds": seconds, "call_seconds": 60.0}
    return compare.Bench(CPU, providers, **{**settings, **more})


def test_a_provider_that_fails_stays_in_the_table(compare: ModuleType) -> None:
    def refuses(z: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("not for this dtype\nand more")

    def not_finite(z: torch.Tensor) -> torch.Tensor:
        return z.sum() * math.nan

    bench = bench_of(
        compare,
        compare.Provider("refuses", lambda: refuses),
        compare.Provider("not finite", lambda: not_finite, batched=False),
        provider(compare, "gram"),
    )
    case = compare.Case(4, 6, 2, "float32", 1, "forward+backward")
    problem = compare.make_problem(4, 6, 2, torch.float32, CPU)
    ceilings = compare.floor.Ceilings(*NOWHERE)
    refused, nan, fine = compare.rows_of(case, bench.measure(case, problem), ceilings, False)
    assert refused["note"] == "NotImplementedError: not for this dtype"
    numbers = ("p50_ms", "speedup_vs_gram", "peak_mib", "value_rel_error", "grad_rel_error")
    assert {refused[column] for column in numbers} == {"nan"}
    assert refused["samples"] == 0
    assert nan["note"] == "the result is not finite"
    assert (nan["value_rel_error"], nan["grad_rel_error"]) == ("nan", "nan")
    assert float(nan["p50_ms"]) > 0
    assert fine["note"] == ""
    assert float(fine["peak_mib"]) > 0 or not HAS_MEMRAY
    assert float(fine["speedup_vs_gram"]) == 1.0
    assert (fine["floor_ms"], fine["floor_share"]) == ("nan", "nan")


def provider(compare: ModuleType, name: str):
    return next(p for p in compare.providers.PROVIDERS if p.name == name)


@pytest.fixture
def replayed(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call itself in the place of a CUDA graph of it."""

    def capture(call, device):
        call()
        return call

    monkeypatch.setattr(compare.machine, "capture", capture)
    monkeypatch.setattr(compare.machine, "l2_bytes", lambda device: 400)


@pytest.mark.usefixtures("replayed")
def test_graphs_and_cold_inputs(compare: ModuleType) -> None:
    """The logic of a GPU's four variants; `gram` is one that no graph holds."""
    names = ("gram", "ours-poles")
    found = [provider(compare, name) for name in names]
    refused = {("gram", 4, True): "no CUDA graph: it waits for the host"}
    bench = bench_of(
        compare, *found, seconds=0.5, variants=compare.VARIANTS["cuda"], refused=refused
    )
    case = compare.Case(4, 6, 2, "float32", 1, "forward+backward")
    problem = compare.make_problem(4, 6, 2, torch.float32, CPU)
    measured = bench.measure(case, problem)
    rows = compare.rows_of(case, measured, compare.floor.Ceilings(1e9, 1e9, 1e-6), True)
    labels = [(row["provider"], row["launch"], row["l2"]) for row in rows]
    variants = [("eager", "hot"), ("eager", "cold"), ("graph", "hot"), ("graph", "cold")]
    assert labels == [(name, *variant) for name in names for variant in variants]
    notes = {label: row["note"] for label, row in zip(labels, rows, strict=True)}
    assert notes["gram", "graph", "hot"] == "no CUDA graph: it waits for the host"
    assert notes["ours-poles", "graph", "cold"] == ""
    by_label = dict(zip(labels, rows, strict=True))
    copies = 1 + math.ceil(2 * 400 / (2 * 4 * 6 * 4))
    assert by_label["ours-poles", "graph", "cold"]["calls"] == copies
    assert 1 <= by_label["ours-poles", "graph", "hot"]["calls"] <= 10
    graph = by_label["ours-poles", "graph", "cold"]
    assert float(graph["grad_rel_error"]) < 1e-5
    gram_ms = float(by_label["gram", "eager", "cold"]["p50_ms"])  # its graph is not there
    ratio = gram_ms / float(graph["p50_ms"])
    assert float(graph["speedup_vs_gram"]) == pytest.approx(ratio, rel=2e-3)


def test_a_replay_that_writes_nothing_is_seen(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(call, device):
        call()
        return lambda: None

    monkeypatch.setattr(compare.machine, "capture", capture)
    variants = (compare.Variant("eager", "hot"), compare.Variant("graph", "hot"))
    bench = bench_of(compare, provider(compare, "ours"), variants=variants)
    case = compare.Case(4, 6, 1, "float32", 1, "forward+backward")
    problem = compare.make_problem(4, 6, 1, torch.float32, CPU)
    eager, graph = bench.measure(case, problem)
    assert eager.note(True) == ""
    assert graph.note(True) == "the result is not finite"


def test_a_call_that_would_take_too_long_is_not_made(compare: ModuleType) -> None:
    def slow(z: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return compare.reference.gram(z)

    bench = bench_of(
        compare, compare.Provider("slow", lambda: slow, batched=False), call_seconds=0.12
    )
    for batch, note in ((1, ""), (2, ""), (4, "not run: about 0 s a call by a smaller batch")):
        case = compare.Case(4, 6, batch, "float32", 1, "forward")
        problem = compare.make_problem(4, 6, batch, torch.float32, CPU)
        (measured,) = bench.measure(case, problem)
        assert measured.note(False) == note
        assert len(measured.contender.samples_s) == (0 if note else 1)  # 3 are more than 0.1 s


def test_half_precision_is_upcast_for_those_that_refuse_it(compare: ModuleType) -> None:
    z = compare.make_problem(5, 7, 1, torch.bfloat16, CPU).z
    want = compare.reference.oracle(z)
    for name in ("algorithm1", "svd", "gram", "ours"):
        got = provider(compare, name).entropy(z.dtype)(z)
        assert float((got.detach() - want.detach()).abs()) < 1e-5, name


def test_the_floor_is_the_largest_of_three(compare: ModuleType) -> None:
    floor = compare.floor
    shape = {"n": 128, "d": 512, "batch": 2, "itemsize": 4}
    gpu = {**shape, "on_gpu": True}
    moved = floor.Ceilings(1e9, math.inf, math.nan)
    assert floor.floor_s(moved, **gpu, gradient=True) == 2 * 2 * 128 * 512 * 4 / 1e9
    assert floor.floor_s(moved, **gpu, gradient=False) == 2 * 128 * 512 * 4 / 1e9
    work = floor.Ceilings(math.inf, 1e9, math.nan)
    flop = 2 * (128**2 * 512 + 16 * 128**3 + 2 * 128**2 * 512)
    assert floor.floor_s(work, **gpu, gradient=True) == flop / 1e9
    on_cpu = 2 * (128**2 * 512 + 16 / 3 * 128**3 + 2 * 128**2 * 512)
    got = floor.floor_s(work, **shape, gradient=True, on_gpu=False)
    assert got == pytest.approx(on_cpu / 1e9)
    chain = floor.Ceilings(math.inf, math.inf, 1e-7)
    assert floor.floor_s(chain, **gpu, gradient=True) == 128e-7
    assert math.isnan(floor.floor_s(floor.Ceilings(*NOWHERE), **gpu, gradient=True))
    tiny = floor.measure(CPU)
    assert 1e8 < tiny.bytes_per_s < 1e13
    assert 1e8 < tiny.flop_per_s < 1e14


def test_trials_of_capture_go_on_after_a_device_is_lost(compare: ModuleType) -> None:
    """Three processes: one loses its device, one dies in the midst, the last ends well."""
    todo = compare.capturable.trials(["a", "b", "c"], [8])
    assert todo[:3] == [("a", 8, False), ("a", 8, True), ("b", 8, False)]
    fine = '{"reason": null, "alive": true}'
    lost = '{"reason": "RuntimeError: lost", "alive": false}'
    refused = '{"reason": "RuntimeError: sync", "alive": true}'
    processes = iter([[fine, lost], [refused], [fine, fine]])
    left = []

    def run(trials):
        left.append(len(trials))
        return iter(next(processes))

    assert compare.capturable.refused(todo, run) == {
        ("a", 8, True): "no CUDA graph: RuntimeError: lost",
        ("b", 8, False): "no CUDA graph: RuntimeError: sync",
        ("b", 8, True): "no CUDA graph: the attempt ended the process",
    }
    assert left == [6, 4, 2]


def test_looped_providers_see_one_sample_at_a_time(compare: ModuleType) -> None:
    svd = provider(compare, "svd").entropy(torch.float64)
    assert compare.make_problem(5, 7, 1, torch.float64, CPU).z.shape == (5, 7)
    z = compare.make_problem(5, 7, 3, torch.float64, CPU).z
    torch.testing.assert_close(svd(z), torch.stack([svd(sample) for sample in z]))


class Clock:
    """Time that passes only when it is told to: what shares it does not depend on the machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_slow_and_fast_share_the_time(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(harness, "time", clock)
    slow = harness.Contender("slow", lambda: clock.sleep(0.02), lambda: None)
    fast = harness.Contender("fast", lambda: clock.sleep(0.0002), lambda: None)
    failed = harness.Contender("failed", lambda: 1 / 0, lambda: None, error="no")
    known = harness.Contender("known", lambda: 1 / 0, lambda: None, calls=2, estimate_s=0.6)
    harness.time_interleaved([slow, fast, failed, known], CPU, 1.5)
    assert clock.now < 2 * 1.5
    assert 3 <= len(slow.samples_s) < len(fast.samples_s)
    assert failed.samples_s == []
    assert known.samples_s == [0.3]  # three calls are more than there is time for
    assert slow.quantiles_ms()[1] == pytest.approx(20)
    assert all(math.isnan(q) for q in failed.quantiles_ms())


@pytest.mark.skipif(not HAS_MEMRAY, reason="peak memory of a CPU needs memray")
def test_peak_memory_is_what_is_held_at_once(compare: ModuleType) -> None:
    """What a call keeps is not counted in the next; objects and rounding take some bytes."""
    kept = []

    def call() -> None:
        kept.append(torch.empty(1 << 20, dtype=torch.uint8))  # stays
        torch.empty(1 << 18, dtype=torch.uint8)  # gone before the next
        torch.empty(1 << 19, dtype=torch.uint8)

    for _ in range(3):
        kept.clear()
        peak = compare.memory.peak_bytes(call, CPU)
        assert (1 << 20) + (1 << 19) <= peak <= (1 << 20) + (1 << 19) + 16384


def test_without_memray_the_peak_is_nan(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare.memory.importlib.util, "find_spec", lambda name: None)
    compare.memory.has_memray.cache_clear()
    try:
        assert math.isnan(compare.memory.peak_bytes(lambda: 1 / 0, CPU))
        assert "memray" in capsys.readouterr().err
    finally:
        compare.memory.has_memray.cache_clear()


def test_a_failed_write_leaves_the_old_file(harness: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    harness.write_csv(path, ["a"], [{"a": 1}])
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        harness.write_csv(path, ["a"], [{"a": 2}, {"b": 3}])
    assert path.read_text() == "a\n1\n"
    assert list(tmp_path.iterdir()) == [path]
