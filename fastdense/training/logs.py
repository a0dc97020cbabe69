"""Measurements in files that a full disk or a kill cannot spoil: JSON lines, what TensorBoard shows, and pictures."""

from __future__ import annotations

import json
import math
import os
import stat
import struct
import time
from pathlib import Path
from typing import Any

import torch

from ..analysis.gradient_flow import BlockFlow
from .checkpoint import replacing
from .events import SCORES, EpochEvent, FlowEvent, Record, StepEvent, record

# What TensorBoard shows: fields of the events to its tags, which get the run's name.
STEP_SCALARS = {
    "loss": "train_loss",
    "lr": "learning_rate",
    "grad_norm": "gradient_norm",
    "seconds": "step_seconds",
    "images_per_second": "images_per_second",
}
EPOCH_SCALARS = {name: name for name in (*SCORES, "peak_bytes")}


class WholeWrites:
    """A file, cut to its first ``length`` bytes and appended to; each write goes as a whole or not at all.

    Every method may raise ``OSError``. Unbuffered, so that a full disk shows at once and not on closing.
    """

    def __init__(self, path: Path, length: int | None = None) -> None:
        self.file = path.open("ab", buffering=0)
        self.regular = stat.S_ISREG(os.fstat(self.file.fileno()).st_mode)  # a pipe or a device keeps what it got
        if length is not None:
            self._cut(min(length, self._length()))

    def write(self, data: bytes) -> None:
        """Appends ``data``, or raises ``OSError`` with the file as it was."""
        before = self._length()
        view = memoryview(data)
        try:
            while view:
                view = view[self.file.write(view) :]
        except OSError:
            self._cut(before)
            raise

    def sync(self) -> int:
        """Lets what was written survive a power failure, and returns the file's length."""
        if self.regular:
            os.fsync(self.file.fileno())
        return self._length()

    def _length(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def _cut(self, length: int) -> None:
        if self.regular:
            os.ftruncate(self.file.fileno(), length)


class JsonLines(WholeWrites):
    """Records, one a line; the header's ``event`` is ``header``."""

    def __init__(self, path: Path, length: int, header: str = "header") -> None:
        super().__init__(path, length)
        self.header = header

    def update(self, event: Record) -> None:
        fields = record(event)
        if event.event == "header":
            fields["event"] = self.header
        # JSON has no NaN and no infinity; float() reads these words back.
        plain = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in fields.items()}
        self.write(f"{json.dumps(plain, allow_nan=False)}\n".encode())


class TensorBoard(WholeWrites):
    """Scalars for TensorBoard: one file for each start of the program, after ``step``; it hides later steps of others.

    tensorboardX's own writers are not used: on a full disk, training would wait for ever for ``SummaryWriter``, and
    ``EventsWriter`` leaves half a record, behind which TensorBoard finds nothing.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX import record_writer
        from tensorboardX.proto import event_pb2, summary_pb2

        super().__init__(folder / f"events.out.tfevents.{int(time.time()):010d}.{step}")
        self._checksum, self._event, self._summary = record_writer.masked_crc32c, event_pb2.Event, summary_pb2.Summary
        self._write_event(step + 1, file_version="brain.Event:2")
        self._write_event(step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def update(self, event: Record) -> None:
        scalars: dict[str, float | None] = {}
        if isinstance(event, StepEvent | EpochEvent):
            names = STEP_SCALARS if isinstance(event, StepEvent) else EPOCH_SCALARS
            scalars = {f"{tag}/{event.run}": getattr(event, name) for name, tag in names.items()}
        elif isinstance(event, FlowEvent):  # at both ends of each block: the picture beside the file has all layers
            for block, total in event.total.items():
                tag = f"gradient_flow/{event.run}/{block}"
                scalars |= {f"{tag}_first": total[1], f"{tag}_last": total[-1]}
        else:
            return
        value = self._summary.Value
        values = [value(tag=tag, simple_value=number) for tag, number in scalars.items() if number is not None]
        self._write_event(event.step, summary=self._summary(value=values))

    def _write_event(self, step: int, **fields: Any) -> None:
        data: bytes = self._event(wall_time=time.time(), step=step, **fields).SerializeToString()
        framed = (part + struct.pack("<I", self._checksum(part)) for part in (struct.pack("<Q", len(data)), data))
        self.write(b"".join(framed))


def draw_flow(folder: Path, network: str, data: str, event: Record) -> None:
    """Draws ``flow-RUN-N.png`` in ``folder`` for a look at the gradient flow of ``network`` on ``data``."""
    if not isinstance(event, FlowEvent):
        return
    from ..analysis.plots import flow_picture  # matplotlib takes long to import

    flows = [
        BlockFlow(name, torch.tensor(total).double(), torch.tensor(event.contributions[name]).double())
        for name, total in event.total.items()
    ]
    title = f"Gradient flow: {network}, after {event.step:,} steps"
    caption = f"Loss: cross-entropy, on images of the newest batch of {data}; float64."
    with replacing(folder / f"flow-{event.run}-{event.step:08d}.png") as partial:
        flow_picture({event.run: flows}, partial, title=title, caption=caption)
