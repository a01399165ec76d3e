"""Checks a build of the CUDA kernels on a machine with a GPU: one command, eight minutes.

    python bench/gpu_check.py                 # everything, into the folder gpu_check
    python bench/gpu_check.py --device cpu    # a rehearsal with a few of the tests: about a minute

Steps, each a process with a time limit: gpu_smoke.py (every kernel once against float64), graphs,
the table of tests with `--backend cuda` and at the same time compute-sanitizer over our kernels
(memcheck, racecheck), test_device.py, and compare_vs_torch.py in float32 and in float64.

A step has passed, failed, run out of time, or not run for lack of something on this machine. The
exit status is 0 only if every step that can run has passed. After each step the folder holds
check.json (results, counts, failures), check.log (all output) and the timings' CSV files.
"""

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import vne_kernels

ROOT = Path(__file__).resolve().parents[1]
TABLE = "value gradient errors losses density absent_rows negative_eigenvalues properties kernels "
TABLE += "torch_integration"
SIZES = "128x512,32x128,64x256,256x1024,512x2048,1024x4096"
PROVIDERS = "gram,syevjBatched,XsyevBatched,ours,ours-eigh,ours-poles"
CORES = len(os.sched_getaffinity(0))


@dataclass
class Step:
    name: str
    command: list[str]  # empty: this machine cannot run it
    limit_s: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)
    result: str = "not run"  # or passed, failed, out of time
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)  # of passed, failed, skipped ...
    failures: dict[str, str] = field(default_factory=dict)  # name: one line
    detail: str = ""  # of a sanitizer its summary, otherwise the end of the output
    ended_by: str = ""  # the check that ended gpu_smoke.py

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {what}" for what, count in self.counts.items())
        return f"{self.name:10} {self.result:11} {self.seconds:4.0f} s  {counts} {self.detail}"

    def start(self, work: Path) -> subprocess.Popen[bytes]:
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "400", **self.environment}
        where = {"cwd": work, "env": variables, "start_new_session": True}
        with (work / f"{self.name}.log").open("wb") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, **where)

    def read(self, status: int | None, log: str, work: Path) -> None:
        """Takes results from the exit status (None: stopped), the output and the CSV file."""
        for ending in re.findall(r"(?m)^.*\d (?:passed|failed|error).* in [\d.]+s", log):
            self.counts = {what: int(n) for n, what in re.findall(r"(\d+) ([a-z]+)", ending)}
        self.failures = dict(re.findall(r"(?m)^(?:FAILED|ERROR) (.+?)(?: - (.*))?$", log))
        if status is not None and (ended := re.search(r"(?m)^check ([^:]+): (?!ok|BAD)(.*)", log)):
            self.ended_by = ended[1]
            self.failures[ended[1]] = ended[2] or "ended its process"
        for timings in work.glob(f"{self.name}.csv*"):  # .partial, if it was stopped
            rows = list(csv.DictReader(timings.read_text().splitlines()))
            self.counts = {"passed": sum(row["note"] == "" for row in rows), "rows": len(rows)}
            for row in rows:  # others may fail; a graph of an eigensolver is not captured
                case = "{provider} {launch} {mode} {n}x{d}, batch {batch}".format(**row)
                if case.startswith("ours") and not re.match("not (run|captured)|$", row["note"]):
                    self.failures[case] = row["note"]
        summaries = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", log)
        last_line = log.strip().rpartition("\n")[2][:200]
        self.detail = summaries[-1] if summaries else "" if self.counts else last_line
        looked = bool(summaries) or "--tool" not in self.command  # a sanitizer says so at its end
        complete = status == 0 and self.counts.get("passed", 0) > 0 and looked
        failed = self.failures or (status is not None and not complete)
        self.result = "failed" if failed else "passed" if complete else "out of time"


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, after which pytest reports what has run; then the end, for its children too."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(8)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(steps: list[Step], work: Path, deadline: float) -> Iterator[tuple[Step, str]]:
    """Runs the steps at the same time and yields each with its output."""
    begin, running = time.monotonic(), []
    try:
        for step in steps:
            if step.command and begin < deadline:
                running.append((step, step.start(work)))
            else:
                step.result = "out of time" if step.command else "not run"
                yield step, ""
        for step, process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, min(begin + step.limit_s, deadline) - time.monotonic()))
            status = process.returncode
            stop(process)
            log = (work / f"{step.name}.log").read_text(errors="replace")
            step.read(status, log, work)
            step.seconds = round(time.monotonic() - begin, 1)
            yield step, log
    finally:
        for _, process in running:
            if process.returncode is None:  # the check was interrupted
                stop(process)


def plan(device: str, work: Path, deadline: float) -> Iterator[list[Step]]:
    """The steps, each made when it begins; those of one list run at the same time."""
    on_gpu = device == "cuda"
    checks = [sys.executable, str(ROOT / "bench/gpu_smoke.py"), "--device", device]
    for name, command in (("smoke", checks), ("graphs", [*checks, "--graphs"] if on_gpu else [])):
        for _ in range(4):  # a new process for the checks behind one that ended its process
            yield [step := Step(name, command, 60)]
            if not step.ended_by:
                break
            command = [*command, "--after", step.ended_by]

    def pytest(processes: int, files: str, *arguments: str) -> list[str]:
        return [
            *(sys.executable, "-m", "pytest", "-q", "--tb=short", "--show-capture=no"),
            *("-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")),
            *("--backend", device, "-n", str(processes), "--dist", "loadgroup"),
            *("-m", "slow or not slow", *arguments),  # instead of the default in pyproject.toml
            *(str(ROOT / f"python_tests/test_{file}.py") for file in files.split()),
        ]

    # Timings must not use kernels that Triton has tuned while other processes ran.
    cache = {"TRITON_CACHE_DIR": str(work / "tests"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    one_thread = {**cache, "OMP_NUM_THREADS": "1"}
    table = pytest(max(2, CORES - 2), TABLE if on_gpu else "errors")
    together = [Step("table", table, 180, one_thread)]
    path = f"{os.environ['PATH']}:{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
    sanitizer = shutil.which("compute-sanitizer", path=path) if on_gpu else None
    # Without torch's cache every tensor is an allocation, so that none hides its neighbor's bounds.
    uncached = {**one_thread, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool, extra in (("memcheck", "49200 --report-api-errors no"), ("racecheck", "49300")):
        command = [
            *(str(sanitizer), "--tool", tool, "--error-exitcode", "99", "--launch-timeout", "200"),
            *("--kernel-name", "kns=3vne", "--port", *extra.split()),
            *pytest(0, "device", "-m", "sanitize"),
        ]
        together.append(Step(tool, command if sanitizer else [], 180, uncached))
    yield together
    few = max(2, CORES // 4)
    shapes = "--random-shapes 300" if on_gpu else "--random-shapes 20 -k random"
    threads = {**cache, "OMP_NUM_THREADS": str(max(1, CORES // few - 1))}
    yield [Step("device", pytest(few, "device", *shapes.split()), 120, threads)]
    for dtype, sizes, limit_s in (("float32", SIZES, 110), ("float64", "128x512,64x256", 60)):
        cases = f"--sizes {sizes} --batches 1,64" if on_gpu else "--sizes 16x32 --batches 1"
        command = [
            *(sys.executable, str(ROOT / "bench/compare_vs_torch.py"), "--device", device),
            *("--providers", PROVIDERS, "--dtypes", dtype, "--out", f"{dtype}.csv"),
            *(*cases.split(), "--call-seconds", "1", "--case-seconds", "0.5"),
            *("--stop-after", str(max(1, min(limit_s, deadline - time.monotonic()) - 20))),
        ]
        yield [Step(dtype, command, limit_s, {"TRITON_CACHE_DIR": str(work / "triton")})]


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks the CUDA kernels on this machine's GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all steps; default: 8")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="default: gpu_check")
    options = parser.parse_args()
    if options.device == "cuda" and (reason := vne_kernels.available_backends()["cuda"]):
        parser.error(f"--device cuda: {reason}")
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no process is left
    deadline, done = time.monotonic() + 60 * options.minutes, []
    with tempfile.TemporaryDirectory() as work, (options.out / "check.log").open("w") as log_file:
        for steps in plan(options.device, Path(work), deadline):
            for step, log in run(steps, Path(work), deadline):
                done.append(step)
                failures = [f"{name}: {text}" for name, text in step.failures.items()]
                print(step, *failures[:10], sep="\n    ", flush=True)
                print(f"==== {step}\n{log[:500_000]}", file=log_file, flush=True)
                for timings in Path(work).glob("*.csv*"):
                    shutil.copy(timings, options.out)
                (options.out / "check.json").write_text(json.dumps([*map(asdict, done)], indent=1))
    return int(not all(step.result in ("passed", "not run") for step in done))


if __name__ == "__main__":
    sys.exit(main())
