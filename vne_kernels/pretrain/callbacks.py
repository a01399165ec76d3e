"""What a run keeps while it trains: tables of its metrics and spectra, and events.

The tables hold rows up to the checkpoint's step and no further when a run is resumed, so that a
resumed run leaves the same tables as one that never stopped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms import v2

from vne_kernels import spectrum, vn_entropy
from vne_kernels.callbacks import CollapseWatch
from vne_kernels.common.files import write_table
from vne_kernels.pretrain import evaluate
from vne_kernels.pretrain.data import ImageSet, ViewBatch, stratified
from vne_kernels.pretrain.disk import Disk, Rows
from vne_kernels.pretrain.events import BROKEN_IMAGE, COLLAPSE, RECOVERED, Events
from vne_kernels.pretrain.faults import NonFiniteLoss
from vne_kernels.pretrain.model import Pretraining
from vne_kernels.pretrain.ranks import gathered
from vne_kernels.pretrain.tables import read_table

#: per step, as the objective gives them
TERMS = ("loss", "entropy", "cosine", "information", "beta", "lr")
STEP_HEADER = ("step", "epoch", *TERMS)
#: at the end of an epoch: of a fixed batch, and of the test set
ONLINE = ("probe_entropy", "effective_rank", "online_linear", "online_knn")
EPOCH_HEADER = ("epoch", "step", *TERMS, *ONLINE)
FLUSH_STEPS = 50
#: Entropy of a fixed batch over its largest, log min(n, d), below which the user is warned. At a
#: batch of 128 it is an effective rank of 1.6: one direction holds nearly everything.
COLLAPSE_SHARE = 0.1
ONLINE_BANK = 5000  # training images among which neighbours are looked for
ONLINE_TEST = 2000
ONLINE_NEIGHBOURS = 20
ONLINE_TEMPERATURE = 0.1


class Table:
    """A CSV file of numbers with a column "step", appended to while a run goes on."""

    def __init__(self, path: Path, header: Sequence[str], disk: Disk) -> None:
        self.path, self.header = path, tuple(header)
        self.rows = Rows(path, disk)

    def keep_until(self, step: int) -> list[list[float]]:
        """Drop the rows after ``step``; return those that stay."""
        rows: list[list[float]] = []
        if step > 0 and self.path.exists():
            header, rows = read_table(self.path)
            rows = [row for row in rows if row[header.index("step")] <= step]
        write_table(self.path, self.header, ([_short(x) for x in row] for row in rows))
        return rows

    def append(self, rows: Iterable[Sequence[float]]) -> None:
        self.rows.append([[_short(x) for x in row] for row in rows])

    def synchronize(self) -> bool:
        """Wait until the rows are on the disk; whether they are."""
        return self.rows.synchronize()


def _short(value: float) -> str:
    return format(value, ".9g")  # a float32 and back


class MetricsTables(Callback):
    """``metrics.csv``, a row per step, and ``epochs.csv`` and ``spectrum.csv``, a row per epoch.

    A row's step counts the optimiser steps taken when it was written; where gradients of several
    batches are accumulated it holds their means. Entropies are in nats.
    ``probe_entropy``, ``effective_rank`` and the spectrum are those of the embeddings of ``fixed``,
    a batch of images that are not augmented; the spectrum's epoch 0 is the untrained network. A
    collapse of that batch, and the end of one, is an event.
    """

    def __init__(
        self, out: Path, fixed: Tensor, dim: int, online: OnlineEvaluation, events: Events
    ) -> None:
        count = min(len(fixed), dim)
        self.steps = Table(out / "metrics.csv", STEP_HEADER, events.disk)
        self.epochs = Table(out / "epochs.csv", EPOCH_HEADER, events.disk)
        names = [f"eigenvalue_{i}" for i in range(1, count + 1)]
        self.spectra = Table(out / "spectrum.csv", ["epoch", "step", *names], events.disk)
        self.fixed, self.online, self.events = fixed, online, events
        below = COLLAPSE_SHARE * math.log(count) if count > 1 else 0.0
        self.collapse = CollapseWatch(below, "a fixed batch")
        self.of_this_step: list[list[Any]] = []  # terms, a row per batch
        self.pending: list[tuple[Any, ...]] = []  # may hold tensors of the device
        self.this_epoch: list[list[float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if trainer.is_global_zero:
            rows = self.steps.keep_until(step)
            self.this_epoch = [row for row in rows if row[1] == trainer.current_epoch + 1]
            self.epochs.keep_until(step)
            self.spectra.keep_until(step)
            kinds = [kind for _, kind, _ in self.events.keep_until(step)]
            states = [kind for kind in kinds if kind in (COLLAPSE, RECOVERED)]
            self.collapse.collapsed = states[-1:] == [COLLAPSE]
        if step == 0:
            self._spectrum(trainer, pl_module, epoch=0)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not trainer.is_global_zero:
            return
        # Lightning's own "loss" has that of the online probe in it.
        terms = [outputs["objective" if name == "loss" else name] for name in TERMS]
        self.of_this_step.append(terms)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        batches = len(self.of_this_step)
        means = [sum(values) / batches for values in zip(*self.of_this_step, strict=True)]
        self.of_this_step.clear()
        self.pending.append((trainer.global_step, trainer.current_epoch + 1, *means))
        if len(self.pending) >= FLUSH_STEPS:
            self.flush()

    def flush(self) -> None:
        """Write the pending rows; waits for the device, hence not on every step."""
        rows = [[float(x) for x in row] for row in self.pending]
        self.pending.clear()
        if rows:  # on process 0 alone
            self.steps.append(rows)
        self.this_epoch += rows

    def before_saving(self, trainer: pl.Trainer) -> None:
        """A checkpoint's rows are on the disk before it is: they are not written again."""
        self.flush()
        if trainer.is_global_zero:
            self.all_on_disk()

    def all_on_disk(self) -> bool:
        """Wait until every row is on the disk; whether all are."""
        tables = (self.steps, self.epochs, self.spectra, self.events)
        return all([table.synchronize() for table in tables])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.flush()
        if not trainer.is_last_batch:
            return  # interrupted; the resumed run ends this epoch
        epoch = trainer.current_epoch + 1
        entropy = self._spectrum(trainer, pl_module, epoch)
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Pretraining)
        accuracies = self.online.accuracies(trainer, pl_module)
        terms = torch.tensor(self.this_epoch)[:, 2:]
        means = dict(zip(TERMS, terms.mean(0).tolist(), strict=True))
        # Of what follows a schedule, the last.
        means |= {name: self.this_epoch[-1][2 + TERMS.index(name)] for name in ("beta", "lr")}
        ends = [entropy, math.exp(entropy), *accuracies]
        self.epochs.append([[epoch, trainer.global_step, *means.values(), *ends]])
        self._watch_for_collapse(entropy, trainer.global_step)
        for logger in trainer.loggers:
            found = {name: x for name, x in zip(ONLINE, ends, strict=True) if not math.isnan(x)}
            logger.log_metrics(found, trainer.global_step)
        self.this_epoch = []

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, NonFiniteLoss):
            self.flush()  # the way there

    def _watch_for_collapse(self, entropy: float, step: int) -> None:
        message = self.collapse.message(entropy, f"{len(self.fixed)} images")
        if message is not None:
            self.events.add(step, COLLAPSE if self.collapse.collapsed else RECOVERED, message)

    @torch.no_grad()
    def _spectrum(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> float:
        # Every process takes part: synchronized batch norms wait for each other.
        with trainer.precision_plugin.forward_context(), _norms_of_the_batch(pl_module):
            embeddings = pl_module(self.fixed.to(pl_module.device)).float()
        if trainer.is_global_zero:
            self.spectra.append([[epoch, trainer.global_step, *spectrum(embeddings).tolist()]])
        return float(vn_entropy(embeddings))


class OnlineEvaluation:
    """How good the features are while they are trained: accuracies on images of the test set.

    The linear probe is the one that is trained in the same steps; the neighbours are looked for
    among a fixed part of the training set. Asked on one process: in evaluation mode the batch norms
    of several do not wait for each other.
    """

    def __init__(
        self, train: ImageSet, test: ImageSet, view: v2.Compose, *, every: int, workers: int
    ) -> None:
        self.every, self.workers, self.view = every, workers, view
        self.train, self.test = (
            images.take(stratified(images.labels, most))
            for images, most in ((train, ONLINE_BANK), (test, ONLINE_TEST))
        )

    def accuracies(self, trainer: pl.Trainer, module: Pretraining) -> tuple[float, float]:
        """(linear probe, nearest neighbours), 0 to 1; NaN in an epoch that is left out."""
        epoch = trainer.current_epoch + 1
        if not self.every or (epoch % self.every and epoch != trainer.max_epochs):
            return math.nan, math.nan
        bank, test = (
            evaluate.encode(
                module.encoder,
                images,
                self.view,
                module.device,
                bf16=str(trainer.precision) == "bf16-mixed",
                workers=self.workers,
            )
            for images in (self.train, self.test)
        )
        module.encoder.train()
        with torch.no_grad():
            found = module.probe(torch.from_numpy(test.features).to(module.device)).argmax(1)
        neighbours = evaluate.weighted_knn(
            bank,
            test,
            neighbours=min(ONLINE_NEIGHBOURS, len(bank.labels)),
            temperature=ONLINE_TEMPERATURE,
            device=module.device,
        )
        return float(np.mean(found.cpu().numpy() == test.labels)), neighbours


class BrokenImages(Callback):
    """Names every image file that could not be read, once, with the step that met it."""

    def __init__(self, events: Events) -> None:
        self.events = events
        self.met: list[tuple[int, str]] = []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: ViewBatch,
        batch_idx: int,
    ) -> None:
        self.met += [(trainer.global_step, name) for name in batch.broken]
        if trainer.world_size == 1:
            self._report()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before_saving(trainer)

    def before_saving(self, trainer: pl.Trainer) -> None:
        """Bring together what the processes have met; a resumed run does not meet it again."""
        if trainer.world_size > 1:
            met = itertools.chain(*gathered(trainer, self.met))
            self.met = sorted(met) if trainer.is_global_zero else []
            self._report()

    def _report(self) -> None:
        for step, name in self.met:
            message = f"cannot read {name}; another image took its place"
            self.events.add(step, BROKEN_IMAGE, message, once=True)
        self.met.clear()


@contextmanager
def _norms_of_the_batch(module: nn.Module) -> Iterator[None]:
    """Batch norms use the batch's own statistics, as in training, and leave theirs alone."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
