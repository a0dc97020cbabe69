"""``python -m fastdense`` is the ``fastdense`` command."""

from .cli.main import main

main()
