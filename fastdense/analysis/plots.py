"""Pictures of gradient flow and feature reuse, drawn by matplotlib without a display."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from .gradient_flow import BlockFlow, BlockReuse

DPI = 150
MAX_WIDTH = 16.0  # inches
CAPTION_CHARACTERS_PER_INCH = 15.5
LEAST_SPREAD = 0.2  # of the colours of weights: the noise of a fresh network is no preference
DECADES = 4  # that the colours of gradients span; what is smaller is drawn as the smallest
COLOURS = ("#0b6e4f", "#c1666b", "#d4a017", "#4a6fa5", "#7b5ea7")
MARKERS = 150  # feature maps up to which each has one
NOTHING = "#d9d9d9"  # where a layer comes too early to read a feature map


def flow_picture(curves: Mapping[str, Sequence[BlockFlow]], path: Path, *, title: str, caption: str) -> None:
    """Heat maps of the first network's contributions, and every network's gradient norms against depth.

    Args:
        curves: by the name to show in the legend; the first is drawn as heat maps too.
        path: of the PNG.
        title: what was looked at.
        caption: loss, images, dtype: what a reader needs to believe the picture.
    """
    flows = next(iter(curves.values()))
    matrices = [np.ma.masked_equal(flow.contributions.numpy(), 0) for flow in flows]
    figure, (maps, (below,)) = _heat_maps([len(flow.total) for flow in flows], 1, title, curve=True)
    norm = _decades(np.concatenate([matrix.compressed() for matrix in matrices]))
    _draw(maps, flows, matrices, norm, "viridis_r", output=True)
    _label(figure, maps, "norm of the contribution", x="sent back by layer", y="feature map that receives it")
    _depth_curves(below, curves)
    whose = f"of the first network, {next(iter(curves))}" if len(curves) > 1 else "of the network"
    words = (
        f"Heat maps {whose}: the gradient of a feature map is a sum. Row: H$_i$, which layer i wrote (H$_0$ "
        "enters the block). Column j: what layer j, which reads H$_0$ .. H$_{j-1}$, sends back to it; last column: "
        "what arrives through the block's output. The terms of a row add up as tensors, not as norms. "
        "Curves: norm of the sum by depth; a hollow marker is a block's H$_0$, which has another number of channels. "
    )
    _finish(figure, words + caption, path)


def reuse_picture(reuses: Sequence[BlockReuse], path: Path, *, title: str, caption: str) -> None:
    """Heat maps of the mean absolute weight with which each layer reads each feature map.

    Args:
        reuses: one for each block.
        path: of the PNG.
        title: what was looked at.
        caption: which weights these are.
    """
    # H_L is read outside the block alone, and H_i by the layers from i on.
    matrices = [reuse.weights[:-1].numpy() for reuse in reuses]
    matrices = [np.ma.masked_array(matrix, np.tri(len(matrix), k=-1, dtype=bool)) for matrix in matrices]
    figure, rows = _heat_maps([matrix.shape[0] for matrix in matrices], 2, title)
    # Over a layer's mean of what it reads: the first ones read few channels, and start with larger weights.
    relative = [matrix / np.where(matrix.mean(0) > 0, matrix.mean(0), 1.0) for matrix in matrices]
    spread = max(LEAST_SPREAD, *(float(np.abs(ratio - 1).max()) for ratio in relative))
    kinds: list[tuple[list[Any], Normalize, str, str]] = [
        (matrices, Normalize(0.0, max(float(matrix.max()) for matrix in matrices)), "viridis_r", "mean |weight|"),
        (relative, Normalize(1 - spread, 1 + spread), "PuOr_r", "over the layer's mean"),
    ]
    for maps, (shown, norm, colours, label) in zip(rows, kinds, strict=True):
        _draw(maps, reuses, shown, norm, colours, output=False, titles=maps is rows[0])
        x = "layer that reads" if maps is rows[-1] else ""
        _label(figure, maps, label, x=x, y="feature map that is read")
    words = (
        "Row: feature map H$_i$, which layer i wrote (H$_0$ enters the block). Column j: layer j, which reads H$_0$ .. "
        "H$_{j-1}$ through its first convolution. Above: mean absolute weight of that convolution over the channels of "
        "H$_i$. Below: the same divided by the mean of the column; a layer reads orange feature maps more strongly "
        "than its others, and purple ones less; grey: it comes too early to read them. "
    )
    _finish(figure, words + caption, path)


def _heat_maps(sizes: Sequence[int], rows: int, title: str, *, curve: bool = False) -> tuple[Figure, list[list[Axes]]]:
    """Rows of heat maps whose widths are those of the blocks; with ``curve`` a last row of one wide pair of axes."""
    shares = np.clip(np.asarray(sizes, dtype=float) / max(sizes), 0.45, None)
    width = float(np.clip(4.2 * shares.sum() + 1.6, 8.0, MAX_WIDTH))
    height = (width - 1.6) / shares.sum() / (1 if len(sizes) > 1 else 1.6)
    heights = [height] * rows + ([3.0] if curve else [])
    figure = Figure(figsize=(width, sum(heights) + 1.9 + 0.4 * curve), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontweight="bold")
    grid = figure.add_gridspec(len(heights), len(sizes), width_ratios=list(shares), height_ratios=heights)
    axes = [[figure.add_subplot(grid[row, i]) for i in range(len(sizes))] for row in range(rows)]
    return figure, [*axes, [figure.add_subplot(grid[rows, :])]] if curve else axes


def _decades(values: Any) -> LogNorm:
    """A logarithmic scale over all of ``values``, or over the largest decades of them."""
    values = values[np.isfinite(values)]
    if not len(values):
        return LogNorm(0.1, 1.0, clip=True)
    largest = float(values.max())
    return LogNorm(max(float(values.min()), largest / 10**DECADES) * (1 - 1e-9), largest * (1 + 1e-9), clip=True)


def _draw(
    maps: Sequence[Axes],
    blocks: Sequence[BlockFlow | BlockReuse],
    matrices: Sequence[Any],
    norm: Normalize,
    colours: str,
    *,
    output: bool,
    titles: bool = True,
) -> None:
    """One heat map for each block, with ``output`` as the last column; masked elements do not exist."""
    for axes, block, matrix in zip(maps, blocks, matrices, strict=True):
        L = len(matrix) - output
        if titles:
            name = block.name.removeprefix("features.") or "the block"
            axes.set_title(f"{name} ({L} layer{'s' * (L > 1)})", fontsize=10)
        axes.set_facecolor(NOTHING)
        axes.imshow(matrix, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
        step = max(1, round(0.3 * L / (axes.bbox.width / DPI)))  # before the layout is final: about right
        layers = [j for j in range(0, L, step) if not output or step == 1 or L - j > max(1, step // 2)]
        out = {L: "out"} if output else {}
        axes.set_xticks([*layers, *out], [*(str(j + 1) for j in layers), *out.values()])
        axes.set_yticks(range(0, len(matrix), step), [f"H$_{{{i}}}$" for i in range(0, len(matrix), step)])
        axes.tick_params(labelsize=7)
        if output:
            axes.axvline(L - 0.5, color="white", linewidth=1.5)


def _label(figure: Figure, maps: Sequence[Axes], bar: str, *, x: str, y: str) -> None:
    for axes in maps:
        axes.set_xlabel(x)
    maps[0].set_ylabel(y)
    figure.colorbar(maps[-1].images[0], ax=list(maps), pad=0.01, fraction=0.05, aspect=30, label=bar)


def _depth_curves(axes: Axes, curves: Mapping[str, Sequence[BlockFlow]]) -> None:
    """The norms of all blocks after one another, on a logarithmic scale."""
    first = next(iter(curves.values()))
    count = sum(len(flow.total) for flow in first)
    for (label, flows), colour in zip(curves.items(), COLOURS, strict=False):
        start = 0
        for flow in flows:
            depths, total = np.arange(start, start + len(flow.total)), flow.total.numpy()
            legend, marker = None if start else label, "o" if count <= MARKERS else ""
            axes.plot(depths[1:], total[1:], color=colour, marker=marker, markersize=3, label=legend, zorder=3)
            axes.plot(depths[:1], total[:1], color=colour, marker="o", markersize=5, fillstyle="none", linestyle="none")
            start += len(total)
    start = 0
    ticks: dict[int, str] = {}
    step = max(1, round(count / (2.5 * axes.bbox.width / DPI)))
    for i, flow in enumerate(first):
        stop = start + len(flow.total)
        ticks |= {start + layer: f"{layer}" for layer in range(0, len(flow.total), step)}
        if i % 2 == 0:
            axes.axvspan(start - 0.5, stop - 0.5, color="#f4f4f4", zorder=0)
        name, middle, above = flow.name.removeprefix("features."), (start + stop - 1) / 2, axes.get_xaxis_transform()
        axes.text(middle, 1.01, name, transform=above, ha="center", va="bottom", fontsize=8, color="#555555")
        start = stop
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=7)
    if any((flow.total.isfinite() & (flow.total > 0)).any() for flows in curves.values() for flow in flows):
        axes.set_yscale("log")
    axes.set_xlim(-0.5, start - 0.5)
    axes.set_xlabel("feature map H$_i$ of each block: the input is on the left, the loss on the right")
    axes.set_ylabel("norm of dLoss/dH")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    if len(curves) > 1:  # above the axes, where no curve runs
        axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.06), ncols=2)


def _finish(figure: Figure, caption: str, path: Path) -> None:
    characters = round(CAPTION_CHARACTERS_PER_INCH * figure.get_figwidth())
    figure.supxlabel(textwrap.fill(caption, characters), fontsize=8, color="#444444", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
