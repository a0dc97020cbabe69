"""The kernels on a GPU: what the interpreter cannot tell. Collected everywhere, run where there is one."""

from collections.abc import Iterator

import pytest
import torch
from helpers.blocks import assert_close, block_pair, random_input, results
from helpers.budget import BF16, DEVICE, F16, F32, SHAPES, TOLERANCE, check_budget, check_shape

from fastdense.backends import select
from fastdense.backends.triton_backend import TritonBackend
from fastdense.core.features import Features, LazyGradient
from fastdense.core.primitives import Conv, Norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
]


@pytest.fixture(autouse=True)
def _products(request: pytest.FixtureRequest) -> Iterator[None]:
    """fp32 products in fp32, or in TF32 where a test asks for it."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    wanted = "tf32" in request.node.name
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = wanted
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", SHAPES)
def test_block_equals_the_reference_at_every_shape_in_bfloat16(name: str) -> None:
    """In the other dtypes test_dense_block.py runs them on a GPU, too."""
    check_shape(name, BF16)


def test_tf32_is_as_good_as_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOLERANCE, F32, TOLERANCE[F16])  # products of numbers with ten bits
    for name in ("plain", "k = 32", "k = 48", "3D"):
        check_shape(name, F32)


# layers, growth rate, input
REAL = {
    "ImageNet, first block": (3, 32, (4, 64, 56, 56)), "ImageNet, third block": (2, 32, (16, 512, 14, 14)),
    "ImageNet, last block": (2, 32, (8, 960, 7, 7)), "CIFAR": (3, 12, (16, 96, 32, 32)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("mode", ["activations", "bottlenecks"])
@pytest.mark.parametrize("name", REAL)
def test_layers_of_real_networks(name: str, mode: str, dtype: torch.dtype) -> None:
    layers, k, shape = REAL[name]
    check_budget((layers, shape[1], 4, k), shape, dtype, recompute=mode, inputs=2)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
def test_reruns_are_bit_equal(dtype: torch.dtype) -> None:
    """Programs arrive in another order every time; what they add up, they add up in one."""
    _, fast = block_pair(4, 64, 4, 32, dtype=dtype, impl="triton")
    x = random_input((16, 64, 28, 28), dtype=dtype).detach().to(DEVICE).requires_grad_()
    first, *others = (results(fast.to(DEVICE), x) for _ in range(5))
    for other in others:
        for name, value in first.items():
            if value is not None and (name.endswith("grad") or name == "output"):
                assert torch.equal(value, other[name]), name  # type: ignore[arg-type]


def test_auto_takes_the_kernels_and_they_stand_their_trial() -> None:
    for dtype in (F32, F16, BF16):
        assert select.resolve("auto", torch.device(DEVICE), dtype) == "triton"
        assert select.self_test_failure("triton", torch.device(DEVICE), dtype) is None


def test_more_than_two_to_the_31_elements() -> None:
    """The last 28 and 12 channels of a buffer, which takes 17 GB with its gradient."""
    m = 2**19 + 3
    buffer = torch.empty(m, 4104, dtype=F16, device=DEVICE)
    assert buffer.numel() > 2**31
    buffer[:, -40:] = torch.randn(m, 40, device=DEVICE, dtype=F16)
    wide = Features(buffer[:, -40:], torch.zeros(40, device=DEVICE), torch.ones(40, device=DEVICE))
    last = slice(m - 1000, m)
    source, out = wide[slice(0, 28)], wide[slice(28, 40)]
    be = TritonBackend(torch.empty(m, 1, 1, 1, dtype=F16, device=DEVICE))
    norm = Norm(torch.ones(28, device=DEVICE), torch.zeros(28, device=DEVICE), 0.0)
    weight = torch.randn(12, 28, 1, 1, device=DEVICE, dtype=F16)
    be.bn_relu_conv(source, Conv(norm, weight), out)
    matrix = weight.double()[:, :, 0, 0]
    assert_close("last rows", out.rows[last], source.rows[last].double().relu() @ matrix.t(), 1e-3)
    assert out.mean is not None
    assert_close("mean", out.mean, out.rows.double().mean(0), 1e-3)
    D = torch.zeros(m, 4104, dtype=F16, device=DEVICE)[:, -40:]
    g = torch.randn(m, 12, dtype=F16, device=DEVICE)
    into = LazyGradient(D[:, :28], torch.zeros(28, device=DEVICE), torch.zeros(28, device=DEVICE))
    be.bn_relu_conv_backward(LazyGradient(g, None, None), out, Conv(norm, weight), source, into, accumulate=True)
    be.finish()
    want = (g[last].double() @ matrix) * (source.rows[last] > 0)
    assert_close("last rows' gradient", into.D[last], want, 1e-3)
