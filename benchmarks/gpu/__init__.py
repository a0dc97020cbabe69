"""Everything that only a GPU can tell, in one run of limited length: ``python -m benchmarks.gpu``."""
