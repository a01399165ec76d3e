"""The processes of one training, a rank each: how they start, and that none outlives another.

Lightning starts them for ``--devices N``, or torchrun does. A rank that dies or hangs makes the
collective that the others wait in fail: at once over gloo, else after ``--collective-timeout``.
Each survivor then leaves word in a store that all of them can reach, and names those that do not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed.distributed_c10d import PrefixStore, Store

from vne_kernels.pretrain.config import Config, OptionError
from vne_kernels.pretrain.faults import Fault

#: How long a survivor waits for word from the others.
WORD_SECONDS = 10.0
#: How long a process that knows of a death may take to end by itself.
GRACE_SECONDS = 20.0
LOST = "lost touch with the others"
#: One of these is in the message of a collective that failed.
TALK = ("gloo", "NCCL", "pair closure")


def by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def number(config: Config, device_type: str) -> tuple[int, int]:
    """(devices of this node, nodes).

    Raises:
        OptionError: torchrun has started another number of processes than ``--devices`` says.
    """
    if by_torchrun():
        world, here = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if config.devices not in ("auto", str(here)):
            wanted = f"left out or {here}, the processes torchrun has started on a node"
            raise OptionError("devices", wanted, config.devices)
        return here, world // here
    if config.devices != "auto":
        return int(config.devices), 1
    return (torch.cuda.device_count() if device_type == "cuda" else 1), 1


def strategy(processes: int, collective_timeout: int) -> str | DDPStrategy:
    """Lightning's choice for one process, DDP for several."""
    return "auto" if processes == 1 else _DDP(timeout=timedelta(seconds=collective_timeout))


class _DDP(DDPStrategy):
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


class _Launcher(_SubprocessScriptLauncher):
    """Lightning's, but for its observer.

    That one looks every five seconds and kills everything, this process included, when a child has
    not ended with 0: no time for a message, and the exit code would be that of a kill.
    """

    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,
        trainer: pl.Trainer | None = None,
        **kwargs: Any,
    ) -> Any:
        self.cluster_environment.validate_settings(self.num_processes, self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            _Watch(lambda: _dead_children(self.procs), self.procs).start()
        elif not by_torchrun():
            parent = os.getppid()
            _Watch(lambda: None if os.getppid() == parent else "rank 0 has died", []).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


class _Watch(threading.Thread):
    """Ends this process where a death has been seen and the collective does not notice (NCCL)."""

    def __init__(
        self, death: Callable[[], str | None], children: Sequence[subprocess.Popen[Any]]
    ) -> None:
        super().__init__(daemon=True, name="watch-of-the-ranks")
        self.death, self.children = death, children

    def run(self) -> None:
        while (death := self.death()) is None:
            time.sleep(0.5)
        time.sleep(GRACE_SECONDS)
        os.write(2, f"\nvne-pretrain: error: {death}; training stops\n".encode())
        for child in self.children:
            child.kill()
        os._exit(1)


def _dead_children(children: Sequence[subprocess.Popen[Any]]) -> str | None:
    """Those that did not end with 0, in words; None: none."""
    dead = [
        f"rank {rank} {_describe_end(code)}"
        for rank, child in enumerate(children, 1)
        if (code := child.poll())
    ]
    return ", ".join(dead) or None


def _describe_end(code: int) -> str:
    if code >= 0:
        return f"has ended with exit code {code}"
    return f"was killed by signal {-code} ({signal.Signals(-code).name})"


class Ranks(Callback):
    """Keeps the connection to the store through which the survivors report to each other."""

    def __init__(self) -> None:
        self.store: Store | None = None
        self.failed = False
        self.sigterm: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            self.store = PrefixStore(
                "vne-pretrain",
                dist.TCPStore(  # type: ignore[attr-defined]
                    os.environ["MASTER_ADDR"],
                    int(os.environ["MASTER_PORT"]),
                    is_master=False,
                    timeout=timedelta(seconds=WORD_SECONDS),
                ),
            )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.failed = True
        if trainer.world_size > 1:
            signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, signum: int, frame: FrameType | None) -> None:
        """Not while a survivor waits for word: torchrun ends the others as soon as one is dead."""
        if not self.failed:
            signal.signal(signum, self.sigterm)
            signal.raise_signal(signum)

    @contextmanager
    def reported(self, trainer: pl.Trainer) -> Iterator[None]:
        """Raises a :class:`Fault` on each of the other processes when one of them fails.

        A fault that all processes agree on passes through. The process that started the others
        waits until they have ended.
        """
        if trainer.world_size == 1:
            yield
            return
        self.sigterm = signal.signal(signal.SIGTERM, self._terminate)
        try:
            yield
        except Exception as error:
            deadline = time.monotonic() + WORD_SECONDS + 3
            try:
                if not (isinstance(error, Fault) and error.agreed):
                    self._report(trainer, error)
            finally:
                _end_children(trainer, deadline)
            raise
        finally:
            signal.signal(signal.SIGTERM, self.sigterm)

    def _report(self, trainer: pl.Trainer, error: Exception) -> None:
        """Raise the fault that others have caused; return where it is this process's own."""
        lost = _is_of_a_collective(error)
        own = " ".join(str(error).split())
        rank, world = trainer.global_rank, trainer.world_size
        try:
            assert self.store is not None
            self.store.set(str(rank), LOST if lost else f"{type(error).__name__}: {own}"[:500])
            words = self._words(trainer, rank, world) if lost else []
        except (AssertionError, RuntimeError):  # the store went with the process that held it
            words = ["rank 0 has died, or its machine cannot be reached"]
        if lost:
            who = "; ".join(words) or "no other rank has died"
            raise Fault(f"rank {rank}: {who}; training stops ({own[:200]})") from error

    def _words(self, trainer: pl.Trainer, rank: int, world: int) -> list[str]:
        """Who of the others is gone, and why."""
        assert self.store is not None
        children = dict(enumerate(getattr(trainer.strategy.launcher, "procs", []), 1))
        deadline = time.monotonic() + WORD_SECONDS
        words = [
            self._word(other, children.get(other), deadline)
            for other in range(world)
            if other != rank
        ]
        return [word for word in words if word is not None]

    def _word(self, other: int, child: subprocess.Popen[Any] | None, deadline: float) -> str | None:
        """What became of one of the others; None: it has lost touch as well, and no more."""
        assert self.store is not None
        while True:
            # Its connections break while it dies: its end can be seen only a moment later.
            code = child.poll() if child else None
            if code is not None and code < 0:
                return f"rank {other} {_describe_end(code)}"
            if self.store.check([str(other)]):
                word = self.store.get(str(other)).decode()
                return None if word == LOST else f"rank {other} failed: {word}"
            if code is not None:  # word is left before the end, and so would be there
                return f"rank {other} {_describe_end(code)}"
            if time.monotonic() > deadline:
                return f"rank {other} has died or hangs: no word from it"
            time.sleep(0.1)


def _is_of_a_collective(error: Exception) -> bool:
    """Whether the failure is that of the talk between processes: gloo's are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in TALK)
    )


def _end_children(trainer: pl.Trainer, deadline: float) -> None:
    """No process that this one has started outlives it; after ``deadline`` they are killed."""
    children = getattr(trainer.strategy.launcher, "procs", [])
    if not children:
        return
    if dist.is_initialized() and dist.get_backend() == "gloo":
        with suppress(RuntimeError):
            dist.destroy_process_group()  # those that wait for this process stop waiting
    for child in children:
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()


def gathered(trainer: pl.Trainer, own: Any) -> list[Any]:
    """The object ``own`` of every process, by rank."""
    if trainer.world_size == 1:
        return [own]
    objects: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(objects, own)
    return objects


def global_rank() -> int:
    """Of this process, before there is a trainer to ask."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
