"""``python -m fastdense.cli`` is the ``fastdense`` command."""

from .main import main

main()
