"""Training whose output reaches nobody: nothing is lost, and one line says how to go on."""

import errno
import io
import os
from pathlib import Path

import pytest
from helpers.train_runs import load, prepared, records, steps
from rich.live import Live

from fastdense.cli.display import Display
from fastdense.cli.terminal import Printer
from fastdense.cli.train import train
from fastdense.training.events import Event, Stopped
from fastdense.training.outputs import OutputOptions, Outputs


class Lost(io.StringIO):
    """A file that takes so many writes."""

    def __init__(self, writes: int, number: int) -> None:
        super().__init__()
        self.left, self.number = writes, number

    def write(self, text: str) -> int:
        if not self.left:
            raise OSError(self.number, os.strerror(self.number))
        self.left -= 1
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC], ids=["broken pipe", "full disk"])
@pytest.mark.parametrize(
    ("writes", "step", "told"),
    [(0, 1, "Resume with: fastdense train --out"), (1, 2, "Resume"), (2, 4, "Training is over, and"), (3, 4, "over")],
    ids=["introduction", "epoch", "last epoch", "table"],
)
def test_what_cannot_be_printed_is_in_the_files(tmp_path: Path, number: int, writes: int, step: int, told: str) -> None:
    file, experiment = Lost(writes, number), prepared()
    with Outputs(OutputOptions(out=tmp_path), experiment, print) as outputs, pytest.raises(Stopped) as caught:
        train(Printer(file=file), experiment, outputs)
    text = str(caught.value)
    assert f"standard output cannot be written: {os.strerror(number)}, after step {step} of 4. " in text
    assert told in text
    assert load(tmp_path / "last.pt")["step"] == step
    assert steps(tmp_path) == list(range(1, step + 1))
    assert records(tmp_path)[-1]["event"] == "summary"


def test_files_come_before_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(display: Display, events: list[Event]) -> None:
        if events[0].event == "epoch":
            raise ZeroDivisionError("a defect of ours")

    monkeypatch.setattr(Display, "update", fail)
    experiment = prepared()
    with Outputs(OutputOptions(out=tmp_path), experiment, print) as outputs, pytest.raises(ZeroDivisionError):
        train(Printer(file=io.StringIO()), experiment, outputs)
    assert load(tmp_path / "last.pt")["step"] == 2


@pytest.mark.parametrize("terminal", [False, True])
def test_a_printer_falls_silent_and_raises_nothing(terminal: bool) -> None:
    printer = Printer(file=Lost(2, errno.EPIPE), force_terminal=terminal)
    printer.print("one")
    assert printer.failure == 0
    with Live("shown", console=printer, auto_refresh=False) as live:
        live.refresh()
        printer.print("two")
    printer.print("three")
    assert printer.failure == errno.EPIPE
    assert "three" not in printer.file.getvalue()  # type: ignore[attr-defined]
