"""The machine of a benchmark: its description, peak memory, graph capture, launches, clocks."""

from __future__ import annotations

import functools
import importlib.util
import math
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cusolver
import torch

Call = Callable[[], object]

CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"


def output_of(*command: str) -> str:
    """Standard output of a command, stripped; empty if it fails or is not there."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _smi(device: torch.device, query: str) -> str:
    """Asks by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not those of nvidia-smi."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    return output_of("nvidia-smi", "-i", name, f"--query-gpu={query}", "--format=csv,noheader")


def driver(device: torch.device) -> str:
    """The version of the NVIDIA driver; '-' if there is none."""
    return (_smi(device, "driver_version") if device.type == "cuda" else "") or "-"


def _cpuinfo(key: str) -> list[str]:
    """Values of a key of /proc/cpuinfo, one for each processor."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    return re.findall(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)


def clocks(device: torch.device) -> str:
    """Clocks, temperature, power and what limits the clocks at this moment; MHz of a CPU."""
    if device.type != "cuda":
        found = _cpuinfo("cpu MHz")
        return f"{max(map(float, found)):.0f} MHz" if found else "-"
    answer = _smi(device, CLOCKS)
    if not answer:
        return "-"
    sm, most, memory, celsius, watts, reasons = (part.strip() for part in answer.split(","))
    return f"SM {sm} of {most}; memory {memory}; {celsius} C; {watts}; limits {reasons}"


def commit() -> str:
    """The commit of this repository, with a + if tracked sources differ from it; '-' without."""
    head = output_of("git", "rev-parse", "--short=10", "HEAD")
    changed = output_of(
        "git", "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)bench/results"
    )
    return f"{head}{'+' if changed else ''}" or "-"


def name_of(device: torch.device) -> str:
    """The model of a GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = _cpuinfo("model name") or [platform.processor() or platform.machine()]
    return " ".join(found[0].split())


def slug(name: str) -> str:
    """The name of a device as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: torch.device) -> dict[str, str]:
    """The columns that say where a row comes from."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "-",
        "cusolver": cusolver.version(),
        "driver": driver(device),
        "device": device.type,
        "device_name": name_of(device),
        "clocks": clocks(device),
    }


@functools.cache
def has_memray() -> bool:
    """Whether memray is installed; prints to stderr that peak memory is not measured without it."""
    found = importlib.util.find_spec("memray") is not None
    if not found:
        print("peak memory is not measured: pip install memray", file=sys.stderr)
    return found


def peak_bytes(call: Call, device: torch.device) -> float:
    """Most bytes held at once during one call, above those before it.

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
    if not has_memray():
        return math.nan
    import memray

    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.bin"
        with memray.Tracker(records):
            call()
        return float(memray.FileReader(records).metadata.peak_memory)


def l2_bytes(device: torch.device) -> int:
    """The size of a GPU's L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def launches(call: Call, device: torch.device) -> float:
    """Kernels, copies and fills that one call puts on the GPU; NaN where there is no profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize(device)
        count = sum(event.device_type == DeviceType.CUDA for event in seen.events() or ())
    except RuntimeError:  # no CUPTI, or it is taken by another profiler
        return math.nan
    return float(count) if count else math.nan


def capture(call: Call, device: torch.device) -> Call:
    """A CUDA graph of one call; the result replays it. RuntimeError where it cannot be captured.

    The call runs three times beforehand on the stream of the capture, so that libraries
    allocate what they need.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    torch.cuda.synchronize(device)
    return graph.replay  # the bound method keeps the graph
