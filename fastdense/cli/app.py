"""The ``fastdense`` command, with ``train`` and ``env`` beside the groups ``bench`` and ``inspect``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ..environment import environment
from . import train as train_command
from .bench import bench
from .display import environment_tables
from .inspect import inspect
from .options import TRAIN_OPTIONS, give_options, given_options

__all__ = ["app"]


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


def train(context: typer.Context, **options: Any) -> None:
    """Train a DenseNet: on scikit-learn's digits, 1,797 real images that need no download, or on a folder of images.

    The network is given by one of --model, --depth and --block-config. At the end: loss, accuracy, step time
    and the bytes that a step keeps for its backward pass. Under torchrun, all processes train one network.
    """
    train_command.run(options, given_options(context))


give_options(train, TRAIN_OPTIONS)
app.command()(train)


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="The same for machines.")] = False,
) -> None:
    """Show what is installed, which devices there are, and which implementation runs on each, and why."""
    found = environment()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console(highlight=False, markup=False).print(*environment_tables(found), sep="\n")
