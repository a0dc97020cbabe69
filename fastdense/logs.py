"""Measurements in files that a full disk or a kill cannot spoil: JSON lines, and what TensorBoard shows."""

from __future__ import annotations

import json
import math
import os
import stat
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .events import EpochEvent, Event, FlowEvent, StepEvent

__all__ = ["JsonLines", "TensorBoard", "WholeWrites"]

# What TensorBoard shows: fields of the events to its tags, which get the run's name.
STEP_SCALARS = {
    "loss": "train_loss",
    "lr": "learning_rate",
    "grad_norm": "gradient_norm",
    "seconds": "step_seconds",
    "images_per_second": "images_per_second",
}
EPOCH_SCALARS = {
    "test_loss": "test_loss",
    "test_accuracy": "test_accuracy",
    "ema_test_loss": "ema_test_loss",
    "ema_test_accuracy": "ema_test_accuracy",
    "peak_bytes": "peak_bytes",
}


class WholeWrites:
    """A file to which each write goes as a whole or not at all.

    Unbuffered: what has been written is in the file, and a full disk shows here and not on closing.

    Args:
        path: the file, appended to.
        length: bytes of it to keep, from its start; ``None`` for all.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, length: int | None = None) -> None:
        self.file = path.open("ab", buffering=0)
        self.regular = stat.S_ISREG(os.fstat(self.file.fileno()).st_mode)  # a pipe or a device keeps what it got
        if length is not None:
            self._cut(min(length, self.length))

    @property
    def length(self) -> int:
        """Bytes in the file."""
        return os.fstat(self.file.fileno()).st_size

    def write(self, data: bytes) -> None:
        """Append ``data``; raises ``OSError`` with the file as it was."""
        before = self.length
        view = memoryview(data)
        try:
            while view:
                view = view[self.file.write(view) :]
        except OSError:
            self._cut(before)
            raise

    def _cut(self, length: int) -> None:
        if self.regular:
            os.ftruncate(self.file.fileno(), length)

    def sync(self) -> int:
        """Let what was written survive a power failure, and return the file's length."""
        if self.regular:
            os.fsync(self.file.fileno())
        return self.length

    def close(self) -> None:
        self.file.close()


class JsonLines:
    """Records, one a line."""

    def __init__(self, path: Path, length: int | None = None) -> None:
        self.file = WholeWrites(path, length)

    def write(self, record: dict[str, Any]) -> None:
        """Append ``record``; raises ``OSError``."""
        # JSON has no NaN and no infinity; float() reads these words back.
        plain = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        self.file.write(f"{json.dumps(plain, allow_nan=False)}\n".encode())


class TensorBoard:
    """Scalars for TensorBoard: one file in ``folder`` for each start of the program.

    Format and protocol buffers are tensorboardX's. Its ``SummaryWriter`` is not used: it hands events to a thread,
    which a full disk ends, so that training would wait for ever; and a kill loses what the thread still holds, up to
    two minutes that a checkpoint has already passed.

    Args:
        folder: where TensorBoard looks.
        step: the last one that is over; TensorBoard hides what earlier files say of later ones.

    Raises:
        OSError: the file cannot be written.
        ModuleNotFoundError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX import record_writer
        from tensorboardX.proto import event_pb2, summary_pb2

        self._crc: Any = record_writer.masked_crc32c
        self._event: Any = event_pb2
        self._summary: Any = summary_pb2
        self.file = WholeWrites(folder / f"events.out.tfevents.{int(time.time()):010d}.{step}")
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._write(file_version="brain.Event:2", step=step + 1)
        self._write(session_log=start, step=step + 1)

    def update(self, event: Event) -> None:
        """Write the numbers of ``event``; raises ``OSError``."""
        if isinstance(event, StepEvent | EpochEvent):
            names = STEP_SCALARS if isinstance(event, StepEvent) else EPOCH_SCALARS
            found = {tag: getattr(event, name) for name, tag in names.items()}
            scalars = {f"{tag}/{event.run}": value for tag, value in found.items() if value is not None}
            self._write(summary=self._scalars(scalars), step=event.step)
        elif isinstance(event, FlowEvent):
            # A layer's gradient at both ends of each block: the picture beside the file has all of them.
            ends = {
                f"{tag}_{end}": total[i]
                for tag, total in event.total.items()
                for end, i in (("first", 1), ("last", -1))
            }
            self._write(
                summary=self._scalars({f"gradient_flow/{event.run}/{tag}": value for tag, value in ends.items()}),
                step=event.step,
            )

    def _scalars(self, scalars: Mapping[str, float]) -> Any:
        value = self._summary.Summary.Value
        return self._summary.Summary(value=[value(tag=tag, simple_value=number) for tag, number in scalars.items()])

    def _write(self, **fields: Any) -> None:
        data: bytes = self._event.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        self.file.write(b"".join([length, self._checksum(length), data, self._checksum(data)]))

    def _checksum(self, data: bytes) -> bytes:
        return struct.pack("<I", self._crc(data))
