"""``torch.export``: whole networks as programs of PyTorch's own operators, for any batch size."""

from __future__ import annotations

import pytest
import torch
from helpers import networks
from helpers.blocks import assert_close

from fastdense.core import warn


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("name", "training"), [*((name, False) for name in networks.NETWORKS), ("own", True)])
def test_a_program_of_plain_operators(name: str, strict: bool, training: bool) -> None:
    """Nothing in it needs fastdense, and it is said once, not once for each block."""
    warn._said.clear()
    torch._dynamo.reset()
    reference, fast = networks.network(name)
    reference.train(training), fast.train(training)
    x, other = (networks.images(name, batch, seed=batch).detach() for batch in (2, 3))
    batch = torch.export.Dim("batch", min=2)
    with networks.heard() as said:
        program = torch.export.export(fast, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert len(said) == 1 and "is being exported" in said[0], said
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators and all(operator.startswith("aten.") for operator in operators), operators
    exported = program.module()
    for inputs in (x, other):
        assert_close("output", exported(inputs), reference(inputs))
    state = exported.state_dict()
    for key, value in reference.named_buffers():
        if key in state or training:  # a strict export leaves out what nobody reads
            assert_close(key, state[key], value)
    # What was exported is still what it was.
    assert_close("itself", fast(other), reference.train(training)(other))
