"""Many runs: each trained and evaluated by ``vne-pretrain`` itself, in a process of its own.

What is done is read from the run folders: a sweep that was stopped goes on when it is called again,
and one called with more runs trains only those that are missing.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from tqdm import tqdm

from vne_kernels.common.reading import printable
from vne_kernels.common.stopping import PREEMPTIONS, REQUEUE
from vne_kernels.pretrain import checkpoints
from vne_kernels.pretrain.disk import held

PROGRAM = (sys.executable, "-m", "vne_kernels.pretrain")
TRAINED, EVALUATED = "results.json", "linear_eval.json"  # what the two commands end with
LOG = "log.txt"
TAIL_LINES, TAIL_BYTES = 15, 1 << 16  # of a failed run's log
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Run:
    """A run folder, and the options by which ``train`` and ``linear-eval`` fill it."""

    folder: Path
    train: tuple[str, ...]
    linear_eval: tuple[str, ...] = ()

    def next_command(self) -> tuple[str, ...] | None:
        """The arguments that the folder's files ask for; ``None``: the run is finished."""
        if not (self.folder / TRAINED).exists():
            resume = ("--resume",) if checkpoints.files(self.folder) else ()
            return ("train", "--out", str(self.folder), *self.train, *resume)
        if not (self.folder / EVALUATED).exists():
            return ("linear-eval", str(self.folder), *self.linear_eval)
        return None

    @property
    def finished(self) -> bool:
        return self.next_command() is None


@dataclass
class Outcome:
    """How a sweep ended."""

    failed: list[Run] = field(default_factory=list)
    signum: int | None = None  # of the signal that stopped it before all was done


def sweep(out: Path, runs: Sequence[Run], jobs: int, after_each: Callable[[], None]) -> Outcome:
    """Train and evaluate what is not finished of ``runs``, ``jobs`` of them side by side.

    A run that fails is reported, and the others go on. Ctrl-C, SIGTERM, SIGUSR1 and the end of
    the terminal reach every process as Ctrl-C, and the sweep waits until they have saved.

    Args:
        out: the folder of the sweep, locked while it goes on.
        runs: in the order in which they start.
        jobs: with 1 the output of the processes is shown, else it goes to each run's ``log.txt``.
        after_each: called when a run is finished, and at the start if some are.

    Raises:
        OptionError: ``out`` cannot be written, or another sweep is at work in it.
    """
    outcome = Outcome()
    waiting = [run for run in runs if not run.finished]
    done = len(runs) - len(waiting)
    running: list[_Child] = []
    with (
        held("out", out, "sweep") as lock,
        _noted_signals() as signals,
        # smoothing=0: the mean of all, since runs of a grid differ in length by design
        tqdm(total=len(runs), initial=done, unit="run", smoothing=0, dynamic_ncols=True) as bar,
        _none_left_behind(running),
    ):
        if done:
            after_each()
        passed_on = 0
        while running or (waiting and not signals):
            while waiting and len(running) < jobs and not signals:
                running.append(_Child(waiting.pop(0), jobs, lock))
                _show(bar, running, jobs)
            if passed_on < len(signals):
                passed_on = len(signals)
                bar.write(f"stopping: waiting for {_names(running)} to save", sys.stderr)
                for child in running:
                    child.interrupt()
            time.sleep(POLL_SECONDS)
            if jobs > 1 and sys.stderr.isatty():
                bar.refresh()  # its clock
            for child in [child for child in running if not child.goes_on(bool(signals))]:
                running.remove(child)
                if child.run.finished:
                    bar.update()
                    after_each()
                elif child.process.returncode == REQUEUE:
                    signals.append(signal.SIGTERM)  # it reached the process, and not us yet
                elif not signals:
                    outcome.failed.append(child.run)
                    bar.write(child.failure(), sys.stderr)
                _show(bar, running, jobs)
        if signals and not all(run.finished for run in runs):
            outcome.signum = signals[0]
    return outcome


class _Child:
    """The process at work on a run: ``train``, and when that is done ``linear-eval``."""

    def __init__(self, run: Run, jobs: int, lock: int) -> None:
        self.run, self.jobs, self.lock = run, jobs, lock
        self._start()

    def _start(self) -> None:
        self.arguments = self.run.next_command() or ()
        with self._output() as output:
            self.process = subprocess.Popen(
                [*PROGRAM, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment(self.jobs),
                # A terminal's Ctrl-C would come twice: from the terminal and from the sweep.
                start_new_session=True,
                # Should the sweep be killed, its processes still keep the next sweep away.
                pass_fds=[self.lock],
            )

    @contextmanager
    def _output(self) -> Iterator[IO[str] | None]:
        if self.jobs == 1:
            yield None  # the sweep's own
            return
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with (self.run.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(f"$ vne-pretrain {shlex.join(self.arguments)}\n")
            file.flush()
            yield file

    def goes_on(self, stopping: bool) -> bool:
        """Whether a process is at work; starts the run's next one unless ``stopping``."""
        code = self.process.poll()
        if code is None:
            return True
        following = self.run.next_command()
        # The same command again: it said that it succeeded, and left nothing.
        if stopping or code or following is None or following[0] == self.arguments[0]:
            return False
        self._start()
        return True

    def interrupt(self) -> None:
        """Ctrl-C for the process and for those it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)

    def failure(self) -> str:
        what = f"{self.run.folder}: {self.arguments[0]} failed, exit code {self.process.returncode}"
        if self.jobs == 1:
            return f"{what} (its output is above)"
        log = self.run.folder / LOG
        return "\n".join(
            [f"{what}; the end of {log}:", *(f"    {printable(line)}" for line in _tail(log))]
        )


def _environment(jobs: int) -> dict[str, str]:
    """Processes side by side share the processors; a number of threads that is set stays."""
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    return ({"OMP_NUM_THREADS": str(threads)} if jobs > 1 else {}) | dict(os.environ)


def _tail(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        # splitlines: of a progress bar, which overwrites itself, the last state is what counts
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip()][-TAIL_LINES:]


def _names(running: Sequence[_Child]) -> str:
    return ", ".join(child.run.folder.name for child in running) or "nothing"


def _show(bar: tqdm[Any], running: Sequence[_Child], jobs: int) -> None:
    bar.set_postfix_str(_names(running) if running else "")
    if jobs == 1 and running:
        print(file=sys.stderr, flush=True)  # the bar is the heading of the process's own output


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Signals that ask the sweep to end, noted instead of obeyed."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    signums = [signal.SIGINT, *PREEMPTIONS]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signums.append(signal.SIGHUP)
    previous = [(signum, signal.signal(signum, note)) for signum in signums]
    try:
        yield received
    finally:
        for signum, handler in previous:
            signal.signal(signum, handler)


@contextmanager
def _none_left_behind(running: Sequence[_Child]) -> Iterator[None]:
    """After an error of the sweep itself, such as a full disk, the processes stop as well."""
    try:
        yield
    finally:
        for child in running:
            child.interrupt()
        for child in running:
            child.process.wait()
