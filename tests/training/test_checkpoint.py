"""Checkpoints and logs of a run: what they hold, how training goes on from them, and what a full disk leaves behind."""

import errno
import io
import os
import shutil
import signal
import struct
from collections.abc import Callable, Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pictures
from helpers.train_runs import COMMAND, FEW, TINY, command, load, prepared, records, same, same_runs, steps, words

from fastdense.training.checkpoint import link
from fastdense.training.config import TrainConfig
from fastdense.training.logs import EPOCH_SCALARS, STEP_SCALARS, WholeWrites
from fastdense.training.outputs import OutputOptions
from fastdense.training.run import Run


@pytest.mark.parametrize(
    "changes",
    [
        {"drop_rate": 0.3, "ema": 0.9, "compare": True, "check_steps": 2},
        {"amp": "fp16", "schedule": "step", "warm_up": 0.3, "drop_rate": 0.1},
        {"amp": "bf16", "steps": 3, "nesterov": False},
    ],
    ids=["compare", "fp16", "bf16"],
)
def test_training_goes_on_bit_for_bit_from_every_state(changes: dict[str, Any]) -> None:
    few: Any = {"data": FEW, "batch_size": 96, **changes}
    whole = prepared(**few)
    stored = []
    for _ in whole.rounds():
        buffer = io.BytesIO()
        torch.save(whole.state_dict(), buffer)
        stored.append(buffer.getvalue())
    last = torch.load(io.BytesIO(stored[-1]), weights_only=True)
    assert last["step"] == changes.get("steps", 4) and len(stored) > last["step"]
    for state in stored:
        resumed = prepared(**few)
        resumed.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
        torch.rand(7)  # somebody else's random numbers must not matter
        list(resumed.rounds())
        if resumed.step:
            differs = same(resumed.state_dict(), last)
            assert differs == "", (resumed.step, differs)


def test_a_checkpoint_holds_what_it_says(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir() if not path.name.startswith("events")) == [
        "best.pt", "last.pt", "metrics.jsonl", "step-00000002.pt", "step-00000004.pt"
    ]  # fmt: skip
    state = load(finished / "last.pt")
    assert (state["format"], state["step"], state["epoch"], state["processes"]) == (1, 4, 2, 1)
    assert TrainConfig(**state["config"]) == replace(TINY, ema=0.5, image_size=8)
    assert state["versions"]["torch"] == torch.__version__
    run = state["runs"]["fastdense"]
    assert len(run["losses"]) == 4 and [e["step"] for e in run["evaluations"]] == [2, 4]
    tiny = prepared()
    model, data = tiny.runs[0].model.eval(), tiny.data
    for weights, score in ((run["model"], "test_accuracy"), (run["ema"]["model"], "ema_test_accuracy")):
        model.load_state_dict(weights)
        with torch.no_grad():
            right = model(data.test_images).argmax(1) == data.test_labels
        assert right.double().mean().item() == run["evaluations"][-1][score]
    best = max(load(finished / "best.pt")["runs"]["fastdense"]["evaluations"], key=lambda e: e["ema_test_accuracy"])
    assert best["ema_test_accuracy"] == max(e["ema_test_accuracy"] for e in run["evaluations"])
    assert load(finished / "best.pt")["step"] == best["step"]


def test_best_is_the_first_with_the_highest_accuracy(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.2, 0.5, 0.5, 0.4])
    monkeypatch.setattr(Run, "evaluate", lambda *_: (1.0, next(accuracies)))
    assert command(*COMMAND, "--epochs", "4", "--save-every", "3epochs", "--out", out).exit_code == 0
    assert (load(out / "best.pt")["epoch"], load(out / "last.pt")["epoch"]) == (2, 4)


def test_resumed_options_hold_and_contradictions_are_named(finished: Path) -> None:
    for given, begun in (
        ("--lr 0.3", "with --lr 0.1"),
        ("--bn-size none", "with --bn-size 4"),
        ("--no-nesterov", "with --nesterov"),
        ("--plain", "without it"),
        ("--milestones 0.2", "with --milestones 0.5,0.75"),
    ):
        result = command("train", "--out", finished, "--resume", *given.split())
        assert result.exit_code == 2, given
        contradiction = f"{given} contradicts {finished / 'last.pt'}, which was begun {begun}: leave it out"
        assert contradiction in words(result.output)


def test_resuming_a_finished_run_changes_nothing_and_removes_what_a_kill_left(finished: Path, out: Path) -> None:
    shutil.copytree(finished, out)
    (out / "last.partial.pt").write_bytes(b"half a checkpoint")
    result = command(*COMMAND, "--out", out, "--resume", "--threads", "1", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert same_runs(out, finished) == ""
    assert not list(out.glob("*.partial*"))


def test_a_folder_that_cannot_be_used_is_named_and_not_touched(finished: Path, tmp_path: Path) -> None:
    before = (finished / "last.pt").read_bytes()
    (tmp_path / "metrics.jsonl").write_text("somebody else's")
    (tmp_path / "file").touch()
    for arguments, message in (
        ([*COMMAND, "--out", finished], "already holds a run (last.pt, best.pt, metrics.jsonl): resume it with"),
        ([*COMMAND, "--out", tmp_path], "(metrics.jsonl): name another folder"),
        ([*COMMAND, "--out", tmp_path / "file"], "file is a file, not a folder: name another one"),
        ([*COMMAND, "--out", tmp_path / "file" / "run"], "cannot be written: Not a directory"),
        (["train", "--out", tmp_path / "nothing", "--resume"], "holds no last.pt to resume from"),
        (["train", "--resume"], "--resume needs --out, the folder of the run to resume"),
    ):
        result = command(*arguments)
        assert result.exit_code == 2 and message in words(result.output), result.output
    assert (finished / "last.pt").read_bytes() == before
    assert (tmp_path / "metrics.jsonl").read_text() == "somebody else's"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_augmented_images_of_a_moved_folder_go_on_from_the_middle_of_an_epoch(tmp_path: Path, workers: str) -> None:
    data = pictures.write_folder(tmp_path / "images")
    bad = data / "train" / "cat" / "3.png"
    bad.write_bytes(b"no image")
    options = [*COMMAND, "--image-size", "16", "--batch-size", "4", "--on-error", "skip", "--workers", workers]
    first, second = tmp_path / "first", tmp_path / "second"
    whole = command(*options, "--data", data, "--out", first, "--save-every", "1step", "--keep", "9")
    assert whole.exit_code == 0, whole.output
    text = words(whole.output)
    assert text.count(f"Skipped an image that cannot be read: {bad}: cannot identify image file") == 1
    assert f"Images that could not be read: 1, the first {bad}: cannot" in text and "replaced by the next" in text
    (named,) = records(first, "unreadable")
    assert named["message"].startswith(f"{bad}: cannot identify")
    second.mkdir()
    shutil.copy(first / "step-00000002.pt", second / "last.pt")
    moved = data.rename(tmp_path / "moved")
    result = command("train", "--data", moved, "--out", second, "--resume")
    assert result.exit_code == 0, result.output
    assert load(second / "last.pt")["step"] == 6
    assert same_runs(second, first) == ""


def _flip(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def _edit(**changes: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(load(path) | changes, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "is damaged or no checkpoint"),
        (_flip, "is damaged or no checkpoint"),
        (lambda path: (path.unlink(), path.mkdir()), "last.pt cannot be read: Is a directory"),
        (lambda path: torch.save({"state_dict": {}}, path), "is not a checkpoint of fastdense train"),
        (lambda path: torch.save(torch.zeros(2), path), "is not a checkpoint of fastdense train"),
        (_edit(format=2), "has format 2, not 1: resume with fastdense"),
        (_edit(processes=2), "was trained by 2 processes, not 1: resume with torchrun --nproc-per-node 2"),
        (_edit(data={"classes": 7}), "data: classes was 7, and in --data is 10. Name its own data with"),
        (_edit(config={"colour": 1}), "with other options"),
        (_edit(runs={"fastdense": {"model": {}}}), "does not fit the network that it describes"),
    ],
    ids=["cut", "flipped", "folder", "foreign", "tensor", "format", "processes", "data", "options", "network"],
)
def test_a_checkpoint_that_cannot_be_used_is_named(finished: Path, out: Path, spoil: Any, message: str) -> None:
    out = out / ("a long name " * 15).strip()
    out.mkdir(parents=True)
    shutil.copy(finished / "last.pt", out)
    spoil(out / "last.pt")
    result = command("train", "--out", out, "--resume")
    assert result.exit_code == 2, result.output
    assert message in words(result.output) and str(out / "last.pt") in result.output  # in one piece, to be copied


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(
    finished: Path, out: Path, monkeypatch: pytest.MonkeyPatch, signum: int, code: int
) -> None:
    step = Run.step

    def disturbed(self: Run, images: torch.Tensor, labels: torch.Tensor) -> None:
        if len(self.losses) == 1:
            os.kill(os.getpid(), signum)
            os.kill(os.getpid(), signum)  # as torchrun does
        step(self, images, labels)

    handler = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", disturbed)
        result = command(*COMMAND, "--out", out, "--keep", "2", "--ema", "0.5")
    assert signal.getsignal(signum) is handler
    assert result.exit_code == code, result.output
    assert f"Interrupted after step 2 of 4. Resume with: fastdense train --out {out} --resume" in words(result.output)
    state = load(out / "last.pt")
    assert state["step"] == 2 and state["runs"]["fastdense"]["evaluations"] == [], "the evaluation can wait"
    assert command("train", "--out", out, "--resume").exit_code == 0
    assert same_runs(out, finished) == ""
    assert steps(out) == [1, 2, 3, 4] and steps(out, "epoch") == [2, 4]
    assert [len(records(out, kind)) for kind in ("resumed", "summary", "error")] == [1, 1, 0], "cut back"


def test_nothing_is_written_that_is_not_wanted(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*COMMAND, "--steps", "1").exit_code == 0
    assert not list(tmp_path.iterdir())
    assert command(*COMMAND, "--steps", "1", "--out", out, "--no-tensorboard").exit_code == 0
    for _ in range(2):  # the second time both are one file already
        link(out / "last.pt", out / "best.pt")
    assert {path.name for path in out.iterdir()} == {"best.pt", "last.pt", "metrics.jsonl"}


def test_save_every_counts_epochs_or_steps() -> None:
    for text, wanted in {"2": 44, "1epoch": 22, "3epochs": 66, "500steps": 500, "1 step": 1}.items():
        assert OutputOptions(save_every=text).steps(22) == wanted, text
    for text in ("0", "-1", "steps", "1.5", "2minutes"):
        with pytest.raises(ValueError, match="--save-every must be a number of epochs or steps"):
            OutputOptions(save_every=text)


def scalars(path: Path) -> list[tuple[int, dict[str, float], str]]:
    """Step, scalars and session log of every record in one of TensorBoard's files."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        values = {value.tag: value.simple_value for value in event.summary.value}
        found.append((event.step, values, "start" if event.HasField("session_log") else event.file_version))
        data = data[16 + length :]
    return found


def test_tensorboard_shows_every_step_once(finished: Path, out: Path) -> None:
    shutil.copytree(finished, out)
    (first,) = out.glob("events.*")
    version, start, *rest = scalars(first)
    assert version[2] == "brain.Event:2" and start[::2] == (1, "start")
    written = [record for record in records(out) if record["event"] in ("step", "epoch")]
    assert [step for step, *_ in rest] == [record["step"] for record in written] == [1, 2, 2, 3, 4, 4]
    for (_, values, _), record in zip(rest, written, strict=True):
        names = STEP_SCALARS if record["event"] == "step" else EPOCH_SCALARS
        wanted = {f"{tag}/fastdense": record[name] for name, tag in names.items() if record[name] is not None}
        assert values == pytest.approx(wanted, rel=1e-6) and len(values) >= 4
    # What a later start says hides what an earlier one said of the same steps.
    state = load(out / "last.pt")
    assert command("train", "--out", out, "--resume").exit_code == 0
    (second,) = set(out.glob("events.*")) - {first}
    assert [(step, what) for step, _, what in scalars(second)] == [(state["step"] + 1, "brain.Event:2"), (5, "start")]


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
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
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
