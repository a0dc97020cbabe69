"""Options of commands, made from tables; those of ``fastdense train`` from the fields of its configuration."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, get_type_hints

import typer

from ..environment import versions
from ..training.config import PANELS, TrainConfig, flag, parse, shown
from ..training.outputs import OutputOptions

_ALL = [*dataclasses.fields(OutputOptions), *dataclasses.fields(TrainConfig)]
FIELDS = {field.name: field for panel in PANELS for field in _ALL if field.metadata["panel"] == panel}
_TYPES = get_type_hints(TrainConfig) | get_type_hints(OutputOptions)


def give_options(command: Callable[..., None], options: Mapping[str, tuple[Any, Any]]) -> None:
    """Gives ``command``, which takes a context and keywords, ``options``: by name, their type and ``typer.Option``."""
    given, keyword = {"context": (typer.Context, inspect.Parameter.empty), **options}, inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(n, keyword, annotation=a, default=default) for n, (a, default) in given.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]


@contextmanager
def errors_as_bad_options() -> Iterator[None]:
    """Turns a wrong value into one line and the exit status of a wrong option."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error


def provenance(time: str) -> dict[str, Any]:
    """Where a result comes from: the command, when (under the key ``time``), and versions."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"command": shlex.join(["fastdense", *sys.argv[1:]]), time: now, "versions": versions()}


def _option(name: str, field: dataclasses.Field[Any]) -> tuple[Any, Any]:
    """The type of an option of ``fastdense train``, and what typer shall know of it."""
    names = [flag(name)] if field.default is False else []  # others that are on or off get a --no- beside it
    kind, default = _TYPES[field.name], field.default
    if field.metadata["parser"] is not None:
        kind, default = (str | None, None) if default is None else (str, shown(default))
    told = {"help": field.metadata["help"], "rich_help_panel": field.metadata["panel"]}
    return kind, typer.Option(default, *names, **told, show_default=field.metadata["shown"] or True)


TRAIN_OPTIONS = {name: _option(name, field) for name, field in FIELDS.items()}


def given_options(context: typer.Context) -> frozenset[str]:
    """Names of the options that the user wrote; the others have their defaults."""
    sources = {name: context.get_parameter_source(name) for name in FIELDS}
    return frozenset(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")


def parsed(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of :class:`TrainConfig` and those of :class:`OutputOptions`; ``ValueError`` for a wrong one."""
    values = {name: parse(FIELDS[name], value) for name, value in options.items()}
    writing = {field.name: values.pop(field.name) for field in dataclasses.fields(OutputOptions)}
    return values, writing
