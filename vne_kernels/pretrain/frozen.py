"""The encoder of a run, frozen, and the images that it is judged on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from vne_kernels.pretrain import evaluate
from vne_kernels.pretrain.augment import plain_view
from vne_kernels.pretrain.config import Config, OptionError, load_config
from vne_kernels.pretrain.data import ImageData, ImageSet, load
from vne_kernels.pretrain.protocol import Setting


@dataclass(frozen=True)
class Frozen:
    """An encoder in evaluation mode, and images whose labels are 0, 1, ..."""

    run: Path
    setting: Setting
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
        config = load_config(run)
        trained = setting.encoder == "trained"
        encoder = (
            evaluate.trained_encoder(run, config) if trained else evaluate.untrained_encoder(config)
        )
        device = _device(setting.accelerator)
        data = load(
            setting.data or config.data,
            setting.download_dir or config.download_dir,
            classes=config.classes,
            train_images=config.train_images,
        )
        return cls(run, setting, config, encoder.to(device).eval(), data, device)

    @property
    def workers(self) -> int:
        return self.config.workers if self.setting.workers is None else self.setting.workers

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
            workers=self.workers,
            progress=progress,
        )

    def encode_batch(self, batch: Tensor) -> Tensor:
        """(n, 3, size, size) -> features (n, f), float32."""
        return evaluate.encode_batch(self.encoder, batch, self.device, bf16=self.bf16)

    def describe(self) -> dict[str, Any]:
        """What was judged, for a result's reader."""
        return {
            "encoder": self.setting.encoder,
            "backbone": self.config.backbone,
            "stem": self.config.stem,
            "precision": self.config.precision,
            "data": {
                "name": self.setting.data or self.config.data,
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
