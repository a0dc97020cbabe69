"""What a benchmark is asked to do, and where its answer goes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .providers import BASE, MODELS, PROVIDERS
from .runner import CHECKOUT, RESULTS, environment

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = {"fp32": "float32", "tf32": "TF32", "fp16": "float16", "bf16": "bfloat16"}  # as records say
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
ALL_SLOW = ("compile-max-autotune",)
SLOW_ON_CPU = ("compile", *ALL_SLOW)  # a minute and more for each network: only by name
QUICK_MODEL, QUICK_DEPTHS = "densenet-bc-40", (22, 40, 58)


@dataclass(frozen=True)
class Options:
    """The options of every benchmark; each reads those that it knows."""

    device: str = "cpu"
    dtype: str = "fp32"  # or another key of DTYPES; 16 bit means autocast
    layout: str = "channels_last"
    model: str = "densenet121"  # of providers.MODELS
    batch: int = 8  # images a step
    size: int = 128  # their height and width
    providers: tuple[str, ...] = ()  # of providers.PROVIDERS; empty: those that are usual on the device
    batches: tuple[int, ...] = ()  # further batch sizes, for images a second
    models: tuple[str, ...] = ()  # whose bytes are counted
    depths: tuple[int, ...] = ()  # of CIFAR's DenseNet-BC with k = 12, whose bytes are counted
    repeats: int = 7  # timed steps of each provider in each fresh process
    processes: int = 5
    threads: int = 0  # of the CPU; 0: PyTorch's own choice
    quick: bool = False  # under two minutes on two CPU cores
    budget: int | str | None = None  # bytes that a training step may take, as 12GB
    questions: tuple[str, ...] = ()  # of depth.QUESTIONS; empty: all, or the quick ones
    seconds: float | None = None  # after which depth tries no further size: what is known then is a lower bound
    out: Path | None = None  # folder of records and pictures

    def __post_init__(self) -> None:
        known = (("dtype", [self.dtype], DTYPES), ("layout", [self.layout], LAYOUTS),
                 ("model", [self.model, *self.models], MODELS), ("provider", self.providers, PROVIDERS))  # fmt: skip
        for what, names, among in known:
            if unknown := [name for name in names if name not in among]:
                raise ValueError(f"{what} must be one of {', '.join(among)}; got {unknown[0]!r}")
        numbers = (self.batch, self.size, self.repeats, self.processes, *self.batches)
        if min(numbers) < 1:
            raise ValueError(f"batch, size, repeats, processes and batches must be at least 1, got {numbers}")
        if not re.fullmatch(r"(cpu|cuda)(:\d+)?", self.device):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        if self.torch_device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r}: PyTorch finds no CUDA GPU here")
        if self.dtype == "tf32" and self.torch_device.type != "cuda":
            raise ValueError("tf32 is an arithmetic of GPUs: with --device cpu take fp32, fp16 or bf16")

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    def labels(self) -> list[str]:
        """Names of the providers to measure: torchvision, which all are compared with, first."""
        if self.providers:
            return list(dict.fromkeys([BASE, *self.providers]))
        cuda = self.torch_device.type == "cuda"
        left_out = SLOW_ON_CPU if self.quick or not cuda else ALL_SLOW
        return [name for name in PROVIDERS if name not in left_out and (cuda or not name.endswith("-triton"))]

    def new_record(self, kind: str, *fields: str, **settings: Any) -> dict[str, Any]:
        """A record without results: where it was made, ``fields`` of these options, and the arithmetic."""
        head = environment(gpu=self.torch_device.type == "cuda")
        head |= {"threads": self.threads} if self.threads else {}
        settings |= {name: getattr(self, name) for name in (*fields, "layout")} | {"dtype": NAMES[self.dtype]}
        return {**head, "kind": kind, "complete": False, "settings": settings, "results": {}}

    def folder(self) -> Path:
        """Where records and pictures go: into the checkout only if the run was a whole one."""
        if self.out is not None:
            return self.out
        if self.quick or not CHECKOUT:
            return Path("fastdense-bench")
        if self.torch_device.type == "cpu":
            return RESULTS / "cpu"
        name = torch.cuda.get_device_name(self.torch_device)
        return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def suffix(self) -> str:
        """What a file's name says of unusual arithmetic."""
        return ("" if self.dtype == "fp32" else f"-{self.dtype}") + ("" if self.layout == "channels_last" else "-nchw")
