"""Reads the tables that a run writes."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from pathlib import Path

from vne_kernels.common.reading import FileError, printable, read_text

MOST_TABLE = 1 << 30  # bytes


def read_table(path: Path, needed: Collection[str] = ()) -> tuple[list[str], list[list[float]]]:
    """Header and rows of a table of numbers; a last line cut short by a crash is left out.

    Raises:
        FileError: it is no table of numbers, or lacks a column that is ``needed``.
        OSError: it cannot be read.
    """
    header, rows = read_rows(path)
    if missing := set(needed).difference(header):
        raise FileError(path, f"must have the columns {', '.join(sorted(missing))}")
    try:
        return header, [[float(x) for x in row] for row in rows]
    except ValueError as error:
        raise FileError(path, f"must hold numbers: {printable(error, 200)}") from error


def read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of text; a last line cut short by a crash is left out.

    Raises:
        FileError: it is no table.
        OSError: it cannot be read.
    """
    text = read_text(path, MOST_TABLE)
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=""))
    except (csv.Error, ValueError) as error:
        raise FileError(path, f"must be a table: {printable(error, 200)}") from error
    if rows and not text.endswith("\n"):
        del rows[-1]
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            wanted = f"must have {len(header)} columns in every row"
            raise FileError(path, f"{wanted}, got {len(row)} in row {number}")
    return header, rows
