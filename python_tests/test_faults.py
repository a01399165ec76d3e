"""What goes wrong in a training ends clearly; the options of a step resume exactly.

Everything here is provoked for real: weights that overflow, a process that is killed, a disk that
is full. What takes several processes of a training is in test_processes.py.
"""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from vne_kernels.pretrain import checkpoints, run
from vne_kernels.pretrain.cli import main
from vne_kernels.pretrain.model import Pretraining

# 16 images: an epoch of 4 steps
SMALL = ["--backbone", "resnet18", "--accelerator", "cpu", "--workers", "0", "--batch-size", "4"]
SMALL += ["--projector-dim", "8", "--projector-hidden", "16", "--no-evaluation", "--knn-every", "0"]
FP32 = ["--precision", "32-true"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "grey.npz"
    random = np.random.default_rng(0)
    content = {}
    for part, count in (("train", 16), ("test", 8)):
        content[f"{part}_images"] = random.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        content[f"{part}_labels"] = (np.arange(count) % 4).astype(np.uint8)
    np.savez(path, **content)
    return path


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report draws for seconds, and is tested elsewhere."""
    monkeypatch.setattr(run.report, "write", lambda out: None)


def train(npz: Path, out: Path, *options: str) -> int:
    return main(["--data", str(npz), "--out", str(out), "--epochs", "1", *SMALL, *options])


# ---- options of a step: a stopped and resumed run equals one that never stopped ----------------


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: object) -> None:
    """Call ``act(module)`` as step ``step`` of the training begins."""
    original = Pretraining.training_step

    def acting(self: Pretraining, batch: object, batch_idx: int) -> object:
        first = batch_idx % self.config.accumulate == 0
        if self.global_step == step - 1 and first:
            act(self)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Pretraining, "training_step", acting)


def interrupt(module: Pretraining) -> None:
    signal.raise_signal(signal.SIGINT)


STEPS = {
    "accumulate": (["--accumulate", "2", *FP32], 2),
    "bf16": (["--precision", "bf16-mixed"], 4),
    "fp16": (["--precision", "16-mixed"], 4),
    "fp16-accumulate-byol": (
        ["--precision", "16-mixed", "--accumulate", "2", "--loss", "byol", "--epochs", "2"],
        4,
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_stopped_and_resumed_run_equals_the_whole_one(
    name: str, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, steps = STEPS[name]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(npz, whole, *options) == 0
    with monkeypatch.context() as patch:
        at_step(patch, steps - 1, interrupt)
        assert train(npz, stopped, *options) == 130
    assert checkpoints.step_of(checkpoints.files(stopped)[0]) == steps - 1
    assert main(["--resume", "--out", str(stopped)]) == 0
    assert_equal_runs(whole, stopped, steps)


def assert_equal_runs(one: Path, two: Path, steps: int) -> None:
    table = (one / "metrics.csv").read_text()
    assert len(table.splitlines()) == 1 + steps
    assert table == (two / "metrics.csv").read_text()
    first, second = (torch.load(checkpoints.files(out)[0], weights_only=True) for out in (one, two))
    assert first["global_step"] == second["global_step"] == steps
    assert first.get("MixedPrecision") == second.get("MixedPrecision")  # the scaler's
    for key, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][key]), key
