"""Lets a run survive a full disk: it reports what cannot be written, and keeps it for later.

A checkpoint that cannot be written leaves the last one as it is. Rows of tables stay in memory
until there is room. The results of a run must be written: a failure to do so ends the run.
"""

from __future__ import annotations

import csv
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vne_kernels.common.files import locked, synchronize
from vne_kernels.common.reading import FileError
from vne_kernels.pretrain.config import OptionError
from vne_kernels.pretrain.faults import Fault

#: Of an OSError in a long piece of work: only these are surely a write's.
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)


def _is_archive_error(error: BaseException | None) -> bool:
    """torch.save raises a RuntimeError of its archive's writer when the disk is full."""
    text = str(error)
    ours = "inline_container" in text or "PytorchStreamWriter" in text
    return isinstance(error, RuntimeError) and ours


def _loader_failure(error: BaseException | None) -> BaseException | None:
    """Returns the error by which torch reports the death of a process that loads images.

    torch raises it wherever the program is. In torch.save it leaves an archive cut short, whose own
    error then hides it.
    """
    while error is not None and "DataLoader worker" not in str(error):
        error = error.__context__
    return error


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return " ".join(str(error).split())[:150]


def _print_message(message: str) -> None:
    print(f"\nvne-pretrain: {message}", file=sys.stderr)


class Disk:
    """Knows which files cannot be written at the moment.

    Args:
        report: is called with a message when a file cannot be written, and when it can be again;
            by default the message goes to stderr.
    """

    def __init__(self, report: Callable[[str], None] = _print_message) -> None:
        self.failing: set[Path] = set()
        self.report = report

    @contextmanager
    def tolerated(self, path: Path, meanwhile: str) -> Iterator[None]:
        """Reports a failure to write ``path`` once, and what happens ``meanwhile``; continues."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if dead := _loader_failure(error):
                raise dead from None
            if not (isinstance(error, OSError) or _is_archive_error(error)):
                raise
            if path not in self.failing:
                self.failing.add(path)
                self.report(f"cannot write {path}: {_reason(error)}; {meanwhile}")
        else:
            if path in self.failing:
                self.failing.remove(path)
                self.report(f"{path} is written again")


def append_rows(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Appends all of the rows or, where that fails, none of them."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


class Rows:
    """Appends rows to a CSV file; rows that cannot be written wait for the next ones."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path, self.disk = path, disk
        self.waiting: list[Sequence[Any]] = []

    def append(self, rows: Sequence[Sequence[Any]]) -> None:
        self.waiting += rows
        with self.disk.tolerated(self.path, "its rows wait in memory"):
            self._write()

    def synchronize(self) -> bool:
        """Try until the rows are on the disk, and say whether they are."""
        with self.disk.tolerated(self.path, "its rows wait in memory"):
            self._write()
            synchronize(self.path)
        return self.path not in self.disk.failing

    def _write(self) -> None:
        if self.waiting:
            # The report of a failure of this very write is a row of the next one.
            waiting, count = list(self.waiting), len(self.waiting)
            append_rows(self.path, waiting)
            del self.waiting[:count]


@contextmanager
def held(option: str, folder: Path, what: str) -> Iterator[int]:
    """Holds the folder that ``option`` names, as :func:`~vne_kernels.common.files.locked` does.

    Raises:
        OptionError: another process does ``what`` in it, or it cannot be written to.
    """
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(locked(folder, what))
        except FileError as error:
            wanted = "a folder in which no other process is at work"
            raise OptionError(option, wanted, str(error)) from error
        except OSError as error:
            wanted = "a folder that can be written"
            raise OptionError(option, wanted, f"{folder} ({error})") from error
        yield descriptor


@contextmanager
def has_to_be_written(out: Path) -> Iterator[None]:
    """A failure to write something that the run in ``out`` cannot do without, as a fault."""
    try:
        yield
    except (OSError, RuntimeError, OptionError) as error:
        cause = error.__cause__ if isinstance(error, OptionError) else error
        refused = isinstance(cause, OSError) and cause.errno in REFUSED
        if cause is None or not (refused or _is_archive_error(cause)):
            raise
        where = getattr(cause, "filename", None) or out
        raise Fault(f"cannot write {where}: {_reason(cause)}; make room, then go on") from error
