"""What a benchmark asks of a GPU beside its time: graph capture, launches, caches, clocks."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

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
    """Of that very GPU: CUDA_VISIBLE_DEVICES renumbers torch's devices, not those of nvidia-smi."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    return output_of("nvidia-smi", "-i", name, f"--query-gpu={query}", "--format=csv,noheader")


def driver(device: torch.device) -> str:
    return (_smi(device, "driver_version") if device.type == "cuda" else "") or "-"


def _cpu_clock() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", text, re.MULTILINE)
    return f"{max(map(float, found)):.0f} MHz" if found else "-"


def clocks(device: torch.device) -> str:
    """Clocks, temperature, power and what holds the clocks down at this moment; MHz of a CPU."""
    if device.type != "cuda":
        return _cpu_clock()
    answer = _smi(device, CLOCKS)
    if not answer:
        return "-"
    sm, most, memory, celsius, watts, reasons = (part.strip() for part in answer.split(","))
    return f"SM {sm} of {most}; memory {memory}; {celsius} C; {watts}; limits {reasons}"


def l2_bytes(device: torch.device) -> int:
    """Of a GPU's L2; of a large CPU's last cache, which torch does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 32 * 2**20


def launches(call: Call, device: torch.device) -> float:
    """Kernels, copies and fills that one call puts on the GPU; NaN where that cannot be seen."""
    if device.type != "cuda":
        return math.nan
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

    The call runs a few times beforehand, on the stream of the capture: libraries set themselves up.
    """
    if device.type != "cuda":
        raise RuntimeError(f"a CUDA graph needs a GPU, got device {device}")
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

    def replay() -> None:
        graph.replay()

    return replay


def is_alive(device: torch.device) -> bool:
    """Whether the device still computes and captures: an error can take the whole process along."""
    try:
        one = torch.ones(1, device=device)
        replay = capture(lambda: one + one, device)
        replay()
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
