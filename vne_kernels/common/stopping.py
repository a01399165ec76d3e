"""Signals that end a run early with nothing lost.

SIGTERM is what a cluster sends before it takes a machine away, SIGUSR1 what Slurm can be told to
send ahead of it, SIGINT is Ctrl-C. While there is work to save (a network that trains, a file of
which a part is read) the step in hand ends first; at any other time the run ends at once.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

#: sysexits.h's EX_TEMPFAIL, "try again later": what a scheduler can be told to requeue on.
REQUEUE = os.EX_TEMPFAIL
PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """A signal ended the run. Like KeyboardInterrupt no ``Exception``: nobody may swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Within it SIGTERM and SIGUSR1 raise :class:`Stopped`; from `hold` on they are noted.

    So is the first Ctrl-C, until `release`; the second stops at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.held = False
        self.process = os.getpid()

    def __enter__(self) -> StopSignals:
        self.before: dict[int, Any] = {s: signal.signal(s, self._take) for s in PREEMPTIONS}
        self.ctrl_c: Any = None
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def hold(self) -> None:
        """Note signals from here on. Lightning puts handlers of its own before that: not kept."""
        self.held = True
        for signum in PREEMPTIONS:
            signal.signal(signum, self._take)
        self.ctrl_c = signal.signal(signal.SIGINT, self._take)

    def release(self) -> None:
        self.held = False
        if self.ctrl_c is not None:
            signal.signal(signal.SIGINT, self.ctrl_c)
            self.ctrl_c = None

    def _take(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a loading process that has just been forked
        first, self.received = self.received is None, self.received or signum
        if not self.held:
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
