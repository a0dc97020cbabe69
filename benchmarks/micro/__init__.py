"""What the host does in little time and often, one pytest-benchmark each: ``make micro``, ``make micro-baseline``."""
