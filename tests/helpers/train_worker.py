"""Run by ``torchrun`` with two processes: ``train_worker.py FILE CASE ...`` writes what each case said."""

import contextlib
import dataclasses
import io
import json
import os
import sys
import traceback
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastdense.cli import train
from fastdense.cli.terminal import Printer
from fastdense.training.distributed import Processes, processes
from fastdense.training.events import EpochEvent, StepEvent, Stopped
from fastdense.training.experiment import Experiment
from fastdense.training.outputs import OutputOptions, Outputs
from helpers.train_runs import FEW, SMALL, TINY, app, load, records, same, steps

FILE = ""  # where the cases may write, beside what they say


def experiment(ranks: Processes | None = None, **changes: Any) -> Experiment:
    """Six steps, of two processes or of this one alone, and 37 images to test on."""
    config = dataclasses.replace(TINY, **{"batch_size": 64, **changes})
    return Experiment(config, dataclasses.replace(FEW, unreadable=[]), *([] if ranks is None else [ranks]))


def two_are_one_with_sync_bn(ranks: Processes) -> None:
    """The same losses, gradients and scores up to rounding."""
    pair, alone = experiment(ranks, sync_bn=True), experiment(sync_bn=True)
    for ours, theirs in zip(chain.from_iterable(pair.rounds()), chain.from_iterable(alone.rounds()), strict=True):
        if isinstance(ours, StepEvent):
            assert isinstance(theirs, StepEvent)
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-4), (ours, theirs)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3), (ours, theirs)
    assert ours.test_loss == pytest.approx(theirs.test_loss, rel=1e-3), (ours, theirs)
    found, wanted = (run.model.state_dict() for run in (pair.runs[0], alone.runs[0]))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def evaluation_is_shared_exactly(ranks: Processes) -> None:
    """37 images: 19 here and 18 there; and rank 0's running statistics for both."""
    pair, alone = experiment(ranks), experiment()
    list(pair.rounds())
    model = pair.runs[0].model
    if ranks.rank:
        next(model.buffers()).add_(1)
    (event,) = pair._evaluate()
    alone.runs[0].model.load_state_dict(model.state_dict())
    alone.step, alone.runs[0].losses = pair.step, pair.runs[0].losses
    (wanted,) = alone._evaluate()
    assert isinstance(event, EpochEvent) and isinstance(wanted, EpochEvent)
    assert event.test_accuracy == wanted.test_accuracy and 0 < wanted.test_accuracy < 1
    assert event.test_loss == pytest.approx(wanted.test_loss, rel=1e-6)
    models = ranks.gather(model.state_dict())
    assert same(models[0], models[1]) == ""


def resumed_bit_for_bit(ranks: Processes) -> None:
    """Dropout, an average, BatchNorm of each process alone; from the middle of an epoch and from its end."""
    changes: dict[str, Any] = {"drop_rate": 0.2, "ema": 0.9, "epochs": 3, "batch_size": 96}
    whole = experiment(ranks, **changes)
    states = {}
    for _ in whole.rounds():
        # Rank 0's file is all that there is.
        stored = io.BytesIO()
        torch.save(whole.state_dict(), stored)
        (stored, _) = ranks.gather(stored.getvalue())
        states[whole.step, whole.evaluated] = stored
    last = torch.load(io.BytesIO(states[6, True]), weights_only=True)
    assert same(last["runs"]["fastdense"]["rng"][0], last["runs"]["fastdense"]["rng"][1]), "the same dropout masks"
    for at in ((1, True), (2, False), (2, True)):
        resumed = experiment(ranks, **changes)
        resumed.load_state_dict(torch.load(io.BytesIO(states[at]), weights_only=True))
        list(resumed.rounds())
        found = ranks.gather(resumed.state_dict())[0]
        assert same(found, last) == "", (at, same(found, last))


def each_takes_its_share(ranks: Processes) -> None:
    pair, alone = experiment(ranks, steps=1), experiment(steps=1)
    list(pair.rounds())
    weights = ranks.gather({name: p.detach() for name, p in pair.runs[0].model.named_parameters()})
    assert same(weights[0], weights[1]) == ""
    # The mean of what two strangers find on their halves of the first batch.
    model = alone.runs[0].model
    (_, numbers), *_ = alone._epochs(0, 1)
    (batch,) = numbers
    losses = []
    for half in (batch[0::2], batch[1::2]):
        model.train()
        loss = torch.nn.functional.cross_entropy(model(FEW.train_images[half]), FEW.train_labels[half])
        (loss / 2).backward()
        losses.append(loss.item())
    assert pair.runs[0].losses == pytest.approx([sum(losses) / 2])
    alone.runs[0].optimizer.step()
    torch.testing.assert_close({name: p.detach() for name, p in model.named_parameters()}, weights[0])


def batches_that_cannot_be_shared(ranks: Processes) -> None:
    with pytest.raises(ValueError, match=r"--batch-size must be divisible by the 2 processes, as 64 is; got 65"):
        experiment(ranks, batch_size=65)
    with pytest.raises(ValueError, match="--sync-bn in the reference block is PyTorch's SyncBatchNorm"):
        experiment(ranks, sync_bn=True, impl="reference")


def non_finite_on_one_stops_all(ranks: Processes) -> None:
    pair = experiment(ranks)
    if ranks.rank == 1:
        pair.data = dataclasses.replace(FEW, train_images=torch.full_like(FEW.train_images, torch.nan))
    with pytest.raises(RuntimeError, match="training loss of run fastdense is not finite at epoch 1, step 1"):
        list(pair.rounds())


def command_line(ranks: Processes) -> None:
    """Rank 0 alone writes and prints."""
    folder, printed = Path(f"{FILE}.out"), io.StringIO()
    # A process joins the others once in its life.
    train.processes = lambda: contextlib.nullcontext(ranks)
    with contextlib.redirect_stdout(printed):
        code = app([*SMALL, "--steps", "6", "--sync-bn", "--out", str(folder)], standalone_mode=False)
    assert not code, code
    assert bool(printed.getvalue()) == (ranks.rank == 0), printed.getvalue()
    if ranks.rank == 0:
        state = load(folder / "last.pt")
        assert (state["processes"], state["step"]) == (2, 6)
        assert steps(folder) == [1, 2, 3, 4, 5, 6]


def unreadable_images_are_recorded_by_rank_0(ranks: Processes) -> None:
    """Each is named by the process that found it."""
    folder, warned, printed = Path(f"{FILE}.unreadable"), [], io.StringIO()
    folder.mkdir(exist_ok=True)
    pair = experiment(ranks)
    if ranks.rank == 1:
        pair.data.unreadable.append("cat.png: broken")
    with Outputs(OutputOptions(out=folder), pair, warned.append) as outputs:
        train.train(Printer(file=printed), pair, outputs)
    assert warned == ranks.rank * ["Skipped an image that cannot be read: cat.png: broken"], warned
    assert "could not be read: 1, the first cat.png: broken." in printed.getvalue()
    if ranks.rank == 0:
        assert [record["message"] for record in records(folder, "unreadable")] == ["cat.png: broken"]


def lost_output_of_rank_0_ends_both(ranks: Processes) -> None:
    """With a checkpoint, which both must write together."""
    folder, pair, printer = Path(f"{FILE}.lost"), experiment(ranks), Printer(file=io.StringIO())
    folder.mkdir(exist_ok=True)
    if ranks.rank == 0:
        printer.on_broken_pipe()
    message = r"Broken pipe, after step 1 of 6\. Resume with: torchrun --nproc-per-node 2"
    with Outputs(OutputOptions(out=folder), pair, print) as outputs, pytest.raises(Stopped, match=message):
        train.train(printer, pair, outputs)
    if ranks.rank == 0:
        assert load(folder / "last.pt")["step"] == 1


CASES = (
    two_are_one_with_sync_bn, evaluation_is_shared_exactly, resumed_bit_for_bit, each_takes_its_share,
    batches_that_cannot_be_shared, command_line, unreadable_images_are_recorded_by_rank_0,
    lost_output_of_rank_0_ends_both, non_finite_on_one_stops_all,
)  # fmt: skip


def main(file: str, names: list[str]) -> None:
    global FILE
    FILE = file
    torch.set_num_threads(1)
    said = {}
    try:
        with processes() as ranks:
            for case in CASES:
                if case.__name__ in names:
                    case(ranks)
                    said[case.__name__] = "ok"
            dist.barrier()
    except BaseException:
        said["failed"] = traceback.format_exc()  # and the processes may be out of step
    Path(f"{file}.{os.environ['RANK']}").write_text(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
