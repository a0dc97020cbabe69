"""How near to what the hardware allows: each kernel's time, and a whole step's, against its floor.

    python -m benchmarks.roofline [--model densenet121] [--batch 8] [--size 128] [--json FILE] [--plot FILE]
    python -m benchmarks.roofline --record DIR/gpu.json [--plot FILE]

A floor is modelled, never measured: the larger of bytes (``benchmarks.compiled.traffic``) over the copy rate and
operations over the matrix product rate, both measured on the device. The first line measures these rates on the CPU and
compares a training step of the PyTorch backend with the network's floor; of the kernels, which do not run there, it
shows floors alone. The second line shows each kernel's measured time beside its floor, from a record of
``benchmarks.gpu``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

import fastdense

from .compiled import traffic
from .harness.runner import Timing, environment, interleave, write_record

COPY_BYTES, MATMUL_SIZE = 1 << 28, 2048  # past every cache; a second's work for a slow core
BARS = 24
TOLERANCE = 1e-9  # relative 2-norm of output and all gradients together, in float64


@dataclass(frozen=True)
class Options:
    """What to compare: a training step of ``model`` on ``batch`` images of ``size`` x ``size``, in float32."""

    model: str = "densenet121"
    batch: int = 8
    size: int = 128
    repeats: int = 5
    threads: int = 2
    copy_bytes: int = COPY_BYTES
    matmul_size: int = MATMUL_SIZE


@dataclass(frozen=True)
class Bar:
    """One operation at one resolution, all of a training step together; ``measured`` is ``None`` where nothing ran.

    ``m`` is 0 where there are no pixels: weight gradients that are added up.
    """

    operation: str
    m: int
    times: int
    floor: float
    measured: float | None = None

    @property
    def fraction(self) -> float | None:
        """Of the floor's rate that was reached, 1 at best."""
        return self.floor / self.measured if self.measured and self.floor else None


def _timing(statement: str, names: dict[str, Any], threads: int) -> Timing:
    measured = Timer(statement, globals=names, num_threads=threads).blocked_autorange(min_run_time=0.5)
    return Timing.of(measured.times)


def cpu_rates(options: Options) -> dict[str, Any]:
    """Bytes a second that a copy moves (read and written), operations a second of a matrix product, in float32."""
    x = torch.randn(options.copy_bytes // 4)
    moved = _timing("out.copy_(x)", {"x": x, "out": torch.empty_like(x)}, options.threads)
    size = options.matmul_size
    a, b = torch.randn(2, size, size)
    product = _timing("torch.mm(a, b, out=out)", {"torch": torch, "a": a, "b": b, "out": a.clone()}, options.threads)
    return {
        "copy": {"per_second": 2 * x.nbytes / moved.median, "bytes": 2 * x.nbytes, "timing": moved},
        "float32": {"per_second": 2 * size**3 / product.median, "size": size, "timing": product},
    }


def floors(
    network: traffic.Network, batch: int, size: int, itemsize: int, rates: tuple[float, float]
) -> list[dict[str, Any]]:
    """Each primitive of a training step, with its modelled floor."""
    listed = traffic.operations(network, batch, size, itemsize) + traffic.around(network, batch, size, itemsize)
    found = []
    for operation in listed:
        moved = traffic.primitive(operation.name, operation.shape, bottleneck=network.bn_size is not None)
        row = {"operation": operation.name, **operation.shape._asdict(), "times": operation.times}
        found.append(row | moved._asdict() | {"floor_seconds": traffic.floor_seconds(*moved, *rates)})
    return found


def _images(batch: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images, channels last, and a random cotangent of the class scores."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator)
    return x.contiguous(memory_format=torch.channels_last), torch.randn(batch, 1000, generator=generator)


def _in_float64(model: torch.nn.Module) -> torch.Tensor:
    """Output and all gradients of one step of a float64 copy on small images, as one vector."""
    model = copy.deepcopy(model).double()
    x, cotangent = _images(2, 64, seed=1)
    output = model(x.double())
    output.backward(cotangent.double())
    found = [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return torch.cat([tensor.flatten() for tensor in found])


def _step(options: Options) -> dict[str, Any]:
    """The PyTorch backend's training step: checked against the reference network in float64, then timed."""
    reference = getattr(fastdense, options.model)(impl="reference")
    model = getattr(fastdense, options.model)(impl="torch")
    model.load_state_dict(reference.state_dict())
    model.to(memory_format=torch.channels_last)
    want = _in_float64(reference)
    error = ((_in_float64(model) - want).norm() / want.norm()).item()
    row: dict[str, Any] = {"relative_difference": error, "checked": error <= TOLERANCE}
    if not row["checked"]:
        return row
    x, cotangent = _images(options.batch, options.size)

    def step() -> dict[str, float]:
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        model(x).backward(cotangent)
        return {"step": time.perf_counter() - start}

    (phases,) = interleave({"fastdense": step}, repeats=options.repeats, warmup=1).values()
    return row | {phase: Timing.of(values) for phase, values in phases.items()}


def run(options: Options) -> dict[str, Any]:
    """Measure the CPU's rates and the PyTorch backend's step; returns the record."""
    torch.set_num_threads(options.threads)
    network, batch, size = traffic.NETWORKS[options.model], options.batch, options.size
    measured = cpu_rates(options)
    rates = measured["copy"]["per_second"], measured["float32"]["per_second"]
    moved = traffic.network_traffic(network, batch, size, 4)
    floor = traffic.network_floor_seconds(network, batch, size, 4, *rates)
    modelled = {**moved._asdict(), "floor_seconds": floor, "images_per_second": batch / floor}
    modelled["kernels"] = floors(network, batch, size, 4, rates)
    step = _step(options)
    if "step" in step:
        step |= {"images_per_second": batch / step["step"].median, "fraction_of_floor": floor / step["step"].median}
    settings = {"model": options.model, "batch": batch, "size": size, "dtype": "float32", "layout": "channels_last"}
    return {**environment(), "settings": settings, "rates": measured, "modelled": modelled, "step": step}


def bars(rows: Iterable[Mapping[str, Any]]) -> list[Bar]:
    """Rows of :func:`floors` or :func:`of_profile`, those of one operation and resolution added up; longest first."""
    found: dict[tuple[str, int], Bar] = {}
    for row in rows:
        times: int = row["times"]
        key = row["operation"], row.get("m", 0)
        before = found.get(key, Bar(*key, 0, 0.0))
        measured = None if "timing" not in row else (before.measured or 0.0) + times * row["timing"]["median"]
        floor = before.floor + times * row.get("floor_seconds", 0.0)
        found[key] = Bar(*key, before.times + times, floor, measured)
    return sorted(found.values(), key=lambda bar: -(bar.measured or bar.floor))


def of_profile(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A profile of the stage ``layers`` of ``benchmarks.gpu`` as :func:`bars` takes it."""
    return [{**row, "timing": {"median": row["seconds"]}} for row in found["rows"]]


def bars_of_record(record: Mapping[str, Any]) -> dict[str, list[Bar]]:
    """Title and bars for each profiled step of a record of ``benchmarks.gpu``."""
    stage = record["stages"].get("layers", {})
    made = stage.get("environment", {})
    where = "REHEARSAL, says nothing of a GPU" if made.get("rehearsal") else made.get("device", "unknown device")
    found = {
        f"{found['network']}, {label}, {where}: time of a step's kernels, and modelled floor": bars(of_profile(found))
        for label, found in stage.get("result", {}).items()
        if found["rows"]
    }
    return {title: group for title, group in found.items() if group}


def plot(groups: Mapping[str, Sequence[Bar]], path: Path) -> None:
    """Time against floor for each kernel, one panel a group, as PNG; the fraction of the floor's rate is written on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {title: list(group[:BARS]) for title, group in groups.items()}
    heights = [0.9 + 0.26 * len(group) for group in shown.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shown), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (title, group) in zip(axes, shown.items(), strict=True):
        places = range(len(group))
        longest = max(max(bar.measured or 0.0, bar.floor) for bar in group) * 1e3
        if any(bar.measured is not None for bar in group):
            axis.barh(places, [(bar.measured or 0.0) * 1e3 for bar in group], color="#c9d3df", label="measured")
        axis.barh(places, [bar.floor * 1e3 for bar in group], height=0.45, color="#2a6f97", label="floor (modelled)")
        for place, bar in zip(places, group, strict=True):
            text = "" if bar.fraction is None else f"{bar.fraction:.0%}"
            end = max(bar.measured or 0.0, bar.floor) * 1e3
            axis.text(end + longest * 0.01, place, text, va="center", fontsize=8)
        axis.set_yticks(places, [f"{bar.times} x {bar.operation}, m = {bar.m:,}" for bar in group], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, longest * 1.1)
        axis.set_xlabel("ms a training step")
        axis.set_title(title, fontsize=9, loc="left")
        axis.legend(fontsize=8, loc="lower right", frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _bars_table(title: str, group: Sequence[Bar]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("kernel", "m", "times", "measured ms", "floor ms (modelled)", "of the floor's rate"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for bar in group:
        measured = "not measured" if bar.measured is None else f"{bar.measured * 1e3:.3f}"
        fraction = "" if bar.fraction is None else f"{bar.fraction:.0%}"
        table.add_row(bar.operation, f"{bar.m:,}", str(bar.times), measured, f"{bar.floor * 1e3:.3f}", fraction)
    return table


def _cpu_groups(record: Mapping[str, Any]) -> dict[str, list[Bar]]:
    title = f"{record['settings']['model']} on the CPU: modelled floors of a step's kernels, nothing measured"
    return {title: bars(record["modelled"]["kernels"])}


def show(record: Mapping[str, Any], console: Console) -> None:
    """A record of :func:`run` as tables."""
    settings, rates, modelled, step = (record[key] for key in ("settings", "rates", "modelled", "step"))
    for title, group in _cpu_groups(record).items():
        console.print(_bars_table(title, group))
    title = f"{settings['model']}, {settings['batch']} x {settings['size']}^2, float32, {record['threads']} threads"
    table = Table("", "", title=title, title_justify="left", show_header=False)
    table.add_row("copy, measured", f"{rates['copy']['per_second'] / 1e9:.1f} GB/s")
    table.add_row("matrix product, measured", f"{rates['float32']['per_second'] / 1e9:.0f} Gflop/s")
    table.add_row(
        "to move and to compute, modelled", f"{modelled['bytes'] / 1e9:.2f} GB, {modelled['flops'] / 1e9:.0f} Gflop"
    )
    table.add_row(
        "floor, modelled", f"{modelled['floor_seconds'] * 1e3:.0f} ms, {modelled['images_per_second']:.1f} images/s"
    )
    measured = f"not timed: differs by {step['relative_difference']:.1e}"
    if "step" in step:
        measured = f"{step['step'].median * 1e3:.0f} ms, {step['images_per_second']:.1f} images/s"
        measured += f": {step['fraction_of_floor']:.0%} of the floor's rate"
    table.add_row("PyTorch backend's step, measured", measured)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", type=Path, help="gpu.json of benchmarks.gpu: show its kernels, measure nothing")
    parser.add_argument("--model", default="densenet121", choices=list(traffic.NETWORKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the record (default: nowhere)")
    parser.add_argument("--plot", type=Path, help="where to write the picture, a PNG (default: nowhere)")
    given = parser.parse_args(arguments)
    console = Console()
    if given.record is not None:
        groups = bars_of_record(json.loads(given.record.read_text()))
        if not groups:
            parser.error(f"{given.record} has no timed kernels: run python -m benchmarks.gpu --stages rates layers")
        for title, group in groups.items():
            console.print(_bars_table(title, group))
    else:
        options = Options(given.model, given.batch, given.size, given.repeats, given.threads)
        with console.status("measuring rates, then the step"):
            record = run(options)
        groups = _cpu_groups(record)
        show(record, console)
        if given.json is not None:
            write_record(given.json, record)
            console.print(f"record: {given.json}")
    if given.plot is not None:
        plot(groups, given.plot)
        console.print(f"picture: {given.plot}")


if __name__ == "__main__":
    main()
