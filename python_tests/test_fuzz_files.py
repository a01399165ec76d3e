"""The harness of fuzz_files.py: its classes, and a few mutants of every kind that is read quickly.

The long form is a command: python fuzz_files.py --mutants 300
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fuzz_files
import pytest
from fuzz_files import Fuzzer
from fuzz_kinds import Kind, always, never

NUMBERS = "1.5"


def write(number: str) -> Callable[[Path], int]:
    def act(work: Path) -> int:
        (work / "number").write_text(number)
        return 0

    return act


def refuse(work: Path) -> int:
    print("error: it is damaged", file=sys.stderr)
    return 1


def be_silent(work: Path) -> int:
    return 1


def fail(work: Path) -> int:
    raise KeyError("x")


def wait(work: Path) -> int:
    time.sleep(60)
    return 0


def die(work: Path) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def fork_many(work: Path) -> int:
    for _ in range(10):
        if not os.fork():
            time.sleep(60)
            os._exit(0)
    return wait(work)


def take_memory(work: Path) -> int:
    taken = b"x" * ((fuzz_files.MEMORY_MB + 50) << 20)
    return refuse(work) if taken else 0


def take_more_than_the_ceiling(work: Path) -> int:
    taken = b"x" * (100 << 20)
    return take_memory(work) if taken and wait(work) else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "excuse", "what"),
    [
        (refuse, never, "refused"),
        (write(NUMBERS), never, "same"),
        (write("2"), always, "other"),
        (write("2"), never, "WRONG"),
        (be_silent, always, "traceback"),
        (fail, always, "traceback"),
        (wait, always, "hang"),
        (die, always, "crash"),
        (fork_many, always, "crash"),
        (take_memory, always, "memory"),
        (take_more_than_the_ceiling, always, "memory"),
    ],
)
def test_every_end_has_its_class(
    act: Callable[[Path], int],
    excuse: Callable[[bytes, bytes, Path], bool],
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(valid: Path, work: Path) -> int:
        return (write(NUMBERS) if (work / "file").read_text() == "good" else act)(work)

    kind = Kind(
        make=lambda folder: (folder / "file").write_text("good"),
        file="file",
        run=run,
        numbers=lambda work: (work / "number").read_text(),
        excuse=excuse,
        mutate=lambda data, rng: b"bad",
        seconds=4 if act is wait else 20,
    )
    if act is take_more_than_the_ceiling:
        monkeypatch.setattr(fuzz_files, "CEILING_MB", 50)
    monkeypatch.setattr(fuzz_files, "PROCESSES", 5)
    fuzzer = Fuzzer(tmp_path, 0, {"one": kind})
    (end,) = fuzzer.ends_of("one", [0], 1)
    assert end.what == what, end
    assert not list(tmp_path.glob("one-*"))
    if act is fail:
        assert end.detail.startswith("KeyError in ")


#: These train, or draw pictures.
SLOW = ("linear_eval.ckpt", "checkpoint", "checkpoint-forged", "knn:config", "report:config")
SLOW += tuple(f"report:{name}" for name in ("metrics", "epochs", "spectrum", "events"))


@pytest.mark.slow
def test_some_mutants_of_every_kind(tmp_path: Path) -> None:
    """In a process of its own: children of one that has used torch's threads could hang.

    With this seed four kinds failed before the programs distrusted their files.
    """
    kinds = ",".join(name for name in fuzz_files.KINDS if name not in SLOW)
    done = subprocess.run(
        [sys.executable, fuzz_files.__file__, "--mutants=3", "--seed=9", "--kinds", kinds],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
