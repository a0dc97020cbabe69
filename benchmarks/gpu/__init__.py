"""Everything that only a GPU can tell, in one run of limited length: ``python -m benchmarks.gpu``."""

from ..harness import checkout

# The machine with the GPU may be one where nothing can be installed. Here, because every process of a run comes by.
checkout.enable()
