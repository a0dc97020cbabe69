"""The ``fastdense`` command."""

from __future__ import annotations

import sys

EXTRAS = ("typer", "rich", "sklearn", "PIL", "tensorboardX", "matplotlib")


def main() -> None:
    """Run the command line; exits with its status, or with 1 and one line where an extra is missing."""
    try:
        # Not above: without the extras, a user reads how to get them, not a traceback.
        from .app import app

        app(prog_name="fastdense")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        sys.exit(f"fastdense: this command needs {missing}, which is not installed: pip install 'fastdense[train]'")
    except KeyboardInterrupt:
        sys.exit(130)
