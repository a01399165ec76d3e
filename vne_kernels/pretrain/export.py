"""The encoder of a run in the form that other programs load."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

import vne_kernels
from vne_kernels.common.files import atomic_write, write_json
from vne_kernels.common.reading import FileError, read_json
from vne_kernels.pretrain.config import Config, OptionError, load_config
from vne_kernels.pretrain.data import load_for
from vne_kernels.pretrain.evaluate import trained_encoder
from vne_kernels.pretrain.protocol import FORMATS

#: What a ResNet of torchvision or timm needs before it takes the weights of one for tiny images.
TINY_STEM = (
    "model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)",
    "model.maxpool = torch.nn.Identity()",
)


class Description(TypedDict):
    """Distinguishes the ``.json`` of an export from another file of that name."""

    file: str
    format: str
    load: list[str]


class Data(TypedDict, total=False):
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Results(TypedDict):
    """What is read of a run's ``results.json``."""

    data: Data


def write(
    run: Path, format_: str, to: Path | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write the trained encoder of the run in the folder ``run``, and a ``.json`` next to it.

    ``format_``: ``torchvision`` and ``timm`` give a state dict without classifier for
    ``torch.load``; ``detectron2`` a pickle with the keys that MoCo's
    ``convert-pretrain-to-detectron2.py`` gives. ``to`` defaults to ``encoder_FORMAT.pth`` (or
    ``.pkl``) in ``run``. Files that are there and no earlier export are replaced with ``overwrite``
    alone.

    Returns:
        what the ``.json`` holds: ``file``, ``format``, ``backbone``, ``stem``, the ``mean`` and
        ``std`` per channel (of pixels from 0 to 1) that the encoder's input is normalised by, its
        ``image_size``, ``load``: lines that load it (Python; for detectron2, overrides of its
        configuration), and where it comes from.

    Raises:
        OptionError: the run, the format or the file cannot be used.
    """
    if format_ not in FORMATS:
        raise OptionError("format", "one of " + ", ".join(FORMATS), format_)
    config = load_config(run)
    detectron2 = format_ == "detectron2"
    if detectron2 and config.stem != "7x7":
        got = f"detectron2, for an encoder with the {config.stem} stem"
        wanted = "torchvision or timm where the stem is not 7x7: detectron2 has no other"
        raise OptionError("format", wanted, got)
    path = to or run / f"encoder_{format_}{'.pkl' if detectron2 else '.pth'}"
    if path.suffix == ".json":
        raise OptionError("to", "a file that does not end in .json, as its description does", to)
    if not path.name:
        raise OptionError("to", "the name of a file", str(to))
    if not overwrite:
        _check_free(path)
    state = trained_encoder(run, config).state_dict()
    mean, std = _statistics(run, config)
    if detectron2:
        content: Any = detectron2_content(state)
        lines = detectron2_overrides(path, config, mean, std)
    else:
        content = {name: value.contiguous() for name, value in state.items()}
        lines = loading_lines(format_, path, config)
    description = {
        "file": path.name,
        "format": format_,
        "backbone": config.backbone,
        "stem": config.stem,
        "image_size": config.image_size,
        "mean": list(mean),
        "std": list(std),
        "load": lines,
        "run": str(run.resolve()),
        "vne_kernels": vne_kernels.__version__,
    }
    try:
        # The description comes first: what it describes is then known for an earlier export.
        write_json(path.with_suffix(".json"), description)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            (pickle.dump if detectron2 else torch.save)(content, file)
    except OSError as error:
        raise OptionError("to", "a file that can be written", f"{path} ({error})") from error
    return description


def _check_free(path: Path) -> None:
    """Refuses to replace files but those of an earlier export to the same name."""
    described = path.with_suffix(".json")
    existing = [str(x) for x in (path, described) if os.path.lexists(x)]
    try:
        earlier = described.exists() and read_json(described, Description)["file"] == path.name
    except (OSError, ValueError):
        earlier = False
    if existing and not earlier:
        wanted = "a file that is not there, nor its description (or add --overwrite)"
        raise OptionError("to", wanted, ", ".join(existing))


def loading_lines(format_: str, path: Path, config: Config) -> list[str]:
    """Python that makes ``model``, a ResNet (n, 3, h, w) -> (n, features) with these weights."""
    new = {
        "torchvision": [
            "import torch, torchvision",
            f"model = torchvision.models.{config.backbone}()",
            "model.fc = torch.nn.Identity()",
        ],
        "timm": [
            "import timm, torch",
            f"model = timm.create_model({config.backbone!r}, num_classes=0)",
        ],
    }[format_]
    stem = TINY_STEM if config.stem == "3x3" else ()
    read = f"model.load_state_dict(torch.load({str(path)!r}, weights_only=True))"
    return [*new, *stem, read]


def detectron2_content(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What detectron2's checkpointer wants of a pickle."""
    arrays: dict[str, np.ndarray[Any, Any]] = {
        detectron2_name(name): value.contiguous().numpy() for name, value in state.items()
    }
    return {"model": arrays, "__author__": "vne_kernels", "matching_heuristics": True}


def detectron2_name(name: str) -> str:
    """torchvision's name of a parameter -> detectron2's; layer1.0.bn2 -> res2.0.conv2.norm."""
    name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return name if name.startswith("res") else f"stem.{name}"


def detectron2_overrides(
    path: Path, config: Config, mean: tuple[float, ...], std: tuple[float, ...]
) -> list[str]:
    """What differs from detectron2's defaults, which are those of Caffe's ResNets."""
    depth = config.backbone.removeprefix("resnet")
    narrow = ["MODEL.RESNETS.RES2_OUT_CHANNELS 64"] if depth in ("18", "34") else []
    pixels = ([round(255 * x, 3) for x in values] for values in (mean, std))
    return [
        f"MODEL.WEIGHTS {path}",
        f"MODEL.RESNETS.DEPTH {depth}",
        *narrow,
        # torchvision's bottlenecks have the stride in the 3x3 convolution
        "MODEL.RESNETS.STRIDE_IN_1X1 False",
        *(f"MODEL.PIXEL_{name} {x}" for name, x in zip(("MEAN", "STD"), pixels, strict=True)),
        "INPUT.FORMAT RGB",
    ]


def _statistics(run: Path, config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the run noted, so that an export does not need its images; else of the images."""
    try:
        noted = read_json(run / "results.json", Results)["data"]
        return noted["mean"], noted["std"]
    except (OSError, FileError, KeyError):
        data = load_for(config)
        return data.mean, data.std
