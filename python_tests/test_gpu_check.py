"""bench/gpu_check.py: what it concludes from processes that pass, fail, hang or are not there."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
PROGRAM = BENCH / "gpu_check.py"
REHEARSAL = "rehearsal on the CPU | "


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_check

    return gpu_check


@pytest.fixture
def options(gpu_check: ModuleType, tmp_path: Path):
    return gpu_check.parse_arguments(["--device", "cpu", "--out", str(tmp_path / "out")])


def python(gpu_check: ModuleType, name: str, code: str, limit_s: float = 20.0) -> object:
    return gpu_check.Job(name, (sys.executable, "-c", code), limit_s)


def junit(name: str, *cases: str) -> str:
    """Code of a process that writes a report of pytest."""
    text = f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"
    return f"open({f'{name}.xml'!r}, 'w').write({text!r})"


PASSED = '<testcase classname="python_tests.test_value" name="test_spectra[a]"/>'
FAILED = (
    '<testcase classname="python_tests.test_value" name="test_spectra[b]">'
    '<failure message="AssertionError: 3 is not 4">where</failure></testcase>'
)
SKIPPED = '<testcase classname="t" name="s"><skipped message="needs two GPUs"/></testcase>'


def with_jobs(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, jobs: dict[str, list[object]]
) -> None:
    """These processes in the place of the steps'; steps without any cannot run."""

    def planned(step: str):
        def plan(options: object, left_s: float) -> list[object]:
            if step not in jobs:
                raise gpu_check.CannotRun("there is no such program")
            return jobs[step]

        return plan

    monkeypatch.setattr(gpu_check, "JOBS", {step: planned(step) for step in gpu_check.STEPS})


def step_of(out: Path, name: str) -> dict[str, object]:
    steps = json.loads((out / "gpu_check.json").read_text())["steps"]
    return next(step for step in steps if step["step"] == name)


# ---------------------------------------------------------------------------------------------
# Results, table, exit status
# ---------------------------------------------------------------------------------------------


def test_a_failure_and_a_hang_do_not_stop_the_rest(
    gpu_check: ModuleType,
    options: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_jobs(
        gpu_check,
        monkeypatch,
        {
            "environment": [python(gpu_check, "environment", "raise SystemExit('no driver')")],
            "tests": [
                python(gpu_check, "tests-1", junit("tests-1", PASSED, FAILED) + "; exit(1)"),
                python(gpu_check, "tests-2", "import time; time.sleep(60)", limit_s=0.5),
            ],
            "device": [python(gpu_check, "device", junit("device", PASSED, SKIPPED, SKIPPED))],
            "benchmark": [
                python(gpu_check, "benchmark", "open('benchmark.csv','w').write('n,note\\n3,\\n')")
            ],
        },
    )
    begin = time.monotonic()
    assert gpu_check.run(options) == 1
    assert time.monotonic() - begin < 20

    out = options.out
    known = json.loads((out / "gpu_check.json").read_text())
    assert (known["rehearsal"], known["passed"], known["complete"]) == (True, False, True)
    results = {step["step"]: step["result"] for step in known["steps"]}
    assert results == {
        "environment": "failed",
        "tests": "failed",
        "memcheck": "not run",
        "racecheck": "not run",
        "device": "passed",
        "triton": "not run",
        "benchmark": "passed",
        "training-step": "not run",
    }
    assert "no driver" in step_of(out, "environment")["failures"][0]["message"]
    tests = step_of(out, "tests")
    assert (tests["passed"], tests["failed"]) == (1, 1)
    failures = {failure["id"]: failure["message"] for failure in tests["failures"]}
    assert failures["test_value::test_spectra[b]"].startswith("AssertionError: 3 is not 4")
    assert "stopped after" in failures["tests-2"]
    assert step_of(out, "device")["skip_reasons"] == {"needs two GPUs": 2}
    assert step_of(out, "benchmark")["detail"] == "1 rows, 0 with a note"

    names = sorted(path.name for path in out.iterdir())
    assert names == ["gpu_check.csv", "gpu_check.json", "gpu_check.log", "rehearsal.csv"]
    with (out / "gpu_check.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == list(gpu_check.STEPS)
    assert all(row["device_name"].startswith("rehearsal on the CPU") for row in rows)
    assert "no driver" in (out / "gpu_check.log").read_text()

    printed = capsys.readouterr().out.splitlines()
    assert all(line.startswith(REHEARSAL.rstrip()) for line in printed)
    assert any("test_value::test_spectra[b]: AssertionError: 3 is not 4" in x for x in printed)
    assert any("skipped 2: needs two GPUs" in line for line in printed)
    assert "2 of 8 steps passed; FAILED: environment, tests; not run: memcheck (" in printed[-1]


def test_what_cannot_run_here_is_said_and_is_no_failure(
    gpu_check: ModuleType,
    options: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_jobs(
        gpu_check,
        monkeypatch,
        {"device": [python(gpu_check, "device", junit("device", PASSED))]},
    )
    assert gpu_check.run(options) == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert "1 of 8 steps passed; not run: environment (there is no such program)" in last_line


def test_all_passed_is_said_of_all(gpu_check: ModuleType) -> None:
    reports = [gpu_check.Report(step, "passed") for step in gpu_check.STEPS]
    assert gpu_check.verdict(reports) == (True, "all 8 steps passed")


def test_nothing_run_is_not_a_pass(gpu_check: ModuleType) -> None:
    reports = [gpu_check.Report("tests", "not run", "needs x", excused=True)]
    assert gpu_check.verdict(reports)[0] is False


def test_a_step_without_time_left_is_no_pass(
    gpu_check: ModuleType, options: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_jobs(gpu_check, monkeypatch, {})
    monkeypatch.setattr(gpu_check.Check, "left_s", lambda self: 1.0)
    assert gpu_check.run(options) == 1
    assert step_of(options.out, "tests")["detail"] == "the 8 minutes are used up"


def test_ctrl_c_writes_what_is_known_and_stops_children(
    gpu_check: ModuleType, options: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    waits = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with_jobs(
        gpu_check,
        monkeypatch,
        {
            "environment": [python(gpu_check, "environment", "pass")],
            "tests": [python(gpu_check, "tests", waits)],
        },
    )

    def interrupt(self: object, running: list[str], seconds: float) -> None:
        if "tests" in running and pid.exists() and pid.read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check.Screen, "progress", interrupt)
    assert gpu_check.run(options) == 130
    assert step_of(options.out, "environment")["result"] == "passed"
    assert step_of(options.out, "tests")["detail"] == "interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("print('no GPU left'); exit(3)", "no GPU left"),
        (junit("device"), "no test has run"),
        ("open('device.xml', 'w').write('<testsu')", "exit status 0"),
    ],
)
def test_tests_without_a_report_have_not_passed(
    gpu_check: ModuleType,
    options: object,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    message: str,
) -> None:
    with_jobs(gpu_check, monkeypatch, {"device": [python(gpu_check, "device", code)]})
    assert gpu_check.run(options) == 1
    assert message in step_of(options.out, "device")["failures"][0]["message"]


# ---------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "result", "detail"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", "passed", "ERROR SUMMARY: 0 errors"),
        ("echo '========= ERROR SUMMARY: 2 errors'; exit 99", "failed", "ERROR SUMMARY: 2 errors"),
        ("echo 'Unable to attach'", "failed", "no summary"),
    ],
)
def test_a_sanitizer_must_say_that_it_found_nothing(
    gpu_check: ModuleType, tmp_path: Path, script: str, result: str, detail: str
) -> None:
    program = tmp_path / "sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    options = gpu_check.parse_arguments(
        ["--device", "cpu", "--sanitizer", str(program), "--out", str(tmp_path)]
    )
    (job,) = gpu_check.memcheck_jobs(options, 60.0)
    assert job.command[:5] == (str(program), "--tool", "memcheck", "--error-exitcode", "99")
    assert "sanitize" in job.command
    assert job.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    text = f"<testsuites><testsuite>{PASSED}</testsuite></testsuites>"
    (tmp_path / "memcheck.xml").write_text(text)  # the tests as such have passed
    (ended,) = gpu_check.run_jobs([job], tmp_path, lambda running, seconds: None)
    report = gpu_check.Report("memcheck", "passed")
    gpu_check.judge_sanitizer(report, [ended], tmp_path)
    assert (report.result, report.detail) == (result, detail)


def test_a_sanitizer_that_is_not_there(gpu_check: ModuleType, tmp_path: Path) -> None:
    options = gpu_check.parse_arguments(["--device", "cpu", "--sanitizer", "no-such-program"])
    with pytest.raises(gpu_check.CannotRun, match="no-such-program is not there"):
        gpu_check.racecheck_jobs(options, 60.0)


def test_files_that_need_what_is_missing_are_named(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, options: object
) -> None:
    find_spec = gpu_check.importlib.util.find_spec
    monkeypatch.setattr(
        gpu_check.importlib.util,
        "find_spec",
        lambda name: None if name in ("qutip", "vendi_score") else find_spec(name),
    )
    files, lacking = gpu_check.table_files()
    assert lacking == {"test_third_party.py": ["qutip", "vendi_score"]}
    assert "test_value.py" in {path.name for path in files}
    assert "test_third_party.py" not in {path.name for path in files}
    report = gpu_check.Report("tests", "passed", passed=1)
    gpu_check.judge_tests(report, [], Path())
    assert report.detail == "test_third_party.py not run: needs qutip, vendi_score"


def test_tests_are_shared_out(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, options: object
) -> None:
    monkeypatch.setattr(gpu_check, "cores", lambda: 16)
    jobs = gpu_check.tests_jobs(options, 480.0)
    shards = [job.command[job.command.index("--shard") + 1] for job in jobs]
    assert shards == [f"{i}/14" for i in range(1, 15)]
    assert {job.environment["OMP_NUM_THREADS"] for job in jobs} == {"1"}


def test_every_test_is_in_one_shard() -> None:
    """Of a file with shared and unshared inputs, collected by a process for each shard."""
    path = str(Path(__file__).with_name("test_gradient.py"))

    def collected(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *arguments, path]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
        return [line for line in done.stdout.splitlines() if "::" in line]

    parts = [collected("--shard", f"{i}/3") for i in (1, 2, 3)]
    assert all(len(part) > 50 for part in parts)
    assert sorted(test for part in parts for test in part) == sorted(collected())


@pytest.mark.parametrize(
    ("row", "is_fault"),
    [
        ("ours-poles,graph,", False),
        ("ours-poles,graph,no CUDA graph: RuntimeError: it waits", True),
        ("ours,eager,the result is not finite", True),
        ("ours,eager,not run: about 70 s a call by a smaller batch", False),
        ("ours-eigh,graph,no CUDA graph: RuntimeError: cuSOLVER", False),
        ("ours-eigh,eager,RuntimeError: cuSOLVER", True),
        ("gram,graph,no CUDA graph: RuntimeError: it waits", False),
        ("svd,eager,the result is not finite", False),
    ],
)
def test_a_row_of_ours_must_have_its_number(
    gpu_check: ModuleType, tmp_path: Path, row: str, is_fault: bool
) -> None:
    (tmp_path / "benchmark.csv").write_text(f"provider,launch,note\n{row}\n")
    job = gpu_check.Job("benchmark", ("true",), 1.0)
    report = gpu_check.Report("benchmark", "passed")
    gpu_check.judge_benchmark(report, [gpu_check.Ended(job, 0, 1.0, "")], tmp_path)
    assert (report.result == "failed") == is_fault
    assert report.detail.startswith("1 rows")


def test_the_benchmark_gets_what_is_left(gpu_check: ModuleType, options: object) -> None:
    (job,) = gpu_check.benchmark_jobs(options, 150.0)
    seconds = float(job.command[job.command.index("--stop-after") + 1])
    assert 0 < seconds < 150 - gpu_check.TRAINING_S["cpu"]
    with pytest.raises(gpu_check.NoTimeLeft):
        gpu_check.benchmark_jobs(options, 100.0)


# ---------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device tpu", "argument --device: invalid choice: 'tpu'"),
        ("--minutes nan", "argument --minutes: wanted a positive number, got 'nan'"),
        ("--random-shapes 0", "argument --random-shapes: wanted positive whole numbers, got '0'"),
        ("--only tests,lint", "argument --only: wanted some of environment,tests,"),
        ("--bogus", "unrecognized arguments: --bogus"),
    ],
)
def test_wrong_arguments(
    gpu_check: ModuleType, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_check.parse_arguments(["--device", "cpu", *arguments.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_ends_at_once(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "the CUDA kernels are there, but no GPU"
    monkeypatch.setattr(
        gpu_check.vne_kernels, "available_backends", lambda: {"cpu": None, "cuda": reason}
    )
    with pytest.raises(SystemExit) as stopped:
        gpu_check.parse_arguments([])
    assert stopped.value.code == 2
    assert f"--device cuda: {reason}" in capsys.readouterr().err


def test_what_is_asked_of_a_gpu(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        gpu_check.vne_kernels, "available_backends", lambda: {"cpu": None, "cuda": None}
    )
    options = gpu_check.parse_arguments(["--out", str(tmp_path), "--sanitizer", sys.executable])
    assert options.rehearsal is False
    commands = {
        step: " ".join(gpu_check.JOBS[step](options, 400.0)[0].command) for step in gpu_check.STEPS
    }
    for step in ("tests", "memcheck", "racecheck", "device", "triton"):
        assert "--backend cuda" in commands[step]
    for step, asked in (("tests", None), ("triton", "triton")):
        for job in gpu_check.JOBS[step](options, 400.0):
            assert job.environment.get("VNE_KERNELS_BACKEND") == asked
    assert "--random-shapes 1000" in commands["device"]
    assert "--kernel-name kns=3vne" in commands["racecheck"]
    for step in ("benchmark", "training-step"):
        assert "--device cuda" in commands[step]
        assert "--threads" not in commands[step]
    assert "--batches 1,64" in commands["benchmark"]


def test_a_gpu_is_described(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 3 * 2**30
        multi_processor_count = 7

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    build_info = "CUDA 13.0, sm: 90"
    monkeypatch.setattr(torch.ops.vne_kernels, "cuda_build_info", lambda: build_info, raising=False)
    found = gpu_check._gpu()
    assert (found["capability"], found["memory_gib"], found["multiprocessors"]) == ("9.0", 3.0, 7)
    assert found["cuda_build_info"] == build_info
    assert found["nvidia_smi"]  # or why there is none


def test_defaults(gpu_check: ModuleType) -> None:
    options = gpu_check.parse_arguments(["--device", "cpu", "--only", "device,environment"])
    assert options.only == ("environment", "device")
    assert options.out == Path.cwd() / f"gpu_check-cpu-{time.strftime('%Y-%m-%d')}"
    assert (options.minutes, options.random_shapes) == (8.0, 60)


# ---------------------------------------------------------------------------------------------
# The program, once
# ---------------------------------------------------------------------------------------------


def test_a_small_rehearsal(tmp_path: Path) -> None:
    arguments = "--device cpu --only environment,device --random-shapes 5 --out out"
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{REHEARSAL}all 2 steps passed"
    known = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert known["environment"]["torch"] == torch.__version__
    assert known["environment"]["backends"]["cpu"] is None
    device = step_of(tmp_path / "out", "device")
    assert device["passed"] > 300
    assert "needs two GPUs, there are 0" in device["skip_reasons"]


def test_a_time_limit_around_it_is_taken_as_ctrl_c(tmp_path: Path) -> None:
    arguments = "--device cpu --only environment,device --out out"
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), *arguments.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    written = tmp_path / "out" / "gpu_check.json"
    deadline = time.monotonic() + 60
    while not written.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert step_of(tmp_path / "out", "device")["detail"] == "interrupted"
