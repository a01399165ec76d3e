"""The files that are written, and how to recognize that this program has written them."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from vne_kernels.common.reading import FileError, open_regular, read_json

TABLE, SCORES, PICTURE = "spectrum.csv", "scores.json", "spectrum.png"
UNFINISHED = "unfinished.pt"  # while there is something to go on from
ALL = (TABLE, SCORES, PICTURE, UNFINISHED)

#: How `torch.save` begins a file that `atomic_write` has named: known even where it is damaged.
_SAVED = re.compile(rb"PK\x03\x04.{26}unfinished-[0-9a-f]{8}/", re.DOTALL)


class _Scores(TypedDict):
    """What is never missing in scores.json."""

    files: list[str]
    rows: int
    features: int
    entropy: float
    effective_rank: float
    vne_kernels: str


def is_ours(folder: Path) -> bool:
    """Whether this program has written scores or unfinished work into the folder before."""
    with suppress(FileError, OSError):
        read_json(folder / SCORES, _Scores)
        return True
    with suppress(FileError, OSError), open_regular(folder / UNFINISHED) as file:
        return _SAVED.match(file.read(100)) is not None
    return False


def well_formed(name: str) -> str:
    """A file's name as text of Unicode, which JSON is: what is not UTF-8 is escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
