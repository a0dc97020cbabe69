"""Checkpoints and logs of a run: what they hold, how training goes on from them, and what a full disk may do."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from helpers import pictures
from helpers.states import same
from helpers.train_runs import COMMAND, command, load, records, words

from fastdense.data.source import digits
from fastdense.training import checkpoint
from fastdense.training.config import TrainConfig
from fastdense.training.experiment import Experiment
from fastdense.training.logs import EPOCH_SCALARS, STEP_SCALARS
from fastdense.training.outputs import OutputOptions
from fastdense.training.run import Run

DIGITS = digits()
TINY = TrainConfig(depth=10, growth_rate=4, epochs=2, batch_size=480, device="cpu", impl="torch")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    result = command(*COMMAND, "--out", str(out), "--keep", "2", "--ema", "0.5")
    assert result.exit_code == 0, result.output
    return out


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
    config = dataclasses.replace(TINY, **changes)
    whole = Experiment(config, DIGITS)
    stored = []
    for _ in whole.rounds():
        buffer = io.BytesIO()
        torch.save(whole.state_dict(), buffer)
        stored.append(buffer.getvalue())
    last = torch.load(io.BytesIO(stored[-1]), weights_only=True)
    for state in stored:
        resumed = Experiment(config, DIGITS)
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
    assert TrainConfig(**state["config"]) == dataclasses.replace(TINY, ema=0.5, image_size=8)
    assert state["versions"]["torch"] == torch.__version__
    run = state["runs"]["fastdense"]
    assert len(run["losses"]) == 4 and [e["step"] for e in run["evaluations"]] == [2, 4]
    for weights, accuracy in (
        (run["model"], run["evaluations"][-1]["test_accuracy"]),
        (run["ema"]["model"], run["evaluations"][-1]["ema_test_accuracy"]),
    ):
        model = TINY.architecture.build(channels=1, classes=10).eval()
        model.load_state_dict(weights)
        with torch.no_grad():
            assert (model(DIGITS.test_images).argmax(1) == DIGITS.test_labels).double().mean().item() == accuracy
    best = max(load(finished / "best.pt")["runs"]["fastdense"]["evaluations"], key=lambda e: e["ema_test_accuracy"])
    assert best["ema_test_accuracy"] == max(e["ema_test_accuracy"] for e in run["evaluations"])
    assert load(finished / "best.pt")["step"] == best["step"]


def test_best_is_the_first_with_the_highest_accuracy(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.2, 0.5, 0.5, 0.4])
    monkeypatch.setattr(Run, "evaluate", lambda *_: (1.0, next(accuracies)))
    assert command(*COMMAND, "--epochs", "4", "--save-every", "3epochs", "--out", str(out)).exit_code == 0
    assert (load(out / "best.pt")["epoch"], load(out / "last.pt")["epoch"]) == (2, 4)


def test_named_models_give_weights_that_torchvision_loads() -> None:
    from helpers import peers

    model = TrainConfig(model="densenet121", image_size=32).architecture.build(channels=3, classes=1000)
    theirs = peers.torchvision().densenet121()
    theirs.load_state_dict(model.state_dict())


def test_resumed_options_hold_and_contradictions_are_named(finished: Path, tmp_path: Path) -> None:
    result = command("train", "--out", str(finished), "--resume", "--lr", "0.3")
    assert result.exit_code == 2
    text = words(result.output)
    assert "--lr 0.3 contradicts" in text and "which was begun with --lr 0.1" in text
    text = words(command("train", "--out", str(finished), "--resume", "--steps", "3").output)
    assert "--steps 3 contradicts" in text and "which was begun without it" in text, text
    text = words(command("train", "--out", str(finished), "--resume", "--bn-size", "0").output)
    assert "--bn-size none contradicts" in text and "which was begun with --bn-size 4" in text, text
    for flag, begun in (("--no-nesterov", "with --nesterov"), ("--plain", "without it"), ("--compare", "without it")):
        text = words(command("train", "--out", str(finished), "--resume", flag).output)
        assert f"{flag} contradicts" in text and f"which was begun {begun}: leave it out" in text, text
    for contradiction in (["--epochs", "3"], ["--milestones", "0.2"], ["--data", str(tmp_path)]):
        assert command("train", "--out", str(finished), "--resume", *contradiction).exit_code == 2, contradiction
    same_again = command(*COMMAND, "--out", str(finished), "--resume", "--threads", "1", "--device", "cpu")
    assert same_again.exit_code == 0, same_again.output
    assert same(load(finished / "last.pt")["runs"], load(finished / "step-00000004.pt")["runs"]) == ""
    assert "--resume needs --out" in words(command("train", "--resume").output)


def test_a_folder_that_holds_a_run_is_not_overwritten(finished: Path, tmp_path: Path) -> None:
    before = (finished / "last.pt").read_bytes()
    result = command(*COMMAND, "--out", str(finished))
    assert result.exit_code == 2
    assert "already holds a run" in words(result.output) and "--resume" in result.output
    assert (finished / "last.pt").read_bytes() == before
    (tmp_path / "metrics.jsonl").write_text("somebody else's")
    assert "(metrics.jsonl): name another folder" in words(command(*COMMAND, "--out", str(tmp_path)).output)
    result = command("train", "--out", str(tmp_path / "nothing"), "--resume")
    assert result.exit_code == 2 and "holds no last.pt to resume from" in words(result.output)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_augmented_images_of_a_moved_folder_go_on_from_the_middle_of_an_epoch(tmp_path: Path, workers: str) -> None:
    data = pictures.write_folder(tmp_path / "images")
    (data / "train" / "cat" / "3.png").write_bytes(b"no image")
    options = [*COMMAND, "--image-size", "16", "--batch-size", "4", "--on-error", "skip", "--workers", workers]
    first, second = tmp_path / "first", tmp_path / "second"
    whole = command(*options, "--data", str(data), "--out", str(first), "--save-every", "1step", "--keep", "9")
    assert whole.exit_code == 0, whole.output
    text, bad = words(whole.output), data / "train" / "cat" / "3.png"
    assert text.count(f"Skipped an image that cannot be read: {bad}: cannot identify image file") == 1
    assert f"Images that could not be read: 1, the first {bad}: cannot" in text and "replaced by the next" in text
    (named,) = [record for record in records(first) if record["event"] == "unreadable"]
    assert named["message"].startswith(f"{bad}: cannot identify")
    second.mkdir()
    (second / "last.pt").write_bytes((first / "step-00000002.pt").read_bytes())
    moved = data.rename(tmp_path / "moved")
    result = command("train", "--data", str(moved), "--out", str(second), "--resume")
    assert result.exit_code == 0, result.output
    assert load(second / "last.pt")["step"] == 6
    assert same(load(second / "last.pt")["runs"], load(first / "last.pt")["runs"]) == ""


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _edit(**changes: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(load(path) | changes, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut, "is damaged or no checkpoint"),
        (_flip, "is damaged or no checkpoint"),
        (lambda path: path.write_text("hello"), "is damaged or no checkpoint"),
        (lambda path: torch.save({"state_dict": {}}, path), "is not a checkpoint of fastdense train"),
        (lambda path: torch.save(torch.zeros(2), path), "is not a checkpoint of fastdense train"),
        (_edit(format=2), "has format 2, not 1: resume with fastdense"),
        (_edit(processes=2), "was trained by 2 processes, not 1: resume with torchrun --nproc-per-node 2"),
        (_edit(data={"classes": 7}), "data: classes was 7, and in --data is 10. Name its own data with"),
        (_edit(config={"colour": 1}), "with other options"),
        (_edit(runs={"fastdense": {"model": {}}}), "does not fit the network that it describes"),
    ],
    ids=["cut", "flipped", "text", "foreign", "tensor", "format", "processes", "data", "options", "network"],
)
def test_a_checkpoint_that_cannot_be_used_is_named(
    finished: Path, out: Path, spoil: Callable[[Path], None], message: str
) -> None:
    out = out / ("a long name " * 15).strip()
    out.mkdir(parents=True)
    (out / "last.pt").write_bytes((finished / "last.pt").read_bytes())
    spoil(out / "last.pt")
    result = command("train", "--out", str(out), "--resume")
    assert result.exit_code == 2, result.output
    assert message in words(result.output) and str(out / "last.pt") in result.output  # in one piece, to be copied


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    checkpoint.read(finished / "last.pt")
    monkeypatch.setattr("zipfile.ZipFile", refuse)
    result = command("train", "--out", str(finished), "--resume")
    assert result.exit_code == 2
    assert "last.pt cannot be read: Permission denied" in words(result.output)
    assert "damaged" not in result.output and "copy another" not in result.output
    with pytest.raises(ValueError, match=r"last\.pt cannot be read: Permission denied"):
        checkpoint.read(finished / "last.pt")


@pytest.mark.parametrize("spoil", [_cut, _flip, lambda path: path.write_text("hello")], ids=["cut", "flipped", "text"])
def test_reading_finds_damage(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.randn(1000)}, path)
    checkpoint.read(path)
    spoil(path)
    with pytest.raises(ValueError, match=r"weights\.pt is damaged or no checkpoint"):
        checkpoint.read(path)
    with pytest.raises(ValueError, match=r"nowhere\.pt cannot be read: No such file"):
        checkpoint.read(tmp_path / "nowhere.pt")


def test_leftovers_of_a_kill_are_removed(finished: Path, out: Path) -> None:
    out.mkdir()
    (out / "last.pt").write_bytes((finished / "last.pt").read_bytes())
    (out / "last.partial.pt").write_bytes(b"half a checkpoint")
    assert command("train", "--out", str(out), "--resume").exit_code == 0
    assert not list(out.glob("*.partial*"))


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
        result = command(*COMMAND, "--out", str(out), "--keep", "2", "--ema", "0.5")
    assert signal.getsignal(signum) is handler
    assert result.exit_code == code, result.output
    assert f"Interrupted after step 2 of 4. Resume with: fastdense train --out {out} --resume" in words(result.output)
    state = load(out / "last.pt")
    assert state["step"] == 2 and state["runs"]["fastdense"]["evaluations"] == [], "the evaluation can wait"
    assert command("train", "--out", str(out), "--resume").exit_code == 0
    assert same(load(out / "last.pt")["runs"], load(finished / "last.pt")["runs"]) == ""
    steps = [record["step"] for record in records(out) if record["event"] == "step"]
    assert steps == [1, 2, 3, 4]
    assert [record["step"] for record in records(out) if record["event"] == "epoch"] == [2, 4]
    kinds = [record["event"] for record in records(out)]
    assert kinds.count("resumed") == kinds.count("summary") == 1 and "error" not in kinds, "cut back to the checkpoint"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = command(*COMMAND, "--out", str(tmp_path / "file"))
    # Without spaces: a long path is wrapped anywhere.
    said = words(result.output).replace(" ", "")
    assert result.exit_code == 2 and "fileisafile,notafolder:nameanotherone" in said
    result = command(*COMMAND, "--out", str(tmp_path / "file" / "run"))
    assert result.exit_code == 2 and "cannot be written: Not a directory" in words(result.output)


def test_nothing_is_written_without_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*COMMAND, "--steps", "1").exit_code == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "steps"), [("2", 44), ("1epoch", 22), ("3epochs", 66), ("500steps", 500), ("1 step", 1)]
)
def test_save_every_counts_epochs_or_steps(text: str, steps: int) -> None:
    assert OutputOptions(save_every=text).steps(22) == steps


@pytest.mark.parametrize("text", ["0", "-1", "steps", "1.5", "2minutes"])
def test_save_every_names_what_it_can_be(text: str) -> None:
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


def test_tensorboard_shows_every_step_once(out: Path) -> None:
    assert command(*COMMAND, "--out", str(out), "--ema", "0.5").exit_code == 0
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
    assert command("train", "--out", str(out), "--resume").exit_code == 0
    (second,) = set(out.glob("events.*")) - {first}
    assert [(step, what) for step, _, what in scalars(second)] == [(state["step"] + 1, "brain.Event:2"), (5, "start")]


def test_no_tensorboard(out: Path) -> None:
    assert command(*COMMAND, "--steps", "1", "--out", str(out), "--no-tensorboard").exit_code == 0
    assert not list(out.glob("events.*"))


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save({"step": 1}, path)

    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(OSError, match="Input/output"):
                checkpoint.save({"step": 2}, path)
        assert load(path) == {"step": 1}
        assert [found.name for found in tmp_path.iterdir()] == ["last.pt"]
