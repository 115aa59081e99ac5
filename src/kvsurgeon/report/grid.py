"""The grid that explains shared KV heads: a row for each group, a column for each query head of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsurgeon.errors import UsageError
from kvsurgeon.io.atomic_write import atomic_open

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

    from kvsurgeon.workflow.keys import Keys

_COLOURS = "RdBu_r"  # blue below zero, white at it, red above: legible without telling red from green
_FRAMES = (  # of KV heads, in turn
    "#0b6e4f", "#b5651d", "#6a3d9a", "#00798c", "#a61c3c", "#52720b",
    "#37517e", "#8a5a83", "#c2410c", "#1f78b4", "#7a6a00", "#444444",
)  # fmt: skip
_BRIGHTEST = 99.0  # percentile of all magnitudes; a few features of rotated keys are far larger than the rest
_WIDE = 8  # columns of a grid whose groups have one query head each
_CELL = 1.25, 0.82  # inches, as all sizes here
_MARGIN = 0.9, 0.85  # beside and above the cells of a panel
_BAR, _TITLE, _SMALLEST = 0.85, 0.35, 6.0
_BESIDE = 5  # columns up to which two panels stand beside each other, and not below
_LABELLED = 12  # tokens up to which each is dim_names out beside a row


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """Which query head stands where: `rows[row][column]`."""

    rows: tuple[tuple[int, ...], ...]
    groups: bool  # whether a row is a group of heads

    @property
    def columns(self) -> int:
        return max(len(row) for row in self.rows)


def draw(sides: Sequence[Keys]) -> Figure:
    """Return the picture of one model's keys, or of two models' beside each other, on one scale.

    A frame has the colour of the KV head whose keys it holds.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here

    grid, limit = _grid(sides), _limit(sides)
    stacked = grid.columns > _BESIDE
    across, down = (1, len(sides)) if stacked else (len(sides), 1)
    width, height = _MARGIN[0] + grid.columns * _CELL[0], _MARGIN[1] + len(grid.rows) * _CELL[1]
    size = max(across * width + _BAR, _SMALLEST), max(down * height + _TITLE, _SMALLEST / 2)
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    figure.suptitle(f"Keys of layer {sides[0].layer}, as each query head reads them", fontsize=12, fontweight="bold")
    halves: Any = figure.subfigures(1, 2, width_ratios=(size[0] - _BAR, _BAR))
    left, right = halves
    panels: Any = np.reshape(left.subfigures(down, across, squeeze=False), -1)
    image = None
    for panel, keys in zip(panels, sides, strict=True):
        image = _panel(panel, keys, grid, limit)
    _scale(right, image)
    return figure


def _scale(place: SubFigure, image: Any) -> None:
    """Draw what the colours mean, in the middle of the right margin."""
    bar = place.colorbar(image, cax=place.add_axes((0.12, 0.2, 0.16, 0.55)), extend="both")
    bar.set_label("value in the key", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def write(figure: Figure, path: Path) -> Path:
    """Return `path`, at which the picture now is.

    Raises:
        UsageError: It cannot be written there.
    """
    with atomic_open(path) as file:
        try:
            figure.savefig(file, format=path.suffix[1:] or "png")
        except ValueError as error:  # matplotlib draws no such format
            raise UsageError(f"cannot write `{path}`: {error}") from error
    return path


def file_name(keys: Keys) -> Path:
    """Return what the picture is called if nobody says: `<model>_layer_<i>_gqa_keys.png`."""
    return Path(f"{keys.model}_layer_{keys.layer}_gqa_keys.png")


def _grid(sides: Sequence[Keys]) -> _Grid:
    """Return the grid of the side with the fewest KV heads: what one side shares, the other has in one row too."""
    fewest = min(sides, key=lambda keys: keys.kv_heads)
    heads = fewest.query_heads
    rows = [tuple(head for head in range(heads) if fewest.reads[head] == kv) for kv in range(fewest.kv_heads)]
    if heads > fewest.kv_heads:
        return _Grid(rows=tuple(rows), groups=True)
    columns = min(_WIDE, int(np.ceil(np.sqrt(heads))))
    return _Grid(
        rows=tuple(tuple(range(start, min(start + columns, heads))) for start in range(0, heads, columns)), groups=False
    )


def _limit(sides: Sequence[Keys]) -> float:
    magnitudes = np.concatenate([np.abs(keys.keys).reshape(-1) for keys in sides])
    return float(np.percentile(magnitudes[np.isfinite(magnitudes)], _BRIGHTEST)) or 1.0


def _panel(panel: SubFigure, keys: Keys, grid: _Grid, limit: float) -> Any:
    size = keys.query_heads // keys.kv_heads
    shared = "each query head has its own" if size == 1 else f"{size} query heads share one"
    counts = f"{keys.query_heads} query heads, {keys.kv_heads} KV head{'s' if keys.kv_heads > 1 else ''}"
    panel.suptitle(f"{keys.model}\n{counts}: {shared}", fontsize=9)
    cells = panel.subplots(len(grid.rows), grid.columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for row, heads in enumerate(grid.rows):
        for column in range(grid.columns):
            axes = cells[row][column]
            if column >= len(heads):
                axes.set_axis_off()
                continue
            image = _cell(axes, keys, heads[column], limit)
            last = row == len(grid.rows) - 1
            axes.tick_params(labelbottom=last, bottom=last, labelleft=column == 0, left=column == 0)
        if grid.groups and len({keys.reads[head] for head in heads}) == 1:  # on the other side it may be several
            cells[row][0].set_ylabel(f"group {row}", fontsize=8, fontweight="bold")
    panel.supxlabel("feature of the head", fontsize=8)
    return image


def _cell(axes: Any, keys: Keys, head: int, limit: float) -> Any:
    values = keys.of_query_head(head)  # [tokens, head_dim]
    image = axes.imshow(values, cmap=_COLOURS, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    colour = _FRAMES[keys.reads[head] % len(_FRAMES)]
    axes.set_title(f"query {head} reads KV {keys.reads[head]}", fontsize=6.5, pad=3, color=colour)
    tokens, features = values.shape
    step = -(-tokens // _LABELLED)
    axes.set_yticks(range(0, tokens, step), [_short(token) for token in keys.tokens[::step]], fontsize=5)
    axes.set_xticks([0, features - 1], ["0", str(features - 1)], fontsize=6)
    axes.tick_params(length=0, pad=1.5)
    for side in axes.spines.values():
        side.set_linewidth(1.6)
        side.set_color(colour)
    return image


def _short(token: str) -> str:
    return token if len(token) <= 8 else f"{token[:7]}…"
