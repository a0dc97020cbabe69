"""``killed_worker.py FOLDER``: trains in children that are killed or fail, and prints how they ended.

Children are forked from a process that has imported everything but computed nothing, because importing takes longer
than the training.
"""

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import sklearn.datasets
import sklearn.model_selection  # noqa: F401
import tensorboardX.proto.event_pb2  # noqa: F401
import torch
import torch._dynamo  # which the first optimizer would import
from torch import Tensor

from fastdense.data.images import UnreadableImage
from fastdense.data.source import Dataset
from fastdense.training.logs import WholeWrites
from fastdense.training.outputs import Outputs
from fastdense.training.run import Run
from helpers.train_runs import SMALL, app, load, records, same

TRAIN = [
    *("train", "--depth", "7", "--bn-size", "none", "--growth-rate", "4", "--device", "cpu", "--impl", "torch"),
    *("--drop-rate", "0.2", "--epochs", "4", "--batch-size", "480", "--ema", "0.9", "--save-every", "3steps"),
    *("--keep", "1"),
]
# What a child may be killed at, and every how many of its calls: too few of them, and no child comes to a checkpoint.
MOMENTS: dict[str, tuple[list[tuple[Any, str]], int]] = {
    "writing": ([(os, "fsync"), (os, "replace"), (os, "link")], 1),
    "training": ([(Run, "step"), (Run, "evaluate"), (WholeWrites, "write")], 5),
}


def child(arguments: list[str], prepare: Callable[[], None], said: Path) -> int:
    """Runs a command in a child that calls ``prepare`` first; its process number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        prepare()
        code = int(app(arguments, standalone_mode=False) or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def killed_at(moments: list[tuple[Any, str]], at: int) -> None:
    """Lets this process be killed just before or just after the ``at``-th of these calls, or with half a log line."""
    calls = count(1)

    def deadly(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            last = next(calls) == at
            if last and at % 2:
                if isinstance(arguments[0], WholeWrites):
                    arguments[0].file.write(arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for owner, name in moments:
        setattr(owner, name, deadly(getattr(owner, name)))


def kills(out: Path, moments: list[tuple[Any, str]], every: int) -> int:
    """How many children were killed, each one later than the one before, until one came to the end."""
    said = Path(f"{out}.said")
    for n in count(1):
        resume = ["--resume"] if (out / "last.pt").exists() else []
        pid = child([*TRAIN, "--out", str(out), *resume], lambda at=n * every: killed_at(moments, at), said)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            return n - 1
        assert code == -signal.SIGKILL, said.read_text()
    raise AssertionError


def fail(how: str) -> None:
    """Lets this process fail in step 3."""
    read = Dataset.train

    def failing(self: Dataset, batches: Any, *, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for n, batch in enumerate(read(self, batches, epoch=epoch)):
            if n == 3 and how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if n == 3 and how == "unreadable":
                raise UnreadableImage("cat.png cannot be read")
            yield batch

    Dataset.train = failing  # type: ignore[method-assign]


def two(out: Path, how: str) -> dict[str, Any]:
    """Two processes of which the second one fails: their exit statuses, and what both said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def prepare(rank: int) -> None:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        if rank:
            fail(how)
        advise = Outputs.advise
        # As from torchrun, once a process has ended, while another has something to say.
        Outputs.advise = lambda *arguments: os.kill(os.getpid(), signal.SIGTERM) or advise(*arguments)

    said = Path(f"{out}.said")
    pids = [child([*SMALL, "--out", str(out)], lambda rank=rank: prepare(rank), said) for rank in (0, 1)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return {"codes": codes, "said": said.read_text(), "saved": (out / "last.pt").exists()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    said: dict[str, Any] = {}
    whole = folder / "whole"
    kills(whole, [], 1)
    for name, (moments, every) in MOMENTS.items():
        out = folder / name
        said[name] = {"kills": kills(out, moments, every)}
        said[name]["differs"] = same(load(out / "last.pt"), load(whole / "last.pt"))
        said[name]["metrics"] = [same(records(out, kind), records(whole, kind)) for kind in ("step", "epoch")]
        said[name]["files"] = sorted(path.name for path in out.iterdir() if not path.name.startswith("events"))
    for how in ("killed", "unreadable"):
        said[how] = two(folder / how, how)
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
