"""Checkpoints: one file each, there as a whole or not at all.

A checkpoint is what ``torch.save`` writes and ``torch.load(weights_only=True)`` reads: ``runs[NAME]["model"]`` is the
plain ``state_dict`` of a network. The rest is what training is resumed from bit for bit.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..environment import versions
from .config import MACHINE_OPTIONS, TrainConfig, flag, shown
from .experiment import Experiment

FORMAT = 1
KIND = "fastdense train"
OTHER = "copy another one over it (best.pt, or one of --keep) to resume from there, or start again elsewhere"


def contents(experiment: Experiment) -> dict[str, Any]:
    """Returns everything that a checkpoint holds of ``experiment``; every process must call it."""
    return {
        "format": FORMAT,
        "kind": KIND,
        "config": asdict(experiment.config),
        "data": _facts(experiment),
        "processes": experiment.processes.count,
        # PyTorch's own is no plain str, which weights_only would refuse.
        "versions": {package: found and str(found) for package, found in versions().items()},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **experiment.state_dict(),
    }


def _facts(experiment: Experiment) -> dict[str, Any]:
    """What must be true of the data wherever they lie."""
    names = ("train_count", "test_count", "channels", "classes", "class_names")
    return {name: getattr(experiment.data, name) for name in names}


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file that takes the place of ``path`` at the end, for good, or is gone after an ``OSError``."""
    partial = path.with_suffix(f".partial{path.suffix}")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        os.replace(partial, path)
        _sync(path.parent)  # the name, too, must survive a power failure
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def save(state: Mapping[str, Any], path: Path) -> None:
    """Writes ``state`` to ``path``, or raises ``OSError`` with ``path`` as it was and nothing else left behind."""
    buffer = io.BytesIO()  # first in memory: torch.save hides the reason of a failing write
    torch.save(dict(state), buffer)
    with replacing(path) as partial:
        partial.write_bytes(buffer.getbuffer())
        _sync(partial)


def link(path: Path, name: Path) -> None:
    """Lets ``name`` be what ``path`` is now, also after ``path`` is replaced. Raises ``OSError`` as :func:`save`."""
    if name.exists() and name.samefile(path):
        return  # os.replace would do nothing, and leave the other name behind
    with replacing(name) as partial:
        try:
            os.link(path, partial)
        except OSError:  # not every file system can
            shutil.copyfile(path, partial)
            _sync(partial)


def read(path: Path, remedy: str = "") -> Any:
    """Returns what ``torch.save`` wrote to ``path``, its tensors on the CPU and its checksums compared.

    Raises ``ValueError`` if it cannot be read, or is damaged, with the ``remedy`` for that.
    """
    try:
        if zipfile.is_zipfile(path):  # as torch has saved since 2020; torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which torch gets in a file that was cut
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
        # The readers of archives and of pickles raise anything at all on bytes that are not theirs.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged or no checkpoint ({reason}){remedy}") from error


def load(path: Path) -> dict[str, Any]:
    """Returns the checkpoint in ``path``; raises ``ValueError`` if there is none to be used."""
    if not path.exists():
        raise ValueError(f"{path.parent} holds no {path.name} to resume from: leave --resume out to start there")
    state = read(path, f": {OTHER}")
    if not isinstance(state, dict) or state.get("kind") != KIND:
        raise ValueError(f"{path} is not a checkpoint of fastdense train: {OTHER}")
    if state["format"] != FORMAT:
        writer = f"resume with fastdense {state['versions']['fastdense']}, its writer"
        raise ValueError(f"{path} has format {state['format']}, not {FORMAT}: {writer}")
    return state


def resumed(path: Path, state: Mapping[str, Any], given: Mapping[str, Any]) -> TrainConfig:
    """Returns the configuration of the checkpoint ``state``, with those of ``given`` that may change.

    Raises ``ValueError`` if another one is given, or another fastdense has written the checkpoint.
    """
    try:
        config = asdict(TrainConfig(**state["config"]))
    except TypeError as error:
        version = state["versions"]["fastdense"]
        raise ValueError(f"{path} was written by fastdense {version}, with other options: {error}") from error
    for name, value in given.items():
        was = config[name]
        if name not in MACHINE_OPTIONS and value != was:
            begun = "without it" if was is None or was is False else f"with {_as_written(name, was)}"
            contradiction = f"{_as_written(name, value)} contradicts {path}, which was begun {begun}"
            raise ValueError(f"{contradiction}: leave it out to resume, or start again in another --out")
    return TrainConfig(**config | dict(given))


def _as_written(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"{flag(name)} {shown(value)}"


def restore(experiment: Experiment, path: Path, state: Mapping[str, Any]) -> None:
    """Resumes ``experiment`` from ``state``, loaded from ``path``; raises ``ValueError`` if it is another's."""
    facts, count = _facts(experiment), state["processes"]
    for name, was in state["data"].items():
        if facts[name] != was:
            remedy = "Name its own data with --data, or leave --resume out and start in another --out"
            other = f"{name} was {was}, and in --data is {facts[name]}"
            raise ValueError(f"{path} was trained on other data: {other}. {remedy}")
    if count != experiment.processes.count:
        right = f"torchrun --nproc-per-node {count}" if count > 1 else "fastdense train, without torchrun"
        number = f"{count} processes, not {experiment.processes.count}"
        raise ValueError(f"{path} was trained by {number}: resume with {right}")
    try:
        experiment.load_state_dict(dict(state))
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit the network that it describes: {error}") from error
