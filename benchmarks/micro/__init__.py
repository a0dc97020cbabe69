"""CPU overhead: what is short and runs often, one pytest-benchmark each: ``make micro``, ``make micro-baseline``."""
