"""One command that proves a build of the CUDA kernels on a machine with a GPU, in eight minutes.

    python bench/gpu_check.py                 # everything, into gpu_check-cuda-<date>/
    python bench/gpu_check.py --device cpu    # the same steps on the CPU: a rehearsal

Every step is a process of its own with a time limit, so that none can take the others along:

    environment     what there is: GPU, driver, versions, clocks, packages that are missing
    tests           the operators' whole table of tests, `--backend cuda`, in many processes
    memcheck        compute-sanitizer over every kernel once, beside the tests
    racecheck       the same for races in shared memory
    device          test_device.py, alone: graphs, streams, threads, memory, random shapes
    triton          the table by the Triton kernels in the place of CUDA's
    benchmark       compare_vs_torch.py, in what is left of --minutes
    training-step   training_step.py --quick

The exit status is 0 only if every step that could run has passed. What did not run is always said.
The folder holds gpu_check.json (everything), gpu_check.csv (a row a step), gpu_check.log (what the
processes said) and the CSV files of the benchmarks.
"""

from __future__ import annotations

import argparse
import ast
import csv
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import arguments
import harness
import torch

try:
    import vne_kernels
except ImportError as error:
    print(f"gpu_check: {error}; install the package first: pip install .", file=sys.stderr)
    sys.exit(2)

BENCH = Path(__file__).resolve().parent
TESTS = BENCH.parent / "python_tests"
TABLE = (
    *("value", "gradient", "errors", "losses", "density"),
    *("properties", "kernels", "torch_integration", "third_party"),
)
"""The test files that mean the same on every backend."""
TRITONS = TABLE[:5]
"""Those of them that Triton's interpreter runs too."""
OPTIONAL = ("hypothesis", "qutip", "vendi_score", "mpmath", "lightly", "torchvision", "matplotlib")

STAGES = (
    ("environment",),
    ("tests", "memcheck", "racecheck"),  # right or wrong, whatever the clock
    ("device",),
    ("triton",),
    ("benchmark",),
    ("training-step",),
)
STEPS = tuple(step for stage in STAGES for step in stage)
LIMIT_S = {
    **{"environment": 60, "tests": 300, "memcheck": 240, "racecheck": 240, "device": 240},
    "triton": 300,
}
TRAINING_S = {"cuda": 75, "cpu": 90}  # of --minutes, kept for the last step
GRACE_S = 45  # for the case that a benchmark is in when its time is over
LEAST_S = 5  # with less left, a step does not begin

SIZES = "128x512,32x128,64x256,256x1024,512x2048,1024x4096,128x128,512x128"
REHEARSED_SIZES = "16x32,32x16"

FOUND_ERRORS = 99  # exit status of compute-sanitizer
NO_TESTS = 5  # exit status of pytest
LONGEST_LOG = 400_000  # characters of one process in gpu_check.log
LONGEST_MESSAGE, BRIEF_MESSAGE = 4_000, 300  # characters of the first failures, and of the rest
SHOWN_WHOLE = 100

COLUMNS = (
    *("date", "commit", "torch", "device_name", "step", "result"),
    *("passed", "failed", "skipped", "seconds", "detail"),
)


@dataclass(frozen=True)
class Options:
    device: str
    out: Path
    minutes: float
    random_shapes: int
    only: tuple[str, ...]
    sanitizer: str | None

    @property
    def rehearsal(self) -> bool:
        return self.device != "cuda"


@dataclass(frozen=True)
class Job:
    """A process; what it writes lies in the working folder under its name."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Ended:
    job: Job
    status: int | None  # None: stopped, after its time or by Ctrl-C
    seconds: float
    log: str


@dataclass
class Report:
    """What became of a step; `excused`: it could not run here, and that is no fault."""

    step: str
    result: str  # passed, failed, not run
    detail: str = ""
    excused: bool = False
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    skip_reasons: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)

    def fail(self, name: str, message: str) -> None:
        self.result = "failed"
        longest = LONGEST_MESSAGE if len(self.failures) < SHOWN_WHOLE else BRIEF_MESSAGE
        self.failures.append({"id": name, "message": message[:longest]})


# ---------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------


def _begin(job: Job, work: Path) -> subprocess.Popen[bytes]:
    """Started as the leader of a group, so that its children can be stopped with it."""
    with (work / f"{job.name}.log").open("wb") as log:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=work,
            env={**os.environ, **job.environment},
            start_new_session=True,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C for a process and its children, so that they keep what is finished; then the end."""
    for number, patience_s in ((signal.SIGINT, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience_s)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        return


def run_jobs(
    jobs: Sequence[Job], work: Path, progress: Callable[[list[str], float], None]
) -> Generator[Ended, None, None]:
    """Run all side by side and yield each as it ends; Ctrl-C stops them all."""
    begin = time.monotonic()
    running: dict[Job, subprocess.Popen[bytes]] = {}
    try:
        for job in jobs:
            running[job] = _begin(job, work)
        while running:
            time.sleep(0.1)
            seconds = time.monotonic() - begin
            for job, process in list(running.items()):
                if process.poll() is None and seconds < job.limit_s:
                    continue
                status = process.poll()
                if status is None:
                    _stop(process)
                del running[job]
                yield Ended(job, status, seconds, _log(work, job))
            progress([job.name for job in running], seconds)
    finally:
        for process in running.values():
            _stop(process)


def _log(work: Path, job: Job) -> str:
    """What the process said, its middle left out where that is long."""
    text = (work / f"{job.name}.log").read_text(errors="replace")
    if len(text) <= LONGEST_LOG:
        return text
    half = LONGEST_LOG // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


# ---------------------------------------------------------------------------------------------
# Steps: which processes
# ---------------------------------------------------------------------------------------------


class CannotRun(Exception):
    """Why a step cannot run on this machine."""


class NoTimeLeft(Exception):
    """The time of the whole check is used up."""


def missing_imports(path: Path) -> list[str]:
    """Modules that a test file imports when it is loaded, and that are not installed."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    beside = {other.stem for other in path.parent.glob("*.py")}
    return sorted(n for n in names - beside if importlib.util.find_spec(n) is None)


def table_files() -> tuple[list[Path], dict[str, list[str]]]:
    """The files of the table that can be imported here; what the others lack."""
    paths = [TESTS / f"test_{name}.py" for name in TABLE]
    lacking = {path.name: lack for path in paths if (lack := missing_imports(path))}
    return [path for path in paths if path.name not in lacking], lacking


def _pytest(
    options: Options, name: str, *arguments: str, backend: str | None = None
) -> tuple[str, ...]:
    if lack := missing_imports(TESTS / "conftest.py"):
        raise CannotRun(f"the tests need {', '.join(lack)}")
    return (
        *(sys.executable, "-m", "pytest", "-q", "--tb=short", "--show-capture=no"),
        *("-p", "no:cacheprovider", "-o", "junit_family=xunit2", f"--junitxml={name}.xml"),
        *("--backend", backend or options.device, *arguments),
    )


def cores() -> int:
    return len(os.sched_getaffinity(0))


def environment_jobs(options: Options, left_s: float) -> list[Job]:
    code = "import sys, gpu_check; gpu_check.describe(*sys.argv[1:])"
    command = (sys.executable, "-c", code, options.device, "environment.json")
    path = os.pathsep.join(filter(None, (str(BENCH), os.environ.get("PYTHONPATH"))))
    return [Job("environment", command, LIMIT_S["environment"], {"PYTHONPATH": path})]


def _sharded_jobs(
    options: Options, step: str, files: Sequence[Path], count: int, backend: str | None = None
) -> list[Job]:
    jobs = []
    for i in range(1, count + 1):
        name, shard = f"{step}-{i}", ("--shard", f"{i}/{count}")
        command = _pytest(options, name, *shard, *map(str, files), backend=backend)
        # One thread each, of torch.compile too, which would start as many as there are cores.
        threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        jobs.append(Job(name, command, LIMIT_S[step], threads))
    return jobs


def tests_jobs(options: Options, left_s: float) -> list[Job]:
    """As many processes as there are cores, less two for the sanitizers beside them."""
    return _sharded_jobs(options, "tests", table_files()[0], max(cores() - 2, min(cores(), 2)))


def triton_jobs(options: Options, left_s: float) -> list[Job]:
    """On the host Triton's interpreter runs a small part: the whole takes a quarter of an hour."""
    if importlib.util.find_spec("triton") is None:
        raise CannotRun("triton is not installed")
    if options.rehearsal:
        return _sharded_jobs(options, "triton", [TESTS / "test_errors.py"], 1, "triton")
    files = [path for path in table_files()[0] if path.stem.removeprefix("test_") in TRITONS]
    chosen = {"VNE_KERNELS_BACKEND": "triton"}
    return [
        replace(job, environment={**job.environment, **chosen})
        for job in _sharded_jobs(options, "triton", files, cores())
    ]


def find_sanitizer(given: str | None) -> str | None:
    name = given or "compute-sanitizer"
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def _sanitizer_jobs(options: Options, tool: str, environment: dict[str, str]) -> list[Job]:
    program = find_sanitizer(options.sanitizer)
    if program is None:
        raise CannotRun(f"{options.sanitizer or 'compute-sanitizer'} is not there")
    arguments = {
        # torch asks the driver for what it may not have, and copes with the answer.
        "memcheck": ("--report-api-errors", "no"),
        # Of NVIDIA's libraries we could mend nothing, and it is slow: our kernels' namespace.
        "racecheck": ("--kernel-name", "kns=3vne"),
    }[tool]
    command = (
        *(program, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS), *arguments),
        *_pytest(options, tool, "-m", "sanitize", str(TESTS / "test_device.py")),
    )
    return [Job(tool, command, LIMIT_S[tool], {"OMP_NUM_THREADS": "1", **environment})]


def memcheck_jobs(options: Options, left_s: float) -> list[Job]:
    """Every tensor is an allocation of its own, so that none hides a neighbour's bounds."""
    return _sanitizer_jobs(options, "memcheck", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def racecheck_jobs(options: Options, left_s: float) -> list[Job]:
    return _sanitizer_jobs(options, "racecheck", {})


def device_jobs(options: Options, left_s: float) -> list[Job]:
    count = str(options.random_shapes)
    path = str(TESTS / "test_device.py")
    command = _pytest(options, "device", "--random-shapes", count, path)
    # Alone, yet few: threads that wait for each other cost more than small matrices bring.
    threads = str(max(1, min(4, cores() // 2)))
    return [Job("device", command, LIMIT_S["device"], {"OMP_NUM_THREADS": threads})]


def benchmark_jobs(options: Options, left_s: float) -> list[Job]:
    """In what is left, less what the last step takes if it is to come."""
    kept_s = TRAINING_S[options.device] if "training-step" in options.only else 0
    seconds = left_s - kept_s - GRACE_S
    if options.rehearsal:
        seconds = min(seconds, 40.0)
        case = f"--sizes {REHEARSED_SIZES} --batches 1 --case-seconds 0.2 --threads 1"
    else:
        case = f"--sizes {SIZES} --batches 1,64 --case-seconds 0.6"
    if seconds < LEAST_S:
        raise NoTimeLeft
    command = (
        *(sys.executable, str(BENCH / "compare_vs_torch.py"), "--device", options.device),
        *(*case.split(), "--out", "benchmark.csv", "--stop-after", f"{seconds:.0f}"),
    )
    return [Job("benchmark", command, seconds + GRACE_S)]


def training_step_jobs(options: Options, left_s: float) -> list[Job]:
    case = "--quick"
    if options.rehearsal:
        case += " --backbone resnet18 --batches 4 --case-seconds 1"
    command = (
        *(sys.executable, str(BENCH / "training_step.py"), "--device", options.device),
        *(*case.split(), "--out", "training-step.csv"),
    )
    return [Job("training-step", command, left_s)]


JOBS: dict[str, Callable[[Options, float], list[Job]]] = {
    "environment": environment_jobs,
    "tests": tests_jobs,
    "memcheck": memcheck_jobs,
    "racecheck": racecheck_jobs,
    "device": device_jobs,
    "triton": triton_jobs,
    "benchmark": benchmark_jobs,
    "training-step": training_step_jobs,
}


# ---------------------------------------------------------------------------------------------
# Steps: what became of them
# ---------------------------------------------------------------------------------------------


def read_junit(path: Path, report: Report) -> None:
    """Add the tests of one pytest process to a report."""
    reasons: Counter[str] = Counter(report.skip_reasons)
    for case in ElementTree.parse(path).iter("testcase"):
        found = {child.tag: child for child in case}
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        problem = found.get("failure", found.get("error"))
        if problem is not None:
            report.failed += 1
            report.fail(name, f"{problem.get('message', '')}\n{problem.text or ''}".strip())
        elif "skipped" in found:
            report.skipped += 1
            reasons[found["skipped"].get("message", "no reason given")] += 1
        else:
            report.passed += 1
    report.skip_reasons = dict(reasons)


def _end_of(log: str, lines: int = 15) -> str:
    return "\n".join(log.strip().splitlines()[-lines:])


def _why(ended: Ended) -> str:
    """How a process ended that should have ended otherwise."""
    if ended.status is None:
        return f"stopped after {ended.seconds:.0f} s"
    if ended.status < 0:
        return f"ended by {signal.Signals(-ended.status).name}"
    return f"exit status {ended.status}"


def judge_pytest(report: Report, ended: Sequence[Ended], work: Path) -> None:
    for each in ended:
        known = each.status in (0, 1, NO_TESTS, FOUND_ERRORS)  # 1: failures, in the report
        try:
            read_junit(work / f"{each.job.name}.xml", report)
        except (OSError, ElementTree.ParseError):
            known = False
        if not known:
            report.fail(each.job.name, f"{_why(each)}\n{_end_of(each.log)}")
    if report.passed == 0 and not report.failures:
        report.fail(report.step, f"no test has run\n{_end_of(ended[0].log)}")


def judge_tests(report: Report, ended: Sequence[Ended], work: Path) -> None:
    judge_pytest(report, ended, work)
    lacking = table_files()[1]
    report.detail = "; ".join(
        f"{file} not run: needs {', '.join(n)}" for file, n in lacking.items()
    )


def judge_sanitizer(report: Report, ended: Sequence[Ended], work: Path) -> None:
    """The tests passed under it, and its own summary says that it has looked and found nothing."""
    judge_pytest(report, ended, work)
    log = ended[0].log
    summaries = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", log)
    report.detail = summaries[-1] if summaries else "no summary"
    if ended[0].status == FOUND_ERRORS or not summaries:
        lines = [line for line in log.splitlines() if line.startswith("=========")]
        report.fail(f"compute-sanitizer {report.step}", "\n".join(lines) or _end_of(log))


def judge_environment(report: Report, ended: Sequence[Ended], work: Path) -> None:
    if ended[0].status != 0:
        report.fail(report.step, f"{_why(ended[0])}\n{_end_of(ended[0].log)}")


NOT_OURS_TO_MEND = ("not run", "no step")
"""How notes begin on what would take too long or too much memory."""


def _fault(row: Mapping[str, str]) -> bool:
    """A row of ours without a number. cuSOLVER, behind `ours-eigh`, promises no graph capture."""
    name, note = row.get("provider", row.get("loss", "")), row.get("note", "")
    if not name.startswith("ours") or not note or note.startswith(NOT_OURS_TO_MEND):
        return False
    return not (name == "ours-eigh" and row.get("launch") == "graph")


def judge_benchmark(report: Report, ended: Sequence[Ended], work: Path) -> None:
    """It ended by itself, with rows. A row without a number says why; one of ours must have one."""
    path = work / f"{report.step}.csv"
    rows: list[dict[str, str]] = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    without = sum(bool(row.get("note")) for row in rows)
    stopped = re.findall(r"stopped after \d+ of \d+ cases", ended[0].log)
    report.detail = ", ".join([f"{len(rows)} rows", f"{without} with a note", *stopped])
    for row in filter(_fault, rows):
        case = ("provider", "loss", "mode", "launch", "l2", "dtype", "n", "d", "batch", "image")
        label = " ".join(f"{name}={row[name]}" for name in case if row.get(name))
        report.fail(f"{report.step}: {label}", row["note"])
    if ended[0].status != 0 or not rows:
        report.fail(report.step, f"{_why(ended[0])}\n{_end_of(ended[0].log)}")


JUDGES: dict[str, Callable[[Report, Sequence[Ended], Path], None]] = {
    "environment": judge_environment,
    "tests": judge_tests,
    "memcheck": judge_sanitizer,
    "racecheck": judge_sanitizer,
    "device": judge_pytest,
    "triton": judge_pytest,
    "benchmark": judge_benchmark,
    "training-step": judge_benchmark,
}


# ---------------------------------------------------------------------------------------------
# What there is: run as a process of its own, as it is the first to use the GPU
# ---------------------------------------------------------------------------------------------


def _gpu() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv"],
            capture_output=True,
            text=True,
            timeout=20,
        )
        smi = (done.stdout + done.stderr).strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        smi = f"nvidia-smi: {error}"
    return {
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "gpus": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda_build_info": torch.ops.vne_kernels.cuda_build_info(),
        "nvidia_smi": smi,
    }


def describe(device: str, path: str) -> None:
    """Write what there is to `path`, and see that the kernels run at all."""
    entropy = float(vne_kernels.vn_entropy(torch.eye(4, device=device)))
    if not math.isclose(entropy, math.log(4), rel_tol=1e-5):
        raise RuntimeError(f"vn_entropy(eye(4)) on {device} is {entropy}, not log 4")
    found: dict[str, object] = {
        **harness.environment(torch.device(device)),
        "python": platform.python_version(),
        "package": vne_kernels.__version__,
        "backends": vne_kernels.available_backends(),
        "cores": cores(),
        "missing": [name for name in OPTIONAL if importlib.util.find_spec(name) is None],
        **(_gpu() if device == "cuda" else {}),
    }
    Path(path).write_text(json.dumps(found, indent=1))
    for name, value in found.items():
        print(f"{name}: {value}")


# ---------------------------------------------------------------------------------------------
# Files and screen
# ---------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Under a temporary name beside `path`, then renamed: no half-written file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def table(reports: Sequence[Report]) -> str:
    lines = [f"{'step':<15}{'result':<9}{'passed':>7}{'failed':>7}{'skipped':>8}{'s':>6}  detail"]
    for r in reports:
        counts = f"{r.passed:>7}{r.failed:>7}{r.skipped:>8}"
        lines.append(f"{r.step:<15}{r.result:<9}{counts}{r.seconds:>6.0f}  {r.detail}".rstrip())
        lines += [f"{'':<26}skipped {count}: {why}" for why, count in r.skip_reasons.items()]
    return "\n".join(lines)


def verdict(reports: Sequence[Report]) -> tuple[bool, str]:
    """Whether every step that could run has passed; the last line."""
    failed = [r.step for r in reports if r.result == "failed"]
    not_run = [f"{r.step} ({r.detail})" for r in reports if r.result == "not run"]
    if not failed and not not_run:
        return True, f"all {len(reports)} steps passed"
    passed = sum(r.result == "passed" for r in reports)
    parts = [f"{passed} of {len(reports)} steps passed"]
    if failed:
        parts.append(f"FAILED: {', '.join(failed)}")
    if not_run:
        parts.append(f"not run: {', '.join(not_run)}")
    good = passed > 0 and all(r.result == "passed" or r.excused for r in reports)
    return good, "; ".join(parts)


class Screen:
    """Results on stdout, progress on stderr; a rehearsal says in every line that it is one."""

    def __init__(self, options: Options) -> None:
        self.prefix = "rehearsal on the CPU | " if options.rehearsal else ""
        self.shown_s = 0.0

    def say(self, text: str) -> None:
        for line in text.splitlines():
            print(f"{self.prefix}{line}", flush=True)

    def progress(self, running: list[str], seconds: float) -> None:
        """Which processes run, every ten seconds."""
        if running and not 0 <= seconds - self.shown_s < 10:
            self.shown_s = seconds
            names = ", ".join(running if len(running) < 5 else [*running[:4], "..."])
            line = f"{self.prefix}[{seconds:.0f} s] {len(running)} running: {names}"
            print(line, file=sys.stderr, flush=True)

    def show(self, report: Report) -> None:
        self.say(
            f"{report.step}: {report.result}, {report.passed} passed, {report.failed} failed, "
            f"{report.skipped} skipped, {report.seconds:.0f} s"
            + (f"; {report.detail}" if report.detail else "")
        )
        for failure in report.failures[:10]:
            first = (failure["message"].splitlines() or [""])[0]
            self.say(f"  {failure['id']}: {first[:200]}")
        if len(report.failures) > 10:
            self.say(f"  and {len(report.failures) - 10} more: gpu_check.json")


# ---------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------


@dataclass
class Check:
    """One run: what is known so far, and where it is kept."""

    options: Options
    work: Path
    screen: Screen
    begin: float = field(default_factory=time.monotonic)
    reports: list[Report] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def left_s(self) -> float:
        return self.options.minutes * 60 - (time.monotonic() - self.begin)

    def run_stage(self, stage: Sequence[str]) -> None:
        jobs = self.plan(stage)
        step_of = {job: step for step, of_step in jobs.items() for job in of_step}
        ended: dict[str, list[Ended]] = {step: [] for step in jobs}
        with closing(run_jobs(tuple(step_of), self.work, self.screen.progress)) as all_ended:
            for each in all_ended:
                step = step_of[each.job]
                ended[step].append(each)
                if len(ended[step]) == len(jobs[step]):
                    self.add(self.judge(step, ended[step]))

    def plan(self, stage: Sequence[str]) -> dict[str, list[Job]]:
        """The processes of each step that can run."""
        jobs: dict[str, list[Job]] = {}
        for step in stage:
            left_s = self.left_s()
            try:
                if left_s < LEAST_S:
                    raise NoTimeLeft
                planned = JOBS[step](self.options, left_s)
                latest_s = left_s + GRACE_S
                jobs[step] = [replace(j, limit_s=min(j.limit_s, latest_s)) for j in planned]
            except CannotRun as reason:
                self.add(Report(step, "not run", str(reason), excused=True))
            except NoTimeLeft:
                used = f"the {self.options.minutes:g} minutes are used up"
                self.add(Report(step, "not run", used))
        return jobs

    def judge(self, step: str, ended: Sequence[Ended]) -> Report:
        report = Report(step, "passed", seconds=round(max(each.seconds for each in ended), 1))
        JUDGES[step](report, ended, self.work)
        for each in ended:
            self.log.append(f"==== {each.job.name}: {_why(each)}, {each.seconds:.1f} s")
            self.log.append(each.log)
        return report

    def add(self, report: Report) -> None:
        """A step has ended: show it and write down all that is known."""
        self.reports.append(report)
        self.reports.sort(key=lambda r: STEPS.index(r.step))
        self.screen.show(report)
        self.write()

    def interrupted(self) -> None:
        known = {report.step for report in self.reports}
        for step in (step for step in self.options.only if step not in known):
            self.add(Report(step, "not run", "interrupted"))

    def environment(self) -> dict[str, object]:
        path = self.work / "environment.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def write(self) -> None:
        out, environment = self.options.out, self.environment()
        passed, last_line = verdict(self.reports)
        complete = len(self.reports) == len(self.options.only)
        known = {
            "rehearsal": self.options.rehearsal,
            "passed": passed and complete,
            "complete": complete,
            "verdict": last_line,
            "seconds": round(time.monotonic() - self.begin, 1),
            "options": {k: str(v) for k, v in asdict(self.options).items()},
            "environment": environment,
            "steps": [asdict(report) for report in self.reports],
        }
        where = {column: environment.get(column, "-") for column in COLUMNS[:4]}
        if self.options.rehearsal:
            where["device_name"] = f"rehearsal on the CPU: {where['device_name']}"
        rows = [
            {**where, **{k: v for k, v in asdict(r).items() if k in COLUMNS}} for r in self.reports
        ]
        write_text(out / "gpu_check.json", json.dumps(known, indent=1) + "\n")
        harness.write_csv(out / "gpu_check.csv", COLUMNS, rows)
        write_text(out / "gpu_check.log", self.screen.prefix + "\n".join(self.log) + "\n")
        name = "rehearsal"  # on a GPU as bench/results/ has it
        if not self.options.rehearsal:
            name = harness.slug(str(environment.get("device_name", "cuda")))
        for step, ending in (("benchmark", ""), ("training-step", "-training-step")):
            for suffix in (".csv", ".csv.partial"):
                source = self.work / f"{step}{suffix}"
                if source.is_file():
                    shutil.copy(source, out / f"{name}{ending}{suffix}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM, as a time limit around this program sends it, is taken as Ctrl-C."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(options: Options) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check") as work, _interruptible():
        check = Check(options, Path(work), Screen(options))
        interrupted = False
        try:
            for stage in STAGES:
                check.run_stage([step for step in stage if step in options.only])
        except KeyboardInterrupt:
            interrupted = True
            check.interrupted()
        passed, last_line = verdict(check.reports)
        check.screen.say(f"\n{table(check.reports)}\n\n{options.out}\n{last_line}")
    if interrupted:
        return 130
    return 0 if passed else 1


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def _steps(text: str) -> tuple[str, ...]:
    for name in text.split(","):
        if name not in STEPS:
            raise argparse.ArgumentTypeError(f"wanted some of {','.join(STEPS)}, got {name!r}")
    return tuple(step for step in STEPS if step in text.split(","))


def parse_arguments(argv: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description="Tests, sanitizers and benchmarks of the CUDA kernels on this machine's GPU.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    add("--out", type=Path, help="folder; default: gpu_check-<device>-<date> in this one")
    add("--minutes", type=arguments.duration, default=8.0, help="for everything (8)")
    add("--random-shapes", type=arguments.positive, help="cases; default: 1000, in a rehearsal 60")
    add("--only", type=_steps, default=STEPS, metavar="STEP,...", help=", ".join(STEPS))
    add("--sanitizer", metavar="PROGRAM", help="default: compute-sanitizer, where CUDA has it")
    given = parser.parse_args(argv)
    if given.device == "cuda" and (reason := vne_kernels.available_backends()["cuda"]):
        parser.error(f"--device cuda: {reason}")
    return Options(
        device=given.device,
        out=(given.out or Path(f"gpu_check-{given.device}-{time.strftime('%Y-%m-%d')}")).resolve(),
        minutes=given.minutes,
        random_shapes=given.random_shapes or (1000 if given.device == "cuda" else 60),
        only=given.only,
        sanitizer=given.sanitizer,
    )


if __name__ == "__main__":
    sys.exit(run(parse_arguments()))
