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


def test_loss_and_learning_rate_of_accumulated_steps(npz: Path, tmp_path: Path) -> None:
    """Rows count optimiser steps and hold the means of their batches; lr goes by their images."""
    assert train(npz, tmp_path, "--accumulate", "3", "--lr", "0.5", *FP32) == 0
    with (tmp_path / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)  # 16 images: 3 batches of 4, and one that is left out
    assert (row["step"], float(row["lr"])) == ("1", pytest.approx(0.5 * 12 / 256))
    loss = -float(row["entropy"]) - float(row["beta"]) * float(row["cosine"])
    assert float(row["loss"]) == pytest.approx(loss, rel=1e-5)


def test_accumulating_more_than_an_epoch(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(npz, tmp_path, "--accumulate", "5", *FP32) == 2
    error = "argument --accumulate: must be at most 4, the batches of an epoch, got 5"
    assert error in capsys.readouterr().err


def test_compiled_run_resumes_exactly_and_measures_without_compiling(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, differentiated and called as by any backend; code generation would take a minute."""
    shapes = []

    def compile_(self: torch.nn.Module, *, dynamic: bool) -> None:
        def call(*arguments: torch.Tensor) -> object:
            shapes.append(len(arguments[0]))
            return traced(*arguments)

        traced = torch.compile(self._call_impl, dynamic=dynamic, backend="aot_eager")
        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(npz, whole, "--compile", *FP32) == 0
    assert set(shapes) == {8}  # both views of the 4 images of a step
    with monkeypatch.context() as patch:
        at_step(patch, 2, interrupt)
        assert train(npz, stopped, "--compile", *FP32) == 130
    assert main(["--resume", "--out", str(stopped)]) == 0
    assert_equal_runs(whole, stopped, 4)


def test_no_compiler(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/c++",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    assert train(npz, tmp_path, "--compile", *FP32) == 2
    error = capsys.readouterr().err
    assert "argument --compile: must be left out where torch.compile fails, got" in error


# ---- a loss that is not finite -----------------------------------------------------------------


def test_divergence_stops_with_what_shows_why(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--lr", "1e30", "--warmup-epochs", "0", "--checkpoint-every", "0", *FP32]
    assert train(npz, tmp_path, *options) == 3
    error = capsys.readouterr().err
    told = json.loads((tmp_path / "nonfinite.json").read_text())
    step = told["step"]
    assert step > 1
    assert f"error: the loss of step {step}, epoch 1, is nan" in error
    assert error.count("is nan") == 1
    assert "no checkpoint was saved after it" in error
    assert f"vne-pretrain --resume --out {tmp_path}" in error  # what was saved before it is kept
    (process,) = told["processes"]
    assert process["loss"] == "nan"
    assert len(process["images"]) == len(set(process["images"])) == 4
    assert f"training images {', '.join(map(str, process['images']))};" in error
    assert process["largest_encoder_parameter"] > 1e20  # why
    assert process["encoder_parameters_not_finite"] == []
    assert [view["not_finite"] for view in process["pixels"]] == [0, 0]
    assert all(view["not_finite"] == view["entries"] > 0 for view in process["embeddings"])
    assert [kind for _, kind, _ in read_events(tmp_path / "events.csv")][-1] == "non-finite"
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == step  # the way there
    newest = checkpoints.read(checkpoints.files(tmp_path)[0])
    assert newest["global_step"] == step - 1
    assert all(value.isfinite().all() for value in newest["state_dict"].values())


def test_a_parameter_that_is_not_a_number_is_named(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(module: Pretraining) -> None:
        with torch.no_grad():
            module.encoder.layer2[0].conv1.weight[0, 0, 0, 0] = np.nan

    at_step(monkeypatch, 2, spoil)
    assert train(npz, tmp_path, *FP32) == 3
    error = capsys.readouterr().err
    assert "the loss of step 2, epoch 1, is nan" in error
    assert "not finite layer2.0.conv1.weight;" in error
    assert not checkpoints.files(tmp_path)
    assert "--resume" not in error  # there is nothing to go on from
