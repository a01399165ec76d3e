"""A run that is stopped, killed or loses a file goes on as if nothing had been.

Equal means: every tensor of the last checkpoint and of the encoder bit for bit, the tables byte for
byte (see kill_and_resume.py, of which a short form runs here). It holds for equal numbers of
threads, hence one everywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kill_and_resume import Undisturbed, differences, run_trial
from lightning.pytorch import Trainer
from naming import last_error, naming
from tiny_run import SMALL, STEPS_PER_EPOCH, flip_a_byte, rows, write_npz

from vne_kernels.common import files
from vne_kernels.pretrain import checkpoints, random_state
from vne_kernels.pretrain import run as run_module
from vne_kernels.pretrain.augment import plain_view
from vne_kernels.pretrain.callbacks import BrokenImages
from vne_kernels.pretrain.cli import main
from vne_kernels.pretrain.config import OptionError, load_config, resumed_config
from vne_kernels.pretrain.data import EpochSampler, load, view_loader
from vne_kernels.pretrain.disk import Disk
from vne_kernels.pretrain.events import Events, read_events
from vne_kernels.pretrain.model import Pretraining

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]
LAST = 2 * STEPS_PER_EPOCH
SECONDS_TO_START = 8  # of a process, about: it imports torch and lightning


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run of two epochs, without its place."""
    data = write_npz(tmp_path_factory.mktemp("data") / "grey.npz")
    return ["--data", str(data), *SMALL, "--workers", "0", "--epochs", "2"]


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a stop, with the checkpoints of its last three steps."""
    out = tmp_path_factory.mktemp("whole")
    assert main([*arguments, "--out", str(out), "--checkpoint-every", "0"]) == 0
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A run folder of its own, as after the training and before the evaluation."""
    out = tmp_path / "copy"
    # Links: the program replaces and deletes files, and appends to tables alone.
    shutil.copytree(whole, out, copy_function=os.link)
    for path in (*out.glob("*.csv"), out / "config.json"):
        path.unlink()
        shutil.copy(whole / path.name, path)
    for name in ("results.json", "report.html", "encoder.pt"):
        (out / name).unlink()
    return out


def steps(out: Path) -> list[int]:
    return [checkpoints.step_of(path) for path in checkpoints.files(out)]


# ---- the files ---------------------------------------------------------------------------------


def test_the_newest_checkpoints_are_kept(whole: Path) -> None:
    assert steps(whole) == [LAST, LAST - 1, LAST - 2]
    assert len(list((whole / "checkpoints").iterdir())) == 3  # and no temporary file


def test_a_checkpoint_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"global_step": 7, "epoch": 0, "state_dict": {"a": torch.arange(5)}, "config": {}}
    path = checkpoints.write(tmp_path / "checkpoints", 7, content)
    assert torch.equal(checkpoints.read(path)["state_dict"]["a"], torch.arange(5))
    order = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append("fsync"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: order.append("rename"))
        checkpoints.write(tmp_path / "checkpoints", 8, content)
    assert order == ["fsync", "rename", "fsync"]  # the content, the name, the list of names

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoints.write(tmp_path / "checkpoints", 8, content)
    assert list((tmp_path / "checkpoints").iterdir()) == [path]


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        numbers = [random.random(), random.gauss(0, 1), float(torch.randn(1))]
        return [*numbers, np.random.random(), np.random.standard_normal()]  # noqa: NPY002

    random_state.seed(5)
    first = draw()
    torch.save(random_state.collect(), tmp_path / "states")
    second = draw()
    random_state.restore(torch.load(tmp_path / "states", weights_only=True))
    assert draw() == second != first


# ---- stopped and going on ----------------------------------------------------------------------


def test_finished_run_only_evaluates_when_resumed(whole: Path) -> None:
    before = {name: (whole / name).read_bytes() for name in ("metrics.csv", "spectrum.csv")}
    assert main(["--resume", "--out", str(whole), "--workers", "0"]) == 0
    assert before == {name: (whole / name).read_bytes() for name in before}


SLURM = {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "1", "PROCID": "0", "LOCALID": "0"}


@pytest.mark.parametrize(
    ("step", "signum", "code", "advice"),
    [
        (3, signal.SIGINT, 130, "vne-pretrain --resume --out {out}"),
        (STEPS_PER_EPOCH, signal.SIGTERM, 75, "SIGTERM"),
        (7, signal.SIGUSR1, 75, "SIGUSR1"),
    ],
)
def test_stopped_and_resumed_run_equals_the_whole_one(
    step: int,
    signum: signal.Signals,
    code: int,
    advice: str,
    arguments: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    original = Pretraining.training_step

    def signalled(self: Pretraining, *args: object) -> object:
        if self.global_step == step - 1:
            signal.raise_signal(signum)
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Pretraining, "training_step", signalled)
    if signum == signal.SIGUSR1:  # by which Lightning would requeue a job of Slurm's
        for name, value in SLURM.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert main([*arguments, "--out", str(out)]) == code
    assert advice.format(out=out) in capsys.readouterr().err
    assert len(rows(out / "metrics.csv")) == step
    assert steps(out) == [step]
    assert not list(out.glob("hpc_ckpt*"))
    monkeypatch.undo()
    # what a crash after the checkpoint would leave: it is dropped, not doubled
    with (out / "metrics.csv").open("a") as file:
        file.write(f"{step + 1},1,0,0,0,0,0,0\n{step + 2},1,0")
    assert main(["--resume", "--out", str(out)]) == 0
    assert f"step-{step:08d}.ckpt" in capsys.readouterr().out
    assert list(differences(whole, out)) == []
    environment = json.loads((out / "environment.json").read_text())
    assert len(environment["resumed"]) == 1
    assert environment["resumed"][0].keys() == environment.keys() - {"resumed"}
    assert environment["resumed"][0]["started"] in (out / "report.html").read_text()
    assert handlers == [
        signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    ]


def test_sigterm_while_evaluating_ends_at_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_evaluate", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(["--resume", "--out", str(copy)]) == 75
    assert not (copy / "results.json").exists()


@pytest.mark.parametrize(
    ("signum", "code", "options"),
    [
        # to all processes, of which one loads images, as a terminal's Ctrl-C does
        (signal.SIGINT, 130, ["--workers", "1"]),
        # to the first of two that train: they agree on the step
        (signal.SIGTERM, 75, ["--workers", "0", "--devices", "2"]),
    ],
)
def test_signal_at_a_process(
    signum: signal.Signals, code: int, options: list[str], arguments: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vne_kernels.pretrain", *arguments, "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--epochs", "500", "--knn-every", "0", *options],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "epochs.csv").exists() or len(rows(out / "epochs.csv")) < 1:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, errors
    (done,) = steps(out)
    assert done >= STEPS_PER_EPOCH
    assert rows(out / "metrics.csv")[-1]["step"] == done


def test_loading_processes_leave_sigterm_to_the_main_one() -> None:
    data = load("digits", "unused")
    sampler = EpochSampler(len(data.train), 8, seed=0)
    view = plain_view(data, 8)

    def views(images: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.stack([view(image) for image in images]),) * 2

    iterator = iter(view_loader(data.train, views, sampler, workers=1, pin_memory=False))
    next(iterator)
    (worker,) = iterator._workers
    # of another process, as a cluster's to the whole group
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    for _ in range(5):  # more than it had prepared
        next(iterator)
    worker.terminate()  # what torch and multiprocessing do at the end
    with contextlib.suppress(RuntimeError):  # torch's handler of SIGCHLD may be the first to tell
        worker.join(30)
    worker.join(30)
    assert worker.exitcode == -signal.SIGKILL


def test_killed_and_resumed_run_equals_the_whole_one(
    arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    results = json.loads((whole / "results.json").read_text())
    seconds = SECONDS_TO_START + results["training"]["seconds_of_this_process"]
    options = [*arguments, "--checkpoint-every", "0"]
    trial = run_trial(options, tmp_path / "run", whole, Undisturbed(seconds), random.Random(0))
    assert trial.moments
    assert trial.differences == []


def test_broken_images_of_all_processes_are_reported_before_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(gathered: list[Any], own: Any) -> None:
        gathered[:] = [own, [(1, "of the other.png")]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    events = Events(tmp_path / "events.csv", Disk())
    events.keep_until(0)
    broken = BrokenImages(events)
    trainer: Any = SimpleNamespace(world_size=2, is_global_zero=True, global_step=2)
    batch: Any = SimpleNamespace(broken=["own.png"])
    broken.on_train_batch_end(trainer, None, None, batch, 1)  # type: ignore[arg-type]
    assert read_events(events.path) == []  # it would wait for the others in every step
    broken.before_saving(trainer)
    reported = [(int(step), message.split()[2]) for step, _, message in read_events(events.path)]
    assert reported == [(1, "of"), (2, "own.png;")]


# ---- --resume and --resume auto ----------------------------------------------------------------


def test_a_run_killed_before_its_first_checkpoint_begins_again(copy: Path, whole: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    (copy / files.HIDDEN).mkdir()
    (copy / files.HIDDEN / "unfinished-0123abcd.json").touch()
    assert main(["--resume", "--out", str(copy)]) == 0
    assert list(differences(whole, copy)) == []
    assert not list(copy.glob(".*"))


def test_the_same_command_begins_goes_on_and_ends(
    whole: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    command = [*arguments, "--out", f"{whole}/", "--resume", "auto"]
    assert main([*command, "--stem", "auto", "--checkpoint-every", "5"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    for other in (command, ["--resume", "--out", str(whole)]):
        assert main([*other, "--lr", "1"]) == 2
        assert re.search(naming("--lr", 0.5), last_error(capsys))


def test_what_auto_was_decided_to_be_stays(whole: Path) -> None:
    given = {"precision": "auto", "stem": "auto", "augment": "auto", "keep_checkpoints": 5}
    config = resumed_config(whole, given)
    assert (config.precision, config.stem, config.augment) == ("32-true", "3x3", "simclr")
    assert config.keep_checkpoints == 5


# ---- checkpoints that cannot be used -----------------------------------------------------------


def test_a_corrupt_checkpoint_gives_way_to_the_one_before_it(
    copy: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoints.files(copy)[0]
    flip_a_byte(newest)
    assert main(["--resume", "--out", str(copy)]) == 0
    assert newest.name in capsys.readouterr().err
    ((step, kind, message),) = read_events(copy / "events.csv")
    assert (step, kind) == (str(LAST - 1), "checkpoint")
    assert re.search(naming(f"{newest.name}.rejected", "checksum"), message)
    assert list(differences(whole, copy)) == ["events.csv"]
    assert steps(copy) == [LAST, LAST - 1, LAST - 2]


def test_no_good_checkpoint(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checkpoints.files(copy)
    for path in found:
        flip_a_byte(path)
    assert main(["--resume", "--out", str(copy)]) == 2
    error = last_error(capsys)
    assert "--resume" in error
    assert all(path.name in error for path in found)


class Malicious:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_foreign_pickle_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bait = tmp_path / "run", tmp_path / "executed"
    out.mkdir()
    shutil.copy(whole / "config.json", out)
    content = {"global_step": 3, "state_dict": Malicious(bait)}
    path = checkpoints.write(out / "checkpoints", 3, content)
    assert main(["--resume", "--out", str(out)]) == 2
    assert path.name in last_error(capsys)
    assert not bait.exists()
    torch.load(path, weights_only=False)
    assert bait.exists()  # it would have been


def test_a_checkpoint_of_another_architecture(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(whole / "config.json", tmp_path)
    config = json.loads((whole / "config.json").read_text())
    content = {"global_step": 3, "epoch": 0, "state_dict": {}}
    content["config"] = config | {"backbone": "resnet50"}
    path = checkpoints.write(tmp_path / "checkpoints", 3, content)
    assert main(["--resume", "--out", str(tmp_path)]) == 2
    assert re.search(naming("--resume", path.name, "resnet18", "resnet50"), last_error(capsys))


def test_a_checkpoint_that_does_not_fit_the_network(whole: Path) -> None:
    config = load_config(whole)
    resumed = checkpoints.newest(config)
    for classes in (4, 9):
        module = Pretraining(config, LAST, classes)
        steps_by = module.configure_optimizers()
        schedule, loop = steps_by["lr_scheduler"]["scheduler"], Trainer().fit_loop.state_dict()
        parts = (module, steps_by["optimizer"], schedule, loop)
        if classes == 4:  # as the images of the run have
            resumed.check_fits(*parts)
        else:
            with pytest.raises(OptionError, match=r"state_dict\.probe\."):
                resumed.check_fits(*parts)
