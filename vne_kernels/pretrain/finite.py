"""A loss that is not finite ends the training, with what shows why.

On a CPU the loss is looked at before its gradient is taken: weights and statistics are those that
gave it. On a GPU that would make the host wait in every step, so there the loss of a step is looked
at when the forward pass of the next one is queued, one optimiser step too late for the weights, and
in any case before a checkpoint is saved.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from vne_kernels.common.files import write_json
from vne_kernels.pretrain.data import ImageSet
from vne_kernels.pretrain.events import NON_FINITE, Events
from vne_kernels.pretrain.faults import NonFiniteLoss
from vne_kernels.pretrain.model import Pretraining, StepInHand
from vne_kernels.pretrain.ranks import gathered

FILE = "nonfinite.json"
SHOWN_IMAGES = 10  # in the message; the file has all
SHOWN_PARAMETERS = 5


class _Queued(NamedTuple):
    """A step whose loss is on its way to the host."""

    step: int
    epoch: int
    in_hand: StepInHand
    loss: Tensor  # (), the sum over processes: not finite where one of them is not
    arrived: torch.cuda.Event | None


class FiniteLoss(Callback):
    """Raises :class:`NonFiniteLoss`, on every process in the same step.

    ``nonfinite.json`` in the run's folder then holds the statistics of each process. Must come
    before the callback that saves: at the end of an epoch both act.
    """

    def __init__(self, out: Path, images: ImageSet, events: Events) -> None:
        self.out, self.images, self.events = out, images, events
        self.queued: _Queued | None = None

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        assert isinstance(pl_module, Pretraining)
        previous, self.queued = self.queued, _queue(trainer, pl_module)
        if self.queued.arrived is None:
            self._look_now(trainer, pl_module)
        elif previous is not None:
            self._look(previous, trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look_now(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look_now(trainer, pl_module)

    def _look_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        queued, self.queued = self.queued, None
        if queued is not None:
            self._look(queued, trainer, pl_module)

    def _look(self, queued: _Queued, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if queued.arrived is not None:
            queued.arrived.synchronize()
        if math.isfinite(queued.loss.item()):
            return
        assert isinstance(pl_module, Pretraining)
        own = _statistics(queued.in_hand, pl_module.encoder, self.images)
        processes = gathered(trainer, own)
        message = _message(queued, processes)
        if trainer.is_global_zero:
            content = {"step": queued.step, "epoch": queued.epoch, "processes": processes}
            self._record(trainer.global_step, message, content)
        raise NonFiniteLoss(message)

    def _record(self, step: int, message: str, content: dict[str, Any]) -> None:
        self.events.add(step, NON_FINITE, message, say=False)  # the fault is printed at the end
        try:
            write_json(self.out / FILE, content)
        except OSError as error:  # the message says what matters
            self.events.add(step, NON_FINITE, f"cannot write {self.out / FILE}: {error}")


def _queue(trainer: pl.Trainer, module: Pretraining) -> _Queued:
    assert module.in_hand is not None
    loss = module.in_hand.outputs["loss"].detach()
    if trainer.world_size > 1:
        loss = loss.clone()
        torch.distributed.all_reduce(loss)
    arrived = None
    if loss.is_cuda:
        loss = loss.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
    return _Queued(
        trainer.global_step + 1, trainer.current_epoch + 1, module.in_hand, loss, arrived
    )


def _statistics(in_hand: StepInHand, encoder: nn.Module, images: ImageSet) -> dict[str, Any]:
    """What one process has to say of its part of the batch."""
    indices = in_hand.batch.indices.tolist()
    files = None if isinstance(images.images, np.ndarray) else [images.images[i] for i in indices]
    broken = [
        name for name, values in encoder.named_parameters() if not bool(values.isfinite().all())
    ]
    return {
        **{name: _number(float(value)) for name, value in in_hand.outputs.items()},
        "images": indices,
        "files": files,
        "pixels": [_counts(view) for view in (in_hand.batch.first, in_hand.batch.second)],
        "features": [_counts(view) for view in in_hand.features],
        "embeddings": [_counts(view) for view in in_hand.embeddings],
        "embedding_norms": [_norms(view) for view in in_hand.embeddings],
        "largest_encoder_parameter": _number(_largest(encoder)),
        "encoder_parameters_not_finite": broken,
    }


def _largest(module: nn.Module) -> float:
    return max(float(values.detach().abs().max()) for values in module.parameters())


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity: their names."""
    return value if math.isfinite(value) else str(value)


def _counts(values: Tensor) -> dict[str, int]:
    return {"entries": values.numel(), "not_finite": int((~values.isfinite()).sum())}


def _norms(embeddings: Tensor) -> dict[str, float | str]:
    norms = embeddings.double().norm(dim=-1)
    found = {"min": norms.min(), "median": norms.median(), "max": norms.max()}
    return {name: _number(float(value)) for name, value in found.items()}


def _message(queued: _Queued, processes: list[dict[str, Any]]) -> str:
    """Describes, in one line, the first process whose own loss is not finite."""
    rank, worst = next(
        (found for found in enumerate(processes) if isinstance(found[1]["loss"], str)),
        (0, processes[0]),
    )
    terms = ", ".join(
        f"{name} {_short(worst[name])}"
        for name in ("entropy", "cosine", "information", "probe_loss", "lr", "beta")
    )
    parts = ("pixels", "features", "embeddings")
    counts = ", ".join(_format_counts(name, worst[name]) for name in parts)
    norms = worst["embedding_norms"][0]
    spread = " to ".join(_short(norms[name]) for name in ("min", "median", "max"))
    where = f" on process {rank}" if len(processes) > 1 else ""
    return "; ".join(
        [
            f"the loss of step {queued.step}, epoch {queued.epoch}, is {_short(worst['loss'])}"
            f"{where} ({terms})",
            f"not finite in view 1/2: {counts}",
            f"embedding norms (min, median, max) {spread}",
            f"encoder parameters: largest {_short(worst['largest_encoder_parameter'])}, not finite "
            + (_first(worst["encoder_parameters_not_finite"], SHOWN_PARAMETERS) or "none"),
            f"training images {_first(worst['images'], SHOWN_IMAGES)}",
            f"all of it in {FILE}",
            "no checkpoint was saved after it; where the options are to blame (--lr, --precision), "
            "start again with others",
        ]
    )


def _format_counts(name: str, views: list[dict[str, int]]) -> str:
    counts = "/".join(str(view["not_finite"]) for view in views)
    return f"{counts} of {views[0]['entries']} {name}"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _first(items: list[Any], shown: int) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(map(str, items[:shown])) + more
