"""Values of command line options, with errors that say what was wanted and what came."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted positive whole numbers, got {text!r}")
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """Comma-separated, each once."""
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def duration(text: str) -> float:
    """Seconds, or minutes."""
    try:
        time = float(text)
    except ValueError:
        time = math.nan
    if not (math.isfinite(time) and time > 0):
        raise argparse.ArgumentTypeError(f"wanted a positive number, got {text!r}")
    return time
