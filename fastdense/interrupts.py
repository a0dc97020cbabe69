"""Ctrl-C and SIGTERM, heard between two steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "Stop", "noted"]

SAME_PRESS = 1.0  # seconds: torchrun passes a Ctrl-C on that its processes have had already, and SIGTERM after it


class Interrupted(KeyboardInterrupt):
    """Training ended early, as asked; ``signal`` says by what."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signal = signum


class Stop:
    """Which signal asked to stop; ``None`` so far."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.since = 0.0

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Remember the first signal; another Ctrl-C does not wait for the step to end."""
        if self.signal is None:
            self.signal, self.since = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self.since > SAME_PRESS:
            raise KeyboardInterrupt


@contextmanager
def noted() -> Iterator[Stop]:
    """Note SIGINT and SIGTERM instead of obeying them at once; outside the main thread, do nothing."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {signum: signal.signal(signum, stop.note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
