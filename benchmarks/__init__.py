"""One module for each question about speed or memory; records of the answers in ``results/``."""

from .harness import checkout

checkout.enable()  # every `python -m benchmarks.NAME` runs in a checkout that is not installed
