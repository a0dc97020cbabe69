"""``python -m benchmarks.compiled``: see :mod:`benchmarks.compiled.report`."""

from .report import main

if __name__ == "__main__":
    main()
