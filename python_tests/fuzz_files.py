"""Fuzz the files that the programs read: damaged copies of small valid files, of every format.

    python fuzz_files.py --mutants 300 --out table.md --keep failures
    python fuzz_files.py --kinds npy,safetensors
    python fuzz_files.py --only npy:17

Each row of the table is a kind of file. Each mutant of it is read by the program in a child process
with limits, and ends in one class:

    refused     exit code 1, 2 or 3 with a message
    same        exit code 0 and the numbers of the valid file
    other       exit code 0 and other numbers, which nothing in the file could have shown
    WRONG       exit code 0 and other numbers, though a checksum or a declared count shows the
                damage; or numbers that cannot be read, such as NaN in JSON
    traceback   an exception that nothing caught, or an exit code without a message
    hang        still running after the time limit
    crash       ended by a signal, or more than 50 processes
    memory      more than 300 MB above the peak of the valid file

The mutants are a function of the seed, the kind and the index, and of the valid file's bytes.
Peak memory is the largest of the child and of the processes that it starts, beyond the resident
memory that it has after the imports. Exit code 1: a mutant ended in one of the last five classes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from fuzz_kinds import KINDS, Kind
from fuzz_mutations import Random

CLASSES = ("refused", "same", "other", "WRONG", "traceback", "hang", "crash", "memory")
BAD = CLASSES[3:]
HEADER = ("file", "mutants", *CLASSES, "peak (MB)")
MEMORY_MB = 300  # more is the class "memory"
CEILING_MB = 2048  # more ends the child at once
PROCESSES = 50  # likewise
FILE_BYTES = 512 << 20  # the largest file that a child can write
UNCAUGHT = 120  # exit code of a child whose program raised
VALID = -1  # the index of the file without damage
SAVED_BYTES = 1 << 20  # larger mutants are not saved: --only makes them again

# ---- a child: one mutant through the program ---------------------------------------------------


def memory_mb(name: str, process: int | str = "self") -> float:
    """A line of /proc/PID/status, 0 where the process is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/status") as file:
        for line in file:
            if line.startswith(name):
                return int(line.split()[1]) / 1024
    return 0


def child(act: Callable[[Path], dict[str, Any]], slot: Path) -> NoReturn:
    """Do something in this process, a fork, and end it; ``slot`` is where all of it goes."""
    code, about = UNCAUGHT, {}
    try:
        os.setsid()
        for number, name, mode in ((0, os.devnull, "rb"), (1, "out", "wb"), (2, "err", "wb")):
            with open(slot / name, mode) as file:
                os.dup2(file.fileno(), number)
        # pytest has put others in their place
        sys.stdout, sys.stderr = (open(i, "w", closefd=False) for i in (1, 2))  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tempfile.tempdir = str(slot)
        os.chdir(slot)
        about = act(slot)
        code = about["code"]
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    about.setdefault("peak", memory_mb("VmHWM"))
    with contextlib.suppress(BaseException):
        (slot / "about.json").write_text(json.dumps(about))
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 0xFF)


def make(kind: Kind, folder: Path) -> dict[str, Any]:
    kind.make(folder)
    return {"code": 0}


def read_mutant(kind: Kind, valid: Path, index: int, rng: Random, slot: Path) -> dict[str, Any]:
    """Make the mutant, run the program on it, and read its numbers."""
    work = slot / "work"
    # Large files are links: the programs replace files and append to small tables alone.
    shutil.copytree(valid, work, copy_function=link_if_large)
    (path,) = work.glob(kind.file)
    before = after = path.read_bytes()
    if index != VALID:
        after = kind.mutate(before, rng)
        path.unlink()
        if kind.forged:
            digest = hashlib.sha256(after).hexdigest()
            named = re.sub(r"[0-9a-f]{16,64}$", lambda found: digest[: len(found[0])], path.stem)
            path = path.with_stem(named)
        path.write_bytes(after)
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    (slot / "base").write_text(str(memory_mb("VmRSS")))
    code = kind.run(valid, work)
    about = {"code": code, "peak": memory_mb("VmHWM"), "excused": False}
    if code == 0:
        try:
            about["numbers"] = json.loads(json.dumps(kind.numbers(work)))
            about["excused"] = after == before or kind.excuse(before, after, work)
        except Exception as error:
            about["numbers"] = f"{type(error).__name__}: {error}"
    return about


def link_if_large(source: str, target: str) -> None:
    (os.link if os.path.getsize(source) > 1 << 20 else shutil.copy2)(source, target)


# ---- the parent: limits and classes ------------------------------------------------------------


@dataclass
class End:
    """How a mutant ended."""

    kind: str
    index: int
    what: str = ""
    detail: str = ""
    peak_mb: float = 0
    numbers: Any = None
    stderr: str = ""


@dataclass
class Child:
    kind: str
    index: int
    slot: Path
    pid: int
    deadline: float
    peak: float = 0  # as far as it was seen from outside
    killed: str = ""  # why, where it was killed
    polls: int = 0


@dataclass
class Tally:
    """A row of the table."""

    counts: Counter[str] = field(default_factory=Counter)
    peak_mb: float = 0

    def add(self, end: End) -> None:
        self.counts[end.what] += 1
        self.peak_mb = max(self.peak_mb, end.peak_mb)


def session_of(pid: int) -> list[int]:
    """The processes of the session that ``pid`` leads."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[3]) == pid:
                    found.append(int(name))
    return found


class HarnessError(Exception):
    """A valid file or a mutant cannot be made, or the program refuses the valid file."""


class Fuzzer:
    """Valid folders, children, and their ends."""

    def __init__(self, root: Path, seed: int, kinds: dict[str, Kind] | None = None) -> None:
        self.root, self.seed, self.kinds = root, seed, kinds or KINDS
        self.valid: dict[Callable[[Path], None], Path] = {}
        self.expected: dict[str, End] = {}

    def slot(self, name: str, index: int) -> Path:
        """Where all files of a child are."""
        return self.root / f"{name}-{index}".replace(":", "-")

    def _valid(self, name: str) -> End:
        """Make the valid file of a kind and read it: what its mutants are compared with."""
        kind = self.kinds[name]
        if kind.make not in self.valid:
            folder = self.root / f"valid-{len(self.valid)}"
            folder.mkdir()
            self.valid[kind.make] = folder
            slot = self.root / "make"
            slot.mkdir()
            pid = os.fork()
            if not pid:
                child(lambda slot: make(kind, folder), slot)
            if os.waitpid(pid, 0)[1]:
                raise HarnessError(f"{name} cannot be made: {(slot / 'err').read_text()}")
            shutil.rmtree(slot)
        (end,) = self._ends(name, [VALID], 1)
        if end.what != "same":
            raise HarnessError(f"the valid file of {name} ends in {end}")
        return end

    def ends_of(self, name: str, indices: Sequence[int], jobs: int) -> Iterator[End]:
        """Run the mutants of a kind, so many side by side."""
        if name not in self.expected:
            self.expected[name] = self._valid(name)
        yield from self._ends(name, indices, jobs)

    def _ends(self, name: str, indices: Sequence[int], jobs: int) -> Iterator[End]:
        waiting, running = list(reversed(indices)), list[Child]()
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(self._start(name, waiting.pop()))
                for one in list(running):
                    status = self._poll(one)
                    if status is not None:
                        running.remove(one)
                        yield self._judge(one, status)
                        shutil.rmtree(one.slot, ignore_errors=True)
                time.sleep(0.02)
        finally:
            for one in running:
                self._kill(one)
                os.kill(one.pid, signal.SIGKILL)
                os.waitpid(one.pid, 0)
                shutil.rmtree(one.slot, ignore_errors=True)

    def _start(self, name: str, index: int) -> Child:
        kind, slot = self.kinds[name], self.slot(name, index)
        slot.mkdir()
        pid = os.fork()
        if not pid:
            rng = Random(f"{self.seed}:{name}:{index}")
            child(lambda slot: read_mutant(kind, self.valid[kind.make], index, rng, slot), slot)
        return Child(name, index, slot, pid, time.monotonic() + kind.seconds)

    def _poll(self, one: Child) -> int | None:
        """The status of a child that has ended."""
        pid, status = os.waitpid(one.pid, os.WNOHANG)
        if pid:
            self._kill(one)  # what it has left behind
            return status
        # All of /proc is read, which takes a while.
        one.polls += 1
        session = session_of(one.pid) if one.polls % 5 == 0 else [one.pid]
        base = one.slot / "base"
        if base.exists() and (text := base.read_text()):
            for process in session:
                one.peak = max(one.peak, memory_mb("VmRSS", process) - float(text))
        for reason, exceeded in (
            ("memory", one.peak > CEILING_MB),
            ("crash", len(session) > PROCESSES),
            ("hang", time.monotonic() > one.deadline),
        ):
            if exceeded and not one.killed:
                one.killed = reason
                self._kill(one)
        return None

    def _kill(self, one: Child) -> None:
        for _ in range(5):  # a process may start another meanwhile
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
            for process in session_of(one.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def _judge(self, one: Child, status: int) -> End:
        end = End(one.kind, one.index, peak_mb=one.peak)
        about: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            about = json.loads((one.slot / "about.json").read_text())
            end.peak_mb = max(one.peak, about["peak"] - float((one.slot / "base").read_text()))
        with contextlib.suppress(OSError):
            end.stderr = (one.slot / "err").read_text(errors="replace")
        if not (one.slot / "base").exists():
            raise HarnessError(f"{one.kind}:{one.index} cannot be made: {end.stderr}")
        end.numbers = about.get("numbers")
        expected = self.expected.get(one.kind, end)
        code = os.waitstatus_to_exitcode(status)
        if one.killed:
            end.what = one.killed
            end.detail = {"crash": "too many processes"}.get(one.killed, one.killed)
        elif code < 0:
            end.what, end.detail = "crash", signal.Signals(-code).name
        elif end.peak_mb - expected.peak_mb > MEMORY_MB:
            end.what, end.detail = "memory", f"{end.peak_mb:.0f} MB"
        elif "Traceback (most recent call last)" in end.stderr or code == UNCAUGHT:
            end.what, end.detail = "traceback", where(end.stderr)
        elif code in (1, 2, 3) and end.stderr.strip():
            end.what = "refused"
        elif code != 0:
            end.what, end.detail = "traceback", f"exit code {code} without a message"
        elif end.numbers == expected.numbers:
            end.what = "same"
        else:
            end.what = "other" if about.get("excused") else "WRONG"
            end.detail = end.numbers if "Error: " in str(end.numbers) else "other numbers"
        return end


def where(stderr: str) -> str:
    """The exception, the last function of ours and the last of all that it came through."""
    frames = re.findall(r'File "([^"]+)", line \d+, in (\S+)', stderr)
    ours = [frame for frame in frames if "vne_kernels/" in frame[0]]
    last = dict.fromkeys([*ours[-1:], *frames[-1:]])
    places = [f"{re.sub('.*(site-packages|python[^/]*)/', '', path)}:{name}" for path, name in last]
    raised = re.findall(r"^([A-Za-z_][\w.]*)(?:: |$)", stderr, re.M)
    return f"{raised[-1] if raised else '?'} in {', '.join(places)}"


# ---- the command -------------------------------------------------------------------------------


def import_everything() -> None:
    """Once, before the forks. torch and its threads must not have been used by then."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["MPLBACKEND"] = "agg"
    import pyarrow.parquet
    import safetensors.torch
    import sklearn.datasets
    import torch
    import torchvision.datasets.folder
    import tqdm
    from matplotlib.figure import Figure
    from PIL import Image

    from vne_kernels.pretrain import export, knn, linear_eval, report, run
    from vne_kernels.spectrum_files import readers, work

    del sklearn, torchvision, pyarrow, safetensors, export, knn, linear_eval, report, run
    del readers, work
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # or it starts a thread
    Image.init()
    # Both take most of the time, and no part in the reading of files.
    os.fsync = lambda descriptor: None
    savefig = Figure.savefig
    Figure.savefig = lambda self, *rest, **named: savefig(self, *rest, **named | {"dpi": 20})
    gc.collect()
    gc.freeze()


def markdown(tallies: dict[str, Tally]) -> str:
    def cells(name: str, counts: Counter[str], peak: float) -> list[str]:
        numbers = [sum(counts.values()), *(counts[what] for what in CLASSES)]
        return [name, *map(str, numbers), f"{peak:.0f}"]

    every = sum((tally.counts for tally in tallies.values()), Counter[str]())
    rows = [cells(name, tally.counts, tally.peak_mb) for name, tally in tallies.items()]
    rows.append(cells("all", every, max((t.peak_mb for t in tallies.values()), default=0)))
    widths = [max(len(row[i]) for row in (HEADER, *rows)) for i in range(len(HEADER))]
    lines = [[name.ljust(width) for name, width in zip(HEADER, widths, strict=True)]]
    lines.append(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for first, *rest in rows:
        numbers = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append([first.ljust(widths[0]), *numbers])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def keep_failure(folder: Path, end: End, slot: Path) -> None:
    """A line of JSON, and the mutant itself where it is small."""
    line = {"kind": end.kind, "index": end.index, "what": end.what, "detail": end.detail}
    line |= {"peak_mb": round(end.peak_mb), "stderr": end.stderr[-2000:].splitlines()[-12:]}
    line["numbers"] = str(end.numbers)[:500]
    with (folder / "failures.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    for path in (slot / "work").glob(KINDS[end.kind].file):
        if path.stat().st_size <= SAVED_BYTES:
            shutil.copy(path, folder / f"{slot.name}{path.suffix}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mutants", type=int, default=300, metavar="N", help="of each kind (default: 300)")
    add("--kinds", type=lambda text: text.split(","), default=list(KINDS), metavar="A,B")
    add("--only", metavar="KIND:INDEX", help="this mutant alone, and what its program said")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=2, help="children side by side (default: 2)")
    add("--out", type=Path, metavar="FILE", help="where the table goes too")
    add("--keep", type=Path, metavar="FOLDER", help="where mutants that fail are saved")
    options = parser.parse_args(arguments)
    if options.only:
        options.kinds = [options.only.rpartition(":")[0]]
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"argument --kinds: must be of {', '.join(KINDS)}, got {', '.join(unknown)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    import_everything()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores it
    from tqdm import tqdm

    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        (options.keep / "failures.jsonl").write_text("")
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    fuzzer = Fuzzer(root, options.seed)
    tallies: dict[str, Tally] = {}
    failures: Counter[str] = Counter()
    mutants = {
        name: range(math.ceil(options.mutants * KINDS[name].share)) for name in options.kinds
    }
    if options.only:
        name, _, index = options.only.rpartition(":")
        mutants = {name: range(int(index), int(index) + 1)}
    bar = tqdm(total=sum(map(len, mutants.values())), unit=" mutants", disable=bool(options.only))
    try:
        for name, indices in mutants.items():
            bar.set_description(name)
            tally = tallies[name] = Tally()
            try:
                for end in fuzzer.ends_of(name, indices, options.jobs):
                    tally.add(end)
                    bar.update()
                    if options.only:
                        print(f"{end.what} {end.detail}\n{end.stderr}")
                    if end.what in BAD:
                        failures[f"{end.what}: {end.detail[:120]}: {name}"] += 1
                        if options.keep:
                            keep_failure(options.keep, end, fuzzer.slot(name, end.index))
            except HarnessError as error:
                failures[f"harness: {error}"] += 1
    except KeyboardInterrupt:
        print("\ninterrupted: the table is of what was done", file=sys.stderr)
    finally:
        bar.close()
        shutil.rmtree(root, ignore_errors=True)
    table = markdown(tallies)
    print(table)
    for what, count in sorted(failures.items()):
        print(f"{count:5d}  {what}")
    if options.out:
        write_whole(options.out, table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
