"""``fastdense bench``: options of the benchmarks, a table that grows while they run, records and pictures."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.live import Live
from typer import Option

from .options import errors_as_bad_options, give_options

INTERRUPTED = 130
HEARTBEAT_SECONDS = 10.0  # longest silence in a log
LOG_WIDTH = 120  # characters of a table where no terminal says how many fit
QUICK = {"repeats": 5, "processes": 1, "threads": 1}  # small layers are too short to share among threads

Record = dict[str, Any]
bench = typer.Typer(
    help="This machine against torchvision and its variants: tables, JSON records, pictures.", no_args_is_help=True
)

OPTIONS: dict[str, tuple[Any, Any]] = {
    "device": (str | None, Option(None, help="cpu, cuda, cuda:1.", show_default="cuda where there is one")),
    "dtype": (str, Option("fp32", help="fp32, tf32, or fp16 and bf16 under autocast.")),
    "layout": (str, Option("channels_last", help="channels_last or contiguous.")),
    "model": (str | None, Option(None, help="As densenet121 or densenet-bc-100.", show_default="densenet121")),
    "models": (str | None, Option(None, help="Networks, with commas.", show_default="densenet121,densenet201")),
    "batch": (int | None, Option(None, help="Images a step.", show_default="8; on a GPU 64")),
    "size": (int | None, Option(None, help="Height and width in pixels.", show_default="128; memory, GPU: 224")),
    "depths": (list[int] | None, Option(None, "--depths", help="CIFAR-style DenseNet-BC of these depths.")),
    "budget": (str, Option("12GB", help="Bytes that a training step may take, as 12GB.")),
    "providers": (str | None, Option(None, help="With commas; 'list' shows them.", show_default="usual")),
    "batches": (str | None, Option(None, help="Further batch sizes, as 1,2,4,16: images a second against them.")),
    "repeats": (int | None, Option(None, help="Timed steps of each provider in a process.", show_default="7")),
    "processes": (int | None, Option(None, help="Fresh processes, one after another.", show_default="5")),
    "threads": (int | None, Option(None, help="CPU threads.", show_default="PyTorch's choice")),
    "quick": (bool, Option(False, "--quick", help="Small networks and few steps: under two minutes for all.")),
    "out": (Path | None, Option(None, help="Folder of records and pictures.", show_default="./fastdense-bench")),
    "as_json": (bool, Option(False, "--json", help="The record on standard output; tables on standard error.")),
}
COMMANDS = {
    "speed": (
        "model batch size batches repeats processes threads",
        "Time of a training step, forward, backward and optimizer, with its bytes and images a second.",
    ),
    "memory": ("models batch size depths threads", "Bytes that a training step keeps for backward, and its peak."),
    "depth": ("budget", "The deepest network and the largest batch that train within a budget of memory."),
    "all": ("threads", "Speed with several batches, memory, memory against depth; and, unless --quick, depth."),
}
COMMON = "device dtype layout providers quick out as_json"
# What ``all`` runs, each with options of its own.
ALL_QUICK: list[tuple[str, Record]] = [("speed", {"batches": "4,16"}), ("memory", {})]
ALL: list[tuple[str, Record]] = [
    ("speed", {"batches": "1,2,4,16,32"}),
    ("memory", {}),
    ("memory", {"depths": (40, 100, 190)}),
    ("depth", {"budget": "12GB"}),
]


def _command(name: str, options: str, help: str) -> None:
    """Adds ``fastdense bench NAME`` with some of ``OPTIONS``."""

    def command(context: typer.Context, as_json: bool, **given: Any) -> None:
        console = Console(stderr=as_json, highlight=False, markup=False)
        if not console.is_terminal:
            console.width = LOG_WIDTH
        records: list[Record] = []
        with errors_as_bad_options():
            if "depths" in given:  # --depths 40 100 190: what follows the first arrives as arguments
                more = " ".join(context.args)
                if more and not given["depths"]:
                    raise ValueError(f"unknown arguments: {more}")
                given["depths"] = (*(given["depths"] or ()), *_numbers("--depths must be whole numbers", more))
            jobs = [(name, {})] if name != "all" else ALL_QUICK if given["quick"] else ALL
            for job, special in jobs:
                records.append(_run(console, job, _options(job, {**given, **special})))
                if not records[-1].get("complete", True):
                    break
        if as_json:
            plain = [benchmark("harness.runner").plain(record) for record in records]
            typer.echo(json.dumps(plain if len(plain) > 1 else plain[0], indent=1))
        if not all(record.get("complete", True) for record in records):
            console.print("Interrupted: what had been measured is in the record.")
            raise typer.Exit(INTERRUPTED)

    give_options(command, {key: OPTIONS[key] for key in OPTIONS if key in f"{COMMON} {options}".split()})
    bench.command(name, help=help, context_settings={"allow_extra_args": "depths" in options})(command)


def benchmark(name: str) -> Any:
    """A module of the benchmarks, which take long to import."""
    return importlib.import_module(f"fastdense.benchmarks.{name}")


def _numbers(rule: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.replace(",", " ").split()))
    except ValueError as error:
        raise ValueError(f"{rule}, got {text!r}") from error


def _options(name: str, given: Mapping[str, Any]) -> Any:
    """The benchmarks' options: what was given, else what suits the device, and ``--quick``."""
    module = benchmark("harness.options")
    device = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu, quick = device.startswith("cuda"), given["quick"]
    found: Record = {"batch": 64 if gpu else 8, "size": 224 if gpu or name == "memory" else 128}
    if quick:
        found |= {**QUICK, "model": module.QUICK_MODEL, "size": 32, "batch": 8}
    found |= {key: value for key, value in given.items() if value is not None} | {"device": device}
    for key in ("providers", "models"):
        found[key] = tuple((given.get(key) or "").replace(",", " ").split())
    found["batches"] = _numbers("--batches must be whole numbers, as in 1,2,4", given.get("batches") or "")
    if name == "memory" and not found.get("depths") and not found["models"]:
        found |= {"depths": module.QUICK_DEPTHS} if quick else {"models": ("densenet121", "densenet201")}
    if "list" in found["providers"]:
        for provider, described in benchmark("harness.providers").PROVIDERS.items():
            typer.echo(f"{provider:30} {described.label}")
        raise typer.Exit
    return module.Options(**found)


def _run(console: Console, name: str, options: Any) -> Record:
    """Runs one benchmark and writes its record and pictures, also after Ctrl-C."""
    module, folder = benchmark(name), options.folder()
    folder.mkdir(parents=True, exist_ok=True)
    plots = benchmark("report.plots")  # before minutes of measuring: matplotlib may be missing
    stem = folder / (name if name == "depth" else module.file_name(options))
    record: Record = module.run(options) if name == "depth" else _measure(console, module, options)
    path = Path(f"{stem}.json")
    benchmark("harness.runner").write_record(path, record)
    if name == "depth":
        pictures = [Path(f"{stem}.png")]
        module.plot(record, pictures[0])
    else:
        pictures = plots.pictures(record, stem)
    for written in [path, *pictures]:
        console.print(str(written), soft_wrap=True)
    return record


def _measure(console: Console, module: Any, options: Any) -> Record:
    """Shows the record while it grows: a table in place on a terminal; in a log some lines, and then the table."""
    if console.is_terminal:
        with Live("checking: the first results take some seconds", console=console, refresh_per_second=4) as live:
            return module.run(options, lambda record: live.update(module.table(record)))
    said = time.monotonic()

    def watch(record: Record) -> None:
        nonlocal said
        if time.monotonic() - said > HEARTBEAT_SECONDS:
            said = time.monotonic()
            steps = [row["step"].repeats for row in record["results"].values() if "step" in row]
            console.print(f"measuring: {len(record['results'])} rows, at least {min(steps, default=0)} steps each")

    record: Record = module.run(options, watch)
    console.print(module.table(record))
    return record


for _name, (_options_of, _help) in COMMANDS.items():
    _command(_name, _options_of, _help)
