"""The ``fastdense`` command, with ``train`` and ``env`` beside the groups ``bench`` and ``inspect``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ..environment import environment
from .bench import bench
from .display import environment_tables
from .inspect import inspect
from .options import TRAIN_OPTIONS, give_options
from .train import run


class _Unframed(TyperGroup):
    """Prints errors in lines as long as they are: in a frame, a path would be broken and could not be copied."""

    def main(self, *arguments: Any, **named: Any) -> Any:
        self.rich_markup_mode = None
        return super().main(*arguments, **named)

    def format_help(self, *arguments: Any) -> None:
        self.rich_markup_mode = "rich"
        super().format_help(*arguments)


app = typer.Typer(
    cls=_Unframed,
    help="DenseNets that are cheap to train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")
app.add_typer(inspect, name="inspect")


give_options(run, TRAIN_OPTIONS)
app.command("train")(run)


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="The same for machines.")] = False) -> None:
    """Show what is installed, which devices there are, and which implementation runs on each, and why."""
    found = environment()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console(highlight=False, markup=False).print(*environment_tables(found), sep="\n")
