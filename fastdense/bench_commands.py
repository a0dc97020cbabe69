"""``fastdense bench``: options of the benchmarks, a table that grows while they run, records and pictures."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.live import Live

__all__ = ["bench"]

INTERRUPTED = 130
HEARTBEAT_SECONDS = 10.0  # longest silence in a log
LOG_WIDTH = 120  # characters of a table where no terminal says how many fit
QUICK = {"repeats": 5, "processes": 1, "threads": 1}  # small layers are too short to share among threads

Record = dict[str, Any]

bench = typer.Typer(
    help="This machine's figures against torchvision and its variants: tables, JSON records, pictures.",
    no_args_is_help=True,
)

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.", show_default="cuda where there is one")]
Dtype = Annotated[str, typer.Option(help="fp32, tf32, or fp16 and bf16 under autocast.")]
Layout = Annotated[str, typer.Option(help="channels_last or contiguous.")]
Model = Annotated[str | None, typer.Option(help="As densenet121 or densenet-bc-100.", show_default="densenet121")]
Batch = Annotated[int | None, typer.Option(help="Images a step.", show_default="8; on a GPU 64")]
Size = Annotated[int | None, typer.Option(help="Height and width in pixels.", show_default="128; memory, GPU: 224")]
Providers = Annotated[
    str | None,
    typer.Option(help="Names with commas, as compile,fastdense-activations; 'list' shows them.", show_default="usual"),
]
Batches = Annotated[str | None, typer.Option(help="Further batch sizes, as 1,2,4,16: images a second against them.")]
Models = Annotated[str | None, typer.Option(help="Networks, with commas.", show_default="densenet121,densenet201")]
Depths = Annotated[
    list[int] | None,
    typer.Option("--depths", help="CIFAR-style DenseNet-BC of this depth (6*n + 4); repeat it, or name several."),
]
Repeats = Annotated[int | None, typer.Option(help="Timed steps of each provider in a process.", show_default="7")]
Processes = Annotated[int | None, typer.Option(help="Fresh processes, one after another.", show_default="5")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="PyTorch's choice")]
Quick = Annotated[bool, typer.Option("--quick", help="Small networks and few steps: under two minutes for all.")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder of records and pictures.",
        show_default="benchmarks/results/DEVICE in a checkout, else ./fastdense-bench",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="The record on standard output; tables on standard error.")]


def benchmark(name: str) -> ModuleType:
    """A module of the benchmarks, which a wheel holds as ``fastdense.benchmarks`` and a checkout as ``benchmarks``."""
    try:
        return importlib.import_module(f"fastdense.benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name != "fastdense.benchmarks":
            raise
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "speed.py").is_file():
        raise ModuleNotFoundError("fastdense was installed without its benchmarks", name="fastdense.benchmarks")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))  # the processes that measure get it too
    return importlib.import_module(f"benchmarks.{name}")


@bench.command()
def speed(
    device: Device = None,
    dtype: Dtype = "fp32",
    layout: Layout = "channels_last",
    model: Model = None,
    batch: Batch = None,
    size: Size = None,
    providers: Providers = None,
    batches: Batches = None,
    repeats: Repeats = None,
    processes: Processes = None,
    threads: Threads = None,
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time of a training step, forward, backward and optimizer, with its bytes and images a second."""
    with _errors(as_json) as console:
        _finish(console, [_run(console, "speed", _options("speed", locals()))], as_json)


@bench.command(context_settings={"allow_extra_args": True})
def memory(
    context: typer.Context,
    device: Device = None,
    dtype: Dtype = "fp32",
    layout: Layout = "channels_last",
    models: Models = None,
    batch: Batch = None,
    size: Size = None,
    depths: Depths = None,
    providers: Providers = None,
    threads: Threads = None,
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Bytes that a training step keeps for backward, and its peak."""
    with _errors(as_json) as console:
        options = _options("memory", {**locals(), "depths": _more_depths(depths, context.args)})
        _finish(console, [_run(console, "memory", options)], as_json)


@bench.command()
def depth(
    device: Device = None,
    dtype: Dtype = "fp32",
    layout: Layout = "channels_last",
    budget: Annotated[str, typer.Option(help="Bytes that a training step may take, as 12GB.")] = "12GB",
    providers: Providers = None,
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """The deepest network and the largest batch that train within a budget of memory."""
    with _errors(as_json) as console:
        _finish(console, [_run(console, "depth", _options("depth", locals()))], as_json)


@bench.command(name="all")
def everything(
    device: Device = None,
    dtype: Dtype = "fp32",
    layout: Layout = "channels_last",
    providers: Providers = None,
    threads: Threads = None,
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Speed with several batches, memory, memory against depth; and, unless --quick, depth."""
    with _errors(as_json) as console:
        options, records = locals(), []
        sweep = "4,16" if quick else "1,2,4,16,32"
        jobs: list[tuple[str, Record]] = [("speed", {"batches": sweep}), ("memory", {"depths": (40, 100, 190)})]
        jobs[1:1] = [] if quick else [("memory", {})]
        jobs += [] if quick else [("depth", {"budget": "12GB"})]
        for name, special in jobs:
            records.append(_run(console, name, _options(name, {**options, **special})))
            if not records[-1].get("complete", True):
                break
        _finish(console, records, as_json)


def _more_depths(depths: list[int] | None, rest: list[str]) -> tuple[int, ...]:
    """``--depths 40 100 190``: what follows the first arrives as arguments that no option has taken."""
    if rest and not depths:
        raise ValueError(f"unknown arguments: {' '.join(rest)}")
    try:
        return (*(depths or ()), *map(int, rest))
    except ValueError as error:
        raise ValueError(f"--depths must be whole numbers, got {' '.join(rest)!r}") from error


def _options(name: str, given: Mapping[str, Any]) -> Any:
    """The benchmarks' options: what was given, else what suits the device, and ``--quick``."""
    module = benchmark("harness.options")
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu, quick = device.startswith("cuda"), given.get("quick", False)
    found: Record = {"device": device, "batch": 64 if gpu else 8}
    found["size"] = 224 if gpu or name == "memory" else 128
    if quick:
        found |= {**QUICK, "model": module.QUICK_MODEL, "size": 32, "batch": 8}
    for key in (
        "dtype",
        "layout",
        "model",
        "batch",
        "size",
        "repeats",
        "processes",
        "threads",
        "quick",
        "out",
        "budget",
    ):
        if given.get(key) is not None:
            found[key] = given[key]
    for key in ("providers", "models"):
        found[key] = tuple(filter(None, (given.get(key) or "").replace(" ", "").split(",")))
    found["batches"] = _numbers("--batches", given.get("batches"))
    found["depths"] = tuple(given.get("depths") or ())
    if quick and name == "memory" and given.get("models") is None:
        found["depths"] = module.QUICK_DEPTHS
    elif name == "memory" and not found["depths"] and not found["models"]:
        found["models"] = ("densenet121", "densenet201")
    if "list" in found["providers"]:
        _list_providers()
    return module.Options(**found)


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in (text or "").split(",") if part)
    except ValueError as error:
        raise ValueError(f"{option} must be whole numbers, as in 1,2,4, got {text!r}") from error


def _list_providers() -> None:
    for name, provider in benchmark("harness.providers").PROVIDERS.items():
        typer.echo(f"{name:30} {provider.label}")
    raise typer.Exit


@contextmanager
def _errors(as_json: bool) -> Iterator[Console]:
    """A console for tables; wrong options and missing packages become one line and an exit code."""
    try:
        console = Console(stderr=as_json, highlight=False, markup=False)
        if not console.is_terminal:
            console.width = LOG_WIDTH
        yield console
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing != "matplotlib" and not (error.name or "").startswith(("fastdense.benchmarks", "benchmarks")):
            raise
        remedy = "pip install 'fastdense[bench]'" if missing == "matplotlib" else "this version has no such benchmark"
        typer.echo(f"fastdense bench: {error}: {remedy}", err=True)
        raise typer.Exit(1) from error


def _run(console: Console, name: str, options: Any) -> Record:
    """One benchmark: shown while it runs, its record and pictures written, also after Ctrl-C."""
    module, folder = benchmark(name), options.folder()
    folder.mkdir(parents=True, exist_ok=True)
    if name == "depth":  # tells of itself
        record: Record = module.run(options)
        stem, draw = folder / "depth", _one(module.plot)
    else:
        benchmark("report.plots")  # before minutes of measuring: matplotlib may be missing
        with _live(console, module.table) as watch:
            record = module.run(options, watch)
        stem, draw = folder / module.file_name(options), benchmark("report.plots").pictures
    path = stem.with_name(f"{stem.name}.json")
    benchmark("harness.runner").write_record(path, record)
    for written in [path, *draw(record, stem)]:
        console.print(str(written), soft_wrap=True)
    return record


def _one(plot: Callable[[Record, Path], Any]) -> Callable[[Record, Path], list[Path]]:
    def draw(record: Record, stem: Path) -> list[Path]:
        path = stem.with_name(f"{stem.name}.png")
        plot(record, path)
        return [path]

    return draw


@contextmanager
def _live(console: Console, table: Callable[[Record], Any]) -> Iterator[Callable[[Record], None]]:
    """Shows a growing record: a table in place on a terminal; in a log some lines, and the table at the end."""
    latest: list[Record] = []
    if console.is_terminal:
        with Live("checking: the first figures take some seconds", console=console, refresh_per_second=4) as live:
            yield lambda record: live.update(table(record))
        return
    said = time.monotonic()

    def watch(record: Record) -> None:
        nonlocal said
        latest[:] = [record]
        if time.monotonic() - said > HEARTBEAT_SECONDS:
            said = time.monotonic()
            console.print(f"measuring: {_extent(record)}")

    yield watch
    if latest:
        console.print(table(latest[0]))


def _extent(record: Record) -> str:
    rows = record["results"].values()
    steps = [row["step"].repeats for row in rows if "step" in row]
    return f"{len(rows)} rows" + (f", {min(steps)} to {max(steps)} steps each" if steps else "")


def _finish(console: Console, records: list[Record], as_json: bool) -> None:
    """The records for machines; the exit code of an interrupted run."""
    if as_json:
        plain = [benchmark("harness.runner").plain(record) for record in records]
        typer.echo(json.dumps(plain if len(plain) > 1 else plain[0], indent=1))
    if not all(record.get("complete", True) for record in records):
        console.print("Interrupted: what had been measured is in the record.")
        raise typer.Exit(INTERRUPTED)
