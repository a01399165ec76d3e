"""Every option of a run, its default and its check."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vne_kernels.common.reading import FileError, printable, read_json

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
#: --loss -> its name in titles and legends; DoE: difference of entropies
LOSSES = {
    "vn-doe": "von Neumann DoE",
    "vn-doe-symmetric": "von Neumann DoE, symmetric",
    "shannon-doe": "Shannon DoE",
    "simclr": "SimCLR",
    "simsiam": "SimSiam",
    "byol": "BYOL",
    "barlow": "Barlow Twins",
    "vicreg": "VICReg",
}
#: The losses with a weight beta of the cosine.
DIFFERENCES_OF_ENTROPIES = ("vn-doe", "vn-doe-symmetric", "shannon-doe")
BETA_SCHEDULES = ("linear", "constant")
METHODS = ("auto", "poles", "eigh")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
STEMS = ("auto", "3x3", "7x7")
AUGMENTATIONS = ("auto", "simclr", "simsiam", "byol", "affine")
BATCH_NORMS = ("joint", "per-view")
CHECKPOINT_SECONDS = 60.0  # between two
DOWNLOADS = ("cifar10", "cifar100")

#: Images up to this side take the paper's Table 4 for tiny images (CIFAR-10 and CIFAR-100).
SMALL = 64

#: Options that a resumed run may change: they say where and how fast, not what is computed.
FREE_ON_RESUME = (
    "workers",
    "accelerator",
    "devices",
    "collective_timeout",
    "precision",
    "download_dir",
    "knn_every",
    "evaluation",
    "checkpoint_every",
    "keep_checkpoints",
)

#: Options whose "auto" is decided when a run begins, for all of the run.
DECIDED = ("stem", "augment", "precision")


class OptionError(ValueError):
    """A bad option: the message names it, says what was wanted and what came."""

    def __init__(self, name: str, wanted: str, got: Any) -> None:
        # the folder of a run is given by its place
        option = "RUN" if name == "run" else "--" + name.replace("_", "-")
        super().__init__(printable(f"argument {option}: must be {wanted}, got {got!r}", 2000))


#: Integers: the least and the greatest. Beyond the latter is no use, but an error far from here.
BOUNDS = {
    "epochs": (1, 10**6),
    "warmup_epochs": (0, 10**6),
    "batch_size": (2, 2**20),
    "accumulate": (1, 2**20),
    "projector_dim": (1, 2**17),
    "projector_hidden": (1, 2**17),
    "projector_layers": (0, 16),
    "image_size": (4, 2**13),
    "train_images": (2, 2**40),
    "knn_every": (0, 10**6),
    "keep_checkpoints": (1, 10**6),
    "seed": (0, 2**32 - 1),
    "workers": (0, 2**10),
    "collective_timeout": (1, 10**7),
}


def check_bounds(name: str, value: int | None, low: int, high: int) -> None:
    """Raises an :class:`OptionError` where the integer is outside; None is left open."""
    if value is not None and not low <= value <= high:
        wanted = f"an integer >= {low}" if value < low else f"an integer <= {high}"
        raise OptionError(name, wanted, value)


@dataclass(frozen=True)
class Head:
    """Width, hidden layers and output of a loss's projector; ``layers`` None: not to be chosen."""

    hidden: int
    layers: int | None
    dim: int


def head_of(loss: str, small: bool) -> Head:
    """The projector that a loss was published with, for tiny images and for others."""
    paper = Head(2048, 1, 256) if small else Head(2048, 2, 512)  # the paper's Table 4
    return {
        "simclr": Head(2048, 1, 128),  # Chen et al. 2020
        "simsiam": Head(2048, None, 2048),  # Chen and He 2020
        "byol": Head(4096, None, 256),  # Grill et al. 2020
        "barlow": Head(8192, None, 8192),  # Zbontar et al. 2021
        "vicreg": Head(8192, 2, 8192),  # Bardes et al. 2021
    }.get(loss, paper)


def temperature_of(loss: str, small: bool) -> float:
    """SimCLR's 0.1, and 0.5 for CIFAR (its appendix B.9).

    For the Shannon difference of entropies the paper states none. Its estimate reaches the bound of
    log n, which takes 0.1: at 0.5 not even orthogonal embeddings come near it.
    """
    return 0.5 if loss == "simclr" and small else 0.1


@dataclass(frozen=True)
class Options:
    """What a recipe and the command line may say.

    ``None`` means: decided by the loss and the data (see :meth:`resolved`).
    """

    data: str = "digits"
    out: str | None = None
    recipe: str | None = None
    loss: str = "vn-doe"
    epochs: int | None = None
    warmup_epochs: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    lr: float | None = None
    weight_decay: float | None = None
    beta_schedule: str = "linear"
    beta_start: float = 1.0
    beta_end: float = 10.0
    temperature: float | None = None
    method: str = "auto"
    backbone: str = "resnet50"
    stem: str = "auto"
    projector_dim: int | None = None
    projector_hidden: int | None = None
    projector_layers: int | None = None
    image_size: int | None = None
    augment: str = "auto"
    classes: str | None = None
    train_images: int | None = None
    batch_norm: str = "joint"
    knn_every: int | None = None
    evaluation: bool = True
    checkpoint_every: float = CHECKPOINT_SECONDS
    keep_checkpoints: int = 3
    seed: int = 0
    workers: int | None = None
    accelerator: str = "auto"
    devices: str = "auto"
    collective_timeout: int = 600
    precision: str = "auto"
    compile: bool = False
    download_dir: str = "data"

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            check_bounds(name, getattr(self, name), low, high)
        for name in ("lr", "weight_decay", "beta_start", "beta_end", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise OptionError(name, "a finite number >= 0", value)
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise OptionError("temperature", "a finite number > 0", self.temperature)
        for name, choices in (
            ("loss", LOSSES),
            ("beta_schedule", BETA_SCHEDULES),
            ("method", METHODS),
            ("backbone", BACKBONES),
            ("stem", STEMS),
            ("augment", AUGMENTATIONS),
            ("batch_norm", BATCH_NORMS),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise OptionError(name, "one of " + ", ".join(choices), getattr(self, name))
        if self.devices != "auto" and not re.fullmatch(r"[1-9]\d{0,4}", self.devices):
            raise OptionError("devices", "'auto' or an integer >= 1", self.devices)
        if self.projector_layers is not None and head_of(self.loss, small=True).layers is None:
            wanted = f"left out with --loss {self.loss}, whose projector has a fixed depth"
            raise OptionError("projector_layers", wanted, self.projector_layers)

    @property
    def step_images(self) -> int:
        """Images of an optimiser step: the learning rate scales with them."""
        return self.batch_size * self.accumulate

    @property
    def out_dir(self) -> Path:
        return Path(self.out if self.out is not None else f"runs/{self.recipe_name()}")

    def recipe_name(self) -> str:
        """The recipe's name, else ``digits``, ``cifar10``, or the file's or folder's own name."""
        what = self.recipe or self.data
        return Path(what).resolve().stem if os.sep in what else Path(what).stem

    def resolved(self, native_size: int) -> Config:
        """Fill in what depends on the data, whose images measure ``native_size`` pixels."""
        digits = self.data == "digits"
        defaults = DIGITS if digits else PAPER
        size = _or(self.image_size, native_size)
        small = size <= SMALL
        epochs = _or(self.epochs, defaults["epochs"])
        warmup = _or(self.warmup_epochs, min(defaults["warmup_epochs"], epochs - 1))
        if warmup >= epochs and warmup > 0:
            raise OptionError("warmup_epochs", f"less than the {epochs} epochs", warmup)
        head = head_of(self.loss, small)
        # Table 5: the losses compared there keep the augmentations they were published with.
        augment = "affine" if digits else self.loss if self.loss in AUGMENTATIONS else "simclr"
        return Config(
            **dataclasses.asdict(self)
            | {
                "out": str(self.out_dir),
                "image_size": size,
                "epochs": epochs,
                "warmup_epochs": warmup,
                "lr": _or(self.lr, defaults["lr"]),
                "weight_decay": _or(self.weight_decay, defaults["weight_decay"]),
                "temperature": _or(self.temperature, temperature_of(self.loss, small)),
                "projector_dim": _or(self.projector_dim, head.dim),
                "projector_hidden": _or(self.projector_hidden, head.hidden),
                "projector_layers": _or(self.projector_layers, head.layers),
                "stem": self.stem if self.stem != "auto" else "3x3" if small else "7x7",
                "augment": self.augment if self.augment != "auto" else augment,
                "knn_every": _or(self.knn_every, defaults["knn_every"]),
                "workers": _or(self.workers, 0 if digits else min(8, os.cpu_count() or 1)),
            }
        )


@dataclass(frozen=True)
class Config(Options):
    """The options of a run with nothing left open; saved as ``config.json`` with its results."""

    out: str = "runs/digits"
    epochs: int = 100
    warmup_epochs: int = 10
    lr: float = 0.5
    weight_decay: float = 5e-5
    temperature: float = 0.1
    projector_dim: int = 256
    projector_hidden: int = 2048
    image_size: int = 32
    knn_every: int = 1
    workers: int = 0


#: The paper's Table 3, 100 epochs of CIFAR-10.
PAPER: dict[str, Any] = {
    "epochs": 100,
    "warmup_epochs": 10,
    "lr": 0.5,
    "weight_decay": 5e-5,
    "knn_every": 1,
}

#: For the bundled digits: found by short runs to end within six minutes on two CPU cores.
DIGITS: dict[str, Any] = {
    "epochs": 36,
    "warmup_epochs": 4,
    "lr": 0.8,
    "weight_decay": 5e-4,
    "knn_every": 6,  # more often it would cost a fifth of the training
}


CONFIG = "config.json"  # in the folder of a run


def load_config(run: Path) -> Config:
    """The configuration of the run in the folder ``run``.

    Raises:
        OptionError: the folder holds none, or one that cannot be read.
    """
    path = run / CONFIG
    try:
        saved = read_json(path, dict[str, Any])
        if unknown := saved.keys() - {field.name for field in dataclasses.fields(Config)}:
            raise FileError(path, f"holds {', '.join(sorted(unknown))}, which is no option")
        config = read_json(path, Config)
    except (OSError, FileError) as error:
        wanted = f"the folder of a run, with a readable {path.name}"
        raise OptionError("run", wanted, f"{run} ({error})") from error
    # How many processes are wise is this machine's to say, and the file may be a stranger's.
    workers = min(config.workers, os.cpu_count() or 1)
    return dataclasses.replace(config, out=str(run), workers=workers)


def resumed_config(out: Path, given: Mapping[str, Any]) -> Config:
    """The run's own options; those ``given`` must agree, or be free to change.

    The place of the run is ``out``, and an "auto" agrees with what it was decided to be.
    """
    config = load_config(out)
    given = {
        name: value
        for name, value in given.items()
        if name != "out" and not (name in DECIDED and value == "auto")
    }
    for name, value in given.items():
        if name not in FREE_ON_RESUME and value != getattr(config, name):
            wanted = f"left out or {getattr(config, name)!r}, as the run began, with --resume"
            raise OptionError(name, wanted, value)
    free = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    return dataclasses.replace(config, **free)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
