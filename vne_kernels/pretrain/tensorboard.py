"""TensorBoard's files, which a full disk may interrupt but which never end a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from vne_kernels.pretrain.disk import Disk

RETRY_SECONDS = 60.0  # between two attempts at a new file


class PatientTensorBoard(TensorBoardLogger):
    """Lightning's logger; where its file cannot be written the points are left out.

    Its thread ends at the first failure, for good: a new file is begun once a minute.
    """

    def __init__(self, out: str, disk: Disk) -> None:
        super().__init__(out, name="tensorboard", version="")
        self.disk = disk
        self.closed_until = 0.0
        threading.excepthook = _quietly(threading.excepthook)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if time.monotonic() >= self.closed_until:
            with self._tolerated():
                super().log_metrics(metrics, step)

    def save(self) -> None:
        if time.monotonic() >= self.closed_until:
            with self._tolerated():
                super().save()

    def finalize(self, status: str) -> None:
        with self._tolerated():
            super().finalize(status)

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        with self.disk.tolerated(Path(self.log_dir), "its points are left out"):
            try:
                yield
            except (OSError, ValueError) as error:
                # Lightning's ValueError is about the kind of the value, whatever was the matter
                cause = error.__cause__ if isinstance(error, ValueError) else error
                if not isinstance(cause, OSError):
                    raise
                self._experiment = None
                self.closed_until = time.monotonic() + RETRY_SECONDS
                raise cause from None


def _quietly(hook: Any) -> Any:
    """An excepthook of threads that leaves the failure of TensorBoard's to its logger."""

    def quiet(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__name__ != "_AsyncWriterThread":
            hook(arguments)

    return quiet
