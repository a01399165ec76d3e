"""``events.csv``: what happened in a run that its reader should know of."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from vne_kernels.common.files import write_table
from vne_kernels.common.reading import FileError, printable
from vne_kernels.pretrain.disk import Disk, Rows
from vne_kernels.pretrain.tables import read_rows

HEADER = ("step", "kind", "message")
COLLAPSE, RECOVERED, BROKEN_IMAGE = "collapse", "recovered", "broken-image"
NON_FINITE = "non-finite"
CHECKPOINT = "checkpoint"  # one that could not be used
DISK = "disk"  # a file that cannot be written, or can be again


class Events:
    """A row per event: the optimiser steps taken by then, its kind, and a sentence."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path, self.disk = path, disk
        self.rows = Rows(path, disk)
        self.seen: set[tuple[str, str]] = set()

    def keep_until(self, step: int) -> list[list[str]]:
        """Drop the events after ``step``, which a resumed run meets again; return the others."""
        rows = [row for row in read_events(self.path) if int(row[0]) <= step] if step else []
        write_table(self.path, HEADER, rows)
        self.seen = {(kind, message) for _, kind, message in rows}
        return rows

    def add(
        self, step: int, kind: str, message: str, *, once: bool = False, say: bool = True
    ) -> None:
        """Write the event and say it; with ``once``, not if it was said before."""
        message = printable(message, 4000)  # it may name files, and be made of their content
        if once and (kind, message) in self.seen:
            return
        self.seen.add((kind, message))
        self.rows.append([(step, kind, message)])
        if say:  # on a new line, since a progress bar may be on the current one
            print(f"\nvne-pretrain: step {step}: {message}", file=sys.stderr)

    def synchronize(self) -> bool:
        """Wait until the rows are on the disk; whether they are."""
        return self.rows.synchronize()


def read_events(path: Path) -> list[list[str]]:
    """The rows of the table; none where there is no table, or where a crash cut one short.

    Raises:
        FileError: it is no table of events.
    """
    if not path.exists():
        return []
    header, rows = read_rows(path)
    if tuple(header) != HEADER:
        raise FileError(path, f"must be a table of {', '.join(HEADER)}")
    for row in rows:
        if not re.fullmatch(r"\d{1,18}", row[0]):
            raise FileError(path, f"must hold numbers of steps, got {printable(row[0], 40)}")
    return rows
