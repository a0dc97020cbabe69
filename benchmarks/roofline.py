"""How near to what the hardware allows: each kernel's time, and a whole step's, against its floor.

    python -m benchmarks.roofline [--model densenet121] [--batch 8] [--size 128] [--json FILE] [--plot FILE]
    python -m benchmarks.roofline --record DIR/gpu.json [--plot FILE]

A floor is modelled, never measured: the larger of bytes (``benchmarks.compiled.traffic``) over the copy rate and
operations over the matrix product rate, both measured on the device. The first line measures these rates on the CPU and
a training step of the PyTorch backend; of the kernels, which do not run there, it shows floors alone. The second line
shows each kernel's measured time beside its floor, from a record of ``benchmarks.gpu``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.benchmark import Timer

from .compiled import traffic
from .harness.options import Options
from .harness.providers import MODELS, PROVIDERS
from .harness.runner import Timing, environment, write_record
from .harness.training import Check, Step, build, images
from .report.tables import console_table

COPY_BYTES, MATMUL_SIZE = 1 << 28, 2048  # past every cache; a second's work for a slow core
BARS = 24


@dataclass
class Bar:
    """One operation at one resolution, all of a training step together."""

    operation: str
    m: int  # 0 where there are no pixels: weight gradients that are added up
    times: int = 0
    floor: float = 0.0
    measured: float | None = None  # where nothing ran

    @property
    def fraction(self) -> float | None:
        """Of the floor's rate that was reached, 1 at best."""
        return self.floor / self.measured if self.measured and self.floor else None

    @property
    def percent(self) -> str:
        return "" if self.fraction is None else f"{self.fraction:.0%}"


def cpu_rates(threads: int) -> tuple[float, float]:
    """Bytes a second that a copy moves (read and written), operations a second of a matrix product, in float32."""

    def seconds(statement: str, **names: Any) -> float:
        timer = Timer(statement, globals={"torch": torch, **names}, num_threads=threads)
        return timer.blocked_autorange(min_run_time=0.5).median

    x = torch.randn(COPY_BYTES // 4)
    a, b, out = torch.randn(3, MATMUL_SIZE, MATMUL_SIZE)
    copied = 2 * x.nbytes / seconds("out.copy_(x)", x=x, out=torch.empty_like(x))
    return copied, 2 * MATMUL_SIZE**3 / seconds("torch.mm(a, b, out=out)", a=a, b=b, out=out)


def floors(rates: tuple[float, float], network: traffic.Network, *of: int) -> list[dict[str, Any]]:
    """Each primitive of a training step, with its modelled floor; ``of`` a batch, a size, and bytes of a number."""
    found = []
    for operation in traffic.operations(network, *of) + traffic.around(network, *of):
        moved = traffic.primitive(operation.name, operation.shape, bottleneck=network.bn_size is not None)
        row = {"operation": operation.name, **operation.shape._asdict(), "times": operation.times}
        found.append(row | moved._asdict() | {"floor_seconds": traffic.floor_seconds(*moved, *rates)})
    return found


def _step(options: Options, floor: float) -> dict[str, Any]:
    """The PyTorch backend's training step: checked in float64, then timed."""
    spec, provider = MODELS[options.model], PROVIDERS["fastdense-activations"]
    row = Check(spec, 2, 64, options)(provider)
    if row["checked"]:
        x, cotangent = images(options.batch, options.size, spec.num_classes, options)
        step = Step(build(provider, spec, options), x, cotangent, options.dtype)
        step()
        rounds = [step() for _ in range(options.repeats)]
        row["step"] = found = Timing.of([phases["forward"] + phases["backward"] for phases in rounds])
        row |= {"images_per_second": options.batch / found.median, "fraction_of_floor": floor / found.median}
    return row


def run(options: Options) -> dict[str, Any]:
    """Measures the CPU's rates and the PyTorch backend's step; returns the record."""
    torch.set_num_threads(options.threads)
    of = (traffic.NETWORKS[options.model], options.batch, options.size, 4)
    rates = cpu_rates(options.threads)
    floor = traffic.network_floor_seconds(*of, *rates)
    modelled = {**traffic.network_traffic(*of)._asdict(), "floor_seconds": floor}
    modelled |= {"images_per_second": options.batch / floor, "kernels": floors(rates, *of)}
    settings: dict[str, Any] = {name: getattr(options, name) for name in ("model", "batch", "size")}
    settings |= {"dtype": "float32", "layout": "channels_last"}
    record = {**environment(), "settings": settings, "rates": rates, "modelled": modelled}
    return record | {"step": _step(options, floor)}


def bars(rows: Iterable[Mapping[str, Any]]) -> list[Bar]:
    """Rows of :func:`floors` or of a GPU's profile, those of one operation and resolution added up; longest first."""
    found: dict[tuple[str, int], Bar] = {}
    for row in rows:
        key = row["operation"], row.get("m", 0)
        bar = found.setdefault(key, Bar(*key))
        bar.times += row["times"]
        bar.floor += row["times"] * row.get("floor_seconds", 0.0)
        if "seconds" in row:
            bar.measured = (bar.measured or 0.0) + row["times"] * row["seconds"]
    return sorted(found.values(), key=lambda bar: -(bar.measured or bar.floor))


def bars_of_record(record: Mapping[str, Any]) -> dict[str, list[Bar]]:
    """Title and bars: of each profiled step in a record of ``benchmarks.gpu``, of the floors in one of :func:`run`."""
    if "modelled" in record:
        title = f"{record['settings']['model']} on the CPU: modelled floors of a step's kernels, nothing measured"
        return {title: bars(record["modelled"]["kernels"])}
    stage = record["stages"].get("layers", {})
    made = stage.get("environment", {})
    where = "REHEARSAL, says nothing of a GPU" if made.get("rehearsal") else made.get("device", "unknown device")
    return {
        f"{found['network']}, {label}, {where}: time of a step's kernels, and modelled floor": bars(found["rows"])
        for label, found in stage.get("result", {}).items()
        if found["rows"]
    }


def plot(groups: Mapping[str, Sequence[Bar]], path: Path) -> None:
    """Time against floor for each kernel, one panel a group, as PNG; the fraction of the floor's rate is written on."""
    from matplotlib.figure import Figure

    heights = [1 + 0.26 * min(len(group), BARS) for group in groups.values()]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    axes = figure.subplots(len(groups), squeeze=False, height_ratios=heights).flat
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        shown = group[:BARS]
        places = range(len(shown))
        measured = axis.barh(places, [(bar.measured or 0.0) * 1e3 for bar in shown], color="C0", label="measured")
        axis.bar_label(measured, [bar.percent for bar in shown], fontsize=8)
        axis.barh(places, [bar.floor * 1e3 for bar in shown], 0.4, color="C1", label="floor (modelled)")
        axis.set_yticks(places, [f"{bar.times} x {bar.operation}, m = {bar.m:,}" for bar in shown], fontsize=8)
        axis.invert_yaxis()
        axis.set(xlabel="ms a training step")
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def show(record: Mapping[str, Any], console: Console) -> None:
    """Prints the bars of a record as tables; of one of :func:`run`, what was measured, too."""
    headings = ("kernel", "m", "times", "measured ms", "floor ms (modelled)", "of the floor's rate")
    for title, group in bars_of_record(record).items():
        lines = []
        for bar in group:
            measured = "not measured" if bar.measured is None else f"{bar.measured * 1e3:.3f}"
            lines.append((bar.operation, f"{bar.m:,}", bar.times, measured, f"{bar.floor * 1e3:.3f}", bar.percent))
        console.print(console_table(title, headings, lines))
    if "modelled" not in record:
        return
    settings, rates, floor, step = (record[key] for key in ("settings", "rates", "modelled", "step"))
    measured = f"not timed: differs by {step['relative_difference']:.1e}"
    if "step" in step:
        measured = f"{step['step'].median * 1e3:.0f} ms, {step['images_per_second']:.1f} images/s"
        measured += f": {step['fraction_of_floor']:.0%} of the floor's rate"
    rows = (
        ("copy, measured", f"{rates[0] / 1e9:.1f} GB/s"),
        ("matrix product, measured", f"{rates[1] / 1e9:.0f} Gflop/s"),
        ("to move and to compute, modelled", f"{floor['bytes'] / 1e9:.2f} GB, {floor['flops'] / 1e9:.0f} Gflop"),
        ("floor, modelled", f"{floor['floor_seconds'] * 1e3:.0f} ms, {floor['images_per_second']:.1f} images/s"),
        ("PyTorch backend's step, measured", measured),
    )
    title = f"{settings['model']}, {settings['batch']} x {settings['size']}^2, float32, {record['threads']} threads"
    console.print(console_table(title, ("", ""), rows, words=2))


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
    given = vars(parser.parse_args(arguments))
    file, path, picture = (given.pop(name) for name in ("record", "json", "plot"))
    console = Console()
    with console.status("measuring rates, then the step"):
        record = run(Options(**given)) if file is None else json.loads(file.read_text())
    if not bars_of_record(record):
        parser.error(f"{file} has no timed kernels: run python -m benchmarks.gpu --stages rates layers")
    show(record, console)
    if file is None and path is not None:
        write_record(path, record)
        console.print(f"record: {path}")
    if picture is not None:
        plot(bars_of_record(record), picture)
        console.print(f"picture: {picture}")


if __name__ == "__main__":
    main()
