"""The traffic model's floors against numbers counted by hand, and its shapes against those of the networks."""

from collections.abc import Iterable

import pytest

import fastdense
from benchmarks.compiled import traffic
from benchmarks.compiled.traffic import Network, Operation, Shape, Traffic


def test_primitives_move_and_compute_what_is_counted_by_hand() -> None:
    pointwise = Shape(m=10, reads=64, writes=128, taps=1, itemsize=2)
    # 10 rows of 64 in, of 128 out, a weight of 64*128, two bytes each
    assert traffic.floor("forward", pointwise) == Traffic(2 * (640 + 1280 + 8192), 2 * 10 * 8192)
    # the gradient of 128 with its values, 64 features, their D in and out; weight in, its gradient out in fp32
    assert traffic.floor("backward", pointwise) == Traffic(2 * (2 * 1280 + 3 * 640) + 8192 * (2 + 4), 4 * 10 * 8192)
    spatial = Shape(m=10, reads=128, writes=32, taps=9, itemsize=4)
    assert traffic.floor("forward", spatial) == Traffic(4 * (1280 + 320 + 36864), 2 * 10 * 36864)
    only_reader = Traffic(4 * (2 * 320 + 2 * 1280) + 36864 * (4 + 4), 4 * 10 * 36864)
    assert traffic.floor("backward of the only reader", spatial) == only_reader
    assert traffic.floor("copy", Shape(10, 64, 64, 1, 2)) == Traffic(2560, 0)
    # a basic layer's 3x3 is not the only reader: it adds to the gradient of what it read
    alone, shared = (traffic.primitive("backward 3x3", spatial, bottleneck=b).bytes for b in (True, False))
    assert shared - alone == 4 * 1280


def test_a_small_network_is_listed_in_full() -> None:
    network = Network(growth_rate=8, layers=(2, 1), init_features=16, bn_size=4)
    found = traffic.operations(network, batch=2, size=32, itemsize=2)
    want = [Operation("copy", block, Shape(m, 16, 16, 1, 2), 1) for block, m in ((1, 128), (2, 32))]
    for pass_ in ("forward", "backward"):
        pointwise = [(1, Shape(128, 16, 32, 1, 2)), (1, Shape(128, 24, 32, 1, 2)), (2, Shape(32, 16, 32, 1, 2))]
        want += [Operation(f"{pass_} 1x1", block, shape, 1) for block, shape in pointwise]
        want += [Operation(f"{pass_} 3x3", 1, Shape(128, 32, 8, 9, 2), 2)]
        want += [Operation(f"{pass_} 3x3", 2, Shape(32, 32, 8, 9, 2), 1)]
    assert sorted(found) == sorted(want)


@pytest.mark.parametrize("name", traffic.NETWORKS)
def test_shapes_are_those_of_the_network(name: str) -> None:
    model, network = getattr(fastdense, name)(device="meta"), traffic.NETWORKS[name]
    blocks, transitions = (
        [module for module in model.features if isinstance(module, kind)]
        for kind in (fastdense.DenseBlock, fastdense.Transition)
    )
    layers = [conv for block in blocks for layer in block.children() for conv in (layer.conv1, layer.conv2)]
    listed = [
        (shape.writes, shape.reads, *((3, 3) if shape.taps == 9 else (1, 1)))
        for operation, _, shape, times in traffic.operations(network, 1, 224, 2)
        if operation in traffic.FORWARD
        for _ in range(times)
    ]
    assert sorted(listed) == sorted(tuple(conv.weight.shape) for conv in layers)
    found = traffic.around(network, 1, 224, 2)
    around = [o.shape for o in found if o.name in (traffic.STEM[0], traffic.TRANSITION[0])]
    convolutions = [model.features.conv0, *(transition.conv for transition in transitions)]
    assert [(s.writes, s.reads) for s in around] == [tuple(conv.weight.shape[:2]) for conv in convolutions]
    assert [s.m for s in around] == [112**2, 28**2, 14**2, 7**2]
    assert [o.shape.reads for o in found if o.name == traffic.MEAN[0]] == [model.classifier.in_features]


def together(found: Iterable[Operation]) -> Traffic:
    parts = [(traffic.primitive(one.name, one.shape), one.times) for one in found]
    return Traffic(sum(part.bytes * times for part, times in parts), sum(part.flops * times for part, times in parts))


def test_densenet121_in_16_bit_moves_about_160_mb_an_image() -> None:
    network = traffic.NETWORKS["densenet121"]
    one, two = (traffic.network_traffic(network, batch, 224, 2).bytes for batch in (1, 2))
    assert 155e6 < two - one < 165e6  # weights are read once for the whole batch
    assert one == together(traffic.operations(network, 1, 224, 2) + traffic.around(network, 1, 224, 2)).bytes


def test_outside_the_blocks_counted_by_hand() -> None:
    network = Network(growth_rate=8, layers=(1, 1), init_features=16)
    image, conv, pooled, weight = 3 * 1024, 16 * 256, 16 * 64, 49 * 3 * 16
    stem = 2 * ((image + conv + weight) + conv + (conv + pooled))  # convolution, its moments, pooling
    arg_max, backward, gradient = 2 * conv + pooled, 2 * (2 * conv + pooled) + pooled, 2 * 3 * conv
    stem += arg_max + backward + gradient + 2 * (conv + image) + 4 * weight
    inputs = 2 * 3 * (64 * 16 + 16 * 12)
    transition = 2 * (3 * 64 * 24 + 2 * 16 * 12) + 24 * 12 * (2 + 2 + 4)
    head = 2 * 3 * 16 * 20
    found = together(traffic.around(network, 1, 32, 2))
    assert found.bytes == stem + inputs + transition + head
    products = 2 * 2 * 256 * weight + (2 + 4) * 16 * 24 * 12
    assert found.flops == products + 3 * (conv + 64 * 16 + 16 * 12)


def test_outside_the_blocks_of_a_network_for_small_images() -> None:
    found = traffic.around(Network(growth_rate=8, layers=(1,), init_features=16, stem_stride=1), 1, 32, 1)
    assert [operation.name for operation in found] == [*traffic.STEM, traffic.RESOLVE, *traffic.MEAN]
    stem = 1024 * 2 * (3 + 16) + 9 * 3 * 16 * (1 + 4)
    assert together(found).bytes == stem + 1024 * (3 * 16 + 3 * 24)


def test_a_networks_floor_is_the_sum_over_primitives_of_the_slower_of_moving_and_computing() -> None:
    network = Network(growth_rate=8, layers=(2,), init_features=16)
    total = traffic.network_traffic(network, 4, 32, 2)
    rates = ((1e9, 1e30), (1e30, 1e9), (1e9, 1e9))
    moving, computing, both = (traffic.network_floor_seconds(network, 4, 32, 2, *rate) for rate in rates)
    assert moving == pytest.approx(total.bytes / 1e9)
    assert computing == pytest.approx(total.flops / 1e9)
    assert max(moving, computing) < both <= moving + computing
