"""``torch.export``: whole networks as programs of PyTorch's own operators, for any batch size."""

import pytest
import torch
from helpers import networks
from helpers.blocks import assert_close

from fastdense.core import warn

CASES = {
    "own, training": ("own", True, False), "own, training, strict": ("own", True, True), "own": ("own", False, False),
    "torchvision, strict": ("torchvision", False, True),
    "timm": ("timm", False, False), "MONAI": ("MONAI", False, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_exported_network_is_a_program_of_plain_operators(case: str) -> None:
    """Nothing in it needs fastdense, and it is said once, not once for each block."""
    name, training, strict = CASES[case]
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
