"""Kill a small pretraining run at random moments, resume it, and compare it with one never stopped.

    python kill_and_resume.py --kills 20

Every trial starts the run, sends SIGKILL to all its processes at a moment drawn uniformly from the
time that an undisturbed run takes to its last file (start-up, evaluation and report included; the
shortest of those seen, since a busy machine's vary), and calls the same command again, which goes
on with ``--resume auto``; one such call in three is killed as well. When one ends by itself, every
tensor and number of the last checkpoint and of encoder.pt must be equal bit for bit, and the tables
byte for byte. Exit code 1: a trial ended otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny_run import SMALL, write_npz

from vne_kernels.pretrain import checkpoints

TABLES = ("metrics.csv", "epochs.csv", "spectrum.csv", "events.csv")
INTERVALS = ("0", "1")  # seconds between checkpoints, in turn: nothing or several steps to repeat
KILLED_AGAIN = 1 / 3
LIMIT = 600  # seconds for one call; more is a hang


@dataclass
class Trial:
    """What became of a run that was killed at ``moments``, in seconds after each start."""

    moments: list[float] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    # the step at which each later call began, or that it found nothing left to do
    resumed: list[int | str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def call(arguments: list[str], out: Path, log: Path, seconds: float | None) -> int | None:
    """Run the program; its exit code, or None where it was killed after ``seconds``."""
    command = [sys.executable, "-m", "vne_kernels.pretrain", *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--out", str(out), "--resume", "auto"],
            cwd=out.parent,  # not the source folder
            env=os.environ | {"PYTHONUNBUFFERED": "1"},  # a killed process has said all it said
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            return process.wait(LIMIT if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            if seconds is None:
                raise
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Undisturbed:
    """How long the quickest run took, of those that were not killed."""

    def __init__(self, seconds: float = LIMIT) -> None:
        self.seconds = seconds

    def saw(self, began: float, out: Path) -> None:
        """A run that began at that time of the clock, and has ended."""
        self.seconds = min(self.seconds, (out / "report.html").stat().st_mtime - began)


def run_trial(
    arguments: list[str], out: Path, reference: Path, undisturbed: Undisturbed, draw: random.Random
) -> Trial:
    """One trial, in the folder ``out``."""
    while True:  # until a kill came before the end
        shutil.rmtree(out, ignore_errors=True)
        began = time.time()
        trial = _killed_and_resumed(arguments, out, undisturbed.seconds, draw)
        if trial.moments:
            break
        undisturbed.saw(began, out)
    trial.differences = list(differences(reference, out))
    return trial


def _killed_and_resumed(
    arguments: list[str], out: Path, seconds: float, draw: random.Random
) -> Trial:
    trial, log = Trial(), out.with_suffix(".log")
    while True:
        kill = not trial.moments or draw.random() < KILLED_AGAIN
        moment = draw.uniform(0, seconds) if kill else None
        code = call(arguments, out, log, moment)
        text = log.read_text()
        if trial.moments:
            trial.resumed.append(_resumed(text))
        if code is None:
            assert moment is not None
            trial.moments.append(round(moment, 2))
            trial.phases.append(_phase(text))
        elif code:
            raise RuntimeError(f"exit code {code}:\n{text[-5000:]}")
        else:
            return trial


def _resumed(log: str) -> int | str:
    if "is finished" in log:
        return "finished"
    found = re.search(r"^resumed   at step (\d+)", log, re.MULTILINE)
    return int(found[1]) if found else 0


def _phase(log: str) -> str:
    for sign, phase in (("test accuracy", "report"), ("evaluating:", "evaluation")):
        if sign in log:
            return phase
    return "training" if "Epoch 0" in log or "resumed   at" in log else "start-up"


def differences(reference: Path, other: Path) -> Iterator[str]:
    """What is not equal in the files of two runs."""
    for name in TABLES:
        if (reference / name).read_bytes() != (other / name).read_bytes():
            yield name
    pairs = {"encoder.pt": [run / "encoder.pt" for run in (reference, other)]}
    pairs["checkpoint"] = [checkpoints.files(run)[0] for run in (reference, other)]
    for name, (one, two) in pairs.items():
        contents = (torch.load(path, weights_only=True) for path in (one, two))
        yield from _unequal(name, *contents)


#: The folder of a run, and how often it is saved, do not change what it computes.
NOT_COMPARED = ("checkpoint/config/out", "checkpoint/config/checkpoint_every")


def _unequal(name: str, one: Any, two: Any) -> Iterator[str]:
    if name in NOT_COMPARED:
        return
    if isinstance(one, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape
        # as bytes: a NaN equals itself, and 0 is not -0
        if not same or one.numpy().tobytes() != two.numpy().tobytes():
            yield name
    elif isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for key in one:
            yield from _unequal(f"{name}/{key}", one[key], two[key])
    elif isinstance(one, (list, tuple)) and type(one) is type(two) and len(one) == len(two):
        for i, (x, y) in enumerate(zip(one, two, strict=True)):
            yield from _unequal(f"{name}/{i}", x, y)
    elif one != two:
        yield name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="trials (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--workers", type=int, default=0, help="loading processes (default: 0)")
    parser.add_argument("--devices", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--epochs", type=int, default=6, help="of 5 steps each (default: 6)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trials, seconds, environment = _experiment(given, Path(folder))
    equal = sum(not trial.differences for trial in trials)
    print(f"{equal} of {len(trials)} equal the run that was never stopped")
    if given.out:
        settings = {k: v for k, v in vars(given).items() if k != "out"}
        content = {
            "settings": settings | {"options": SMALL, "checkpoint_every": INTERVALS},
            "environment": environment,
            "seconds_undisturbed": round(seconds, 2),
            "equal": f"{equal} of {len(trials)}",
            "trials": [asdict(trial) for trial in trials],
        }
        given.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if equal == len(trials) else 1


def _experiment(
    given: argparse.Namespace, folder: Path
) -> tuple[list[Trial], float, dict[str, Any]]:
    arguments = ["--data", str(write_npz(folder / "grey.npz")), *SMALL]
    for name in ("epochs", "workers", "devices"):
        arguments += [f"--{name}", str(getattr(given, name))]
    draw, reference = random.Random(given.seed), folder / "reference"
    undisturbed, began = Undisturbed(), time.time()
    code = call([*arguments, "--checkpoint-every", "0"], reference, folder / "log", None)
    if code:
        raise RuntimeError(f"exit code {code}:\n{(folder / 'log').read_text()[-5000:]}")
    undisturbed.saw(began, reference)
    print(f"undisturbed: {undisturbed.seconds:.1f} s")
    print("trial  killed at (s)  in  resumed at step  equal", flush=True)
    trials = []
    for number in range(1, given.kills + 1):
        every = INTERVALS[number % len(INTERVALS)]
        options = [*arguments, "--checkpoint-every", every]
        trials.append(run_trial(options, folder / "run", reference, undisturbed, draw))
        row = trials[-1]
        equal = "; ".join(row.differences[:5]) or "yes"
        print(f"{number:5}  {row.moments}  {row.phases}  {row.resumed}  {equal}", flush=True)
    described = json.loads((reference / "environment.json").read_text())
    shown = ("vne_kernels", "torch", "lightning", "python", "processor", "device", "threads")
    return trials, undisturbed.seconds, {name: described[name] for name in shown}


if __name__ == "__main__":
    sys.exit(main())
