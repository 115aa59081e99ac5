"""Plots of the time per token, as text and as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

Series = Mapping[str, Sequence[float]]  # seconds of each token, by the name of the series

MARKERS = "●○▲△"


def plot_text(series: Series, *, width: int = 64, height: int = 14) -> str:
    """Return a plot of milliseconds per token in `height` lines, with a marker for each series.

    >>> print(plot_text({"a": [0.0005, 0.0015, 0.003]}, width=3, height=3))
      3.0 ms ┤  ●
             │ ●
      0.0 ms ┤●
             └───
              token 1 to 3
     ● a
    """
    tokens = max(len(seconds) for seconds in series.values())
    columns = [_sampled(seconds, width, tokens) for seconds in series.values()]
    top = max(max(values) for values in columns) * 1000
    grid = [[" "] * width for _ in range(height)]
    for marker, values in zip(MARKERS, columns, strict=False):
        for column, value in enumerate(values):
            row = round(value * 1000 / top * (height - 1)) if top else 0
            if value:
                grid[height - 1 - max(row, 0)][column] = marker
    lines = [f"{_label(row, height, top)}{''.join(cells).rstrip()}" for row, cells in enumerate(grid)]
    legend = "   ".join(f"{marker} {name}" for marker, name in zip(MARKERS, series, strict=False))
    return "\n".join([*lines, f"{'':9}└{'─' * width}", f"{'':10}token 1 to {tokens}", f" {legend}"])


def save_plot(series: Series, path: Path, *, title: str) -> None:
    """Write the plot of milliseconds per token to an image file."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, seconds in series.items():
        axes.plot(range(1, len(seconds) + 1), [1000 * value for value in seconds], label=name, linewidth=1.5)
    axes.set(title=title, xlabel="position of the token", ylabel="milliseconds per token", ylim=(0, None))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _sampled(seconds: Sequence[float], width: int, tokens: int) -> list[float]:
    """Return the median of the tokens of each column; 0 for a column without tokens."""
    columns: list[list[float]] = [[] for _ in range(width)]
    for index, value in enumerate(seconds):
        columns[index * width // tokens].append(value)
    return [sorted(values)[len(values) // 2] if values else 0.0 for values in columns]


def _label(row: int, height: int, top: float) -> str:
    if row in (0, height - 1):
        return f"{(top if row == 0 else 0.0):5.1f} ms ┤"
    return f"{'':9}│"
