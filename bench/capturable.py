"""Which providers a CUDA graph can hold, at which sizes.

Some errors of a capture leave the process without a usable device. So it is tried in another
process, which is started again after each such error, and the benchmark captures only what went
well there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

Trial = tuple[str, int, bool]  # provider, m, more than one sample in the batch
Refused = dict[Trial, str]

Run = Callable[[Sequence[Trial]], Iterator[str]]


def trials(names: Sequence[str], sizes: Sequence[int]) -> list[Trial]:
    return [(name, m, many) for name in names for m in sizes for many in (False, True)]


def _other_process(todo: Sequence[Trial]) -> Iterator[str]:
    """Lines of JSON, as they come."""
    command = [sys.executable, str(Path(__file__).resolve())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(todo))
        process.stdin.close()
        yield from process.stdout


def refused(todo: Sequence[Trial], run: Run = _other_process) -> Refused:
    """The trials that failed, and why; all of `todo` are made, in as many processes as it takes."""
    reasons: Refused = {}
    left = list(todo)
    while left:
        trial, ended = left[0], False
        for line in run(left):
            answer = json.loads(line)
            trial, ended = left.pop(0), True
            if answer["reason"] is not None:
                reasons[trial] = f"no CUDA graph: {answer['reason']}"
            if not answer["alive"]:
                break
            ended = False
        if left and not ended:  # the process is gone in the midst of one
            reasons[left.pop(0)] = "no CUDA graph: the attempt ended the process"
    return reasons


def _try_here(todo: Sequence[Trial]) -> None:
    """Prints a line per trial; ends after the first that takes the device along."""
    import machine
    import providers

    device = torch.device("cuda")
    by_name = {provider.name: provider for provider in providers.available(device)}
    for name, m, many in todo:
        z = torch.randn((2, m, m) if many else (m, m), device=device, requires_grad=True)
        reason, alive = None, True
        torch.backends.cuda.preferred_linalg_library(by_name[name].linalg)
        entropy = by_name[name].entropy(z.dtype)
        try:
            machine.capture(lambda e=entropy, z=z: providers.evaluate(e, z, True), device)  # type: ignore[misc]
        except Exception as error:  # whatever it is, it is the answer
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:120]
            alive = machine.is_alive(device)
        print(json.dumps({"reason": reason, "alive": alive}), flush=True)
        if not alive:
            return


if __name__ == "__main__":
    _try_here(json.load(sys.stdin))
