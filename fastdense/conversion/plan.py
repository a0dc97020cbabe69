"""``plan``: what ``convert`` would do to a model, as a list and as a table."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..ops.bn_relu_pool import channels_last
from .api import Finding, check_model, find
from .converted import BlockSpec, Converted, StemSpec, TransitionSpec, converted_class, part_of
from .trace import clone_with, eval_sync_batchnorm, isolated, on_meta

__all__ = ["PlanEntry", "plan"]


@dataclass(frozen=True)
class PlanEntry:
    """One block, transition or stem of a model.

    Attributes:
        name: its path in the model; empty for the model itself. A stem's is the ``nn.Sequential`` that calls it.
        kind: ``"block"``, ``"transition"`` or ``"stem"``.
        type: the name of its class.
        action: ``"convert"``, ``"skip"``, or ``"done"`` where it runs on fastdense already.
        reason: why it is skipped; empty otherwise.
        layers: layers of a block that is converted; 0 otherwise.
        bytes_before, bytes_after: what one training step saves for backward in it, for the plan's ``input_shape``;
            ``None`` without one, or where it could not be found out.
    """

    name: str
    kind: str
    type: str
    action: str
    reason: str = ""
    layers: int = 0
    bytes_before: int | None = None
    bytes_after: int | None = None

    @property
    def bytes_saved(self) -> int | None:
        """``bytes_before - bytes_after``."""
        if self.bytes_before is None or self.bytes_after is None:
            return None
        return self.bytes_before - self.bytes_after


def plan(model: nn.Module, input_shape: Sequence[int] | None = None) -> list[PlanEntry]:
    """What :func:`fastdense.convert` would replace in ``model``, and why it would skip the rest; changes nothing.

    Args:
        model: any module.
        input_shape: shape of the model's input with its batch, ``(N, C, *spatial)``: the table then says how many
            bytes one training step saves for backward, before and after. Nothing is computed: a copy without data runs.

    Returns:
        An entry for each block, each transition and each stem, in the model's order. The same is printed as a table (by
        ``rich`` where it is installed).

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``input_shape`` is not a sequence of positive integers.
    """
    check_model(model)
    if input_shape is not None:
        if not isinstance(input_shape, list | tuple | torch.Size) or len(input_shape) < 2:
            raise ValueError(f"input_shape must be the shape of a batch, (N, C, *spatial), got {input_shape!r}")
        for size in input_shape:
            checks.positive_int("each size of input_shape", size)
    findings = find(model)
    shapes = {} if input_shape is None else _input_shapes(model, [_entrance(f) for f in findings], input_shape)
    entries = [_entry(finding, shapes.get(_entrance(finding))) for finding in findings]
    _print(model, entries, input_shape)
    return entries


def _entry(finding: Finding, shape: tuple[int, ...] | None) -> PlanEntry:
    module, spec = finding.module, finding.spec
    action = "done" if finding.done else "skip" if spec is None else "convert"
    original = getattr(module, "_fastdense_original", type(module))
    if isinstance(module, Converted):
        spec = module._fastdense
    layers = len(spec.layers) if isinstance(spec, BlockSpec) else 0
    before = after = None
    if shape is not None and spec is not None:
        before, after = (_saved_bytes(module, cls, spec, shape) for cls in (original, converted_class(original)))
    return PlanEntry(finding.name, finding.kind, original.__name__, action, finding.reason, layers, before, after)


def _entrance(finding: Finding) -> str:
    """The module that the candidate's input enters first: a stem's is its norm."""
    spec = finding.module._fastdense if isinstance(finding.module, Converted) else finding.spec
    if not isinstance(spec, StemSpec):
        return finding.name
    return f"{finding.name}.{spec.nodes[0].children[0]}".lstrip(".")


def _input_shapes(model: nn.Module, names: list[str], input_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The shape that enters each named module, from one run of a copy without data; empty if it cannot run."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with isolated(), torch.no_grad():
            copy = clone_with(model, on_meta).train()
            eval_sync_batchnorm(copy)
            for name, module in copy.named_modules():
                if isinstance(module, Converted) and "_fastdense" in vars(module):
                    module._fastdense = module._fastdense._replace(impl="reference")  # which calls what is hooked
                if name in names:
                    module.register_forward_pre_hook(
                        lambda _, args, name=name: shapes.update({name: tuple(args[0].shape)})
                    )
            copy(_meta_input(copy, tuple(input_shape)))
    except Exception:  # foreign code, run without data: no sizes then
        pass
    return shapes


def _meta_input(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return torch.empty(shape, dtype=dtype, device="meta")


def _saved_bytes(module: nn.Module, cls: type[nn.Module], spec: Any, shape: tuple[int, ...]) -> int | None:
    """Bytes that ``module``, run as a ``cls`` on an input of ``shape``, saves for backward.

    Its input is saved by what made it, but for a stem's, which a convolution made and does not need again. A block's
    output counts: its consumer saves it in either case.
    """
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor
        return tensor.detach()

    try:
        with isolated():
            copy = clone_with(part_of(module, spec), on_meta).train()
            eval_sync_batchnorm(copy)
            copy.__class__ = cls
            if issubclass(cls, Converted):
                copy._fastdense = spec._replace(impl="torch")
            x = _meta_input(copy, shape)
            if isinstance(spec, TransitionSpec):
                x = channels_last(x)  # as blocks hand it over
            x.requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = copy(x)
    except Exception:  # as above
        return None
    if isinstance(spec, BlockSpec):
        pack(output)
    inputs = () if isinstance(spec, StemSpec) else (x,)
    own = {tensor.untyped_storage()._cdata for tensor in (*inputs, *copy.parameters(), *copy.buffers())}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in found.items() if key not in own)


def _print(model: nn.Module, entries: list[PlanEntry], input_shape: Sequence[int] | None) -> None:
    title, header = f"fastdense.plan: {type(model).__name__}", ["module", "kind", "class", "action"]
    rows = [
        [e.name or "(the model)", e.kind, e.type, f"{e.action}: {e.reason}" if e.reason else e.action] for e in entries
    ]
    if input_shape is not None:
        title += f", input {tuple(input_shape)}"
        header += ["saved before", "saved after", "less"]
        sizes = [(e.bytes_before, e.bytes_after, e.bytes_saved) for e in entries]
        rows.append(["together", "", "", ""])
        for row, cells in zip(rows, [*sizes, map(_total, zip(*sizes, strict=True))], strict=True):
            row += ["?" if size is None else f"{size / 1e6:.1f} MB" for size in cells]
    if not entries:
        print(f"{title}: no dense blocks found")
        return
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in (header, *rows))
        print(title, *lines, sep="\n")
        return
    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i > 3 else "left", overflow="fold", no_wrap=i != 3)
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console(width=max(120, shutil.get_terminal_size().columns)).print(table)


def _total(sizes: Iterable[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if known else None
