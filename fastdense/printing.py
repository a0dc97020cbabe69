"""Standard output and standard error of a long run, which must survive the loss of either."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from types import TracebackType

from rich.console import Console

__all__ = ["PrintError", "Printer"]


class PrintError(RuntimeError):
    """What training prints reaches nobody any more."""


class Printer(Console):
    """A console that falls silent where it cannot be written, as when ``| head`` has read enough, and raises nothing.

    Attributes:
        failure: number of the error that silenced it; 0 so far.
    """

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
        with suppress(OSError):  # nothing but a file of Python's
            # Python writes what is left once more when it ends, and would fail and say so.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())
            os.close(nowhere)
