"""Which providers a CUDA graph can hold, at which sizes.

A failed capture can leave a process without a usable device. So captures are tried in another
process, which ends with its first failure, and the benchmark captures only what succeeded there.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

import torch

Trial = tuple[str, int, bool]  # provider, m, whether the batch has more than one sample

COMMAND = (sys.executable, __file__)


def refused(trials: Sequence[Trial], limit_s: float) -> dict[Trial, str]:
    """The trials that failed, with the reason; those that did not fit into the time are failures.

    Every process answers with lines of JSON (provider, m, many, reason or null). Other lines are
    ignored. A process that dies has failed in the trial it was at.
    """
    reasons: dict[Trial, str] = {}
    left, end = list(trials), time.monotonic() + limit_s
    while left:
        given = json.dumps(left).encode()
        try:
            seconds = max(0.1, end - time.monotonic())
            done = subprocess.run(COMMAND, input=given, stdout=subprocess.PIPE, timeout=seconds)
            output, status = done.stdout, done.returncode
        except subprocess.TimeoutExpired as error:
            output, status = error.stdout or b"", 0
        for line in output.splitlines():
            with contextlib.suppress(ValueError, TypeError, IndexError):
                *trial, reason = json.loads(line)
                left.remove((trial[0], trial[1], trial[2]))
                if reason is not None:
                    reasons[trial[0], trial[1], trial[2]] = f"no CUDA graph: {reason}"
        if left and status != 0:
            reasons[left.pop(0)] = "no CUDA graph: the attempt ended the process"
        if time.monotonic() > end:
            break
    return reasons | dict.fromkeys(left, f"no CUDA graph: not tried within {limit_s:.0f} s")


def _try_here(trials: Sequence[Trial]) -> None:
    """Prints a line for each trial; ends after the first that fails."""
    import machine
    import providers
    import runner

    device = torch.device("cuda")
    by_name = {provider.name: provider for provider in providers.PROVIDERS}
    for name, m, many in trials:
        z = torch.randn((2, m, m) if many else (m, m), device=device, requires_grad=True)
        by_name[name].prepare()
        entropy = by_name[name].entropy(z.dtype)
        reason = None
        try:
            machine.capture(partial(providers.evaluate, entropy, True, z), device)
        except Exception as error:  # whatever it is, it is the answer
            reason = runner.reason(error)
        print(json.dumps([name, m, many, reason]), flush=True)
        if reason is not None:
            return


if __name__ == "__main__":
    _try_here(json.load(sys.stdin))
