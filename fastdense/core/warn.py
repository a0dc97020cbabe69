"""Warnings that are given once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])
_said: set[str] = set()


def while_tracing(function: _F) -> _F:
    """torch.compile calls ``function`` while it traces, and takes its result for a constant.

    That is ``torch.compiler.assume_constant_result`` without an import that takes seconds.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


@while_tracing
def say_once(message: str, key: str | None = None, said: set[str] | None = None) -> None:
    """Warns, the first time that there is this to say.

    Args:
        message: what to say.
        key: what makes it the same, where the message holds numbers that vary; the message itself by default.
        said: what was said before, where that is not the whole process's affair.
    """
    said = _said if said is None else said
    key = key or message
    if key not in said:
        said.add(key)
        warnings.warn(message, UserWarning, stacklevel=4)
