"""Fields of dataclasses that are command-line options as well: help, parsing and checks in one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

__all__ = ["PANELS", "Rule", "check_options", "flag", "one_of", "option", "option_name", "parse", "shown"]

PANELS = ("Network", "Data", "Training", "Machine", "Output")  # of --help, in this order


class Rule(NamedTuple):
    """What an option must be, in words, and a function: whether a value is allowed, or what a text stands for."""

    words: str
    function: Callable[[Any], Any]


def one_of(allowed: Iterable[str]) -> Rule:
    """The rule that a value is one of ``allowed``."""
    return Rule(f"one of {', '.join(map(repr, allowed))}", lambda value: value in allowed)


AT_LEAST_0 = Rule("at least 0", lambda value: value >= 0)
AT_LEAST_1 = Rule("at least 1", lambda value: value >= 1)
BELOW_1 = Rule("at least 0 and less than 1", lambda value: 0 <= value < 1)
POSITIVE = Rule("a positive number", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Rule("0 or a positive number", lambda value: 0 <= value < math.inf)


def option(
    panel: str,
    default: Any,
    help: str,
    must: Rule | None = None,
    *,
    parser: Rule | None = None,
    default_shown: str | None = None,
    name: str | None = None,
) -> Any:
    """Returns a field of a dataclass that is an option of ``fastdense train``, too.

    ``must`` says what values are allowed, besides ``None``; ``parser`` is for values that are more than text, a number
    or a flag; ``default_shown`` is what ``--help`` says of the default; ``name`` is the option's, if not the field's.
    """
    told = {"panel": panel, "help": help, "must": must, "parser": parser, "default": default_shown, "name": name}
    return dataclasses.field(default=default, metadata=told)


def option_name(field: dataclasses.Field[Any]) -> str:
    """The option's name in files, with underscores."""
    return field.metadata["name"] or field.name


def flag(name: str) -> str:
    """The option called ``name``, as on the command line."""
    return f"--{name.replace('_', '-')}"


def shown(value: Any) -> str:
    """``value`` as on the command line."""
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse(field: dataclasses.Field[Any], text: Any) -> Any:
    """The value that ``text`` stands for; raises ``ValueError`` where it stands for none."""
    parser: Rule | None = field.metadata["parser"]
    if parser is None or text is None:
        return text
    try:
        return parser.function(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{flag(option_name(field))} must be {parser.words}, got {text!r}") from error


def check_options(options: Any) -> None:
    """Raises ``ValueError`` for a field of the dataclass ``options`` whose value its rule does not allow."""
    for field in dataclasses.fields(options):
        value, rule = getattr(options, field.name), field.metadata["must"]
        if value is not None and rule is not None and not rule.function(value):
            got = shown(value) if isinstance(value, tuple) else value
            raise ValueError(f"{flag(option_name(field))} must be {rule.words}, got {got!r}")
