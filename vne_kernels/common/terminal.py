"""What the programs say, and to whom: terminals that show any text, users who get one line."""

from __future__ import annotations

import io
import sys

from vne_kernels.common.reading import printable


def show_any_text() -> None:
    """Makes standard output and error escape what their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def reason(error: BaseException) -> str | None:
    """One line for an error that is not the program's own fault; None for any other.

    Memory that has run out, and files that the system does not read or write.
    """
    if isinstance(error, OSError) and error.strerror:
        return printable(f"{error.filename or 'a file'}: {error.strerror}")
    text = str(error)
    of_torch = isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in text or "out of memory" in text
    )
    if isinstance(error, MemoryError) or of_torch:
        return printable(f"out of memory ({text.splitlines()[0] if text else 'of this machine'})")
    return None
