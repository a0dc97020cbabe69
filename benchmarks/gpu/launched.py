"""What a run on a GPU launches, done on a fake one: whole networks, the first look, the self-test, candidates.

Every :class:`Work` goes through the code that runs there, at the sizes that run there: what is compiled depends on
them. Values are whatever memory held, and what takes long and launches no kernel of ours is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastdense
from fastdense import backends, trial
from fastdense.kernels import launch

from ..compiled.traffic import NETWORKS
from .case import Case
from .machine import tf32
from .primitives import bind
from .requests import Request, collecting

CPU = torch.device("cpu")
MODES = ("activations", "bottlenecks")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGE = 1 << 20  # elements from which on random values cost time

Candidate = tuple[str, Mapping[str, Any], Case]
Changes = Mapping[str, Mapping[str, Any]]  # of the launch table, by operation

# How the first look asks which part is at fault, where something is.
_ONE_STAGE: Changes = {op: {"num_stages": 1} for op in ("bn_relu_conv", "bn_relu_conv_backward")}
SIMPLER: tuple[Changes, ...] = (
    {},
    {"bn_relu_conv": {"form": "taps"}},
    _ONE_STAGE,
    {**_ONE_STAGE, "bn_relu_conv": {"form": "taps", "num_stages": 1}},
)


@dataclass(frozen=True)
class Work:
    """Something that launches kernels.

    Attributes:
        label: what it is.
        run: does it, on the CPU under a fake GPU.
    """

    label: str
    run: Callable[[], None]


class _Skipped(torch.autograd.Function):
    """A convolution of PyTorch whose results nobody computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        ctx.shapes = x.shape, x.dtype, weight.shape, weight.dtype
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_shape, x_dtype, weight_shape, weight_dtype = ctx.shapes
        return torch.empty(x_shape, dtype=x_dtype), torch.empty(weight_shape, dtype=weight_dtype), None, None


class Unread(TorchFunctionMode):
    """Within the ``with``, large random tensors and PyTorch's convolutions are memory that nobody has written."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn, torch.rand) and not kwargs.get("requires_grad"):
            meta = func(*args, **{**kwargs, "device": "meta", "generator": None})
            if meta.numel() >= LARGE:
                return torch.empty(meta.shape, dtype=meta.dtype)
        if func is torch.conv2d:
            x, weight = args[:2]
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            with torch.autocast("cpu", enabled=False):
                shape = func(x.detach().to("meta", dtype), weight.detach().to("meta", dtype), *args[2:], **kwargs).shape
            return _Skipped.apply(x, weight, shape, dtype)
        return func(*args, **kwargs)


def network_step(model: nn.Module, batch: int, size: int, dtype: torch.dtype) -> None:
    """Forward, cross-entropy and backward; 16 bit means autocast."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.empty(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    with Unread():
        with torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2):
            loss = F.cross_entropy(model(x), torch.zeros(batch, dtype=torch.int64))
        loss.backward()


def _densenet(name: str, mode: str) -> nn.Module:
    network = NETWORKS[name]
    arguments = network.growth_rate, network.layers, network.init_features
    return fastdense.DenseNet(*arguments, num_classes=1000, recompute=mode, impl="triton")


def _converted(name: str) -> nn.Module:
    from ..harness.peers import torchvision_densenet

    network = NETWORKS[name]
    arguments = network.growth_rate, network.layers, network.init_features
    model: nn.Module = torchvision_densenet().DenseNet(*arguments, num_classes=1000)
    return fastdense.convert(model, impl="triton", verify=False)


def _network(make: Callable[[], nn.Module], batch: int, size: int, dtype: torch.dtype, allow_tf32: bool) -> None:
    with tf32(allow_tf32):
        network_step(make(), batch, size, dtype)


def networks() -> Iterator[Work]:
    """Training steps as they are timed, and as they are checked: small images, also in float32."""
    timed = [("densenet121", batch, 224, torch.bfloat16) for batch in (64, 256, 1, 8)]
    timed += [("densenet201", 64, 224, torch.bfloat16), ("densenet121", 64, 224, torch.float16)]
    checked = [(name, 16, 64, dtype) for name in ("densenet121", "densenet201") for dtype in DTYPES]
    for name, batch, size, dtype in timed + checked:
        makers: dict[str, Callable[[], nn.Module]] = {mode: partial(_densenet, name, mode) for mode in MODES}
        if batch != 256:
            makers["converted"] = partial(_converted, name)
        for what, make in makers.items():
            for allowed in (False, True) if dtype == torch.float32 else (True,):
                label = (
                    f"{name} {what}, {batch} x {size}^2, {_short(dtype)}{' tf32' * (allowed and dtype.itemsize == 4)}"
                )
                yield Work(label, partial(_network, make, batch, size, dtype, allowed))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def smoke_step(shape: tuple[int, ...], dtype: torch.dtype, mode: str, changes: Changes, allow_tf32: bool) -> None:
    """The first look's block of three layers with a transition behind it, forward and backward."""
    block = fastdense.DenseBlock(3, 64, 4, 32, impl="triton", recompute=mode)
    pair = nn.Sequential(block, fastdense.Transition(160, 80, impl="triton")).to(dtype)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    with ExitStack() as stack:
        stack.enter_context(tf32(allow_tf32))
        for op, change in changes.items():
            stack.enter_context(launch.override(op, **change))
        output = pair(x)
        output.backward(torch.randn(output.shape).to(dtype))


def smoke() -> Iterator[Work]:
    """The first look in every dtype, mode and form; float32 with exact products, and as PyTorch is by default."""
    for dtype in DTYPES:
        for allowed in (False, True) if dtype == torch.float32 else (True,):
            for shape in ((8, 64, 28, 27), (8, 64, 56, 56)):
                for mode in MODES:
                    for changes in SIMPLER:
                        label = f"smoke {_short(dtype)} {mode} {shape[2]} {changes or ''} tf32 {allowed}"
                        yield Work(label, partial(smoke_step, shape, dtype, mode, changes, allowed))


def _trial(dtype: torch.dtype) -> None:
    before = dict(trial.SIZES)
    trial.SIZES["cpu"] = trial.SIZES["cuda"]
    try:
        with torch.no_grad():
            trial._results(lambda x: backends.create("triton", x), CPU, dtype)
    finally:
        trial.SIZES.update(before)


def trials() -> Iterator[Work]:
    """The self-test before the first use."""
    for dtype in DTYPES:
        yield Work(f"self-test {_short(dtype)}", partial(_trial, dtype))


def _candidates(case: Case, tried: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    with Unread():
        primitive, _ = bind(case, torch.bfloat16, CPU, "triton")
        for op, change in tried:
            with launch.override(op, **change) if change else nullcontext():
                primitive()


def candidates(listed: Iterable[Candidate]) -> Iterator[Work]:
    """Launch configurations to be tried; those of one case share its tensors."""
    cases: dict[Case, list[tuple[str, Mapping[str, Any]]]] = {}
    for op, change, case in listed:
        cases.setdefault(case, []).append((op, change))
    for case, tried in cases.items():
        label = f"{len(tried)} candidates for {case.operation}, {case.shape.m} rows"
        yield Work(label, partial(_candidates, case, tried))


def requests_of(work: Iterable[Work], say: Callable[[str], None] = lambda line: None) -> dict[Request, str]:
    """What has to be compiled for ``work``, each with what it is first needed for; this process has a fake GPU."""
    found: dict[Request, str] = {}
    for one in work:
        with collecting() as new:
            one.run()
        say(f"{one.label}: {len(new)} kernels, {len(new.keys() - found.keys())} of them new")
        found |= {request: one.label for request in new if request not in found}
    return found
