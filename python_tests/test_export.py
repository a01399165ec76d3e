"""``vne-pretrain export``: the lines that come with a file load it, and it computes the same."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import in_tiers
from naming import exit_code, last_error, naming
from torch import Tensor, nn
from torch.nn import functional as F

from vne_kernels.pretrain import export
from vne_kernels.pretrain.cli import main
from vne_kernels.pretrain.config import Options
from vne_kernels.pretrain.evaluate import trained_encoder
from vne_kernels.pretrain.model import make_encoder

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
MEAN, STD = [0.5, 0.25, 0.125], [0.2, 0.1, 0.3]


def make_run(folder: Path, backbone: str, stem: str) -> Path:
    """The folder of a run that has ended; no two entries of a norm are alike."""
    folder.mkdir()
    config = Options(out=str(folder), backbone=backbone, stem=stem).resolved(8)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (folder / "results.json").write_text(json.dumps({"data": {"mean": MEAN, "std": STD}}))
    torch.manual_seed(0)
    encoder = make_encoder(backbone, stem)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    torch.save(encoder.state_dict(), folder / "encoder.pt")
    return folder


def features(run: Path, images: Tensor) -> Tensor:
    config = Options(**json.loads((run / "config.json").read_text())).resolved(8)
    with torch.no_grad():
        return trained_encoder(run, config).eval()(images)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# ---- torchvision and timm ----------------------------------------------------------------------


@pytest.mark.parametrize("backbone", in_tiers(["resnet18", "resnet50"], ["resnet18"]))
@pytest.mark.parametrize("stem", ["7x7", "3x3"])
@pytest.mark.parametrize("format_", ["torchvision", pytest.param("timm", marks=pytest.mark.slow)])
def test_lines_load_the_same_encoder(
    format_: str,
    stem: str,
    backbone: str,
    images: Tensor,
    tmp_path: Path,
    capsys: Capture,
    request: pytest.FixtureRequest,
) -> None:
    if format_ == "timm":
        request.getfixturevalue("timm")
    run = make_run(tmp_path / "run", backbone, stem)
    assert main(["export", str(run), "--format", format_]) == 0
    written = json.loads((run / f"encoder_{format_}.json").read_text())
    shown = capsys.readouterr().out
    assert all(f"  {line}\n" in shown for line in written["load"])
    names: dict[str, Any] = {}
    exec("\n".join(written["load"]), names)  # strict: no key is missing or left over
    with torch.no_grad():
        found = names["model"].eval()(images)
    torch.testing.assert_close(found, features(run, images), rtol=1e-4, atol=1e-4)


def test_only_the_classifier_is_missing(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    run = make_run(tmp_path / "run", "resnet18", "7x7")
    file = tmp_path / "elsewhere.pth"
    assert main(["export", str(run), "--format", "torchvision", "--to", str(file)]) == 0
    state = torch.load(file, weights_only=True)
    missing, unexpected = resnet18().load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    assert {path.name for path in tmp_path.iterdir()} == {"run", file.name, "elsewhere.json"}


# ---- detectron2 --------------------------------------------------------------------------------
# It is not on PyPI. What follows has the modules and names of its modeling/backbone/resnet.py with
# STRIDE_IN_1X1 False: a convolution has its norm as a child, the stages are res2 to res5.


class NormedConv(nn.Conv2d):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, middle: int | None, stride: int) -> None:
        super().__init__()
        if middle is None:  # BasicBlock
            self.conv1 = NormedConv(inputs, outputs, 3, stride)
            self.conv2 = NormedConv(outputs, outputs, 3)
        else:  # BottleneckBlock
            self.conv1 = NormedConv(inputs, middle, 1)
            self.conv2 = NormedConv(middle, middle, 3, stride)
            self.conv3 = NormedConv(middle, outputs, 1)
        self.shortcut = NormedConv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv1(x))
        out = self.conv2(out)
        if hasattr(self, "conv3"):
            out = self.conv3(F.relu(out))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class Detectron2ResNet(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = {18: [2, 2, 2, 2], 50: [3, 4, 6, 3]}[depth]
        self.stem = nn.Module()
        self.stem.conv1 = NormedConv(3, 64, 7, 2)
        inputs = 64
        outputs = 64 if depth == 18 else 256
        for i, count in enumerate(blocks):
            stage = []
            for j in range(count):
                middle = None if depth == 18 else outputs // 4
                stage.append(Block(inputs, outputs, middle, 2 if i > 0 and j == 0 else 1))
                inputs = outputs
            self.add_module(f"res{i + 2}", nn.Sequential(*stage))
            outputs *= 2

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem.conv1(x)), 3, 2, 1)
        return self.res5(self.res4(self.res3(self.res2(x))))


#: Of the R-50 in detectron2's own notation: names of its first and last modules.
R50_NAMES = (
    "stem.conv1.weight",
    "stem.conv1.norm.running_var",
    "res2.0.shortcut.weight",
    "res2.0.shortcut.norm.bias",
    "res2.0.conv1.weight",
    "res2.0.conv1.norm.weight",
    "res5.2.conv3.norm.running_mean",
)


@pytest.mark.parametrize("depth", [18, 50])
def test_detectron2(depth: int, images: Tensor, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", f"resnet{depth}", "7x7")
    assert main(["export", str(run), "--format", "detectron2"]) == 0
    content = pickle.loads((run / "encoder_detectron2.pkl").read_bytes())
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True
    assert all(isinstance(value, np.ndarray) for value in content["model"].values())
    if depth == 50:
        assert set(R50_NAMES) <= content["model"].keys()
    model = Detectron2ResNet(depth).eval()
    state = {name: torch.from_numpy(value) for name, value in content["model"].items()}
    model.load_state_dict(state)
    with torch.no_grad():
        found = model(images).mean((2, 3))
    torch.testing.assert_close(found, features(run, images), rtol=1e-4, atol=1e-4)
    written = json.loads((run / "encoder_detectron2.json").read_text())
    assert written["load"] == [
        f"MODEL.WEIGHTS {run / 'encoder_detectron2.pkl'}",
        f"MODEL.RESNETS.DEPTH {depth}",
        *(["MODEL.RESNETS.RES2_OUT_CHANNELS 64"] if depth == 18 else []),
        "MODEL.RESNETS.STRIDE_IN_1X1 False",
        "MODEL.PIXEL_MEAN [127.5, 63.75, 31.875]",
        "MODEL.PIXEL_STD [51.0, 25.5, 76.5]",
        "INPUT.FORMAT RGB",
    ]


# ---- the description, and bad input ------------------------------------------------------------


def test_description(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "resnet18", "3x3")
    written = export.write(run, "torchvision")
    assert json.loads((run / "encoder_torchvision.json").read_text()) == written
    expected = {"format": "torchvision", "backbone": "resnet18", "stem": "3x3", "image_size": 8}
    expected |= {"mean": MEAN, "std": STD, "run": str(run), "file": "encoder_torchvision.pth"}
    assert written | expected == written


def test_statistics_of_a_run_that_did_not_note_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "resnet18", "3x3")
    (run / "results.json").write_text(json.dumps({"data": {"name": "digits"}}))
    written = export.write(run, "torchvision")
    from vne_kernels.pretrain.data import load

    data = load("digits", "unused")
    assert (written["mean"], written["std"]) == (list(data.mean), list(data.std))


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ([], "--format"),
        (["--format", "onnx"], "--format"),
        (["--format", "detectron2"], "--format"),  # which has no stem of 3x3
        (["--format", "timm", "--to", "a.json"], "--to"),
        (["--format", "timm", "--to", "no/a.pth"], "--to"),
    ],
)
def test_bad_option(
    arguments: list[str], option: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    run = make_run(tmp_path / "run", "resnet18", "3x3")
    monkeypatch.chdir(tmp_path)
    assert exit_code(main, ["export", str(run), *arguments]) == 2
    assert re.search(naming("vne-pretrain export: error", option), last_error(capsys))
    assert not list(run.glob("encoder_*"))


def test_run_that_has_not_ended(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "run", "resnet18", "3x3")
    (run / "encoder.pt").unlink()
    assert main(["export", str(run), "--format", "timm"]) == 2
    assert "RUN" in last_error(capsys)
