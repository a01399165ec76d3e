"""``vne-pretrain linear-eval`` and ``knn``, and what they share: a frozen encoder of a run.

The run here is made by hand: an untrained ResNet-18 in the place of a trained one, 40 images.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import in_tiers
from naming import exit_code, last_error, naming
from PIL import Image
from programs import run_python
from tiny_run import rows, write_npz

from vne_kernels.pretrain import evaluate, linear_eval
from vne_kernels.pretrain.cli import main
from vne_kernels.pretrain.config import OptionError, Options
from vne_kernels.pretrain.data import ImageSet, stratified
from vne_kernels.pretrain.frozen import Frozen
from vne_kernels.pretrain.linear_eval import Probe
from vne_kernels.pretrain.model import Pretraining, make_encoder
from vne_kernels.pretrain.protocol import LinearProtocol, Setting

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
CLASSES = 7
TRAIN, TEST, BATCH = 40, 14, 16
STEPS_PER_EPOCH = 3  # of 16, 16 and 8 images
CPU = ["--accelerator", "cpu", "--workers", "0"]
# At the paper's momentum a few epochs of a few steps would not get anywhere.
FAST = ["--epochs", "3", "--batch-size", str(BATCH), "--lr", "0.05", "--momentum", "0.9", *CPU]


def make_run(folder: Path, data: str, **options: Any) -> Path:
    """The folder of a run whose encoder is not that of its seed."""
    folder.mkdir()
    config = Options(
        data=data, out=str(folder), backbone="resnet18", precision="32-true", **options
    ).resolved(8)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    torch.manual_seed(1)
    torch.save(make_encoder("resnet18", config.stem).state_dict(), folder / "encoder.pt")
    return folder


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Classes of different brightness, named 0, 10, 20, ..."""
    path = tmp_path_factory.mktemp("data") / "grey.npz"
    return str(write_npz(path, test=TEST, classes=CLASSES, step=30, spacing=10))


@pytest.fixture
def run(npz: str, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", npz)


# ---- linear-eval -------------------------------------------------------------------------------


def test_linear_eval_leaves_its_files(run: Path, capsys: Capture) -> None:
    assert main(["linear-eval", str(run), *FAST]) == 0
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "encoder.pt", "linear_eval.json", "linear_eval.csv"}
    result = json.loads((run / "linear_eval.json").read_text())
    table = rows(run / "linear_eval.csv")
    assert [row["epoch"] for row in table] == [1, 2, 3]
    assert result["accuracy"] == pytest.approx(table[-1]["test_top1"])
    assert result["top5_accuracy"] == pytest.approx(table[-1]["test_top5"])
    assert result["protocol"] == dataclasses.asdict(
        LinearProtocol(epochs=3, batch_size=BATCH, lr=0.05, momentum=0.9)
    )
    assert result["data"] | {"name": ""} == {
        "name": "",
        "train_images": TRAIN,
        "test_images": TEST,
        "classes": CLASSES,
    }
    assert (result["encoder"], result["dimension"]) == ("trained", 512)
    assert result["environment"]["torch"] == torch.__version__
    assert f"{100 * result['accuracy']:.2f} %" in capsys.readouterr().out


def test_default_protocol_is_the_papers() -> None:
    expected = {"epochs": 100, "batch_size": 256, "lr": 0.3, "momentum": 0.995}
    expected |= {"weight_decay": 1e-6, "augment": False, "seed": 0}
    assert dataclasses.asdict(LinearProtocol()) == expected


def test_probe_is_trained_by_sgd_as_written_out(run: Path) -> None:
    """The update, the schedule and the means, by hand, from the features on."""
    protocol = LinearProtocol(
        epochs=3, batch_size=BATCH, lr=0.05, momentum=0.9, weight_decay=0.01, seed=5
    )
    setting = Setting(accelerator="cpu", workers=0)
    result = linear_eval.evaluate(run, protocol, setting)
    subject = Frozen.open(run, setting)
    train, test = (subject.encode(x, "") for x in (subject.data.train, subject.data.test))
    x, y = (torch.from_numpy(array) for array in train)
    probe = Probe(512, CLASSES, TRAIN, protocol, torch.device("cpu"))
    weight, bias = (p.detach().clone() for p in probe.linear.parameters())
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    steps = 3 * STEPS_PER_EPOCH
    losses = []
    for step, keys in enumerate(linear_eval.batches(TRAIN, BATCH, 5, range(steps))):
        chosen = [image for _, image in keys]
        probabilities = torch.softmax(x[chosen] @ weight.T + bias, 1)
        right = probabilities[range(len(chosen)), y[chosen]]
        losses += (-right.log()).tolist()
        error = (probabilities - torch.eye(CLASSES)[y[chosen]]) / len(chosen)
        gradient = [error.T @ x[chosen] + 0.01 * weight, error.sum(0) + 0.01 * bias]
        velocity = [0.9 * v + g for v, g in zip(velocity, gradient, strict=True)]
        lr = 0.05 * (1 + np.cos(np.pi * step / steps)) / 2
        weight, bias = weight - lr * velocity[0], bias - lr * velocity[1]
    table = rows(run / "linear_eval.csv")
    means = np.mean(np.reshape(losses, (3, TRAIN)), 1)
    assert [row["loss"] for row in table] == pytest.approx(means.tolist(), rel=1e-4)
    logits = torch.from_numpy(test.features) @ weight.T + bias
    found = logits.argmax(1).numpy() == test.labels
    assert result["accuracy"] == pytest.approx(found.mean())
    top5 = (logits.topk(5).indices.numpy() == test.labels[:, None]).any(1)
    assert result["top5_accuracy"] == pytest.approx(top5.mean())
    assert table[-1]["lr"] == pytest.approx(0, abs=1e-9)


def test_probe_learns(run: Path) -> None:
    assert main(["linear-eval", str(run), *FAST, "--epochs", "40"]) == 0
    table = rows(run / "linear_eval.csv")
    assert table[-1]["train_top1"] > 0.8
    assert table[-1]["loss"] < table[0]["loss"] / 2


def test_order_is_a_permutation_of_every_epoch() -> None:
    whole = list(linear_eval.batches(TRAIN, BATCH, 0, range(2 * STEPS_PER_EPOCH)))
    assert [len(keys) for keys in whole] == 2 * [16, 16, 8]
    for epoch in (0, 1):
        keys = [key for batch in whole[3 * epoch : 3 * epoch + 3] for key in batch]
        assert {e for e, _ in keys} == {epoch}
        assert sorted(image for _, image in keys) == list(range(TRAIN))
    assert whole[0] != [(0, image) for _, image in whole[3]]
    assert list(linear_eval.batches(TRAIN, BATCH, 0, range(4, 6))) == whole[4:]


def interrupt(run: Path, step: int, monkeypatch: Patch, *arguments: str) -> None:
    """Ctrl-C while the probe takes this step."""
    (run / "linear_eval.json").write_text("of an earlier evaluation")
    original = Probe.learn

    def interrupting(self: Probe, *args: torch.Tensor) -> None:
        if self.step == step - 1:
            signal.raise_signal(signal.SIGINT)
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Probe, "learn", interrupting)
        assert main(["linear-eval", str(run), *FAST, *arguments]) == 130


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, STEPS_PER_EPOCH, 7])
@pytest.mark.parametrize("augment", [[], ["--augment"]], ids=["plain", "augment"])
def test_interrupted_and_resumed_evaluation_equals_the_whole_one(
    augment: list[str], step: int, run: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    whole = shutil.copytree(run, tmp_path / "whole")
    assert main(["linear-eval", str(whole), *FAST, *augment]) == 0
    interrupt(run, step, monkeypatch, *augment)
    assert str(run / "linear_eval.ckpt") in capsys.readouterr().err
    assert not (run / "linear_eval.json").exists()
    # what a crash after the checkpoint would leave: it is dropped, not doubled
    with (run / "linear_eval.csv").open("a") as file:
        file.write("3,9,0,0,0,0,0,0\n3,9")
    assert main(["linear-eval", str(run), *FAST, *augment]) == 0
    assert not (run / "linear_eval.ckpt").exists()
    for left, right in zip(
        rows(run / "linear_eval.csv"), rows(whole / "linear_eval.csv"), strict=True
    ):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-6)


def test_interrupt_leaves_the_terminals_handler(run: Path, monkeypatch: Patch) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupt(run, 1, monkeypatch)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_unfinished_evaluation_keeps_its_options(
    run: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    interrupt(run, 1, monkeypatch)
    assert main(["linear-eval", str(run), *FAST, "--lr", "0.1"]) == 2
    assert re.search(naming("--lr", 0.05), last_error(capsys))
    torch.save(make_encoder("resnet18", "3x3").state_dict(), run / "encoder.pt")
    assert main(["linear-eval", str(run), *FAST]) == 2
    assert "--encoder" in last_error(capsys)
    (run / "linear_eval.ckpt").write_bytes(b"broken")
    assert main(["linear-eval", str(run), *FAST]) == 2
    assert "linear_eval.ckpt" in last_error(capsys)
    (run / "linear_eval.ckpt").unlink()
    assert main(["linear-eval", str(run), *FAST]) == 0


def test_augmented_features_do_not_depend_on_the_workers(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    arguments = [*FAST, "--augment", "--epochs", "1"]
    assert main(["linear-eval", str(run), *arguments]) == 0
    assert main(["linear-eval", str(other), *arguments, "--workers", "2"]) == 0
    assert (run / "linear_eval.csv").read_bytes() == (other / "linear_eval.csv").read_bytes()


def test_untrained_encoder_is_judged_apart(run: Path) -> None:
    assert main(["linear-eval", str(run), *FAST]) == 0
    before = (run / "linear_eval.json").read_bytes()
    assert main(["linear-eval", str(run), *FAST, "--encoder", "untrained"]) == 0
    assert (run / "linear_eval.json").read_bytes() == before
    result = json.loads((run / "linear_eval_untrained.json").read_text())
    assert result["encoder"] == "untrained"
    assert rows(run / "linear_eval_untrained.csv") != rows(run / "linear_eval.csv")


def test_untrained_encoder_is_the_one_the_run_began_with(npz: str) -> None:
    config = Options(data=npz, backbone="resnet18", seed=3).resolved(8)
    torch.manual_seed(3)
    begun = Pretraining(config, 10, CLASSES).encoder.state_dict()
    again = evaluate.untrained_encoder(config).state_dict()
    assert begun.keys() == again.keys()
    assert all(torch.equal(begun[name], again[name]) for name in begun)


# ---- knn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, evaluate.KNN_CHUNK])
def test_knn_is_the_weighted_vote(
    chunk: int, run: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr(evaluate, "KNN_CHUNK", chunk)
    arguments = ["--neighbours", "5", "--temperature", "0.2", *CPU]
    assert main(["knn", str(run), *arguments]) == 0
    result = json.loads((run / "knn.json").read_text())
    subject = Frozen.open(run, Setting(accelerator="cpu", workers=0))
    train, test = (subject.encode(x, "") for x in (subject.data.train, subject.data.test))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.features, test.features)]
    right = 0
    for cosines, label in zip(unit[1] @ unit[0].T, test.labels, strict=True):
        votes = np.zeros(CLASSES)
        for i in np.argsort(-cosines)[:5]:
            votes[train.labels[i]] += np.exp(cosines[i] / 0.2)
        right += int(votes.argmax() == label)
    assert result["accuracy"] == pytest.approx(right / TEST)
    assert (result["neighbours"], result["temperature"]) == (5, 0.2)
    assert f"{100 * right / TEST:.2f} %" in capsys.readouterr().out


def test_knn_of_few_images_takes_them_all(run: Path) -> None:
    assert main(["knn", str(run), *CPU]) == 0
    result = json.loads((run / "knn.json").read_text())
    assert (result["neighbours"], result["temperature"]) == (TRAIN, 0.1)


# ---- images ------------------------------------------------------------------------------------


def write_folder(path: Path) -> list[Path]:
    """train/ and test/ of two classes; the returned files, one in each part, are broken."""
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for shade, name in enumerate(("cat", "dog")):
            (path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 100, (12, 12, 3)) + 100 * shade
                Image.fromarray(pixels.astype(np.uint8)).save(path / part / name / f"{i}.png")
    broken = [path / part / "cat" / "1.png" for part in ("train", "test")]
    broken[0].write_bytes(b"no image")
    broken[1].write_bytes(broken[1].read_bytes()[:60])
    return broken


@pytest.mark.parametrize("augment", [[], ["--augment"]], ids=["plain", "augment"])
def test_broken_images_are_left_out_and_counted(augment: list[str], tmp_path: Path) -> None:
    write_folder(tmp_path / "images")
    run = make_run(tmp_path / "run", str(tmp_path / "images"), image_size=8)
    assert main(["linear-eval", str(run), *FAST, *augment]) == 0
    result = json.loads((run / "linear_eval.json").read_text())
    assert result["broken_images"] == {"train": 1, "test": 1}
    assert "top5_accuracy" not in result  # of two classes
    assert main(["knn", str(run), *CPU]) == 0
    assert json.loads((run / "knn.json").read_text())["broken_images"] == {"train": 1, "test": 1}


def test_encode_keeps_features_and_labels_together(tmp_path: Path) -> None:
    broken = write_folder(tmp_path)
    paths = sorted(str(path) for path in (tmp_path / "train").glob("*/*.png"))
    images = ImageSet(paths, np.arange(len(paths)))

    def mean_of(image: Image.Image) -> torch.Tensor:
        return torch.full((3, 1, 1), float(np.asarray(image).mean()))

    cpu = torch.device("cpu")
    flatten = torch.nn.Flatten()
    found = evaluate.encode(flatten, images, mean_of, cpu, bf16=False, workers=0)
    readable = [i for i, path in enumerate(paths) if path != str(broken[0])]
    assert found.labels.tolist() == readable
    expected = [np.asarray(Image.open(paths[i])).mean() for i in readable]
    np.testing.assert_allclose(found.features, np.repeat(np.array(expected)[:, None], 3, 1), 1e-6)
    nothing = ImageSet([str(broken[0])], np.zeros(1, np.int64))
    with pytest.raises(OptionError, match=naming("--data")):
        evaluate.encode(flatten, nothing, mean_of, cpu, bf16=False, workers=0)


def test_subset_for_the_probes_is_stratified(monkeypatch: Patch) -> None:
    labels = np.repeat([0, 1, 2], [500, 300, 200])
    chosen = stratified(labels, 100)
    assert np.bincount(labels[chosen]).tolist() == [50, 30, 20]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert np.array_equal(chosen, stratified(labels, 100))
    assert np.ptp(chosen[:50]) > 400  # not the first of each class
    images = ImageSet(np.zeros((1000, 1, 1), np.uint8), labels)
    assert evaluate.probe_subset(images) is images
    monkeypatch.setattr(evaluate, "PROBE_IMAGES", 100)
    assert np.array_equal(evaluate.probe_subset(images).labels, labels[chosen])


# ---- bad input: one line that names the argument, exit code 2 ----------------------------------

BAD = {
    "linear-eval": [
        ["--epochs", "0"],
        ["--batch-size", "0"],
        ["--lr", "inf"],
        ["--momentum", "1"],
        ["--weight-decay", "nan"],
        ["--seed", "-1"],
        ["--workers", "-1"],
        ["--encoder", "other"],
        ["--accelerator", "abacus"],
        ["--data", "nowhere"],
        ["--colour"],
    ],
    "knn": [["--neighbours", "0"], ["--temperature", "0"]],
}


@pytest.mark.parametrize(
    ("command", "arguments"), [(command, x) for command, bad in BAD.items() for x in bad]
)
def test_bad_option(command: str, arguments: list[str], run: Path, capsys: Capture) -> None:
    assert exit_code(main, [command, str(run), *arguments]) == 2
    assert re.search(naming(f"vne-pretrain {command}: error", arguments[0]), last_error(capsys))


@pytest.mark.parametrize("command", ["linear-eval", "knn"])
def test_run_that_cannot_be_judged(
    command: str, run: Path, tmp_path: Path, capsys: Capture
) -> None:
    encoder = run / "encoder.pt"
    assert main([command, str(tmp_path / "nowhere")]) == 2
    assert re.search(naming("RUN", "config.json"), last_error(capsys))
    for spoil in (
        lambda: torch.save(make_encoder("resnet34", "3x3").state_dict(), encoder),
        lambda: encoder.write_bytes(b"broken"),
        encoder.unlink,
    ):
        spoil()
        assert main([command, str(run), *CPU]) == 2
        assert re.search(naming("RUN", "encoder.pt"), last_error(capsys))


@pytest.mark.parametrize("command", in_tiers(["linear-eval", "knn", "export", "train"], ["train"]))
def test_help_needs_no_extra(command: str, tmp_path: Path) -> None:
    script = """
        import sys
        for name in ("lightning", "lightly", "sklearn", "torchvision", "torchmetrics", "tqdm"):
            sys.modules[name] = None
        from vne_kernels.pretrain.cli import main; sys.exit(main(sys.argv[1:]))
    """
    assert command in run_python(script, command, "--help", cwd=tmp_path).stdout
