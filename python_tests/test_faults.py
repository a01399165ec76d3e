"""What goes wrong in a training ends clearly; the options of a step resume exactly.

Everything here is provoked for real: weights that overflow, a process that is killed, a disk that
is full. What takes several processes of a training is in test_processes.py.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from naming import last_error, naming
from tiny_run import write_noise

from vne_kernels.pretrain import checkpoints, run
from vne_kernels.pretrain.cli import main
from vne_kernels.pretrain.disk import Disk, append_rows
from vne_kernels.pretrain.events import read_events
from vne_kernels.pretrain.model import Pretraining

pytestmark = pytest.mark.slow

# 16 images: an epoch of 4 steps
SMALL = ["--backbone", "resnet18", "--accelerator", "cpu", "--workers", "0", "--batch-size", "4"]
SMALL += ["--projector-dim", "8", "--projector-hidden", "16", "--no-evaluation", "--knn-every", "0"]
FP32 = ["--precision", "32-true"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("data") / "grey.npz", 16)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report draws for seconds, and is tested elsewhere."""
    monkeypatch.setattr(run.report, "write", lambda out: None)


def train(npz: Path, out: Path, *options: str) -> int:
    return main(["--data", str(npz), "--out", str(out), "--epochs", "1", *SMALL, *options])


# ---- options of a step: a stopped and resumed run equals one that never stopped ----------------


def at_every_step(monkeypatch: pytest.MonkeyPatch, act: Callable[..., None]) -> None:
    """Call ``act(module, batch, its number)`` before each batch of the training."""
    original = Pretraining.training_step

    def acting(self: Pretraining, *arguments: object) -> object:
        act(self, *arguments)
        return original(self, *arguments)

    monkeypatch.setattr(Pretraining, "training_step", acting)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Pretraining], None]) -> None:
    """Call ``act(module)`` as step ``step`` of the training begins."""

    def acting(module: Pretraining, _batch: object, batch_idx: int) -> None:
        if module.global_step == step - 1 and batch_idx % module.config.accumulate == 0:
            act(module)

    at_every_step(monkeypatch, acting)


def interrupt(module: Pretraining) -> None:
    signal.raise_signal(signal.SIGINT)


STEPS = {
    "accumulate": (["--accumulate", "2", *FP32], 2),
    "bf16": (["--precision", "bf16-mixed"], 4),
    "fp16": (["--precision", "16-mixed", "--accumulate", "2", "--loss", "byol"], 2),
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
    options = ["--accumulate", "3", "--lr", "0.5", "--epochs", "2", "--warmup-epochs", "1", *FP32]
    assert train(npz, tmp_path, *options) == 0
    with (tmp_path / "metrics.csv").open(newline="") as file:
        row, second = csv.DictReader(file)  # 16 images: 3 batches of 4, and one that is left out
    assert (second["step"], second["epoch"]) == ("2", "2")
    assert (row["step"], float(row["lr"])) == ("1", pytest.approx(0.5 * 12 / 256))
    loss = -float(row["entropy"]) - float(row["beta"]) * float(row["cosine"])
    assert float(row["loss"]) == pytest.approx(loss, rel=1e-5)


def test_accumulating_more_than_an_epoch(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(npz, tmp_path, "--accumulate", "5", *FP32) == 2
    assert "--accumulate" in last_error(capsys)


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


def test_no_compiler(npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torch._inductor import config as inductor

    # Its own patch: pytest's leaves a setting of torch deleted behind it.
    with inductor.patch({"cpp.cxx": ("/nowhere/c++",), "force_disable_caches": True}):
        assert train(npz, tmp_path, "--compile", *FP32) == 2
    assert "--compile" in last_error(capsys)


# ---- a loss that is not finite -----------------------------------------------------------------


def test_divergence_stops_with_what_shows_why(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--lr", "1e30", "--warmup-epochs", "0", "--checkpoint-every", "0", *FP32]
    assert train(npz, tmp_path, *options) == 3
    error = capsys.readouterr().err
    found = json.loads((tmp_path / "nonfinite.json").read_text())
    step = found["step"]
    assert step > 1
    assert len(re.findall(rf"error: .*step {step}\b.*nan", error)) == 1
    assert f"vne-pretrain --resume --out {tmp_path}" in error  # what was saved before it stays
    (process,) = found["processes"]
    assert process["loss"] == "nan"
    assert len(process["images"]) == len(set(process["images"])) == 4
    assert ", ".join(map(str, process["images"])) in error
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
    assert re.search(naming("step 2", "nan", "layer2.0.conv1.weight"), error)
    assert not checkpoints.files(tmp_path)
    assert "--resume" not in error  # there is nothing to go on from


# ---- a process that loads images ---------------------------------------------------------------


def test_a_death_in_the_midst_of_saving_is_no_full_disk(tmp_path: Path) -> None:
    """torch raises it where the signal finds the program: in torch.save, too."""
    died = RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
    archive = RuntimeError("[enforce fail at inline_container.cc:1] unexpected pos")
    archive.__context__ = died
    with pytest.raises(RuntimeError, match="pid 1"), Disk().tolerated(tmp_path, "-"):
        raise archive


def test_a_loading_process_that_is_killed_ends_the_run(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = []

    def kill(module: Pretraining) -> None:
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        killed.append(worker.pid)

    at_step(monkeypatch, 3, kill)
    options = ["--epochs", "50", "--workers", "1", "--checkpoint-every", "0", *FP32]
    assert train(npz, tmp_path, *options) == 1
    error = capsys.readouterr().err
    assert f"pid {killed[0]}" in error
    assert f"vne-pretrain --resume --out {tmp_path}" in error
    assert "Traceback" not in error
    assert multiprocessing.active_children() == []  # they are gone, and waited for


def test_a_loading_process_that_fails_is_reported_in_one_line(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def views(images: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(run, "make_views", lambda *_: views)
    assert train(npz, tmp_path, "--workers", "1", *FP32) == 1
    error = capsys.readouterr().err
    assert re.search("KeyError.*a bug", error)
    assert "Traceback" not in error


# ---- a disk that fills up ----------------------------------------------------------------------


@pytest.fixture
def limit() -> Iterator[Callable[[int | None], None]]:
    """Let no file of this process grow beyond so many bytes; None: as before."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield set_limit
    set_limit(None)


def test_rows_are_appended_whole_or_not_at_all(
    tmp_path: Path, limit: Callable[[int | None], None]
) -> None:
    path = tmp_path / "table.csv"
    append_rows(path, [(1, 2)])
    before = path.read_bytes()
    limit(len(before) + 3)  # room for a half of the next row
    with pytest.raises(OSError, match="File too large"):
        append_rows(path, [(3, 4)])
    limit(None)
    assert path.read_bytes() == before


def test_training_goes_on_while_nothing_can_be_written(
    npz: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: Callable[[int | None], None],
) -> None:
    """Each file is reported once, the last checkpoint stays; with room again nothing is missing."""
    out = tmp_path / "run"
    seen = []

    def act(module: Pretraining, *_: object) -> None:
        if module.global_step == 1:
            limit(100)
        elif module.global_step == 4:  # the last of three epochs of 2 steps
            seen.extend(checkpoints.step_of(path) for path in checkpoints.files(out))
            limit(None)

    at_every_step(monkeypatch, act)
    options = ["--batch-size", "8", "--epochs", "3", "--checkpoint-every", "0", *FP32]
    assert train(npz, out, *options) == 0
    assert seen == [1]
    error = capsys.readouterr().err
    for name in ("metrics.csv", "spectrum.csv", "epochs.csv"):
        assert error.count(f"{out / name}: File too large") == 1
        assert error.count(str(out / name)) == 2, name  # the failure, and its end
    assert error.count(str(out / "checkpoints")) == 2
    assert "Traceback" not in error
    for name, rows in (("metrics.csv", 6), ("epochs.csv", 3), ("spectrum.csv", 4)):
        with (out / name).open(newline="") as file:
            header, *content = csv.reader(file)
        assert len(content) == rows, name
        assert {len(row) for row in content} == {len(header)}
    assert [kind for _, kind, _ in read_events(out / "events.csv")].count("disk") >= 8
    assert checkpoints.step_of(checkpoints.files(out)[0]) == 6


#: Fills the disk of the run's folder (or, where the test may not mount one, takes this process the
#: right to write more) as the second step begins, for good; then says what is in the folder.
FULL_DISK = """
import json, resource, sys
from pathlib import Path
from vne_kernels.pretrain import checkpoints
from vne_kernels.pretrain.cli import main
from vne_kernels.pretrain.model import Pretraining

how, out, *arguments = sys.argv[1:]
original = Pretraining.training_step

def fill():
    with (Path(out) / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            print("filled:", error.strerror, file=sys.stderr)

def training_step(self, *rest):
    if self.global_step == 1:
        if how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        else:
            fill()
    return original(self, *rest)

Pretraining.training_step = training_step
code = main([*arguments, "--out", out])
files = checkpoints.files(Path(out))
steps = [checkpoints.read(path)["global_step"] for path in files]
names = sorted(path.name for path in Path(out).rglob("*") if path.name != "filler")
print()
print(json.dumps({"code": code, "steps": steps, "names": names}))
"""


def test_results_that_cannot_be_written_end_the_run(npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    script = tmp_path / "full_disk.py"
    script.write_text(FULL_DISK)
    how, command = "limit", [sys.executable, str(script)]
    mount = 'mount -t tmpfs -o size=160m none "$0" && exec "$@"'
    in_namespace = ["unshare", "-rm", "sh", "-c", mount, str(out)]
    if (
        shutil.which("unshare")
        and not subprocess.run([*in_namespace, "true"], capture_output=True, check=False).returncode
    ):
        how, command = "tmpfs", [*in_namespace, *command]
    options = ["--data", str(npz), "--epochs", "1", *SMALL, "--checkpoint-every", "0", *FP32]
    done = subprocess.run(
        [*command, how, str(out), *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 1
    assert found["steps"] == [1]  # it is there, and whole
    unwanted = {"encoder.pt", "results.json", "report.html"}
    assert not unwanted & set(found["names"])
    assert not [name for name in found["names"] if ".tmp" in name]
    reason = {"limit": "File too large", "tmpfs": "No space left on device"}[how]
    assert done.stderr.count(str(out / "checkpoints")) == 1
    assert reason in done.stderr
    assert f"vne-pretrain --resume --out {out}" in done.stderr
    assert "Traceback" not in done.stderr
