"""Encoder, projector, loss, optimiser and schedules: everything that a training step needs."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightly.models.modules.heads import ProjectionHead  # type: ignore[import-untyped]
from lightly.models.utils import get_weight_decay_parameters  # type: ignore[import-untyped]
from lightly.utils.scheduler import CosineWarmupScheduler  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from vne_kernels import DoELoss
from vne_kernels.pretrain.config import Config

HIDDEN = 2048  # width of the projector's hidden layer, as the paper's
MOMENTUM = 0.9


def make_encoder(backbone: str, stem: str) -> nn.Module:
    """A torchvision ResNet without its classifier: (n, 3, h, w) -> (n, features).

    The stem "3x3" is the paper's Table 4 for tiny images: a 3x3 convolution of stride 1 in place of
    the 7x7 of stride 2, no max pooling. All other parameters keep torchvision's names and shapes.
    """
    encoder: nn.Module = models.get_model(backbone, weights=None)
    encoder.fc = nn.Identity()
    if stem == "3x3":
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        # as torchvision initialises every convolution of a ResNet
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder.to(memory_format=torch.channels_last)


def make_projector(features: int, dim: int) -> ProjectionHead:
    """features -> 2048 -> dim, batch norm and ReLU between."""
    return ProjectionHead(
        [(features, HIDDEN, nn.BatchNorm1d(HIDDEN), nn.ReLU()), (HIDDEN, dim, None, None)]
    )


def beta_at(step: int, total_steps: int, start: float, end: float) -> float:
    """The weight of the cosine: linear from the first step to the last."""
    return start + (end - start) * min(1.0, step / max(1, total_steps - 1))


class Pretraining(pl.LightningModule):
    """Maximises the mutual information of two views: loss = -S(U1) - beta * cos(U1, U2)."""

    def __init__(self, config: Config, total_steps: int) -> None:
        super().__init__()
        self.config = config
        self.total_steps = total_steps
        self.encoder = make_encoder(config.backbone, config.stem)
        features = models.get_model(config.backbone, weights=None).fc.in_features
        self.projector = make_projector(features, config.projector_dim)
        self.criterion = DoELoss(config.beta_start, method=config.method, gather_distributed=True)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) -> embeddings (n, projector_dim), not normalised."""
        features = self.encoder(images.contiguous(memory_format=torch.channels_last))
        embeddings: Tensor = self.projector(features)
        return embeddings

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        beta = beta_at(
            self.global_step, self.total_steps, self.config.beta_start, self.config.beta_end
        )
        self.criterion.beta = beta
        # Both views in one pass, as one batch of the batch norms.
        z1, z2 = self(torch.cat(batch)).chunk(2)
        loss: Tensor = self.criterion(z1, z2)
        with torch.no_grad():
            cosine = F.cosine_similarity(z1.float(), z2.float(), dim=-1).mean()
            cosine = self.trainer.strategy.reduce(cosine, reduce_op="mean")
            entropy = -loss - beta * cosine
        optimizer = self.trainer.optimizers[0]
        outputs = {
            "loss": loss,
            "entropy": entropy,
            "cosine": cosine,
            "beta": beta,
            "lr": optimizer.param_groups[0]["lr"],
        }
        self.log_dict({name: outputs[name] for name in ("loss", "beta", "lr")})
        self.log_dict({"entropy": entropy, "cosine": cosine}, prog_bar=True)
        return outputs

    def configure_optimizers(self) -> Any:
        decayed, plain = get_weight_decay_parameters([self.encoder, self.projector])
        optimizer = torch.optim.SGD(
            [
                {"params": decayed, "weight_decay": self.config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=self.config.lr * self.config.batch_size / 256,
            momentum=MOMENTUM,
            fused=True,
        )
        steps_per_epoch = self.total_steps // self.config.epochs
        schedule = CosineWarmupScheduler(
            optimizer,
            warmup_epochs=self.config.warmup_epochs * steps_per_epoch,
            max_epochs=self.total_steps,
            end_value=0.0,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
