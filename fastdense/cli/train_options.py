"""The options of ``fastdense train``, made from the fields of :class:`TrainConfig` and :class:`OutputOptions`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_type_hints

import typer

from ..training.config import TrainConfig
from ..training.option_fields import PANELS, flag, option_name, parse, shown
from ..training.outputs import OutputOptions

__all__ = ["given_options", "parsed", "train_options"]

_FIELDS = {
    option_name(field): field
    for field in sorted(
        [*dataclasses.fields(OutputOptions), *dataclasses.fields(TrainConfig)],
        key=lambda field: PANELS.index(field.metadata["panel"]),
    )
}
_TYPES = get_type_hints(TrainConfig) | get_type_hints(OutputOptions)


def _parameter(name: str, field: dataclasses.Field[Any]) -> inspect.Parameter:
    names = [flag(name)] if field.default is False else []  # others that are on or off get a --no- beside it
    kind, default = _TYPES[field.name], field.default
    if field.metadata["parser"] is not None:
        kind, default = (str | None, None) if default is None else (str, shown(default))
    told = typer.Option(
        *names,
        help=field.metadata["help"],
        rich_help_panel=field.metadata["panel"],
        show_default=field.metadata["default"] or True,
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, told])


def train_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives ``command``, which takes a context and any keywords, the options of ``fastdense train`` for keywords."""
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    options = [_parameter(name, field) for name, field in _FIELDS.items()]
    command.__signature__ = inspect.Signature([context, *options])  # type: ignore[attr-defined]
    return command


def given_options(context: typer.Context) -> frozenset[str]:
    """Names of the options that the user wrote; the others have their defaults."""
    sources = {name: context.get_parameter_source(name) for name in _FIELDS}
    return frozenset(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")


def parsed(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values by name of the options of :class:`TrainConfig`, and of those of :class:`OutputOptions`.

    Raises ``ValueError`` where one cannot be parsed.
    """
    values = {name: parse(_FIELDS[name], value) for name, value in options.items()}
    writing = {field.name: values.pop(field.name) for field in dataclasses.fields(OutputOptions)}
    return values, writing
