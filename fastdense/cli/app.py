"""``fastdense train`` and ``fastdense env``, beside ``fastdense bench`` and ``fastdense inspect``."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ..environment import environment
from . import train as train_command
from .bench import bench
from .display import environment_tables
from .inspect import inspect
from .train_options import given_options, train_options

__all__ = ["app"]

# Whatever the command line raises of its own: click's, or of the copy of click that newer releases of typer bring.
_CLICK_EXCEPTION: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class _Unframed(TyperGroup):
    """Says what is wrong in lines as long as they are: in a frame, a path would be broken and could not be copied."""

    def main(self, *arguments: Any, standalone_mode: bool = True, **named: Any) -> Any:
        """Runs a command; by itself, exits with its status."""
        try:
            found = super().main(*arguments, **{**named, "standalone_mode": False})
        except typer.Abort:
            if not standalone_mode:
                raise
            sys.exit("Aborted.")
        except Exception as error:
            if not standalone_mode or not isinstance(error, _CLICK_EXCEPTION):
                raise
            error.show()
            sys.exit(error.exit_code)
        if standalone_mode:
            sys.exit(found if isinstance(found, int) else 0)
        return found


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


@app.command()
@train_options
def train(context: typer.Context, **options: Any) -> None:
    """Train a DenseNet: on scikit-learn's digits, 1,797 real images that need no download, or on a folder of images.

    The network is given by one of --model, --depth and --block-config. At the end: loss, accuracy, step time
    and the bytes that a step keeps for its backward pass. Under torchrun, all processes train one network.
    """
    train_command.run(options, given_options(context))


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
