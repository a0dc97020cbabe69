"""``python -m fastdense`` is the ``fastdense`` command."""

from .cli import main

main()
