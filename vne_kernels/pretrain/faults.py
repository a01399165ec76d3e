"""What ends a training that cannot go on: one line for the user, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vne_kernels.pretrain.config import Config, OptionError


class Fault(Exception):
    """Training cannot go on; the message is one line."""

    exit_code = 1
    agreed = False  # raised on every process, so that one of them prints it


class NonFiniteLoss(Fault):
    """The loss is NaN or infinite. Raised on every process in the same step."""

    exit_code = 3
    agreed = True


@contextmanager
def loading_processes() -> Iterator[None]:
    """What torch raises where a process that loads images dies or fails, as a :class:`Fault`."""
    try:
        yield
    except (OptionError, Fault):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if lines and "is killed by signal" in lines[0]:
            advice = "often: memory ran out; fewer --workers need less"
            raise Fault(f"a process that loads images died: {lines[0]} ({advice})") from error
        if lines and ("DataLoader worker" in lines[0]):
            raise Fault(f"a process that loads images failed: {lines[0]} {lines[-1]}") from error
        raise


@contextmanager
def compilation(config: Config) -> Iterator[None]:
    """What torch raises where it cannot compile, as an :class:`OptionError`."""
    if not config.compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # importing it takes seconds

    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).split())[:300]
        raise OptionError("compile", "left out where torch.compile fails", reason) from error
