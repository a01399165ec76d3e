"""Decides when a run saves a checkpoint, and adds to it what Lightning leaves out."""

from __future__ import annotations

import dataclasses
import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vne_kernels.common.reading import FileError, first_sentence
from vne_kernels.common.stopping import StopSignals
from vne_kernels.pretrain import checkpoints, random_state
from vne_kernels.pretrain.checkpoints import Resumed
from vne_kernels.pretrain.config import Config, OptionError
from vne_kernels.pretrain.disk import Disk
from vne_kernels.pretrain.events import CHECKPOINT, Events
from vne_kernels.pretrain.faults import Fault
from vne_kernels.pretrain.ranks import gathered

RANDOM, CONFIG = "random_states", "config"  # keys of a checkpoint


class CheckpointFolder(TorchCheckpointIO):
    """Lightning's checkpoints as files of a folder that are whole or not there.

    None is written that is ahead of the tables' rows on the disk, as ``rows_on_disk`` says.
    """

    def __init__(self, disk: Disk, rows_on_disk: Callable[[], bool]) -> None:
        super().__init__()
        self.disk, self.rows_on_disk = disk, rows_on_disk

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        with self.disk.tolerated(Path(path), "the last checkpoint stays, training goes on"):
            if not self.rows_on_disk():
                raise OSError(errno.ENOSPC, "rows of tables wait in memory")
            checkpoints.write(Path(path), int(checkpoint["global_step"]), checkpoint)


class Checkpoints(Callback):
    """Saves at the end of training, every so many seconds, and when a signal asks to stop.

    Only between two optimiser steps: gradients that are being accumulated are not saved. Must come
    after the callbacks whose ``before_saving`` are given, and whose rows have to be on the disk
    when the checkpoint is.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        signals: StopSignals,
        resumed: Resumed,
        events: Events,
        before_saving: Sequence[Callable[[pl.Trainer], None]],
    ) -> None:
        self.config, self.signals, self.resumed = config, signals, resumed
        self.events, self.before_saving = events, before_saving
        self.out = out
        self.has_begun = False
        self.saved_at = time.monotonic()
        self.random_states: list[dict[str, Any]] = []

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CONFIG] = dataclasses.asdict(self.config)
        checkpoint[RANDOM] = gathered(trainer, random_state.collect())

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.random_states = checkpoint.get(RANDOM, [])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._set_random_state(trainer)
        if trainer.is_global_zero:
            for path, reason in self.resumed.passed_over.items():
                aside = checkpoints.set_aside(path).name
                message = f"passed over a checkpoint, {reason}; it is now {aside}"
                self.events.add(trainer.global_step, CHECKPOINT, message)
        if trainer.global_step != self.resumed.step:
            raise ValueError(f"its parts are of the steps {trainer.global_step} and of its name")
        self.has_begun = True
        self.saved_at = time.monotonic()
        self.signals.defer()

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """What is raised between here and the first step is the fault of what is restored."""
        try:
            yield
        except (OptionError, FileError, Fault):
            raise
        except Exception as error:
            if self.has_begun or self.resumed.path is None:
                raise
            wanted = "used with a checkpoint whose content is that of this run"
            got = f"{self.resumed.path.name} ({first_sentence(error)})"
            raise OptionError("resume", wanted, got) from error

    def _set_random_state(self, trainer: pl.Trainer) -> None:
        rank = trainer.global_rank
        if rank < len(self.random_states):
            random_state.restore(self.random_states[rank])
        else:  # the begin, or a process that was not there before
            random_state.seed(self.config.seed + rank)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signals.restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.signals.restore()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # The last batch of an epoch leaves saving to the epoch's end, whose rows belong to it.
        between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if between_steps and not trainer.is_last_batch and self._due(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_last_batch:
            return  # stopped, and saved when that happened
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if self._due(trainer) or last:
            self._save(trainer)

    def _due(self, trainer: pl.Trainer) -> bool:
        """All processes agree, since saving and stopping concern them all."""
        due = time.monotonic() - self.saved_at >= self.config.checkpoint_every
        signum = self.signals.received or 0
        if trainer.world_size > 1:
            asked = torch.tensor([signum, due], device=trainer.strategy.root_device)
            signum, due = trainer.strategy.reduce(asked, reduce_op="max").tolist()
        if signum:
            self.signals.received = int(signum)
            trainer.should_stop = True
        return bool(signum or due)

    def _save(self, trainer: pl.Trainer) -> None:
        for prepare in self.before_saving:
            prepare(trainer)
        trainer.save_checkpoint(self.out / checkpoints.FOLDER)
        if trainer.is_global_zero:
            checkpoints.keep_newest(self.out, self.config.keep_checkpoints)
        self.saved_at = time.monotonic()
