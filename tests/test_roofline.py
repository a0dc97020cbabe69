"""The traffic model against the kernels' own loads and stores, and the report that compares floors with times."""

from __future__ import annotations

import pytest
import torch
from interpreted import accesses_counted

from benchmarks import traffic
from benchmarks.gpu import kernels, primitives
from benchmarks.gpu.case import Case

CPU = torch.device("cpu")
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what Triton's interpreter does")

# Beside feature maps and weights, a launch moves some vectors of a number a channel: at 2 x 16^2 pixels a share that
# counts, at a network's size none. A 3x3's weight gradient is as large here as its features, and is left behind by each
# of two programs, to be added up.
MOVED, MOVED_3X3_BACKWARD = 1.15, 1.45
# All accesses, those that a cache answers with them: a tap reads its neighbours' pixels, a window its neighbours'.
ACCESSED, ACCESSED_3X3 = 2.3, 5.0


def case(operation: str, dims: int = 2) -> Case:
    m = 2 * (8**3 if dims == 3 else 16**2)
    reads, writes, taps, width = 24, 24, 1, 24
    if operation.endswith("3x3"):
        reads, writes, taps, width = 32, 8, 9, 40
    elif operation.endswith("1x1"):
        writes, width = 32, 40
    elif operation in traffic.TRANSITION:
        writes = 16
    elif operation in (traffic.COPY, traffic.RESOLVE):
        width = 40
    return Case(operation, traffic.Shape(m, reads, writes, taps, 2), 2, width, dims)


CASES = [case(o) for o in (traffic.COPY, *traffic.FORWARD, *traffic.BACKWARD, *traffic.AROUND)]
CASES += [case(o, dims=3) for o in traffic.TRANSITION]


@needs_interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation} {case.dims}D")
def test_a_floor_is_what_the_kernels_move_at_least_and_nearly_that(case: Case) -> None:
    torch.manual_seed(0)
    primitive, _ = primitives.bind(case, torch.float16, CPU, "triton")
    with accesses_counted() as found:
        primitive()
    floor = kernels.floor(case).bytes
    moved, accessed = sum(one.moved for one in found), sum(one.accessed for one in found)
    spatial, backward = case.shape.taps > 1, case.operation == traffic.BACKWARD[1]
    assert floor <= moved <= floor * (MOVED_3X3_BACKWARD if backward else MOVED), (moved / floor, found)
    assert moved <= accessed <= floor * (ACCESSED_3X3 if spatial else ACCESSED), (accessed / floor, found)
    # The features are read whole, and no channel of the buffer beside them.
    shape = case.shape
    pixels = shape.m * (2**case.dims if case.operation in traffic.TRANSITION else 1)
    for one in found:
        name = "v_ptr" if case.operation == traffic.RESOLVE else "x_ptr"
        assert one.kernel == "add_up_kernel" or one.loaded[name] == pixels * shape.reads * shape.itemsize, one


@needs_interpreter
def test_of_the_stems_pooling_each_kernel_has_its_floor() -> None:
    backward = case(traffic.MAX_POOL[1])
    primitive, _ = primitives.bind(backward, torch.float16, CPU, "triton")
    with accesses_counted() as found:
        primitive()
    windows = backward.shape.m // traffic.WINDOW
    floors = traffic.arg_max(windows, backward.shape), traffic.max_pool_backward(windows, backward.shape)
    for one, floor in zip(found, floors, strict=True):
        assert floor.bytes <= one.moved <= floor.bytes * MOVED, one


@needs_interpreter
def test_a_load_of_what_a_launch_has_stored_is_no_traffic() -> None:
    primitive, _ = primitives.bind(case(traffic.FORWARD[0]), torch.float16, CPU, "triton")
    with accesses_counted() as found:
        primitive()
    (one,) = found
    assert "out_ptr" not in one.loaded  # the moments are those of the stored values
    assert one.stored["out_ptr"] == 512 * 32 * 2
    assert one.accessed >= one.moved + one.stored["out_ptr"]


@needs_interpreter
def test_the_gradient_that_is_added_to_is_read_and_written() -> None:
    primitive, _ = primitives.bind(case(traffic.BACKWARD[0]), torch.float16, CPU, "triton")
    with accesses_counted() as found:
        primitive()
    assert found[0].loaded["D_ptr"] == found[0].stored["D_ptr"] == 512 * 24 * 2
