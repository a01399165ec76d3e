"""Signals that end a run early with nothing lost.

SIGTERM is what a cluster sends before it takes a machine away, SIGUSR1 what Slurm sends on request
ahead of it, SIGINT is Ctrl-C. While there is work to save (a network that trains, a file of
which a part is read) the step in hand ends first; at any other time the run ends at once.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

#: EX_TEMPFAIL of sysexits.h, "try again later": a scheduler can requeue on this exit code.
REQUEUE = os.EX_TEMPFAIL
PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """A signal ended the run. Like KeyboardInterrupt no ``Exception``: nobody may swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Within it SIGTERM and SIGUSR1 raise :class:`Stopped`; after `defer` they are noted instead.

    So is the first Ctrl-C, until `restore`; the second one stops at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False
        self.process = os.getpid()

    def __enter__(self) -> StopSignals:
        self.before: dict[int, Any] = {s: signal.signal(s, self._take) for s in PREEMPTIONS}
        self.ctrl_c: Any = None
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def defer(self) -> None:
        """Note signals from here on; replaces the handlers that Lightning has set by then."""
        self.deferred = True
        for signum in PREEMPTIONS:
            signal.signal(signum, self._take)
        self.ctrl_c = signal.signal(signal.SIGINT, self._take)

    def restore(self) -> None:
        self.deferred = False
        if self.ctrl_c is not None:
            signal.signal(signal.SIGINT, self.ctrl_c)
            self.ctrl_c = None

    def _take(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a loading process that has just been forked
        first, self.received = self.received is None, self.received or signum
        if not self.deferred:
            if first:
                raise Stopped(signum)
            return
        if signum == signal.SIGINT and self.ctrl_c is not None:
            signal.signal(signal.SIGINT, self.ctrl_c)
            self.ctrl_c = None
        if first:
            advice = "; press Ctrl-C again to stop at once" if signum == signal.SIGINT else ""
            # Not print: the progress bar may be inside the same stream's lock.
            os.write(2, f"\nstopping after this step{advice}\n".encode())
