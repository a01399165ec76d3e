"""The encoder of a run, frozen, and the images that it is judged on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from vne_kernels.pretrain import evaluate
from vne_kernels.pretrain.augment import plain_view
from vne_kernels.pretrain.config import Config, OptionError, load_config
from vne_kernels.pretrain.data import ImageData, ImageSet, load_for
from vne_kernels.pretrain.protocol import Setting


@dataclass(frozen=True)
class Frozen:
    """An encoder in evaluation mode, and images whose labels are 0, 1, ...

    ``state`` is "trained" or "untrained"; ``config`` the run's, but for where the images are and
    how many processes load them.
    """

    state: str
    config: Config
    encoder: nn.Module
    data: ImageData
    device: torch.device

    @classmethod
    def open(cls, run: Path, setting: Setting) -> Frozen:
        """The encoder of the run in the folder ``run``.

        Raises:
            OptionError: the folder, the images or the accelerator cannot be used.
        """
        changes = {name: getattr(setting, name) for name in ("data", "download_dir", "workers")}
        given = {name: value for name, value in changes.items() if value is not None}
        config = replace(load_config(run), **given)
        trained = setting.encoder == "trained"
        encoder = (
            evaluate.trained_encoder(run, config) if trained else evaluate.untrained_encoder(config)
        )
        device = _device(setting.accelerator)
        return cls(setting.encoder, config, encoder.to(device).eval(), load_for(config), device)

    @property
    def bf16(self) -> bool:
        """Whether features are computed under autocast, as in the run."""
        return self.config.precision == "bf16-mixed"

    def encode(self, images: ImageSet, progress: str) -> evaluate.Encoded:
        """Features of the plain view of every image that can be read."""
        view = plain_view(self.data, self.config.image_size)
        return evaluate.encode(
            self.encoder,
            images,
            view,
            self.device,
            bf16=self.bf16,
            workers=self.config.workers,
            progress=progress,
        )

    def encode_batch(self, batch: Tensor) -> Tensor:
        """(n, 3, size, size) -> features (n, f), float32."""
        return evaluate.encode_batch(self.encoder, batch, self.device, bf16=self.bf16)

    def describe(self) -> dict[str, Any]:
        """What was judged, for a result's reader."""
        return {
            "encoder": self.state,
            "backbone": self.config.backbone,
            "stem": self.config.stem,
            "precision": self.config.precision,
            "data": {
                "name": self.config.data,
                "train_images": len(self.data.train),
                "test_images": len(self.data.test),
                "classes": self.data.classes,
            },
        }


def _device(accelerator: str) -> torch.device:
    try:
        return Fabric(accelerator=accelerator, devices=1).device
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        got = f"{accelerator}: {' '.join(str(error).split())}"
        raise OptionError("accelerator", "one that this machine has", got) from error
