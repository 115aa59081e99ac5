"""Plots of the accuracy loss against the size of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvsurgeon.reporting.key_grid import save_figure

if TYPE_CHECKING:
    from kvsurgeon.workflow.sweep import SweepPoint


def save_loss_plot(points: Sequence[SweepPoint], path: Path, *, tokens: int) -> None:
    """Write a plot of the points of a sweep to an image file.

    Args:
        points: The points, the original first.
        path: The image file.
        tokens: Number of tokens of the sequence whose cache is stated in bytes.

    Raises:
        UsageError: The file cannot be written, or its suffix is no image format.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    ordered = sorted(points, key=lambda point: point.cache_bytes)
    sizes, losses = [point.cache_bytes / 2**20 for point in ordered], [point.kl_divergence for point in ordered]
    axes.plot(sizes, losses, marker="o", linewidth=1)
    for point, size, loss in zip(ordered, sizes, losses, strict=True):
        axes.annotate(point.passes or "original", (size, loss), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel=f"cache of {tokens} tokens in MiB", ylabel="KL divergence, nats per token", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
