"""Peak memory of one call: of torch's allocator on a GPU, of the process's allocators on a CPU.

On a CPU torch's own counters do not see the scratch of native kernels; memray sees all of malloc
and mmap, in all threads, to the byte.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


@functools.cache
def has_memray() -> bool:
    """Whether memray is installed; if not, says on stderr that peak memory will be missing."""
    found = importlib.util.find_spec("memray") is not None
    if not found:
        print("peak memory is not measured: pip install memray", file=sys.stderr)
    return found


def peak_bytes(call: Callable[[], object], device: torch.device) -> float:
    """Most bytes held at once during one call, above those before it.

    NaN without memray, and the call is then not made.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    if not has_memray():
        return math.nan
    import memray

    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.bin"
        with memray.Tracker(records):
            call()
        return float(memray.FileReader(records).metadata.peak_memory)
