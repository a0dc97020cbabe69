"""The error budget that the kernels are held to, and the shapes that hurt; for tests on whatever device."""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdense.kernels import launch
from helpers.blocks import Results, block_pair, norms, random_input, results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # about one rounding of a result
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INPUTS = 8 if DEVICE == "cuda" else 1  # the interpreter takes a second or more for each


@contextmanager
def tiles(size: int) -> Iterator[None]:
    """Every kernel with tiles of ``size``: several tiles, splits and blocks even for small features."""
    more = {
        "bn_relu_conv": {"block_k": size},
        "bn_relu_conv_backward": {"weight_block_m": size, "weight_block_c": size},
        "reduce": {"block_c": 1024},
    }
    with ExitStack() as stack:
        for op in launch.OPERATIONS:
            stack.enter_context(launch.override(op, **{"block_m": size, "block_c": size, **more.get(op, {})}))
        yield


def ordinary_gammas(module: nn.Module) -> None:
    """gamma near 1: with gamma = 0 or negative a few roundings decide whole channels, for PyTorch as for us."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for norm in norms(module):
            norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
            norm.bias.copy_(torch.rand(norm.num_features, generator=generator) - 0.5)


def decided_relus(module: nn.Module) -> None:
    """beta far from 0, so that every channel's ReLU is on or off whatever the roundings.

    In 16 bit one value within a rounding of 0 switches a ReLU and outweighs everything else, whoever computes: that is
    luck, of which an average over some inputs is free ("ReLUs that roundings switch").
    """
    with torch.no_grad():
        for norm in norms(module):
            norm.bias.copy_(torch.where(torch.arange(norm.num_features) % 3 == 1, -8.0, 8.0))


def root_mean_square(values: Sequence[float]) -> float:
    return (sum(value**2 for value in values) / len(values)) ** 0.5


def within_budget(
    build: Callable[[], tuple[nn.Module, nn.Module, nn.Module]],
    feed: Callable[[int], Tensor],
    dtype: torch.dtype,
    *,
    parameters: torch.dtype | None = None,
    run: Callable[[nn.Module, Tensor], Results] = results,
    average: Callable[[Sequence[float]], float] = statistics.median,
    needs_x: bool = True,
    inputs: int = INPUTS,
    decided: bool = False,
    negligible: float = 0.0,
    floor: float = 0.0,
) -> None:
    """``error <= 2*(PyTorch's error in the same dtype) + tolerance`` for outputs, gradients and statistics.

    In the 2-norm and element-wise, an ``average`` over ``inputs`` of what ``run`` finds.

    build: the truth in float64, the reference (whose error is PyTorch's) and ours, in float32 or float64.
    feed: the input for a seed, in float64.
    parameters: their dtype, where it is another than that of the features.
    decided: see ``decided_relus``.
    negligible: gradients of less than this share of the largest one's norm are left out, and
    floor: errors are relative to this share of it at least: what BatchNorm takes away is all rounding.
    """
    truth, peer, fast = modules = build()
    truth.load_state_dict(peer.state_dict())
    for module in modules:
        ordinary_gammas(module)
        if decided:
            decided_relus(module)
        module.to(DEVICE, parameters or dtype)
    truth.double()  # all start from the rounded values
    states = [copy.deepcopy(module.state_dict()) for module in modules]
    errors: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(inputs):
        for module, state in zip(modules, states, strict=True):
            module.load_state_dict(state)
        x = feed(seed).detach().to(DEVICE, dtype).requires_grad_(needs_x)
        got, other = run(fast, x), run(peer, x)
        exact = results(truth, x.detach().double().requires_grad_(needs_x))
        gradients = [g.norm().item() for name, g in exact.items() if g is not None and name.endswith("grad")]
        largest = max(gradients, default=0.0)
        for name, want in exact.items():
            assert (got[name] is None) == (want is None), name
            if want is None or "num_batches" in name:
                continue
            if name.endswith("grad") and want.norm().item() < negligible * largest:
                continue
            pairs = zip(*(_errors(found[name], want, floor * largest) for found in (got, other)), strict=True)
            errors.setdefault(name, []).append(tuple(error for both in pairs for error in both))
    assert errors
    tolerance = TOLERANCE[dtype]
    for name, rows in errors.items():
        norm, peer_norm, element, peer_element = map(average, zip(*rows, strict=True))
        assert norm <= 2 * peer_norm + tolerance, f"{name}: relative error {norm:.2e}, PyTorch's {peer_norm:.2e}"
        assert element <= 2 * peer_element + 4 * tolerance, f"{name}: element {element:.2e}, {peer_element:.2e}"


def _errors(got: Tensor | None, want: Tensor, at_least: float) -> tuple[float, float]:
    """In the 2-norm and element-wise, relative to ``want``, or to ``at_least`` where that is more."""
    assert got is not None and got.isfinite().all(), "an average would hide it"
    difference = got.double() - want
    norm = difference.norm().item() / (max(want.norm().item(), at_least) or 1.0)
    return norm, difference.abs().max().item() / (max(want.abs().max().item(), at_least) or 1.0)


def check_budget(
    arguments: tuple[Any, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    change: Callable[[nn.Module], Any] | None = None,
    shift: float = 0.0,
    needs_x: bool = True,
    inputs: int = INPUTS,
    decided: bool | None = None,
    **options: Any,
) -> None:
    """A block ``within_budget``; ``decided``, by default in 16 bit: see ``decided_relus``."""
    named: dict[str, Any] = {"spatial_dims": len(shape) - 2, "change": change}
    ours = {**named, "dtype": F32, "impl": "triton", **options}
    within_budget(
        lambda: (block_pair(*arguments, **named)[0], *block_pair(*arguments, **ours)),
        lambda seed: random_input(shape, layout=layout, seed=seed).detach() + shift,
        dtype,
        needs_x=needs_x,
        inputs=inputs,
        decided=dtype != F32 if decided is None else decided,
        negligible=1e-4 if dtype != F32 else 0.0,
    )


class Guarded:
    """A tensor that is a channel slice of a wider one, with canaries on both sides of every row."""

    CANARY = 777.0

    def __init__(self, values: Tensor, before: int = 3, after: int = 5) -> None:
        rows, channels = values.shape
        self.wide = torch.full((rows + 2, before + channels + after), self.CANARY, dtype=values.dtype, device=DEVICE)
        self.rows = self.wide[1:-1, before : before + channels]
        self.rows.copy_(values)

    def check(self) -> Tensor:
        rows = self.rows.clone()
        self.rows.fill_(self.CANARY)
        assert (self.wide == self.CANARY).all(), "written outside of the slice"
        return rows


# layers, C0, bn_size, k, input shape, mode
SHAPES = {
    "plain": (2, 8, 4, 4, (2, 8, 6, 6), "bottlenecks"),
    "one pixel": (2, 5, 4, 3, (20, 5, 1, 1), "activations"),
    "primes, not square": (2, 7, 3, 5, (3, 7, 11, 13), "activations"),
    "batch of one": (2, 3, 4, 12, (1, 3, 5, 7), "bottlenecks"),
    "k = 1": (3, 1, 2, 1, (2, 1, 4, 3), "activations"),
    "k = 24": (1, 20, 4, 24, (1, 20, 5, 4), "activations"),
    "k = 32": (2, 64, 4, 32, (2, 64, 4, 4), "bottlenecks"),
    "k = 48": (1, 17, 4, 48, (1, 17, 3, 9), "bottlenecks"),
    "a bottleneck too wide for one pass": (1, 12, 9, 32, (1, 12, 3, 5), "activations"),
    "basic": (3, 6, None, 4, (2, 6, 5, 3), "activations"),
    "1D": (2, 6, 4, 4, (3, 6, 17), "bottlenecks"),
    "1D, basic": (2, 6, None, 5, (3, 6, 9), "activations"),
    "3D": (1, 6, 4, 4, (2, 6, 3, 5, 4), "bottlenecks"),
    "3D, basic": (2, 5, None, 4, (1, 5, 4, 3, 5), "activations"),
    "3D, primes": (2, 7, 3, 5, (1, 7, 2, 5, 3), "activations"),
    "3D, one plane": (1, 8, 4, 12, (2, 8, 1, 5, 4), "activations"),
    "3D, k = 32": (1, 17, 4, 32, (1, 17, 3, 2, 4), "bottlenecks"),
}


def check_shape(name: str, dtype: torch.dtype) -> None:
    """``check_budget`` for one of ``SHAPES``."""
    *arguments, shape, mode = SHAPES[name]
    # Where almost nothing but BatchNorm is left, always-on ReLUs make a linear network: gradients vanish in its scale.
    linear = dtype != F32 and name in ("one pixel", "k = 1")
    check_budget(tuple(arguments), shape, dtype, recompute=mode, **{"decided": False, "inputs": 9} if linear else {})
