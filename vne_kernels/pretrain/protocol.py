"""The options of the commands that use the encoder of a run, with their defaults and checks.

Apart from the modules that compute with them, so that help comes without their imports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vne_kernels.pretrain.config import OptionError

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
            if getattr(self, name) < low:
                raise OptionError(name, f"an integer >= {low}", getattr(self, name))
        if self.seed >= 2**32:
            raise OptionError("seed", "an integer < 2**32", self.seed)
        for name in ("lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(name, "a finite number >= 0", getattr(self, name))
        if not 0 <= self.momentum < 1:
            raise OptionError("momentum", "a number >= 0 and < 1", self.momentum)


@dataclass(frozen=True)
class KNNProtocol:
    """Weighted nearest neighbours; the defaults are those of Wu et al. 2018."""

    neighbours: int = 200
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise OptionError("neighbours", "an integer >= 1", self.neighbours)
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
        if self.workers is not None and self.workers < 0:
            raise OptionError("workers", "an integer >= 0", self.workers)

    def file_stem(self, command: str) -> str:
        """Name, without its suffix, of what ``command`` writes into the run's folder."""
        return command if self.encoder == "trained" else f"{command}_{self.encoder}"
