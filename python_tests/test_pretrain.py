"""``vne-pretrain`` from the outside: its command line and its files.

The runs here are tiny (a ResNet-18, a few dozen images); that training helps is measured by the
program itself and described in the README.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from naming import exit_code, last_error, naming
from PIL import Image
from programs import run_python
from tiny_run import SMALL, rows, write_folder, write_npz

from vne_kernels.pretrain import evaluate
from vne_kernels.pretrain.callbacks import MetricsTables, OnlineEvaluation
from vne_kernels.pretrain.cli import main
from vne_kernels.pretrain.config import Options
from vne_kernels.pretrain.data import load
from vne_kernels.pretrain.disk import Disk
from vne_kernels.pretrain.events import Events, read_events
from vne_kernels.pretrain.model import Pretraining, make_encoder

SMALL = [*SMALL, "--workers", "0"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("data") / "grey.npz")


@pytest.fixture(scope="module")
def whole(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs without a stop: what every stopped and resumed run must end as."""
    out = tmp_path_factory.mktemp("whole")
    assert main(["--data", str(npz), "--out", str(out), "--epochs", "2", *SMALL]) == 0
    return out


# ---- a whole run -------------------------------------------------------------------------------


def test_run_leaves_its_files(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    plots = {name for name in names if name.endswith(".png")}
    assert plots >= {"loss.png", "entropy.png", "cosine.png", "spectrum.png"}
    tables = {"metrics.csv", "epochs.csv", "spectrum.csv", "events.csv"}
    records = {"config.json", "environment.json", "results.json", "report.html"}
    others = {"checkpoints", "encoder.pt", "tensorboard"}
    assert names == plots | tables | records | others  # and no temporary file
    for name in plots:
        assert Image.open(whole / name).size[0] > 500
    assert list((whole / "tensorboard").glob("events.out.tfevents.*"))


def test_metrics(whole: Path) -> None:
    steps = rows(whole / "metrics.csv")
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert [row["epoch"] for row in steps] == [1.0] * 5 + [2.0] * 5
    for i, row in enumerate(steps):
        assert row["loss"] == pytest.approx(-row["entropy"] - row["beta"] * row["cosine"], rel=1e-5)
        assert row["beta"] == pytest.approx(1 + 9 * i / 9)  # 1 at the first step, 10 at the last
        assert 0 <= row["entropy"] <= np.log(8) + 1e-5
    # lr 0.5 for 256 images, 8 here; linear over the first epoch, then cosine to zero
    peak = 0.5 * 8 / 256
    assert [row["lr"] for row in steps[:5]] == pytest.approx([peak * k / 5 for k in range(1, 6)])
    assert [row["lr"] for row in steps[5:]] == sorted(row["lr"] for row in steps[5:])[::-1]
    assert steps[-1]["lr"] == pytest.approx(0, abs=1e-9)
    assert all(row["information"] == row["entropy"] for row in steps)  # what vn-doe maximises
    epochs = rows(whole / "epochs.csv")
    for row in epochs:
        assert row["effective_rank"] == pytest.approx(np.exp(row["probe_entropy"]), rel=1e-6)
        assert 0 <= row["online_linear"] <= 1
        assert 0 <= row["online_knn"] <= 1
    assert epochs[1]["loss"] == pytest.approx(np.mean([row["loss"] for row in steps[5:]]))
    spectra = rows(whole / "spectrum.csv")
    assert [row["epoch"] for row in spectra] == [0, 1, 2]
    for row in spectra:
        values = [row[f"eigenvalue_{i}"] for i in range(1, 9)]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)


def test_results(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    scores = {"linear_probe", "knn", "linear_probe_10_labels", "knn_10_labels"}
    assert results["evaluation"].keys() == {"pixels", "untrained", "trained"}
    for row in results["evaluation"].values():
        assert row.keys() == scores
        assert all(0 <= score <= 1 for score in row.values())
    assert results["training"]["steps"] == 10
    assert results["config"]["backbone"] == "resnet18"
    assert results["data"]["broken_images"] == 0
    environment = json.loads((whole / "environment.json").read_text())
    assert results["environment"].keys() == environment.keys()
    assert environment["torch"] == torch.__version__
    assert environment["device"].startswith("cpu (")


def test_encoder_fits_torchvision(whole: Path) -> None:
    from torchvision.models import resnet18

    model = resnet18(num_classes=4)
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    state = torch.load(whole / "encoder.pt", weights_only=True)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])


# ---- collapse ----------------------------------------------------------------------------------


def test_collapse_is_reported_once_and_so_is_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = Events(tmp_path / "events.csv", Disk())
    events.keep_until(0)
    online = OnlineEvaluation(*2 * [load("digits", "unused").test], None, every=0, workers=0)
    tables = MetricsTables(tmp_path, torch.zeros(8, 3, 8, 8), 16, online, events)
    for step, entropy in enumerate((1.5, 0.1, 0.15, 0.9, 0.05)):  # warned below 0.208
        tables._watch_for_collapse(entropy, step)
    kinds = [(int(step), kind) for step, kind, _ in read_events(events.path)]
    assert kinds == [(1, "collapse"), (3, "recovered"), (4, "collapse")]
    assert re.search(naming("step 1", 0.1, 1.11, 0.208), capsys.readouterr().err)


# ---- data --------------------------------------------------------------------------------------


def test_run_on_image_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "images" / "train", {"cat": 8, "dog": 8})
    write_folder(tmp_path / "images" / "val", {"cat": 2, "dog": 2})
    out = tmp_path / "out"
    arguments = ["--data", str(tmp_path / "images"), "--image-size", "16", "--epochs", "1"]
    assert main([*arguments, "--out", str(out), *SMALL]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["data"]["train_images"] == 16
    assert results["data"]["test_images"] == 4


# ---- parts -------------------------------------------------------------------------------------


def test_default_model_is_the_papers() -> None:
    config = Options(data="digits").resolved(8)
    model = Pretraining(config, total_steps=10, classes=10)
    shapes = [tuple(p.shape) for p in model.objective.projector.parameters() if p.ndim == 2]
    assert shapes == [(2048, 2048), (256, 2048)]
    assert (config.beta_start, config.beta_end, config.backbone) == (1.0, 10.0, "resnet50")
    conv1 = make_encoder("resnet50", "3x3").conv1
    assert (conv1.kernel_size, conv1.stride) == ((3, 3), (1, 1))
    decayed, plain, probe = model.configure_optimizers()["optimizer"].param_groups
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in plain["params"])
    assert plain["weight_decay"] == probe["weight_decay"] == 0.0


def test_few_labels_are_drawn_per_class() -> None:
    labels = np.repeat([0, 1, 2], [3, 20, 20])
    chosen = evaluate.few_per_class(labels, 10, draw=0)
    assert np.bincount(labels[chosen]).tolist() == [3, 10, 10]
    assert len(set(chosen.tolist())) == 23


def test_scores_of_separable_and_of_useless_features() -> None:
    labels = np.arange(400) % 4
    random = np.random.default_rng(0)
    noise = random.normal(size=(400, 8)).astype(np.float32)
    good = noise.copy()
    good[np.arange(400), labels] += 20
    separable = evaluate.scores(good[:200], labels[:200], good[200:], labels[200:])
    assert min(separable.values()) > 0.95
    useless = evaluate.scores(noise[:200], labels[:200], noise[200:], labels[200:])
    assert max(useless.values()) < 0.45


# ---- bad input: one line that names the argument, exit code 2 ----------------------------------

BAD = [
    ["--epochs", "0"],
    ["--epochs", "two"],
    ["--batch-size", "1"],
    ["--batch-size", "2000"],
    ["--lr", "nan"],
    ["--beta-end", "-1"],
    ["--warmup-epochs", "9"],
    ["--backbone", "vgg"],
    ["--devices", "none"],
    ["--accelerator", "abacus"],
    ["--data", "nowhere"],
    ["--resume"],
    ["--colour"],
]


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_option(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--out", str(tmp_path / "o"), "--precision", "32-true"]
    small += [] if "--epochs" in arguments else ["--epochs", "1"]
    assert exit_code(main, [*small, *arguments]) == 2
    assert re.search(naming("vne-pretrain: error", *arguments), last_error(capsys))


def test_output_that_is_a_run_or_a_file(
    whole: Path, npz: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (whole, npz):
        assert main(["--out", str(out)]) == 2
        assert re.search(naming("--out", out), last_error(capsys))


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    script = """
        import sys
        sys.modules["lightning"] = None
        from vne_kernels.pretrain.cli import main; sys.exit(main([]))
    """
    with pytest.raises(AssertionError, match=r"lightning.*pip install"):
        run_python(script, cwd=tmp_path)
