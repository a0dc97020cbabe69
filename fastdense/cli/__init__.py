"""The ``fastdense`` command."""
