"""Plots of the time per token, as text and as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, median_high

Series = Mapping[str, Sequence[float]]  # seconds of each token, by the name of the series

MARKERS = "●○▲△"
_NEIGHBORS = 8  # tokens on each side of which the median is drawn: single tokens vary with the load of the machine


def plot_text(series: Series, *, width: int = 64, height: int = 14) -> str:
    """Return a plot of milliseconds per token in `height` lines, with a marker for each series.

    >>> print(plot_text({"a": [0.0005, 0.0015, 0.003]}, width=3, height=3))
      3.0 ms ┤  ●
      1.5 ms ┤ ●
      0.0 ms ┤●
             └───
              1 2 3
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
    return "\n".join([*lines, f"{'':9}└{'─' * width}", f"{'':10}{_ticks(tokens, width)}", f" {legend}"])


def save_plot(series: Series, path: Path, *, title: str) -> None:
    """Write the plot of milliseconds per token, and of their median over neighbors, to an image file."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, seconds in series.items():
        tokens = range(1, len(seconds) + 1)
        (line,) = axes.plot(tokens, [1000 * value for value in _smoothed(seconds)], label=name, linewidth=1.5)
        axes.plot(tokens, [1000 * value for value in seconds], color=line.get_color(), linewidth=0.5, alpha=0.4)
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
    return [median_high(values) if values else 0.0 for values in columns]


def _label(row: int, height: int, top: float) -> str:
    """Return the tick of a row: at the top, in the middle and at the bottom."""
    if row in (0, height // 2, height - 1):
        return f"{top * (1 - row / (height - 1)):5.1f} ms ┤"
    return f"{'':9}│"


def _ticks(tokens: int, width: int) -> str:
    """Return the numbers of the first, the middle and the last token, below their columns."""
    first, middle, last = "1", str((tokens + 1) // 2), str(tokens)
    return f"{first}{middle:>{max(width // 2, 1 + len(middle))}}{last:>{max(width - width // 2 - 1, 1 + len(last))}}"


def _smoothed(seconds: Sequence[float]) -> list[float]:
    """Return the median of each token and its neighbors."""
    return [median(seconds[max(index - _NEIGHBORS, 0) : index + _NEIGHBORS + 1]) for index in range(len(seconds))]
