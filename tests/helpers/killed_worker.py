"""``killed_worker.py FOLDER``: trains in children that are killed, until one of them comes to the end.

A child is forked from a process that has imported everything but computed nothing, because importing takes longer than
the training. It prints how often children were killed, by how, and compares what they left with an undisturbed run's.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sklearn.datasets
import sklearn.model_selection  # noqa: F401
import tensorboardX.proto.event_pb2  # noqa: F401
import torch
import torch._dynamo  # which the first optimizer would import

from fastdense.cli.app import app
from helpers.states import same

ARGUMENTS = [
    *("train", "--depth", "7", "--bn-size", "none", "--growth-rate", "4", "--device", "cpu", "--impl", "torch"),
    *("--drop-rate", "0.2", "--epochs", "4", "--batch-size", "480", "--ema", "0.9", "--save-every", "3steps"),
    *("--keep", "1"),
]


def child(out: Path, prepare: Callable[[], None]) -> int:
    """Start or resume training in a child that calls ``prepare`` first; its process number."""
    pid = os.fork()
    if pid:
        return pid
    prepare()
    resume = ["--resume"] if (out / "last.pt").exists() else []
    code = 1
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        code = int(app([*ARGUMENTS, "--out", str(out), *resume], standalone_mode=False) or 0)
    os._exit(code)


def ended(pid: int) -> int:
    """The exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_from_outside(out: Path, longest: float) -> int:
    """SIGKILL after random times, which after four kills grow until a child comes to the end."""
    kills, random_times = 0, random.Random(0)
    while True:
        pid = child(out, lambda: None)
        time.sleep(random_times.uniform(0.2, 1) * longest * 1.5 ** max(0, kills - 4))
        os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, code
        kills += 1


def killed_while_writing(out: Path) -> int:
    """SIGKILL just before, or just after, the n-th time that a file is fsynced or gets its name."""
    kills, n = 0, 0
    while True:
        n += 1

        def prepare(at: int = n) -> None:
            calls = 0

            def deadly(original: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == at and at % 2:
                        os.kill(os.getpid(), signal.SIGKILL)
                    result = original(*arguments)
                    if calls == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return result

                return call

            os.fsync, os.replace, os.link = deadly(os.fsync), deadly(os.replace), deadly(os.link)

        code = ended(child(out, prepare))
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, code
        kills += 1


def lines(out: Path) -> list[dict[str, Any]]:
    """Steps and epochs of ``metrics.jsonl``, without times."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = {"seconds", "images_per_second"}
    return [{k: v for k, v in r.items() if k not in timed} for r in records if r["event"] in ("step", "epoch")]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    start = time.monotonic()
    assert ended(child(folder / "whole", lambda: None)) == 0
    took = time.monotonic() - start
    said: dict[str, Any] = {
        "outside": killed_from_outside(folder / "outside", took / 2),
        "writing": killed_while_writing(folder / "writing"),
    }
    whole = torch.load(folder / "whole" / "last.pt", weights_only=True)
    for name in ("outside", "writing"):
        out = folder / name
        last = torch.load(out / "last.pt", weights_only=True)
        said[f"{name} differs"] = same(last, whole) or ("" if lines(out) == lines(folder / "whole") else "metrics")
        said[f"{name} files"] = sorted(path.name for path in out.iterdir() if not path.name.startswith("events"))
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
