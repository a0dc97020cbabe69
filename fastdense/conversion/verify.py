"""A block or transition and its conversion, run side by side on copies: outputs, gradients, statistics, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..backends.philox import keep_mask
from .converted import BlockSpec, Converted, Spec, converted_class, resolve
from .trace import Unsupported, clone_with, eval_sync_batchnorm, isolated, kind_of, summary

TOLERANCE = 1e-9
_SEED = 20


class ReplayDropoutMasks(TorchFunctionMode):
    """Gives every dropout call fastdense's mask of the next layer that drops, instead of one of PyTorch's."""

    def __init__(self, seed: Tensor, layers: Sequence[int]) -> None:
        super().__init__()
        self.seed, self.layers = seed, iter(layers)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = kind_of(func)
        if kind not in ("dropout", "channel dropout"):
            return func(*args, **kwargs)
        values = {"p": 0.5, "training": True, **dict(zip(("input", "p", "training"), args, strict=False)), **kwargs}
        h, p, per_channel = values["input"], values["p"], kind != "dropout"
        if not values["training"] or p == 0:
            return h
        n, k, *spatial = h.shape
        keep = keep_mask(self.seed, next(self.layers), 0, n * k if per_channel else h.numel(), p)
        mask = keep.view(n, k, *[1] * len(spatial)) if per_channel else keep.view(n, *spatial, k).movedim(-1, 1)
        return h * mask * (1 / (1 - p) if p < 1 else 0.0)


def random_double(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A maker of float64 stand-ins: values that hide nothing, where trained or fresh ones may (a gamma of 0)."""
    at: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # whatever the default device is

    def make(tensor: Tensor) -> Tensor:
        shape = tuple(tensor.shape)
        if not tensor.is_floating_point():
            return torch.zeros(shape, dtype=tensor.dtype, device="cpu")
        if len(shape) < 2:  # vectors: gamma, beta, statistics (a variance must be positive)
            return torch.rand(shape, generator=generator, **at).add_(0.5)
        values = torch.randn(shape, generator=generator, **at)
        return values.mul_((2 / max(1, values[0].numel())) ** 0.5)

    return make


def disagreement(
    module: nn.Module, spec: Spec, shape: Sequence[int], prepare: Callable[[nn.Module], None]
) -> str | None:
    """How far the conversion is from ``module``, or ``None`` if they agree in training and in evaluation.

    Both run on float64 copies with random parameters, on the CPU, on an input of ``shape``; ``prepare`` is applied to
    the copies first. Compared are the output, the gradients of the input and of every parameter for a random
    cotangent, and every buffer. Foreign code that cannot be run so is a disagreement, too.
    """
    try:
        generator = torch.Generator("cpu").manual_seed(_SEED)
        with isolated(), torch.random.fork_rng(devices=[]):
            copy = clone_with(module, random_double(generator))
            prepare(copy)
            if isinstance(spec, BlockSpec):
                _raise_dropout(copy, spec)
            initial = {name: buffer.clone() for name, buffer in copy.named_buffers()}
            x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
            for training in (True, False):
                copy.train(training)
                eval_sync_batchnorm(copy)
                copy.__class__ = type(module)
                want = _results(copy, spec, x, initial)
                copy.__class__ = converted_class(type(module))
                copy._fastdense = spec._replace(recompute="activations", impl="torch")  # type: ignore[assignment]
                got = _results(copy, spec, x, initial)
                if name := _first_difference(got, want):
                    return f"converted, its {name} differs in {'training' if training else 'evaluation'}"
    except Unsupported:
        raise
    except Exception as error:
        return f"it cannot be checked on the CPU in float64 ({summary(error)})"
    return None


def _raise_dropout(copy: nn.Module, spec: BlockSpec) -> None:
    """Every rate above 0, also where it is 0 today."""
    owners, _ = resolve(copy, spec.nodes)
    for layer in spec.layers:
        if layer.dropout is not None and layer.dropout.attribute is not None:
            setattr(owners[layer.dropout.owner], layer.dropout.attribute, 0.3)


def _results(copy: nn.Module, spec: Spec, x: Tensor, initial: dict[str, Tensor]) -> dict[str, Tensor | None]:
    for name, buffer in copy.named_buffers():
        buffer.copy_(initial[name])
    copy.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    torch.manual_seed(_SEED)
    dropping = [i for i, layer in enumerate(getattr(spec, "layers", ())) if layer.dropout is not None]
    if isinstance(copy, Converted):
        output = copy(x)
    else:
        seed = torch.randint(2**63 - 1, (1,), device="cpu")
        with ReplayDropoutMasks(seed, dropping):
            output = copy(x)
    buffers = {f"buffer {name}": buffer.clone() for name, buffer in copy.named_buffers()}
    generator = torch.Generator("cpu").manual_seed(_SEED)
    cotangent = torch.randn(output.shape, generator=generator, dtype=output.dtype, device="cpu")
    output.backward(cotangent)
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in copy.named_parameters()}
    return {"output": output.detach(), **buffers, "gradient of the input": x.grad, **gradients}


def _first_difference(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> str | None:
    scale = max(float(value.double().norm()) for value in want.values() if value is not None)
    for name, theirs in want.items():
        ours = got[name]
        if ours is None or theirs is None:
            if ours is not theirs:
                return name
        elif ours.shape != theirs.shape:
            return f"shape of {name}"
        else:
            error = float((ours.double() - theirs.double()).norm())
            if not error <= TOLERANCE * float(theirs.double().norm()) + 1e-12 * scale:  # NaN is a difference, too
                return name
    return None
