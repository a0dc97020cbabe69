"""What a long run must survive: the loss of its standard output, Ctrl-C and SIGTERM."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

from rich.console import Console

__all__ = ["Interrupted", "PrintError", "Printer", "Stop", "defer_signals"]

SAME_PRESS = 1.0  # seconds: torchrun passes a Ctrl-C on that its processes have had already, and SIGTERM after it


class PrintError(RuntimeError):
    """Standard output cannot be written any more."""


class Printer(Console):
    """A console that falls silent when it cannot be written, as after ``| head``; ``failure`` is the error's number."""

    failure = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)  # where rich writes, whatever is shown
        except OSError as reason:
            self._fall_silent(reason.errno or errno.EIO)

    def on_broken_pipe(self) -> None:
        """Where rich would end the program."""
        self._fall_silent(errno.EPIPE)

    def _fall_silent(self, number: int) -> None:
        self.failure, self.quiet = number, True
        # Python writes what is left once more when it ends, and would fail and say so.
        with suppress(OSError), open(os.devnull, "wb") as nowhere:  # OSError: nothing but a file of Python's
            os.dup2(nowhere.fileno(), self.file.fileno())


class Interrupted(KeyboardInterrupt):
    """Training ended early, as asked; ``signal`` says by what."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signal = signum


class Stop:
    """Which signal asked to stop: 0 so far."""

    def __init__(self) -> None:
        self.signal, self.since = 0, 0.0

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Remembers the first signal; another Ctrl-C does not wait for the step to end."""
        if not self.signal:
            self.signal, self.since = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self.since > SAME_PRESS:
            raise KeyboardInterrupt


@contextmanager
def defer_signals() -> Iterator[Stop]:
    """Notes SIGINT and SIGTERM instead of obeying them at once; outside the main thread, does nothing."""
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
