"""Encoder, objective, optimiser and schedules: everything that a training step needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightly.models.utils import get_weight_decay_parameters  # type: ignore[import-untyped]
from lightly.utils.scheduler import cosine_warmup_schedule  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchvision import models

from vne_kernels.pretrain.config import DIFFERENCES_OF_ENTROPIES, Config
from vne_kernels.pretrain.data import ViewBatch
from vne_kernels.pretrain.objectives import OBJECTIVES, both_views

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


def beta_at(step: int, total_steps: int, config: Config) -> float:
    """The weight of the cosine: linear from the first step to the last, or constant."""
    start, end = config.beta_start, config.beta_end
    if config.beta_schedule == "constant":
        return start
    return start + (end - start) * min(1.0, step / max(1, total_steps - 1))


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


class StepInHand(NamedTuple):
    """What a training step has seen and made of it, detached; features and embeddings per view."""

    batch: ViewBatch
    outputs: dict[str, Any]
    features: tuple[Tensor, Tensor]
    embeddings: tuple[Tensor, Tensor]


class Pretraining(pl.LightningModule):
    """An encoder, the objective that trains it, and a linear probe that only looks on.

    The probe learns the labels from detached features in the same steps: it costs next to nothing,
    and nothing of the labels reaches the encoder.
    """

    def __init__(self, config: Config, total_steps: int, classes: int) -> None:
        super().__init__()
        self.config = config
        self.total_steps = total_steps
        self.encoder = make_encoder(config.backbone, config.stem)
        features = models.get_model(config.backbone, weights=None).fc.in_features
        self.objective = OBJECTIVES[config.loss](config, features, self.encoder)
        self.probe = nn.Linear(features, classes)
        self.in_hand: StepInHand | None = None
        if config.compile:
            for module in (self.encoder, *self.objective.heads()):
                module.compile(dynamic=False)  # in place: parameters keep their names

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) -> embeddings (n, projector_dim), not normalised."""
        # forward: not compiled, for the shapes of a few measurements
        features = self.encoder.forward(_channels_last(images))
        embeddings: Tensor = self.objective.projector.forward(features)
        return embeddings

    def _encode(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder(_channels_last(images))
        return features

    def training_step(self, batch: ViewBatch, batch_idx: int) -> dict[str, Any]:
        if batch_idx % self.config.accumulate == 0:  # the first batch of a step
            self.objective.follow(self.encoder, self.global_step, self.total_steps)
        beta = beta_at(self.global_step, self.total_steps, self.config)
        h1, h2 = both_views(self._encode, batch.first, batch.second, self.config)
        terms = self.objective(h1, h2, (batch.first, batch.second), beta)
        probe_loss = self._probe_loss(h1, batch.labels)
        outputs = {
            "loss": terms.loss + probe_loss,
            "probe_loss": probe_loss.detach(),
            "objective": terms.loss.detach(),
            "entropy": terms.entropy,
            "cosine": terms.cosine,
            "information": terms.information,
            "beta": beta if self.config.loss in DIFFERENCES_OF_ENTROPIES else float("nan"),
            "lr": self.trainer.optimizers[0].param_groups[0]["lr"],
        }
        self.log_dict({"loss": outputs["objective"], "lr": outputs["lr"]})
        self.log_dict({name: outputs[name] for name in ("entropy", "cosine")}, prog_bar=True)
        self.in_hand = StepInHand(
            batch,
            outputs | {"loss": outputs["loss"].detach()},
            (h1.detach(), h2.detach()),
            (terms.z1.detach(), terms.z2.detach()),
        )
        return outputs

    def _probe_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.cross_entropy(self.probe(features.detach().float()), labels)

    def configure_optimizers(self) -> Any:
        decayed, plain = get_weight_decay_parameters([self.encoder, self.objective])
        fixed = {id(p) for p in self.objective.fixed_lr_parameters()}
        groups = [
            {"params": self._trained(decayed, fixed), "weight_decay": self.config.weight_decay},
            {"params": self._trained(plain, fixed), "weight_decay": 0.0},
            {"params": list(self.probe.parameters()), "weight_decay": 0.0},
        ]
        factors: list[Callable[[int], float]] = [self._lr_factor] * len(groups)
        if fixed:
            for some, decay in ((decayed, self.config.weight_decay), (plain, 0.0)):
                groups.append(
                    {"params": [p for p in some if id(p) in fixed], "weight_decay": decay}
                )
                factors.append(lambda step: 1.0)
        optimizer = torch.optim.SGD(
            groups,
            lr=self.config.lr * self.config.step_images / 256,
            momentum=MOMENTUM,
            # where the scaler skips the first step, torch's fused SGD takes uninitialised momentum
            fused=self.config.precision != "16-mixed",
        )
        schedule = LambdaLR(optimizer, factors)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    @staticmethod
    def _trained(parameters: list[nn.Parameter], apart: set[int]) -> list[nn.Parameter]:
        return [p for p in parameters if p.requires_grad and id(p) not in apart]

    def _lr_factor(self, step: int) -> float:
        """Linear warm-up, then one half of a cosine to zero."""
        warmup = self.config.warmup_epochs * (self.total_steps // self.config.epochs)
        factor: float = cosine_warmup_schedule(
            step, self.total_steps, 1.0, 0.0, warmup_steps=warmup, warmup_start_value=0.0
        )
        return factor
