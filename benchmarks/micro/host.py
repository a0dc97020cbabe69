"""The Triton host side without launches: everything that Python and PyTorch do before a kernel starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.compiled.launches import SM_COUNT, Planned
from fastdense.backends import select
from fastdense.ops.bn_relu_pool import bn_relu_pool, bn_relu_pool_backward
from fastdense.ops.dense_block import dense_block, dense_block_backward

OPERATORS = (dense_block, dense_block_backward, bn_relu_pool, bn_relu_pool_backward)
ARCH = 90


@contextmanager
def host_side() -> Iterator[Counter[str]]:
    """Runs the operators' own bodies on the Triton backend; its launches are counted by kernel, not made.

    For tensors on ``meta``, too, which have no values: whatever waits for one raises there.
    """
    launches: Counter[str] = Counter()

    class Silent(Planned):
        def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
            launches[kernel.__name__] += 1

    with ExitStack() as stack:
        stack.enter_context(patch.object(select, "create", lambda name, x: Silent(x, ARCH, SM_COUNT[ARCH])))
        for operator in OPERATORS:
            body = operator._init_fn
            stack.enter_context(patch.object(operator, "_abstract_fn", body))
            stack.enter_context(patch.object(operator, "_backend_fns", dict.fromkeys(operator._backend_fns, body)))
        yield launches
