"""The machine of a benchmark: description, clocks, rates, memory, graph capture, launches."""

from __future__ import annotations

import functools
import math
import platform
import re
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import cusolver
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

Call = Callable[[], object]

CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"


def _output_of(*command: str) -> str:
    """Returns standard output of a command, stripped; empty if it fails or is not there."""
    options = {"capture_output": True, "text": True, "cwd": Path(__file__).parent, "timeout": 20}
    try:
        return subprocess.run(command, check=True, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _smi(device: torch.device, query: str) -> str:
    """Asks by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not those of nvidia-smi."""
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    command = ("nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={query}", "--format=csv,noheader")
    return _output_of(*command)


def _cpuinfo(key: str) -> list[str]:
    """Returns values of a key of /proc/cpuinfo, one for each processor."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    return re.findall(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)


def clocks(device: torch.device) -> str:
    """Returns the highest MHz of a CPU; of a GPU what CLOCKS lists, at this moment."""
    if device.type == "cuda":
        return _smi(device, CLOCKS) or "-"
    found = _cpuinfo("cpu MHz")
    return f"{max(map(float, found)):.0f} MHz" if found else "-"


def commit() -> str:
    """Returns this repository's commit, with a + if tracked sources differ; '-' without one."""
    head = _output_of("git", "rev-parse", "--short=10", "HEAD")
    sources = ("--", ":/", ":(top,exclude)bench/results")
    changed = _output_of("git", "status", "--porcelain", "-uno", *sources)
    return f"{head}{'+' if changed else ''}" or "-"


def name_of(device: torch.device) -> str:
    """Returns the model of a GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = _cpuinfo("model name") or [platform.processor() or platform.machine()]
    return " ".join(found[0].split())


def environment(device: torch.device) -> dict[str, str]:
    """Returns the columns that say where a row comes from."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "-",
        "cusolver": cusolver.version(),
        "driver": (_smi(device, "driver_version") if device.type == "cuda" else "") or "-",
        "device": device.type,
        "device_name": name_of(device),
        "clocks": clocks(device),
    }


def peak_bytes(call: Call, device: torch.device) -> float:
    """Returns the most bytes held at once during one call, above those before it.

    Of torch's allocator on a GPU. On a CPU torch's counters do not include the scratch of native
    kernels; memray counts all of malloc and mmap, in all threads, to the byte. Without memray the
    result is NaN and the call is not made.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    try:
        import memray
    except ImportError:
        warnings.warn("peak memory is not measured: pip install memray", stacklevel=1)
        return math.nan
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.bin"
        with memray.Tracker(records):
            call()
        return float(memray.FileReader(records).metadata.peak_memory)


@functools.cache
def rates(device: torch.device, threads: int) -> tuple[float, float]:
    """Returns bytes per second of a copy beyond any cache, and float32 operations per second."""

    def fastest(call: Call) -> float:
        timer = Timer("call()", globals={"call": call}, num_threads=threads)
        return min(timer.timeit(1).mean for _ in range(5))  # each after a warm-up

    count, m = (2**30, 8192) if device.type == "cuda" else (2**28, 1536)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target, a = torch.empty_like(source), torch.randn(m, m, device=device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # on the units for float32
    try:
        found = 2 * count / fastest(lambda: target.copy_(source)), 2 * m**3 / fastest(lambda: a @ a)
    finally:
        torch.set_float32_matmul_precision(precision)
    print(f"threads {threads}: {found[0]:.4g} bytes/s, {found[1]:.4g} flop/s")
    return found


def l2_bytes(device: torch.device) -> int:
    """Returns the size of a GPU's L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def launches(call: Call, device: torch.device) -> int:
    """Counts the kernels, copies and fills of one call on the GPU; 0 without a profiler."""
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize(device)
    except RuntimeError:  # no CUPTI, or it is taken by another profiler
        return 0
    return sum(event.device_type == DeviceType.CUDA for event in seen.events() or ())


def capture(call: Call, device: torch.device) -> Call:
    """Captures one call in a CUDA graph; the result replays it. RuntimeError if that fails.

    The call runs three times beforehand on the stream of the capture, so that libraries
    allocate what they need.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    torch.cuda.synchronize(device)
    return graph.replay  # the bound method keeps the graph
