"""The options of the commands that use the encoder of a run, with their defaults and checks.

Apart from the modules that compute with them, so that help comes without their imports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

from vne_kernels.pretrain.config import BOUNDS, OptionError, check_bounds

ENCODERS = ("trained", "untrained")
FORMATS = ("torchvision", "timm", "detectron2")  # that an encoder is exported in


@dataclass(frozen=True)
class LinearProtocol:
    """Hyper-parameters of the linear evaluation; the defaults are the paper's (Appendix C).

    SGD on the cross entropy, cosine decay of the learning rate to zero without warm-up or restarts.
    ``lr`` is used as given: it is not scaled by the batch size.
    """

    epochs: int = 100
    batch_size: int = 256
    lr: float = 0.3
    momentum: float = 0.995
    weight_decay: float = 1e-6
    augment: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            check_bounds(name, getattr(self, name), low, BOUNDS[name][1])
        for name in ("lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(name, "a finite number >= 0", getattr(self, name))
        if not 0 <= self.momentum < 1:
            raise OptionError("momentum", "a number >= 0 and < 1", self.momentum)


class Accuracy(TypedDict):
    """What is read of the result of an evaluation."""

    accuracy: float


@dataclass(frozen=True)
class KNNProtocol:
    """Weighted nearest neighbours; the defaults are those of Wu et al. 2018."""

    neighbours: int = 200
    temperature: float = 0.1

    def __post_init__(self) -> None:
        check_bounds("neighbours", self.neighbours, 1, 2**40)
        if not 0 < self.temperature < math.inf:
            raise OptionError("temperature", "a finite number > 0", self.temperature)


@dataclass(frozen=True)
class Setting:
    """Which encoder of a run is judged, on which images and where; ``None``: as the run had it."""

    encoder: str = "trained"
    data: str | None = None
    download_dir: str | None = None
    workers: int | None = None
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        if self.encoder not in ENCODERS:
            raise OptionError("encoder", "one of " + ", ".join(ENCODERS), self.encoder)
        check_bounds("workers", self.workers, *BOUNDS["workers"])

    def file_stem(self, command: str) -> str:
        """Name, without its suffix, of what ``command`` writes into the run's folder."""
        return command if self.encoder == "trained" else f"{command}_{self.encoder}"
