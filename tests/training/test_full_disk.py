"""A disk that is full, from the start or for a while: what is left behind, and what is said."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from helpers.states import same
from helpers.train_runs import COMMAND, command, load, records, words

from fastdense.training.logs import WholeWrites
from fastdense.training.run import Run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


class FullDisk:
    """Writes to files of ``folder`` fail while ``full``, after some bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        self.full, self.what, self.failures = False, what, 0
        fsync, write = os.fsync, WholeWrites.write

        def full_fsync(number: int) -> None:
            if self.full and what == "checkpoint" and os.readlink(f"/proc/self/fd/{number}").endswith(".partial.pt"):
                self.failures += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(number)

        class Half:
            """A file that takes half of what it should."""

            def __init__(self, file: Any) -> None:
                self.file, self.taken = file, 0

            def write(self, data: memoryview) -> int:
                if self.taken:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.taken = self.file.write(data[: len(data) // 2])
                return self.taken

            def fileno(self) -> int:
                return self.file.fileno()

        def full_write(log: WholeWrites, data: bytes) -> None:
            if not (self.full and what == "logs"):
                return write(log, data)
            self.failures += 1
            file, log.file = log.file, Half(log.file)  # type: ignore[assignment]
            try:
                return write(log, data)
            finally:
                log.file = file

        monkeypatch.setattr(os, "fsync", full_fsync)
        monkeypatch.setattr(WholeWrites, "write", full_write)


def _full_from(monkeypatch: pytest.MonkeyPatch, disk: FullDisk, first: int, last: int) -> None:
    step = Run.step

    def counted(self: Run, images: torch.Tensor, labels: torch.Tensor) -> None:
        disk.full = first <= len(self.losses) + 1 <= last
        step(self, images, labels)

    monkeypatch.setattr(Run, "step", counted)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize("what", ["checkpoint", "logs"])
def test_a_full_disk_stops_training_and_spoils_nothing(out: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    finished = out.with_name("finished")
    assert command(*COMMAND, "--out", str(finished), "--ema", "0.5").exit_code == 0
    with monkeypatch.context() as patch:
        _full_from(patch, FullDisk(patch, what), 3, 4)
        result = command(*COMMAND, "--out", str(out), "--ema", "0.5")
    assert result.exit_code == 1, result.output
    text = words(result.output)
    named = "last.pt" if what == "checkpoint" else "metrics.jsonl"
    assert f"Stopped: {named} in {out} cannot be written: No space left on device" in text
    assert f"fastdense train --out {out} --resume" in text
    assert load(out / "last.pt")["step"] == 2 and not list(out.glob("*.partial*"))
    assert records(out)  # each line is whole
    assert command("train", "--out", str(out), "--resume").exit_code == 0
    assert same(load(out / "last.pt")["runs"], load(finished / "last.pt")["runs"]) == ""


@needs_proc
@pytest.mark.parametrize("what", ["checkpoint", "logs"])
def test_a_full_disk_can_be_skipped(out: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    disk = FullDisk(monkeypatch, what)
    _full_from(monkeypatch, disk, 3, 3)
    result = command(*COMMAND, "--out", str(out), "--save-every", "1steps", "--on-error", "skip")
    assert result.exit_code == 0, result.output
    assert disk.failures >= 1
    warnings = words(result.output).count("cannot be written: No space left on device.")
    assert warnings == (1 if what == "checkpoint" else 2), "one for each file"
    assert load(out / "last.pt")["step"] == 4
    steps = [record["step"] for record in records(out) if record["event"] == "step"]
    assert steps == ([1, 2, 3, 4] if what == "checkpoint" else [1, 2, 4])


@needs_proc
def test_a_last_checkpoint_that_cannot_be_written_is_an_error_after_the_report(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _full_from(monkeypatch, FullDisk(monkeypatch, "checkpoint"), 3, 4)
    result = command(*COMMAND, "--out", str(out), "--on-error", "skip")
    assert result.exit_code == 1
    assert "the last checkpoint could not be written" in words(result.output)
    assert "No space left on device" in words(result.output) and "next save" not in words(result.output)
    assert "saved for" in result.output and load(out / "last.pt")["step"] == 2


@needs_proc
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_disk_that_is_full_from_the_start_leaves_a_folder_for_a_new_start(
    out: Path, monkeypatch: pytest.MonkeyPatch, on_error: str
) -> None:
    with monkeypatch.context() as patch:
        disk = FullDisk(patch, "checkpoint")
        disk.full = True
        result = command(*COMMAND, "--epochs", "1", "--out", str(out), "--on-error", on_error)
    assert result.exit_code == 1
    text = words(result.output)
    assert "start again with the same command" in text and "--resume" not in text and "is whole" not in text
    if on_error == "skip":
        assert text.count("last.pt in") == 1, "one warning for a file that stays unwritable"
        measured = (out / "metrics.jsonl").read_text()
        (out / "flow-fastdense-00000001.png").touch()
    (out / "events.of.somebody.else").touch()
    assert command(*COMMAND, "--epochs", "1", "--out", str(out)).exit_code == 0
    assert [record["event"] for record in records(out)].count("header") == 1
    assert len(list(out.glob("events.out.*"))) == 1 and not list(out.glob("flow-*"))
    assert (out / "events.of.somebody.else").exists()
    assert on_error == "stop" or (out / "metrics.before.jsonl").read_text() == measured


def test_an_empty_log_is_no_run(out: Path) -> None:
    out.mkdir()
    (out / "metrics.jsonl").touch()
    assert command(*COMMAND, "--steps", "1", "--out", str(out)).exit_code == 0


def test_each_log_warns_once_until_it_can_be_written_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = WholeWrites.write

    def refuse(log: WholeWrites, data: bytes) -> None:
        if b'"step": 1,' in data or b'"step": 2,' in data or b'"step": 4,' in data:  # metrics alone
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(log, data)

    monkeypatch.setattr(WholeWrites, "write", refuse)
    result = command(*COMMAND, "--out", str(out), "--on-error", "skip")
    assert result.exit_code == 0, result.output
    assert words(result.output).count("metrics.jsonl in") == 2, "at step 1, and again at step 4"
