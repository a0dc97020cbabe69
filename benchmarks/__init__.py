"""One module for each question about speed or memory; records of the answers in ``results/``."""
