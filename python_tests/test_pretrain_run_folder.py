"""``vne-pretrain`` and the folder of a run: nothing of the user's is lost, nothing is believed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from naming import naming
from tiny_run import SMALL, STEPS_PER_EPOCH, flip_a_byte, write_npz

from vne_kernels.common import files
from vne_kernels.pretrain import checkpoints, export, frozen, knn, linear_eval, report
from vne_kernels.pretrain.cli import main
from vne_kernels.pretrain.commands import train
from vne_kernels.pretrain.config import Config, OptionError, load_config
from vne_kernels.pretrain.disk import Disk
from vne_kernels.pretrain.events import Events, read_events
from vne_kernels.pretrain.protocol import LinearProtocol, Setting

pytestmark = [
    pytest.mark.xdist_group("run_folder"),
    pytest.mark.usefixtures("no_pictures"),
]

FAST = LinearProtocol(epochs=1)
CPU = Setting(accelerator="cpu", workers=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended, of one epoch, with its evaluations."""
    folder = tmp_path_factory.mktemp("data")
    out = folder / "run"
    data = ["--data", str(write_npz(folder / "grey.npz")), "--workers", "0"]
    with pytest.MonkeyPatch.context() as patch:
        from vne_kernels.pretrain import plots

        patch.setattr(plots, "draw_all", lambda *_: [])
        assert main([*data, *SMALL, "--epochs", "1", "--no-evaluation", "--out", str(out)]) == 0
        linear_eval.evaluate(out, FAST, CPU)
        knn.evaluate(out, None, CPU)
    return out


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, whose files may be changed."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error that a command ended with: one line, and no traceback."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [x for x in error.splitlines() if x.startswith("vne-pretrain")]
    return line


# ---- nothing is lost -----------------------------------------------------------------------------


def test_train_knows_all_that_it_writes(whole: Path) -> None:
    evaluations = {"linear_eval.json", "linear_eval.csv", "knn.json"}
    written = {path.name for path in whole.iterdir() if path.is_file()} - evaluations
    assert written <= set(train.FILES)
    assert {f"{name}.png" for name in report.CAPTIONS} <= set(train.FILES)


@pytest.mark.parametrize("name", ["results.json", "config.json", "metrics.csv", "report.html"])
def test_train_spares_the_users_files(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    (tmp_path / ".env.tmp").touch()
    arguments = ["--data", str(write_npz(tmp_path / "grey.npz")), *SMALL, "--workers", "0"]
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert name in one_line(capsys)
    assert {x.name for x in tmp_path.iterdir()} == {name, ".env.tmp", "grey.npz"}
    assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_a_run_is_trained_by_one_process(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = (run / "metrics.csv").read_bytes()
    with files.locked(run, "train"):
        assert main(["--resume", "--out", str(run)]) == 2
    assert "--out" in one_line(capsys)
    assert (run / "metrics.csv").read_bytes() == table


@pytest.mark.parametrize("command", ["linear_eval", "knn"])
def test_what_cannot_be_written_is_said_before_the_work(
    command: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen.Frozen, "encode", lambda *_: pytest.fail("has begun the work"))
    evaluate: Any = {"linear_eval": linear_eval.evaluate, "knn": knn.evaluate}[command]
    with files.locked(run, command), pytest.raises(OptionError, match=naming(run)):
        evaluate(run, None, CPU)
    (run / files.HIDDEN).touch()
    with pytest.raises(OptionError, match=files.HIDDEN):
        evaluate(run, None, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.pth", "results.pth", "package.pth", "encoder.pt"])
def test_export_spares_what_is_there(name: str, run: Path) -> None:
    (run / "package.json").write_text('{"mine": 1}')
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(OptionError, match="--to"):
        export.write(run, "torchvision", run / name)
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_export_replaces_its_own(run: Path) -> None:
    path = run / "package.pth"
    for _ in range(2):
        export.write(run, "torchvision", path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(OptionError, match="--overwrite"):
        export.write(run, "torchvision", path)
    export.write(run, "torchvision", path, overwrite=True)
    assert json.loads(path.with_suffix(".json").read_text())["file"] == "package.pth"


@pytest.mark.parametrize("option", [["export", "{}", "--format", "timm", "--to"], ["--out"]])
@pytest.mark.parametrize("name", ["", "n" * 256])
def test_names_that_no_file_can_have(
    option: list[str], name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*(x.format(run) for x in option), name]) in (1, 2)
    assert (name or option[-1]) in one_line(capsys)


def test_sweeps_spare_the_users_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "variance.csv").write_text("mine\r\n1\r\n")
    assert main(["variance", "--out", str(tmp_path)]) == 2
    assert "variance.csv" in one_line(capsys)
    assert (tmp_path / "variance.csv").read_text() == "mine\n1\n"


# ---- nothing is believed -------------------------------------------------------------------------

BAD_CONFIG: dict[str, Any] = {
    "workers": [100_000, -1, "3", 1.5, True],
    "epochs": [10**30, 0, None],
    "batch_size": [2**40],
    "collective_timeout": [10**30],
    "projector_hidden": [10**12],
    "devices": ["9" * 5000, 2],
    "data": [None, 7],
    "loss": ["x", ["vn-doe"]],
    "lr": [1e308 * 10, "0.1"],
    "of_another_version": [1],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in BAD_CONFIG.items() for v in vs])
def test_a_config_is_not_believed(name: str, value: Any, tmp_path: Path) -> None:
    text = json.dumps(dataclasses.asdict(Config()) | {name: value})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(OptionError):
        load_config(tmp_path)


def test_a_config_decides_not_how_many_processes_there_are(tmp_path: Path) -> None:
    text = json.dumps(dataclasses.asdict(Config()) | {"workers": 1000})
    (tmp_path / "config.json").write_text(text)
    assert load_config(tmp_path).workers == os.cpu_count()


def change(path: Path, place: str, value: Any) -> None:
    """Set one value of a JSON file; ``place``: keys with dots between them."""
    content = json.loads(path.read_text())
    *outer, last = place.split(".")
    inner = content
    for key in outer:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(content))


BAD_RECORDS: dict[str, Callable[[Path], object]] = {
    "results: list": lambda run: (run / "results.json").write_text("[]"),
    "results: depth": lambda run: (run / "results.json").write_text("[" * 100_000),
    "results: data": lambda run: change(run / "results.json", "data.train_images", "many"),
    "results: training": lambda run: change(run / "results.json", "training", {}),
    "results: scores": lambda run: change(run / "results.json", "evaluation", {"trained": {}}),
    "environment: resumed": lambda run: change(run / "environment.json", "resumed", [{"a": 1}]),
    "environment: text": lambda run: (run / "environment.json").write_text('"x"'),
    "environment: pipe": lambda run: (
        (run / "environment.json").unlink(),
        os.mkfifo(run / "environment.json"),
    ),
    "linear_eval: accuracy": lambda run: change(run / "linear_eval.json", "accuracy", "high"),
    "linear_eval: protocol": lambda run: change(run / "linear_eval.json", "protocol.epochs", -1),
    "linear_eval: broken": lambda run: change(run / "linear_eval.json", "broken_images", []),
    "knn: neighbours": lambda run: change(run / "knn.json", "neighbours", None),
    "epochs: infinity": lambda run: (run / "epochs.csv").write_text("epoch,step\r\ninf,2\r\n"),
    "epochs: empty": lambda run: (run / "epochs.csv").write_text(""),
    "events: step": lambda run: (run / "events.csv").write_text("step,kind,message\r\n-,a,b\r\n"),
    "events: header": lambda run: (run / "events.csv").write_text("a,b\r\n1,2\r\n"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_record_that_is_not_ours(
    case: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "report.html").read_bytes()
    BAD_RECORDS[case](run)
    assert main(["report", str(run)]) == 2
    assert "argument RUN" in one_line(capsys)
    assert (run / "report.html").read_bytes() == before


def with_content(run: Path, changes: dict[str, Any]) -> Path:
    """A run whose one checkpoint holds other things, and whose checksums are right."""
    (path,) = checkpoints.files(run)
    content: dict[str, Any] = checkpoints.read(path) | changes
    torch.save({name: x for name, x in content.items() if x is not ...}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"global_step": -7},
        {"global_step": 10**30},
        {"global_step": math.nan},
        {"global_step": True},
        {"epoch": None},
        {"state_dict": []},
        {"state_dict": ...},
        {"config": torch.zeros(3)},
        {"config": {"loss": torch.zeros(3)}},
        {"config": {"loss": "simclr"}},
    ],
)
def test_a_checkpoint_of_wrong_content(changes: dict[str, Any], run: Path) -> None:
    with_content(run, changes)
    with pytest.raises(OptionError, match="--resume"):
        checkpoints.newest(load_config(run))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer_states": ["x"]},
        {"optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(3)}}}]},
        {"lr_schedulers": [{"step": 3}]},
        {"loops": {"fit_loop": 3}},
        {"loops": ...},
        {"state_dict": {"encoder.conv1.weight": "x"}},
    ],
)
def test_what_cannot_be_restored_is_said(
    changes: dict[str, Any], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_content(run, changes)
    assert main(["--resume", "--out", str(run)]) == 2
    assert path.name in one_line(capsys)


def set_in_group(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda state: state["param_groups"][0].__setitem__(name, value)


OPTIMIZERS: dict[str, tuple[Callable[[dict[str, Any]], object], bool]] = {
    "as it is": (lambda state: None, True),
    "of a torch without a flag": (lambda state: state["param_groups"][0].pop("fused"), True),
    "before the first step": (lambda state: state["state"].clear(), True),
    "another learning rate": (set_in_group("lr", 7.0), True),
    "text": (set_in_group("lr", "7.0"), False),
    "another momentum": (set_in_group("momentum", 10**30), False),
    "a tensor for a momentum": (set_in_group("momentum", torch.zeros(3)), False),
    "other parameters": (set_in_group("params", [-7]), False),
    "no parameters": (set_in_group("params", [torch.zeros(3)]), False),
    "no state of one": (lambda state: state["state"][0].clear(), False),
    "another shape": (lambda state: state["state"][0].update(momentum_buffer=torch.ones(3)), False),
    "more entries": (lambda state: state["state"][0].update(step=5), False),
    "more groups": (lambda state: state["param_groups"].append({}), False),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_the_form_of_an_optimizer(case: str) -> None:
    change_it, fits = OPTIMIZERS[case]
    parameter = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    change_it(state)
    ours, theirs = checkpoints.form_of(optimizer), checkpoints.form(state)
    assert (checkpoints.difference(ours, theirs, "optimizer") is None) == fits


def test_a_checkpoint_of_more_steps_than_the_run_has(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_content(run, {"global_step": 10**9})
    path.rename(path.with_name(f"step-{10**9}.ckpt"))
    assert main(["--resume", "--out", str(run)]) == 2
    assert re.search(naming("--resume", STEPS_PER_EPOCH), one_line(capsys))


UNFINISHED: dict[str, dict[str, Any]] = {
    "step": {"step": -1},
    "steps": {"step": 10**6},
    "text": {"step": "1"},
    "no probe": {"probe": ...},
    "probe": {"probe": {"linear.weight": torch.zeros(1)}},
    "optimizer": {"optimizer": {"state": 3}},
    "broken": {"broken": 5},
    "begun": {"begun_with": []},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*UNFINISHED, "list", "damaged"])
def test_an_unfinished_evaluation_is_not_believed(case: str, run: Path) -> None:
    subject = frozen.Frozen.open(run, CPU)
    path = run / "linear_eval.ckpt"
    probe = linear_eval.Probe(512, subject.data.classes, 40, FAST, torch.device("cpu"))
    checkpoint = linear_eval.Checkpoint(path, FAST, subject)
    checkpoint.save(probe)
    checkpoint.restore(probe)
    content = torch.load(path, weights_only=True) | UNFINISHED.get(case, {})
    content = {name: x for name, x in content.items() if x is not ...}
    torch.save(list(content) if case == "list" else content, path)
    if case == "damaged":
        flip_a_byte(path)
    with pytest.raises(OptionError, match=r"linear_eval\.ckpt"):
        checkpoint.restore(probe)


def test_a_damaged_encoder_is_not_exported(run: Path) -> None:
    flip_a_byte(run / "encoder.pt")
    with pytest.raises(OptionError, match=r"encoder\.pt"):
        export.write(run, "torchvision")


# ---- one line ------------------------------------------------------------------------------------


def test_events_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = Events(tmp_path / "events.csv", Disk())
    events.keep_until(0)
    events.add(1, "broken-image", "cannot read \x1b[2Ja\nvne-pretrain: all is well \udcff.png")
    assert "\x1b" not in capsys.readouterr().err
    ((step, _, message),) = read_events(events.path)
    assert (step, "\n" in message) == ("1", False)


def test_a_folder_may_look_like_an_address(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    run.rename("https:run")
    assert main(["--resume", "--out", "https:run"]) == 0
    assert not Path("https:").exists()


def test_memory_that_runs_out_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(frozen.Frozen, "encode", fail)
    assert main(["knn", str(run), "--workers", "0", "--accelerator", "cpu"]) == 1
    assert "out of memory" in one_line(capsys)


def test_a_recipe_is_printed_without_control(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.toml").write_text('description = "a\\u001b[2J" # \x1b[2J')
    main(["recipes", str(tmp_path / "r.toml")])
    assert "\x1b" not in capsys.readouterr().out
