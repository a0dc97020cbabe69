"""Draw the README's diagram: concatenations beside one shared buffer, and what either keeps for backward.

    python -m benchmarks.diagram [--out docs/images/shared-buffer.png]

Nothing in it is measured: the curves are counts of values, and ``tests/test_diagram.py`` holds them against what
autograd really keeps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .runner import ROOT

PICTURE = ROOT / "docs" / "images" / "shared-buffer.png"
GROWTH, ENTERING, BOTTLENECK = 32, 64, 128  # DenseNet-121's first block
DRAWN = 6  # layers of the two sketches
DEEPEST = 64  # layers at the right end of the curves
RED, BLUE, GREEN, GREY = "#c44e52", "#3b6fb6", "#3a9a5b", "#555555"


def textbook(layers: int) -> int:
    """Values a pixel that a block of ``torch.cat`` keeps: concatenation, activation, and both of the bottleneck."""
    return sum(2 * (ENTERING + layer * GROWTH) + 2 * BOTTLENECK for layer in range(layers))


def activations(layers: int) -> int:
    """Values a pixel that fastdense keeps: the buffer and every bottleneck."""
    return bottlenecks(layers) + layers * BOTTLENECK


def bottlenecks(layers: int) -> int:
    """Values a pixel that fastdense keeps with ``recompute="bottlenecks"``: the buffer."""
    return ENTERING + layers * GROWTH


CURVES: tuple[tuple[str, str, Callable[[int], int]], ...] = (
    ("torch.cat", RED, textbook),
    ("fastdense", BLUE, activations),
    ('fastdense, "bottlenecks"', GREEN, bottlenecks),
)


def _maps(axes: Any, y: float, count: int, colour: str, height: float = 0.62) -> None:
    """Feature maps ``H_0 .. H_{count-1}`` side by side."""
    for i in range(count):
        axes.barh(y, 0.92, left=i, height=height, align="center", color=colour, alpha=0.35 + 0.09 * i, linewidth=0)


def _sketch(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, fontsize=12, fontweight="bold", loc="left")
    axes.set_xlim(-1.6, DRAWN + 1.1)
    axes.set_ylim(DRAWN + 1.1, -1.0)
    axes.axis("off")
    axes.text(-1.6, DRAWN + 0.5, below, fontsize=10.5, va="top", linespacing=1.4)


def _concatenations(axes: Any) -> None:
    """Each layer's own copy of everything before it."""
    _sketch(
        axes,
        "torch.cat: a copy for every layer",
        "two copies of all that came before, each layer:\nmemory grows with depth squared",
    )
    for layer in range(DRAWN):
        for copy in (0.16, -0.16):  # the concatenation, and what BatchNorm and ReLU made of it
            _maps(axes, layer + copy, layer + 1, RED, height=0.26)
        axes.text(-0.2, layer, f"layer {layer + 1}", ha="right", va="center", fontsize=9.5, color=GREY)


def _shared_buffer(axes: Any) -> None:
    """One buffer; each layer reads a prefix and writes the next piece."""
    _sketch(
        axes,
        "fastdense: one buffer for all",
        "a layer reads what lies left of its arrow and writes\nthe next piece: memory grows with depth",
    )
    _maps(axes, -0.1, DRAWN + 1, BLUE)
    for i in range(DRAWN + 1):
        axes.text(i + 0.46, -0.1, f"$H_{i}$", ha="center", va="center", fontsize=9.5)
    for layer in range(DRAWN):
        y = layer + 0.9
        axes.plot([0, layer + 0.92], [y, y], color=GREY, linewidth=1.6, solid_capstyle="butt")
        bend = "angle,angleA=0,angleB=90"
        arrow = {"arrowstyle": "-|>", "color": BLUE, "linewidth": 1.3, "connectionstyle": bend}
        axes.annotate("", xy=(layer + 1.46, 0.26), xytext=(layer + 0.92, y), arrowprops=arrow)
        axes.text(-0.2, y, f"layer {layer + 1}", ha="right", va="center", fontsize=9.5, color=GREY)


def _curves(axes: Any) -> None:
    """Values kept a pixel, against the number of layers."""
    axes.set_title("kept for backward", fontsize=12, fontweight="bold", loc="left")
    depths = range(1, DEEPEST + 1)
    for label, colour, count in CURVES:
        axes.plot(depths, [count(depth) / 1000 for depth in depths], color=colour, linewidth=2.4, label=label)
    axes.set_xlabel("layers in the block")
    axes.set_ylabel("thousand values a pixel")
    axes.set_xlim(0, DEEPEST)
    axes.set_ylim(0)
    axes.legend(loc="upper left", frameon=False, fontsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.text(
        1.0, -0.27, f"counted: k = {GROWTH}, {ENTERING} channels entering", transform=axes.transAxes, fontsize=8.5,
        ha="right", color=GREY,
    )  # fmt: skip


def draw(path: Path) -> None:
    """The picture, as wide as a README."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.9), width_ratios=(1, 1, 1.05))
    _concatenations(left)
    _shared_buffer(middle)
    _curves(right)
    figure.tight_layout(w_pad=2.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diagram", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    draw(options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
