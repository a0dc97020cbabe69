"""A disk that is full, from the start or for a while: what is left behind, and what is said."""

import errno
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.train_runs import COMMAND, command, load, records, same_runs, steps, words

from fastdense.training.logs import WholeWrites
from fastdense.training.run import Run

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Half:
    """A file that takes half of what it should."""

    def __init__(self, file: Any) -> None:
        self.file, self.taken, self.fileno = file, 0, file.fileno

    def write(self, data: memoryview) -> int:
        if self.taken:
            raise NO_SPACE
        self.taken = self.file.write(data[: len(data) // 2])
        return self.taken


def fill_disk(monkeypatch: pytest.MonkeyPatch, what: str, during: Container[int]) -> None:
    """Lets a "checkpoint", its "name" or the "logs" be unwritable from the start of each of these steps."""
    step, fsync, replace, write = Run.step, os.fsync, os.replace, WholeWrites.write
    full = 0 in during

    def noted_step(self: Run, images: torch.Tensor, labels: torch.Tensor) -> None:
        nonlocal full
        full = len(self.losses) + 1 in during
        step(self, images, labels)

    def full_fsync(number: int) -> None:
        if full and what == "checkpoint" and os.readlink(f"/proc/self/fd/{number}").endswith(".partial.pt"):
            raise NO_SPACE
        fsync(number)

    def full_replace(path: Path, name: Path) -> None:
        if full and what == "name":
            raise NO_SPACE
        replace(path, name)

    def full_write(log: WholeWrites, data: bytes) -> None:
        file = log.file
        if full and what == "logs":
            log.file = Half(file)  # type: ignore[assignment]
        try:
            write(log, data)
        finally:
            log.file = file

    monkeypatch.setattr(Run, "step", noted_step)
    monkeypatch.setattr(os, "fsync", full_fsync)
    monkeypatch.setattr(os, "replace", full_replace)
    monkeypatch.setattr(WholeWrites, "write", full_write)


@pytest.mark.parametrize(("what", "named"), [("checkpoint", "last.pt"), ("name", "last.pt"), ("logs", "metrics.jsonl")])
def test_a_full_disk_stops_training_and_spoils_nothing(
    finished: Path, out: Path, monkeypatch: pytest.MonkeyPatch, what: str, named: str
) -> None:
    with monkeypatch.context() as patch:
        fill_disk(patch, what, {3, 4})
        result = command(*COMMAND, "--out", out, "--ema", "0.5")
    assert result.exit_code == 1, result.output
    text = words(result.output)
    assert f"Stopped: {named} in {out} cannot be written: No space left on device" in text
    assert f"fastdense train --out {out} --resume" in text
    assert load(out / "last.pt")["step"] == 2 and not list(out.glob("*.partial*"))
    assert records(out)  # each line is whole
    assert command("train", "--out", out, "--resume").exit_code == 0
    assert same_runs(out, finished) == ""


@pytest.mark.parametrize(
    ("what", "during", "warnings", "written"),
    [
        ("checkpoint", {3}, {"last.pt": 1}, [1, 2, 3, 4]),
        ("checkpoint", {3, 4}, {"last.pt": 1}, [1, 2, 3, 4]),
        ("logs", {1, 2, 4}, {"metrics.jsonl": 2, "file": 2}, [3]),
    ],
    ids=["once", "at the end", "logs"],
)
def test_a_full_disk_can_be_skipped_with_one_warning_until_a_file_can_be_written_again(
    out: Path, monkeypatch: pytest.MonkeyPatch, what: str, during: set[int], warnings: dict[str, int], written: Any
) -> None:
    fill_disk(monkeypatch, what, during)
    result = command(*COMMAND, "--out", out, "--save-every", "1steps", "--on-error", "skip")
    lost = during == {3, 4}  # the last checkpoint, which is an error after the report
    assert result.exit_code == lost, result.output
    text = words(result.output)
    assert "saved for" in text and ("the last checkpoint could not be written" in text) == lost
    assert text.count("cannot be written: No space left on device.") == sum(warnings.values())
    assert {name: text.count(f"{name} in {out} cannot be written") for name in warnings} == warnings
    assert load(out / "last.pt")["step"] == (2 if lost else 4)
    assert steps(out) == written


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_disk_that_is_full_from_the_start_leaves_a_folder_for_a_new_start(
    out: Path, monkeypatch: pytest.MonkeyPatch, on_error: str
) -> None:
    with monkeypatch.context() as patch:
        fill_disk(patch, "checkpoint", range(5))
        result = command(*COMMAND, "--epochs", "1", "--out", out, "--on-error", on_error)
    assert result.exit_code == 1
    text = words(result.output)
    assert "start again with the same command" in text and "--resume" not in text and "is whole" not in text
    if on_error == "skip":
        assert text.count("last.pt in") == 1, "one warning for a file that stays unwritable"
        measured = (out / "metrics.jsonl").read_text()
        (out / "flow-fastdense-00000001.png").touch()
    else:
        (out / "metrics.jsonl").touch()  # an empty log is no run
    (out / "events.of.somebody.else").touch()
    assert command(*COMMAND, "--epochs", "1", "--out", out).exit_code == 0
    assert len(records(out, "header")) == 1
    assert len(list(out.glob("events.out.*"))) == 1 and not list(out.glob("flow-*"))
    assert (out / "events.of.somebody.else").exists()
    assert on_error == "stop" or (out / "metrics.before.jsonl").read_text() == measured
