"""Files appear whole or not at all: written under a temporary name, on the disk, then renamed."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block succeeds.

    Its content is on the disk before it gets the name, and the name before the block is left: a
    power cut leaves the old file or the new one.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Where ``path`` is written before it is whole; :func:`remove_temporaries` knows it."""
    # The suffix is kept: matplotlib and others choose the format by it.
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


def publish(temporary: Path, path: Path) -> None:
    """Rename a file in its folder once its content is on the disk, and the new name with it."""
    synchronise(temporary)
    os.replace(temporary, path)
    synchronise(path.parent)


def synchronise(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Delete what writers that were killed have left in ``folder``."""
    for path in folder.glob(".*.tmp*"):
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def append_rows(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """All of the rows or, where that fails, none of them."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def read_table(path: Path) -> tuple[list[str], list[list[float]]]:
    """Header and rows of a table of numbers; a last line cut short by a crash is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return header, [[float(x) for x in row] for row in rows if len(row) == len(header)]


def first_sentence(error: Exception) -> str:
    """What torch.load found, without its advice of how to load it nevertheless."""
    text = " ".join(str(error).split())
    found = re.search(r"Unsupported (?:global: GLOBAL|operand|class) \S+", text)
    return (found[0] if found else text[:120]) or type(error).__name__
