"""What a long run must survive: the loss of its standard output, Ctrl-C and SIGTERM."""

from __future__ import annotations

import errno
import os
import signal
import time
from contextlib import suppress
from typing import Any

from rich.console import Console

SAME_PRESS = 1.0  # seconds: torchrun passes a Ctrl-C on that its processes have had already, and SIGTERM after it


class Printer(Console):
    """A console that falls silent when it cannot be written, as after ``| head``; ``failure`` is the error's number."""

    failure = 0

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)  # where rich writes, whatever is shown
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


class DeferSignals:
    """Notes SIGINT and SIGTERM while its context lasts, instead of obeying them at once.

    ``signal`` is the first one that came; 0 so far. Another Ctrl-C does not wait for the step to end.
    """

    def __init__(self) -> None:
        self.signal, self.since = 0, 0.0

    def __call__(self, signum: int, frame: object) -> None:
        if not self.signal:
            self.signal, self.since = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self.since > SAME_PRESS:
            raise KeyboardInterrupt

    def __enter__(self) -> DeferSignals:
        self.before = {signum: signal.signal(signum, self) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
