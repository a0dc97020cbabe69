"""How a stage says that it cannot run here. Apart: the module of a stage's process is there twice."""


class Skip(Exception):
    """Raised by a stage that cannot run here; its message says why. The run counts as complete without it."""
