"""``convert``, ``revert``: a foreign DenseNet on fastdense's algorithm, in place and back; and its dense blocks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core import checks
from ..nn import DenseBlock, Transition
from .converted import OWN, BlockSpec, Converted, Spec, block_layers, converted_class, part_of
from .match import candidates, probe_shape, read, without_flags
from .trace import Unsupported
from .verify import disagreement

__all__ = ["Finding", "check_model", "convert", "dense_blocks", "find", "revert", "with_dense_blocks"]

Filter = Callable[[nn.Module, str], bool]


@dataclass
class Finding:
    """A candidate and what is to become of it: ``spec`` to convert it by, or the reason why not."""

    name: str
    module: nn.Module
    kind: str
    spec: Spec | None = None
    reason: str = ""
    done: bool = False  # it runs on fastdense already


def convert(
    model: nn.Module,
    *,
    recompute: str | None = None,
    impl: str = "auto",
    filter_fn: Filter | None = None,
    verify: bool = True,
) -> nn.Module:
    """Make the dense blocks, transitions and the stem of ``model`` run on fastdense, in place.

    The converted modules get a subclass of their own class: they keep their parameters (the same objects), their
    ``state_dict`` keys, buffers, hooks, training flags and attributes, and whatever fastdense does not fully understand
    is left alone (:func:`fastdense.plan` says why). Where a converted block meets something later that it cannot run
    fused (a hook on an inner layer, an export) it says so once and runs its original ``forward``.

    Args:
        model: any module that contains DenseNet blocks: torchvision's, timm's, MONAI's, torchxrayvision's, or your own.
        recompute: ``"activations"``, ``"bottlenecks"`` or ``"auto"``, see :class:`fastdense.DenseBlock`; ``None`` does
            what the model's own flag says (``memory_efficient``, ``grad_checkpointing``, ``efficient``), now and later.
        impl: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"`` (the original ``forward``).
        filter_fn: ``filter_fn(module, name) -> bool``: which of the blocks, transitions and stems to convert;
            a stem is asked for by the ``nn.Sequential`` that calls its norm, ReLU and pooling.
        verify: run each of these and its conversion once on small float64 copies and compare outputs, gradients and
            statistics before anything is touched. Without it the structure and the order of concatenation are still
            read from a trace.

    Returns:
        ``model``. Converting it again changes nothing but an explicit ``recompute`` or ``impl``.

    Raises:
        TypeError: ``model`` is no module, or ``filter_fn`` cannot be called.
        ValueError: ``recompute`` or ``impl`` is unknown.

    Warns:
        UserWarning: nothing in ``model`` could be converted.

    Example:
        >>> model = fastdense.convert(torchvision.models.densenet121(weights="DEFAULT"))
    """
    _check_arguments(model, recompute, impl, filter_fn)
    findings = find(model, filter_fn=filter_fn, verify=verify)
    said: set[str] = set()
    for finding in findings:
        if isinstance(finding.module, Converted):
            now = finding.module._fastdense
            impl_now = now.impl if impl == "auto" else impl
            finding.module._fastdense = now._replace(recompute=recompute or now.recompute, impl=impl_now)
        elif finding.spec is not None:
            finding.module._fastdense = finding.spec._replace(recompute=recompute, impl=impl)  # type: ignore[assignment]
            vars(finding.module)["_fastdense_said"] = said
            finding.module.__class__ = converted_class(type(finding.module))
    if not any(finding.done or finding.spec is not None for finding in findings):
        reasons = "; ".join(f"{f.name or 'the model itself'}: {f.reason}" for f in findings[:3])
        warnings.warn(
            f"fastdense.convert found nothing to convert in this {type(model).__name__}"
            + (f" ({reasons}); fastdense.plan(model) lists everything" if reasons else ": it has no dense blocks"),
            UserWarning,
            stacklevel=2,
        )
    return model


def revert(model: nn.Module) -> nn.Module:
    """Give every converted module inside ``model`` its original class back, in place; returns ``model``.

    Parameters, buffers, hooks and attributes stay as they are. Blocks that were built as
    :class:`fastdense.DenseBlock` stay what they are.

    Raises:
        TypeError: ``model`` is no module.
        RuntimeError: a converted module was wrapped in another class since (``fully_shard`` does that).
    """
    check_model(model)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Converted)]
    for name, module in found:
        if "_fastdense_original" not in vars(type(module)):
            raise RuntimeError(
                f"{name!r} was converted and then became a {type(module).__name__}: revert it before wrapping it"
            )
    for _, module in found:
        module.__class__ = module._fastdense_original  # type: ignore[assignment]
        for attribute in OWN:
            vars(module).pop(attribute, None)
    return model


def find(model: nn.Module, *, filter_fn: Filter | None = None, verify: bool = True) -> list[Finding]:
    """Every block, transition and stem in ``model``, with how to convert it or why not. Changes nothing."""
    findings = []
    for name, module, kind in candidates(model):
        finding = Finding(name, module, kind)
        findings.append(finding)
        if isinstance(module, Converted | DenseBlock | Transition):
            finding.done = True
            continue
        if filter_fn is not None and not filter_fn(module, name):
            finding.reason = "filter_fn said no"
            continue
        try:
            spec = read(module, kind)
            part = part_of(module, spec)
            difference = disagreement(part, spec, probe_shape(part), without_flags) if verify else None
            if difference is None:
                finding.spec = spec
            else:
                finding.reason = difference
        except Unsupported as reason:
            finding.reason = str(reason)
    return findings


def check_model(model: Any) -> None:
    """Raises ``TypeError`` unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _check_arguments(model: Any, recompute: Any, impl: Any, filter_fn: Any) -> None:
    check_model(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a torch.jit.ScriptModule, which cannot be changed: convert it before scripting it")
    checks.choice("recompute", recompute, (*checks.RECOMPUTE, None))
    checks.choice("impl", impl, checks.IMPL)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be filter_fn(module, name) -> bool or None, got {filter_fn!r}")


def dense_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[Any]]]:
    """Every dense block of ``model``, own or converted: its name, itself, and its layers.

    A layer has ``norm1, conv1``, maybe ``norm2, conv2`` in ``_modules``, and ``drop_rate``. ``ValueError`` where a
    converted block cannot run fused any more: a hook on an inner layer, for instance.
    """
    for name, module in model.named_modules():
        if isinstance(module, DenseBlock):
            yield name, module, list(module.values())
        elif _is_converted(module):
            layers, reason = block_layers(module)
            if reason is not None:
                raise ValueError(f"the block {name or 'that the model is'} cannot run fused: {reason}")
            yield name, module, layers


def with_dense_blocks(model: nn.Module) -> nn.Module:
    """``model``, or a converted copy where none of its blocks is ours; ``ValueError`` if it has no dense block."""
    if any(isinstance(module, DenseBlock) or _is_converted(module) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(model)
    if not any(map(_is_converted, model.modules())):
        raise ValueError(
            f"this {type(model).__name__} has no dense block that fastdense understands: fastdense.plan(model) says why"
        )
    return model


def _is_converted(module: nn.Module) -> bool:
    return isinstance(module, Converted) and isinstance(vars(module).get("_fastdense"), BlockSpec)
