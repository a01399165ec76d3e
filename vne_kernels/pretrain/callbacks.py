"""What a run keeps while it trains: tables of its metrics and spectra, and its checkpoint.

The tables hold rows up to the checkpoint's step and no further when a run is resumed, so that a
resumed run leaves the same tables as one that never stopped.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vne_kernels import spectrum, vn_entropy
from vne_kernels.pretrain.files import append_rows, read_table, replacing, write_table

STEP_HEADER = ("step", "epoch", "loss", "entropy", "cosine", "beta", "lr")
EPOCH_HEADER = ("epoch", "step", "loss", "entropy", "cosine", "beta", "lr", "probe_entropy")
CHECKPOINT_SECONDS = 60.0
FLUSH_STEPS = 50


class Table:
    """A CSV file of numbers with a column "step", appended to while a run goes on."""

    def __init__(self, path: Path, header: Sequence[str]) -> None:
        self.path, self.header = path, tuple(header)

    def keep_until(self, step: int) -> list[list[float]]:
        """Drop the rows after ``step``; return those that stay."""
        rows: list[list[float]] = []
        if step > 0 and self.path.exists():
            header, rows = read_table(self.path)
            rows = [row for row in rows if row[header.index("step")] <= step]
        write_table(self.path, self.header, ([_short(x) for x in row] for row in rows))
        return rows

    def append(self, rows: Iterable[Sequence[float]]) -> None:
        append_rows(self.path, ([_short(x) for x in row] for row in rows))


def _short(value: float) -> str:
    return format(value, ".9g")  # a float32 and back


class MetricsTables(Callback):
    """``metrics.csv``, a row per step, and ``epochs.csv`` and ``spectrum.csv``, a row per epoch.

    A row's step counts the optimiser steps taken when it was written. Entropies are in nats.
    ``probe_entropy`` and the spectrum are those of the embeddings of ``probe``, a fixed batch of
    images that are not augmented; the spectrum's epoch 0 is the untrained network.
    """

    def __init__(self, out: Path, probe: Tensor, projector_dim: int) -> None:
        count = min(len(probe), projector_dim)
        self.steps = Table(out / "metrics.csv", STEP_HEADER)
        self.epochs = Table(out / "epochs.csv", EPOCH_HEADER)
        names = [f"eigenvalue_{i}" for i in range(1, count + 1)]
        self.spectra = Table(out / "spectrum.csv", ["epoch", "step", *names])
        self.probe = probe
        self.pending: list[tuple[Any, ...]] = []  # may hold tensors of the device
        self.this_epoch: list[list[float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if trainer.is_global_zero:
            rows = self.steps.keep_until(step)
            self.this_epoch = [row for row in rows if row[1] == trainer.current_epoch + 1]
            self.epochs.keep_until(step)
            self.spectra.keep_until(step)
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
        values = (outputs[name] for name in STEP_HEADER[2:])
        self.pending.append((trainer.global_step, trainer.current_epoch + 1, *values))
        if len(self.pending) >= FLUSH_STEPS:
            self.flush()

    def flush(self) -> None:
        """Write the pending rows; waits for the device, hence not on every step."""
        rows = [[float(x) for x in row] for row in self.pending]
        self.pending.clear()
        if rows:  # on process 0 alone
            self.steps.append(rows)
        self.this_epoch += rows

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.flush()
        if not trainer.is_last_batch:
            return  # interrupted; the resumed run ends this epoch
        epoch = trainer.current_epoch + 1
        entropy = self._spectrum(trainer, pl_module, epoch)
        if not trainer.is_global_zero:
            return
        loss, entropies, cosine = torch.tensor(self.this_epoch).mean(0)[2:5].tolist()
        beta, lr = self.this_epoch[-1][5:]
        row = [epoch, trainer.global_step, loss, entropies, cosine, beta, lr, entropy]
        self.epochs.append([row])
        self.this_epoch = []

    @torch.no_grad()
    def _spectrum(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> float:
        # Every process takes part: synchronised batch norms wait for each other.
        with trainer.precision_plugin.forward_context(), _norms_of_the_batch(pl_module):
            embeddings = pl_module(self.probe.to(pl_module.device)).float()
        entropy = float(vn_entropy(embeddings))
        if trainer.is_global_zero:
            self.spectra.append([[epoch, trainer.global_step, *spectrum(embeddings).tolist()]])
            for logger in trainer.loggers:
                logger.log_metrics({"probe_entropy": entropy}, trainer.global_step)
        return entropy


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


class Checkpoints(Callback):
    """``last.ckpt``: at the end of training, about every minute, and at Ctrl-C.

    The first Ctrl-C lets the step in hand end, saves and stops the fit; the second stops at once
    and leaves the checkpoint of the last minute. Must come after :class:`MetricsTables`, whose
    rows have to be on disk when the checkpoint is.
    """

    def __init__(self, path: Path, tables: MetricsTables) -> None:
        self.path = path
        self.tables = tables
        self.interrupted = False
        self.saved_at = time.monotonic()
        self.previous: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved_at = time.monotonic()
        self.previous = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.interrupted = True
        self._restore()
        # Not print: the progress bar may be inside the same stream's lock.
        os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")

    def _restore(self) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
            self.previous = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # The last batch of an epoch leaves saving to the epoch's end, whose rows belong to it.
        if not trainer.is_last_batch and self._due(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_last_batch:
            return  # interrupted, and saved when that happened
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if self._due(trainer) or last:
            self._save(trainer)

    def _due(self, trainer: pl.Trainer) -> bool:
        """All processes agree, since saving and stopping concern them all."""
        agree = trainer.strategy.reduce_boolean_decision
        if trainer.world_size > 1:
            self.interrupted = agree(self.interrupted, all=False)
        if self.interrupted:
            trainer.should_stop = True
            return True
        due = time.monotonic() - self.saved_at > CHECKPOINT_SECONDS
        return agree(due, all=False) if trainer.world_size > 1 else due

    def _save(self, trainer: pl.Trainer) -> None:
        self.tables.flush()
        if trainer.is_global_zero:
            with replacing(self.path) as temporary:
                trainer.save_checkpoint(temporary)
        else:
            trainer.save_checkpoint(self.path)  # takes part, writes nothing
        self.saved_at = time.monotonic()
