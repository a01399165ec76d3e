"""Every option of a run, its default and its check."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
METHODS = ("auto", "poles", "eigh")
PRECISIONS = ("auto", "32-true", "bf16-mixed")
STEMS = ("auto", "3x3", "7x7")
AUGMENTATIONS = ("auto", "simclr", "affine")
CHECKPOINT = "last.ckpt"  # in the output folder
DOWNLOADS = ("cifar10", "cifar100")

#: Options that a resumed run may change: they say where and how fast, not what is computed.
FREE_ON_RESUME = ("workers", "accelerator", "devices", "precision", "download_dir")


class OptionError(ValueError):
    """A bad option: the message names it, says what was wanted and what came."""

    def __init__(self, name: str, wanted: str, got: Any) -> None:
        option = "--" + name.replace("_", "-")
        super().__init__(f"argument {option}: must be {wanted}, got {got!r}")


@dataclass(frozen=True)
class Options:
    """What the command line may say. ``None`` means: decided by the data (see :meth:`resolved`)."""

    data: str = "digits"
    out: str | None = None
    epochs: int | None = None
    warmup_epochs: int | None = None
    batch_size: int = 128
    lr: float | None = None
    weight_decay: float | None = None
    beta_start: float = 1.0
    beta_end: float = 10.0
    method: str = "auto"
    backbone: str = "resnet50"
    stem: str = "auto"
    projector_dim: int = 256
    image_size: int | None = None
    augment: str = "auto"
    seed: int = 0
    workers: int | None = None
    accelerator: str = "auto"
    devices: str = "auto"
    precision: str = "auto"
    download_dir: str = "data"

    def __post_init__(self) -> None:
        for name, low in (
            ("epochs", 1),
            ("warmup_epochs", 0),
            ("batch_size", 2),
            ("projector_dim", 1),
            ("image_size", 4),
            ("seed", 0),
            ("workers", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise OptionError(name, f"an integer >= {low}", value)
        for name in ("lr", "weight_decay", "beta_start", "beta_end"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise OptionError(name, "a finite number >= 0", value)
        for name, choices in (
            ("method", METHODS),
            ("backbone", BACKBONES),
            ("stem", STEMS),
            ("augment", AUGMENTATIONS),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise OptionError(name, "one of " + ", ".join(choices), getattr(self, name))
        if self.seed >= 2**32:
            raise OptionError("seed", "an integer < 2**32", self.seed)
        if self.devices != "auto" and not (self.devices.isdecimal() and int(self.devices) > 0):
            raise OptionError("devices", "'auto' or an integer >= 1", self.devices)

    @property
    def out_dir(self) -> Path:
        return Path(self.out if self.out is not None else f"runs/{self.data_name}")

    @property
    def data_name(self) -> str:
        """``digits``, ``cifar10``, ``cifar100``, or the file's or folder's own name."""
        return Path(self.data).resolve().stem if os.sep in self.data else Path(self.data).stem

    def resolved(self, native_size: int) -> Config:
        """Fill in what depends on the data, whose images measure ``native_size`` pixels."""
        digits = self.data == "digits"
        defaults = DIGITS if digits else PAPER
        size = _or(self.image_size, native_size)
        epochs = _or(self.epochs, defaults["epochs"])
        warmup = _or(self.warmup_epochs, min(defaults["warmup_epochs"], epochs - 1))
        if warmup >= epochs and warmup > 0:
            raise OptionError("warmup_epochs", f"less than the {epochs} epochs", warmup)
        augment = "affine" if digits else "simclr"
        return Config(
            **dataclasses.asdict(self)
            | {
                "out": str(self.out_dir),
                "image_size": size,
                "epochs": epochs,
                "warmup_epochs": warmup,
                "lr": _or(self.lr, defaults["lr"]),
                "weight_decay": _or(self.weight_decay, defaults["weight_decay"]),
                "stem": self.stem if self.stem != "auto" else "3x3" if size <= 64 else "7x7",
                "augment": self.augment if self.augment != "auto" else augment,
                "workers": _or(self.workers, 0 if digits else min(8, os.cpu_count() or 1)),
            }
        )


@dataclass(frozen=True)
class Config(Options):
    """The options of a run with nothing left open; kept as ``config.json`` beside its results."""

    out: str = "runs/digits"
    epochs: int = 100
    warmup_epochs: int = 10
    lr: float = 0.5
    weight_decay: float = 5e-5
    image_size: int = 32
    workers: int = 0


#: The paper's Table 3, 100 epochs of CIFAR-10.
PAPER: dict[str, Any] = {"epochs": 100, "warmup_epochs": 10, "lr": 0.5, "weight_decay": 5e-5}

#: For the bundled digits: found by short runs to end within six minutes on two CPU cores.
DIGITS: dict[str, Any] = {
    "epochs": 36,
    "warmup_epochs": 4,
    "lr": 0.8,
    "weight_decay": 5e-4,
}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
