"""Gradient flow and feature reuse of a DenseNet, beside the same layers without dense connections.

    python -m benchmarks.flow [--depth 100] [--epochs 6] [--json FILE] [--redraw]

Before and after training, which `fastdense train` does on scikit-learn's digits (``--epochs 0``: before it alone).
Writes a record and the pictures of docs/gradient-flow.md beside it: ``STEM-init.png``, ``STEM-trained.png`` and
``STEM-reuse.png``. ``--redraw`` measures nothing and draws the record that is there.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdense.conversion.blocks import dense_blocks
from fastdense.inspect import BlockFlow, BlockReuse, feature_reuse, gradient_flow
from fastdense.inspect_plots import flow_picture, reuse_picture
from fastdense.plain import without_dense_connections
from fastdense.subject import Subject, batch, subject

from .runner import RESULTS, environment

SEED, IMAGES = 0, 64
DENSE, PLAIN = "DenseNet", "the same layers without dense connections"
Flows = dict[str, list[BlockFlow]]


def untrained(depth: int) -> dict[str, Subject]:
    """Both networks as training starts with them."""
    dense = subject(None, None, seed=SEED, depth=depth)
    torch.manual_seed(SEED)
    plain = without_dense_connections(dense.model)
    return {DENSE: dense, PLAIN: Subject(plain, dense.description, dense.state)}


def trained(depth: int, epochs: int) -> tuple[dict[str, Subject], dict[str, Any]]:
    """Both networks after ``fastdense train``, and how well they do."""
    found, outcome = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for label, options in {DENSE: [], PLAIN: ["--plain"]}.items():
            out = Path(folder) / ("plain" if options else "dense")
            command = ["train", "--depth", str(depth), "--epochs", str(epochs), "--seed", str(SEED), "--out", str(out)]
            metrics = out.with_suffix(".jsonl")
            subprocess.run(
                [sys.executable, "-m", "fastdense", *command, "--metrics", str(metrics), *options], check=True
            )
            summary = json.loads(metrics.read_text().splitlines()[-1])
            outcome[label] = {key: summary[key] for key in ("steps", "train_loss", "test_loss", "test_accuracy")}
            found[label] = subject(None, out / "last.pt", seed=SEED)
    return found, outcome


def flows(subjects: dict[str, Subject]) -> Flows:
    """The gradients of one batch, in training mode."""
    found = {}
    for label, of in subjects.items():
        seen = batch(of, "digits", count=IMAGES, image_size=None, seed=SEED)
        found[label] = gradient_flow(of.model.train(), seen.images, seen.labels)
    return found


def prediction(dense: BlockFlow, plain: BlockFlow, channels: Sequence[int]) -> dict[str, float]:
    """How much larger the gradient is at a block's first layer than at its last: measured, and predicted by the chain.

    Args:
        dense, plain: the block's flow with and without dense connections.
        channels: ``C_0 .. C_L``.
    """
    L = len(dense.total) - 1
    growth = (plain.total[1] / plain.total[L]).item() ** (2 / (L - 1))  # of the squared norm, a layer
    k = channels[1] - channels[0]
    return {
        "growth": growth,
        "chain": (plain.total[1] / plain.total[L]).item(),
        "predicted": math.prod(1 + growth * k / channels[j] for j in range(1, L)) ** 0.5,
        "measured": (dense.total[1] / dense.total[L]).item(),
    }


def flow_table(record: dict[str, Any], file: str) -> str:
    """A record of ``benchmarks.flow`` as a Markdown table."""
    lines = [
        "| block | `s` of the chain | chain: first over last | DenseNet: predicted | DenseNet: measured |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, row in record["results"]["prediction"].items():
        lines.append(
            f"| {name.removeprefix('features.')} | {row['growth']:.2f} | {_power(row['chain'])} "
            f"| {row['predicted']:.1f} | {row['measured']:.1f} |"
        )
    settings, after = record["settings"], ""
    if outcome := record["results"].get("outcome"):
        accuracies = ", ".join(f"{label}: {row['test_accuracy']:.1%}" for label, row in outcome.items())
        after = f" Test accuracy after {settings['epochs']} epochs: {accuracies}."
    conditions = (
        "Norm of the gradient of what a block's first layer writes over that of its last, at initialisation: "
        f"{settings['network']}, {settings['images']} images of scikit-learn's digits, float64.{after} "
        f"PyTorch {record['torch']}, {record['date'][:10]}. Reproduce: "
        f"`{record['command']}`. Record: [{file}](../benchmarks/results/{file})."
    )
    return "\n".join(["", *lines, "", conditions, ""])


def _numbers(found: Flows) -> dict[str, Any]:
    """Totals, and of the DenseNet what each row of the contributions has from its diagonal on."""
    return {
        label: {
            block.name: {"total": block.total.tolist()}
            | ({"terms": [row[i:].tolist() for i, row in enumerate(block.contributions)]} if label == DENSE else {})
            for block in blocks
        }
        for label, blocks in found.items()
    }


def _flow(name: str, numbers: dict[str, Any]) -> BlockFlow:
    """A block of ``_numbers``."""
    total = _tensor(numbers["total"])
    contributions = torch.diag(total)
    for i, row in enumerate(numbers.get("terms", [])):
        contributions[i, i:] = _tensor(row)
    return BlockFlow(name, total, contributions)


def measure(depth: int, epochs: int) -> dict[str, Any]:
    """The record."""
    start = untrained(depth)
    at_start = flows(start)
    widths = [[layer.norm1.num_features for layer in layers] for _, _, layers in dense_blocks(start[DENSE].model)]
    channels = [[*block, block[-1] + block[1] - block[0]] for block in widths]
    predictions = {
        dense.name: prediction(dense, plain, of)
        for dense, plain, of in zip(at_start[DENSE], at_start[PLAIN], channels, strict=True)
    }
    network = start[DENSE].description
    settings = {"network": network, "depth": depth, "epochs": epochs, "images": IMAGES, "seed": SEED}
    results: dict[str, Any] = {"prediction": predictions, "initialisation": _numbers(at_start)}
    if epochs:
        after, results["outcome"] = trained(depth, epochs)
        results["trained"] = _numbers(flows(after))
        results["reuse"] = {block.name: block.weights.tolist() for block in feature_reuse(after[DENSE].model)}
    return _rounded({**environment(), "kind": "flow", "complete": True, "settings": settings, "results": results})


def draw(record: dict[str, Any], path: Path) -> None:
    """The pictures of ``record``, which lies or will lie in ``path``."""
    settings, results = record["settings"], record["results"]
    network, epochs = settings["network"], f"after {settings['epochs']} epochs"
    words = f"Loss: cross-entropy, mean over {settings['images']} images of scikit-learn's digits, 8x8; float64."
    for kind, when in {"initialisation": "freshly initialised", "trained": epochs}.items():
        if kind not in results:
            return
        curves = {label: [_flow(name, of) for name, of in blocks.items()] for label, blocks in results[kind].items()}
        name = f"{path.stem}-{'init' if kind == 'initialisation' else kind}.png"
        flow_picture(curves, path.with_name(name), title=f"Gradient flow: {network}, {when}", caption=words)
    reuse = [BlockReuse(name, _tensor(weights)) for name, weights in results["reuse"].items()]
    title = f"Feature reuse: {network}, {epochs} of scikit-learn's digits"
    reuse_picture(reuse, path.with_name(f"{path.stem}-reuse.png"), title=title, caption="")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flow", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=100, help="of both networks, 6*n + 4 (default: 100)")
    parser.add_argument(
        "--epochs", type=int, default=6, help="of training; 0: look at the untrained networks alone (default: 6)"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "cpu" / "flow.json", help="where the record goes")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: draw the record that is there")
    options = parser.parse_args()
    path: Path = options.json
    if options.redraw:
        record = json.loads(path.read_text())
    else:
        record = measure(options.depth, options.epochs)
        path.write_text(json.dumps(record) + "\n")
    draw(record, path)
    print(flow_table(record, f"cpu/{path.name}"))


def _power(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio < 1e5 else f"10^{math.log10(ratio):.0f}"


def _tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _rounded(value: Any) -> Any:
    """Six digits: a record of matrices is not read at its last ones."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
