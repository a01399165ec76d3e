"""A training of several processes: the same by --devices and torchrun; none outlives another.

Every process here is real, and so are the signals that end or stop it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from naming import last_error, naming
from tiny_run import write_noise

from vne_kernels.pretrain import checkpoints, ranks

pytestmark = pytest.mark.slow

RANKS = 2
SMALL = ["--backbone", "resnet18", "--accelerator", "cpu", "--workers", "0", "--batch-size", "8"]
SMALL += ["--projector-dim", "8", "--projector-hidden", "16", "--no-evaluation", "--knn-every", "0"]
SMALL += ["--precision", "32-true"]
DEVICES = [sys.executable, "-m", "vne_kernels.pretrain", "--devices", str(RANKS)]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
TORCHRUN += ["--standalone", "-m", "vne_kernels.pretrain"]
#: Of a rank that is dead: until the others have ended, on a busy machine.
SECONDS = 60


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("data") / "grey.npz", 32)


class Training:
    """A training in processes of its own, and what became of it."""

    def __init__(self, launcher: list[str], npz: Path, out: Path, *options: str) -> None:
        self.out = out
        arguments = ["--data", str(npz), "--out", str(out), *SMALL, *options]
        self.log = out.with_suffix(".log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*launcher, *arguments],
                cwd=out.parent,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def processes(self) -> dict[int, int]:
        """Rank -> process id of those that live, zombies among them."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                command = (folder / "cmdline").read_bytes().decode().split("\0")
                environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if str(self.out) in command and "torch.distributed.run" not in command:
                ranks = [line[11:] for line in environment if line.startswith("LOCAL_RANK=")]
                found[int(ranks[0]) if ranks else 0] = int(folder.name)
        return found

    def wait_for_step(self) -> None:
        """Until a checkpoint is there: every process is in the middle of its training."""
        deadline = time.monotonic() + 240
        while not checkpoints.files(self.out):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.2)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self, timeout: float) -> int:
        """Its exit code, when it has one and no process is left."""
        code = self.process.wait(timeout)
        deadline = time.monotonic() + SECONDS
        while self.processes():
            assert time.monotonic() < deadline, f"left: {self.processes()}"
            time.sleep(0.2)
        return code

    def kill(self) -> None:
        for process in self.processes().values():
            os.kill(process, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def start(npz: Path, tmp_path: Path) -> Iterator[Callable[..., Training]]:
    trainings = []

    def start_(launcher: list[str], name: str, *options: str) -> Training:
        trainings.append(Training(launcher, npz, tmp_path / name, *options))
        return trainings[-1]

    yield start_
    for training in trainings:
        training.kill()


def metrics(out: Path) -> np.ndarray:
    return np.loadtxt(out / "metrics.csv", delimiter=",", skiprows=1)


def test_a_killed_rank_is_named_and_launchers_train_the_same(
    start: Callable[..., Training],
) -> None:
    """One run by each launcher, a rank of each killed: what they did before is the same."""
    endless = ["--epochs", "5000", "--checkpoint-every", "0"]
    outs = []
    for launcher, rank, message in (
        (DEVICES, 1, "rank 1 .*SIGKILL"),
        (TORCHRUN, 0, "rank 0 "),
    ):
        training = start(launcher, f"killed{rank}", *endless)
        training.wait_for_step()
        processes = training.processes()
        assert sorted(processes) == [0, 1]
        os.kill(processes[rank], signal.SIGKILL)
        assert training.end(SECONDS) == 1
        log = training.output()
        assert re.search(f"error: .*{message}", log), log
        assert f"vne-pretrain --resume --out {training.out}" in log
        assert log.count("20000 steps") == 1  # by one process
        outs.append(training.out)
    one, two = (metrics(out) for out in outs)
    common = min(len(one), len(two))
    assert common >= 1
    np.testing.assert_allclose(one[:common], two[:common], rtol=1e-5, atol=1e-6)


def test_a_hung_rank_is_named_and_ends(start: Callable[..., Training]) -> None:
    timeout = 20
    endless = ["--epochs", "5000", "--checkpoint-every", "0"]
    training = start(DEVICES, "hung", *endless, "--collective-timeout", str(timeout))
    training.wait_for_step()
    os.kill(training.processes()[1], signal.SIGSTOP)
    assert training.end(timeout + SECONDS) == 1
    assert re.search("error: .*rank 1 ", training.output()), training.output()


class Dying:
    """A child whose end is seen later than its connections break."""

    def __init__(self, code: int | None, after: int = 0) -> None:
        self.code, self.left = code, after

    def poll(self) -> int | None:
        self.left -= 1
        return self.code if self.left < 0 else None


@pytest.mark.parametrize(
    ("child", "left_word", "message"),
    [
        (Dying(-signal.SIGKILL, 2), None, "SIGKILL"),
        (Dying(-signal.SIGKILL), ranks.LOST, "SIGKILL"),
        (Dying(3), None, 3),
        (Dying(1), "ValueError: no", "ValueError: no"),
        (Dying(1), ranks.LOST, None),
        (Dying(None), None, "rank 1"),
        (None, None, "rank 1"),
    ],
)
def test_what_became_of_a_rank(
    child: Dying | None, left_word: str | None, message: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "WORD_SECONDS", 0.3)
    survivor = ranks.Ranks()
    survivor.store = torch.distributed.HashStore()
    if left_word is not None:
        survivor.store.set("1", left_word)
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=[child])))
    words = survivor._words(trainer, 0, 2)
    assert len(words) == (message is not None)
    assert all(re.search(naming("rank 1", message), word) for word in words)


def test_a_loss_that_is_not_finite_ends_every_process(start: Callable[..., Training]) -> None:
    training = start(DEVICES, "diverged", "--lr", "1e30", "--epochs", "2", "--warmup-epochs", "0")
    assert training.end(240) == 3
    found = json.loads((training.out / "nonfinite.json").read_text())
    images = [set(process["images"]) for process in found["processes"]]
    assert [len(indices) for indices in images] == [4, 4]
    assert not images[0] & images[1]
    assert len(re.findall(r"error: .*\bnan\b", training.output())) == 1
    assert not checkpoints.files(training.out)


def test_torchruns_processes_are_the_devices(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vne_kernels.pretrain.cli import main

    torchrun = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    arguments = ["--data", str(npz), "--out", str(tmp_path / "run"), *SMALL, "--devices", "3"]
    assert main(arguments) == 2
    assert re.search(naming("--devices", 2), last_error(capsys))
