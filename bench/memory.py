"""Peak memory of one call: of torch's allocator on a GPU, of malloc on a CPU.

On a CPU torch's own counters do not see the scratch of native kernels, so the program is started
once more with `count_malloc.c` preloaded, which sees all of it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).resolve().parent / "count_malloc.c"
RESTARTED = "VNE_BENCH_COUNT_MALLOC"  # in the environment: the folder of the library, or a reason


def _build(folder: Path) -> Path:
    """Compile the counter; OSError with the reason where that cannot be done."""
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError("there is no C compiler")
    library = folder / "count_malloc.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError((done.stderr.strip().splitlines() or ["the compiler failed"])[0])
    return library


def restart_with_counter() -> None:
    """Replace this process by one that counts malloc; returns in that one, or where it cannot be.

    Says on stderr why peak memory will be missing, if so. The environment is left as it was found,
    so that compilers started later are not counted.
    """
    before = os.environ.pop(RESTARTED, None)
    if before is not None:
        os.environ.pop("LD_PRELOAD", None)
        if ":" in before:
            os.environ["LD_PRELOAD"] = before.partition(":")[2]
        shutil.rmtree(before.partition(":")[0], ignore_errors=True)
        return
    folder = Path(tempfile.mkdtemp(prefix="count_malloc"))
    try:
        library = str(_build(folder))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"peak memory is not measured: {error}", file=sys.stderr)
        return
    preloaded = [p for p in (os.environ.get("LD_PRELOAD"),) if p]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join([library, *preloaded]),
        RESTARTED: ":".join([str(folder), *preloaded]),
    }
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


@functools.cache
def _counter() -> ctypes.CDLL | None:
    """The preloaded counter, or None."""
    process = ctypes.CDLL(None)
    if not hasattr(process, "count_malloc_stop"):
        return None
    process.count_malloc_stop.restype = ctypes.c_longlong
    return process


def peak_bytes(call: Callable[[], object], device: torch.device) -> float:
    """Most bytes held at once during one call, above those before it; NaN without the counter."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    counter = _counter()
    if counter is None:
        return math.nan
    counter.count_malloc_start()
    try:
        call()
    finally:
        peak = counter.count_malloc_stop()
    return float(peak)
