"""The commands: what they print, write and exit with, also where their output reaches nobody."""

import dataclasses
import errno
import io
import json
import os
import re
import threading
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from helpers.processes import python
from helpers.train_runs import FEW, SMALL, Result, command, load, prepared, records, steps, words
from rich.live import Live

import fastdense
from fastdense.cli import display
from fastdense.cli.terminal import Printer
from fastdense.cli.train import train
from fastdense.training.config import TrainConfig, flag
from fastdense.training.events import Event, Stopped
from fastdense.training.outputs import OutputOptions, Outputs
from fastdense.training.run import Run

Compared: TypeAlias = tuple[Result, list[dict[str, Any]]]


def rows(text: str) -> dict[str, list[str]]:
    """The result table: label to cells."""
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    return {first: rest for first, *rest in cells}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    path = tmp_path_factory.mktemp("metrics") / "new" / "folders" / "metrics.jsonl"
    options = ["--compare", "--steps", "30", "--check-steps", "3", "--impl", "torch"]
    result = command(*SMALL, *options, "--metrics", path)
    assert result.exit_code == 0, result.output
    return result, records(path)


def test_help_lists_the_commands_and_every_option() -> None:
    result = command("--help")
    assert result.exit_code == 0 and "train" in result.output and "env" in result.output
    text = words(command("train", "--help").output)
    for field in (*dataclasses.fields(TrainConfig), *dataclasses.fields(OutputOptions)):
        assert f"{flag(field.name)} " in text, field.name
    for default in ("100", "12, or the model's own", "1 below 32 pixels", "digits 8, CIFAR 32, a folder 224"):
        assert default in text


def test_a_comparison_is_a_short_log_that_ends_in_a_table_and_plain_words(compared: Compared) -> None:
    result, written = compared
    table, lines = rows(result.output), result.output.splitlines()
    assert len(lines) < 20 and "\x1b" not in result.output and "basic layers" not in result.output
    epochs = [line.split(";")[0] for line in lines if line.startswith("epoch")]
    assert epochs == ["epoch 1/2 step 22/30", "epoch 2/2 step 30/30"]
    assert "check in float64: losses of 3 steps differ by at most" in result.output
    for run in (record for record in written if record["event"] == "summary"):
        cells = f"{run['train_loss']:.4f}", f"{run['test_loss']:.4f}", f"{100 * run['test_accuracy']:.2f}%"
        rest = f"{1000 * run['step_seconds']:.1f} ms", f"{run['kept_bytes'] / 1e6:.1f} MB"
        assert table[run["label"]] == [*cells, *rest]
    assert re.search(r"^same loss curve \(largest difference of .*\d times\.$", lines[-1])


def test_metrics_hold_everything(compared: Compared) -> None:
    _, written = compared
    header, *rest = written
    wanted = {"event": "header", "device": "cpu", "seed": 0, "threads": 1, "steps": 30}
    assert header == header | wanted | {"runs": {"reference": "reference", "fastdense": "torch"}}
    versions = {"torch": torch.__version__, "fastdense": fastdense.__version__}
    assert header["versions"] == header["versions"] | versions and header["command"].split()[0] == "fastdense"
    assert header["config"]["depth"] == 10 and header["config"]["compare"] is True

    kinds = [record["event"] for record in rest]
    first, second = [*["step"] * 44, *["epoch"] * 2], [*["step"] * 16, *["epoch"] * 2]
    assert kinds == [*["check"] * 3, *first, *second, *["summary"] * 2, "comparison"]
    fields = {
        "check": "event step reference fastdense",
        "step": "event run step epoch loss seconds images_per_second lr grad_norm skipped",
        "epoch": "event run epoch step train_loss test_loss test_accuracy ema_test_loss ema_test_accuracy peak_bytes",
    }
    for record in rest:
        if record["event"] in fields:
            assert record.keys() == set(fields[record["event"]].split())
    assert rest[-1]["same_curve"] is True and rest[-1]["check_steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--depth 101", "--depth 101 does not fit a DenseNet-BC of three equal blocks"),
        ("--block-config 6,x", "--block-config must be whole numbers, as in 6,12,24, got '6,x'"),
        ("--bn-size four", "--bn-size must be a whole number, 0 or none, got 'four'"),
        ("--milestones half", "--milestones must be fractions of all steps, as in 1/3,2/3, got 'half'"),
        ("--save-every soon", "--save-every must be a number of epochs or steps, as in 2epochs or 500steps"),
        ("--metrics /dev/null/x", "--metrics /dev/null/x cannot be written: Not a directory. Name another file"),
        ("--impl triton --device cpu", "use --impl auto or --impl torch"),
        ("--no-such-option", "--no-such-option"),
    ],
)
def test_bad_options_exit_with_2(arguments: str, message: str) -> None:
    result = command("train", *arguments.split())
    assert result.exit_code == 2, result.output
    assert message in words(result.output)


def test_divergence_exits_with_1_and_still_reports(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    result = command(*SMALL, "--compare", "--check-steps", "0", "--lr", "1e30", "--metrics", path)
    assert result.exit_code == 1
    assert "Stopped: the training loss of run reference is not finite at epoch 1, step 2 (" in words(result.output)
    assert rows(result.output)["fastdense"][0] == "nan"
    assert "same loss curve" not in result.output
    (error,) = records(path, "error")
    assert (error["run"], error["epoch"], error["step"]) == ("reference", 1, 2)
    assert [record["train_loss"] for record in records(path, "summary")] == ["nan", "nan"]


@pytest.mark.parametrize("at", [0, 7])
def test_interrupt_exits_with_130_and_shows_the_table_so_far(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: int
) -> None:
    step, made = Run.step, 0

    def interrupted(self: Run, images: torch.Tensor, labels: torch.Tensor) -> None:
        nonlocal made
        if made == at:
            raise KeyboardInterrupt
        made += 1
        step(self, images, labels)

    monkeypatch.setattr(Run, "step", interrupted)
    path = tmp_path / "metrics.jsonl"
    result = command(*SMALL, "--compare", "--check-steps", "0", "--metrics", path)
    assert result.exit_code == 130
    # In the fourth step the other run goes first.
    table = rows(result.output)
    assert (table["reference (torch.cat)"][0] == "-") == (table["fastdense"][0] == "-") == (at == 0)
    assert f"Interrupted after step {at // 2} of 132." in words(result.output)
    assert records(path)[-3 if at == 0 else -4]["event"] == "error"


def test_a_log_gives_signs_of_life_and_says_how_fast_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "HEARTBEAT_SECONDS", -1.0)
    result = command(*SMALL, "--steps", "3")
    lines = [line for line in result.output.splitlines() if line.startswith("epoch")]
    assert [line.split(";")[0] for line in lines] == [f"epoch 1/1 step {step}/3" for step in (1, 2, 3)]
    assert re.search(r"; [\d,]+ images/s, \d+ s left$", lines[0]), lines
    assert re.search(r"; [\d,]+ images/s$", lines[-1]), lines
    said = [display.duration(s) for s in (0.4, 59, 60, 3599, 3600, 90_000)]
    assert said == ["0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "25 h 00 min"]


def test_averaged_weights_have_a_row() -> None:
    options = ["--ema", "0.9", "--schedule", "step", "--amp", "bf16", "--bn-size", "0"]
    result = command(*SMALL, "--steps", "2", *options)
    assert "basic layers" in result.output
    assert "seed 0, times 0.1 at 50%, 75%, bf16, weights averaged with decay 0.9." in words(result.output)
    (row,) = [cells for label, cells in rows(result.output).items() if label.startswith("fastdense, averaged")]
    assert float(row[1]) > 0 and row[2].endswith("%") and row[0] == row[3] == "-"


def test_a_log_of_many_epochs_stays_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdense.data.source.digits", lambda size: FEW)
    result = command(*SMALL, "--epochs", "50", "--batch-size", "200", "--growth-rate", "1")
    lines = [line for line in result.output.splitlines() if line.startswith("epoch")]
    assert 10 <= len(lines) <= 20
    assert lines[-1].startswith("epoch 50/50 step 50/50;")


def test_terminal_shows_both_curves_grow_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "REDRAW_SECONDS", -1.0)  # after each step, however fast they are
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail(f"{thread} may live at exit"))
    screen = io.StringIO()
    console = Printer(file=screen, force_terminal=True, width=80, legacy_windows=False, color_system=None)
    experiment = prepared(epochs=1, batch_size=64, steps=12, check_steps=2, compare=True)
    with Outputs(OutputOptions(), experiment, print) as outputs:
        train(console, experiment, outputs)
    shown = screen.getvalue()
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor is hidden, then shown again"
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert max(map(len, text.splitlines())) <= 80
    assert "check in float64" in text and "epoch 1/1" in text and all(f" {step}/12;" in text for step in range(1, 13))
    for label in ("reference (torch.cat)", "fastdense"):
        (curve,) = re.findall(rf"{re.escape(label)}: .* ms +([▁-█]{{20}}) *$", text.split("12/12")[-1], re.MULTILINE)
        assert curve[0] == "█" and curve[-1] < "█"


def test_curve_is_logarithmic_and_grows_with_the_steps() -> None:
    def drawn(losses: list[float], steps: int) -> str:
        return display.curve(losses, steps, 0.01, 1.0, width=4, bars="0123456789")

    assert drawn([1.0, 0.1, 0.01, 0.0], 4) == "9500"
    assert drawn([1.0, 0.1], 4) == "95"
    assert drawn([1.0, 1.0, 0.1, 0.1], 8) == "95"
    assert drawn([1.0], 2) == "99"
    assert drawn([1.0, 0.1], 2) == "9955"
    assert drawn([], 4) == ""
    assert display.curve([2.0], 1, 2.0, 2.0, width=1, bars=display.ASCII_BARS) == "_"


def test_env_names_devices_implementations_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory = "NVIDIA H100", 9, 0, 80_000_000_000

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    said, found = words(command("env").output), json.loads(command("env", "--json").output)
    unset, card = ("TRITON_INTERPRET not set", "FASTDENSE_IMPL not set"), ("NVIDIA H100", "capability 9.0, 80 GB")
    for value in (fastdense.__version__, torch.__version__, *unset, *card):
        assert value in said
    cpu, gpu = found["devices"]
    assert (cpu["device"], cpu["impl"], cpu["reason"]) == ("cpu", *fastdense.backends.explain("cpu"))
    assert (gpu["device"], gpu["capability"], gpu["memory_bytes"]) == ("cuda:0", "9.0", 80_000_000_000)
    assert found["versions"]["torch"] == torch.__version__
    assert found["variables"] == {"FASTDENSE_IMPL": None, "TRITON_INTERPRET": None}


def test_the_variable_is_followed_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDENSE_IMPL", "reference")
    cpu, *_ = json.loads(command("env", "--json").output)["devices"]
    assert (cpu["impl"], cpu["reason"]) == ("reference", "FASTDENSE_IMPL is reference")
    monkeypatch.setenv("FASTDENSE_IMPL", "fast")
    shown, refused = command("env"), command(*SMALL, "--steps", "1")
    assert shown.exit_code == 0 and "none" in shown.output and "got 'fast'" in words(shown.output)
    assert refused.exit_code == 2
    assert "the environment variable FASTDENSE_IMPL must be one of" in words(refused.output)


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
    def fail(shown: display.Display, events: list[Event]) -> None:
        if events[0].event == "epoch":
            raise ZeroDivisionError("a defect of ours")

    monkeypatch.setattr(display.Display, "update", fail)
    experiment = prepared()
    with Outputs(OutputOptions(out=tmp_path), experiment, print) as outputs, pytest.raises(ZeroDivisionError):
        train(Printer(file=io.StringIO()), experiment, outputs)
    assert load(tmp_path / "last.pt")["step"] == 2


def test_a_printer_falls_silent_and_raises_nothing() -> None:
    printer = Printer(file=Lost(2, errno.EPIPE), force_terminal=True)
    printer.print("one")
    assert printer.failure == 0
    with Live("shown", console=printer, auto_refresh=False) as live:
        live.refresh()
        printer.print("two")
    printer.print("three")
    assert printer.failure == errno.EPIPE
    assert "three" not in printer.file.getvalue()  # type: ignore[attr-defined]


# Children of one process that has imported what all need. None in sys.modules makes an import fail.
CHILDREN = """
import os, sys, fastdense.data.images, fastdense.data.source, fastdense.training.outputs
assert not {*sys.argv[1].split()} & {*sys.modules}
for missing in sys.argv.pop(1).split():
    assert not any(files for *_, files in os.walk(sys.argv[-1]))
    if not os.fork():
        if missing == "/dev/full":
            os.dup2(os.open(missing, os.O_WRONLY), 1)
        else:
            sys.modules[missing] = None
        from fastdense.cli.main import main
        main()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs fork and /dev/full")
def test_a_missing_extra_and_a_full_standard_output_are_one_line_and_status_1(tmp_path: Path) -> None:
    packages, out = ["typer", "rich", "sklearn", "tensorboardX"], tmp_path / "run"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    arguments = [" ".join([*packages, "/dev/full"]), *SMALL, "--steps", "2", "--out", out]
    done = python("-c", CHILDREN, *arguments, environment=buffered)
    assert done.stdout.split() == ["1"] * 5, done.stderr
    *lines, last = done.stderr.splitlines()
    line = "fastdense: this command needs {}, which is not installed: pip install 'fastdense[train]'"
    assert lines == list(map(line.format, packages))
    assert last.startswith("Stopped: standard output cannot be written: No space left on device, after step 1 of 2")
    assert last.endswith(f"Resume with: fastdense train --out {out} --resume.")


@pytest.mark.filterwarnings("ignore:fastdense. recompute")
def test_what_recompute_auto_resolved_to_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, mode in ((1 << 40, "activations"), (0, "bottlenecks")):
        monkeypatch.setattr(fastdense.memory, "free_bytes", lambda device, free=free: free)
        text = words(command(*SMALL, "--steps", "1", "--recompute", "auto").output)
        assert f"recompute='auto' resolved to '{mode}' for denseblock1, denseblock2" in text
    assert "resolved to" not in words(command(*SMALL, "--steps", "1").output)
