"""Images of the keys of a layer: a row for each group of query heads that share a KV head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsurgeon.errors import UsageError
from kvsurgeon.io.atomic_write import atomic_open

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

    from kvsurgeon.workflow.keys import Keys

_COLORMAP = "RdBu_r"  # safe for red-green color blindness
_FRAME_COLORS = (  # of the KV heads, cyclically
    "#0b6e4f", "#b5651d", "#6a3d9a", "#00798c", "#a61c3c", "#52720b",
    "#37517e", "#8a5a83", "#c2410c", "#1f78b4", "#7a6a00", "#444444",
)  # fmt: skip
_PERCENTILE = 99.0  # of all magnitudes, at which colors saturate: a few rotated features are far larger
_MAX_COLUMNS = 8  # of a grid without groups
_CELL = 1.25, 0.82  # inches, as all sizes here
_MARGIN = 0.9, 0.85  # left of and above the cells of a panel
_COLORBAR, _TITLE, _MIN_WIDTH = 0.85, 0.35, 6.0
_MAX_SIDE_BY_SIDE = 5  # columns of a panel up to which two panels are side by side
_MAX_LABELS = 12  # tokens of a cell that are labeled


def draw_keys(sides: Sequence[Keys]) -> Figure:
    """Return a figure of the keys of one model, or of two models on one scale.

    The color of a frame stands for the KV head.
    """
    from matplotlib.figure import Figure  # slow to import

    rows, limit = _rows(sides), _limit(sides)
    columns, grouped = max(map(len, rows)), any(keys.query_heads > keys.kv_heads for keys in sides)
    across, down = (1, len(sides)) if columns > _MAX_SIDE_BY_SIDE else (len(sides), 1)
    width, height = _MARGIN[0] + columns * _CELL[0], _MARGIN[1] + len(rows) * _CELL[1]
    size = max(across * width + _COLORBAR, _MIN_WIDTH), max(down * height + _TITLE, _MIN_WIDTH / 2)
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    figure.suptitle(f"Keys of layer {sides[0].layer}, as each query head reads them", fontsize=12, fontweight="bold")
    left, right = figure.subfigures(1, 2, width_ratios=(size[0] - _COLORBAR, _COLORBAR))  # type: ignore[misc]
    panels: Any = np.reshape(left.subfigures(down, across, squeeze=False), -1)
    image = None
    for panel, keys in zip(panels, sides, strict=True):
        image = _draw_panel(panel, keys, rows, limit, grouped=grouped)
    _draw_colorbar(right, image)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to an image file.

    Raises:
        UsageError: The file cannot be written, or its suffix is no image format.
    """
    with atomic_open(path) as file:
        try:
            figure.savefig(file, format=path.suffix[1:] or "png")
        except ValueError as error:  # not a format of matplotlib
            raise UsageError(f"cannot write `{path}`: {error}") from error


def default_path(keys: Keys) -> Path:
    """Return the default file name, `<model>_layer_<i>_gqa_keys.png`."""
    return Path(f"{keys.model}_layer_{keys.layer}_gqa_keys.png")


def _rows(sides: Sequence[Keys]) -> list[range | list[int]]:
    """Return the query heads of each row: the groups of the side with the fewest KV heads, for all sides alike."""
    fewest = min(sides, key=lambda keys: keys.kv_heads)
    heads = fewest.query_heads
    if heads > fewest.kv_heads:
        return [[head for head in range(heads) if fewest.reads[head] == kv] for kv in range(fewest.kv_heads)]
    columns = min(_MAX_COLUMNS, int(np.ceil(np.sqrt(heads))))
    return [range(start, min(start + columns, heads)) for start in range(0, heads, columns)]


def _limit(sides: Sequence[Keys]) -> float:
    magnitudes = np.concatenate([np.abs(keys.keys).reshape(-1) for keys in sides])
    return float(np.percentile(magnitudes[np.isfinite(magnitudes)], _PERCENTILE)) or 1.0


def _draw_panel(panel: SubFigure, keys: Keys, rows: Sequence[Sequence[int]], limit: float, *, grouped: bool) -> Any:
    size = keys.query_heads // keys.kv_heads
    shared = "each query head has its own" if size == 1 else f"{size} query heads share one"
    counts = f"{keys.query_heads} query heads, {keys.kv_heads} KV head{'s' if keys.kv_heads > 1 else ''}"
    panel.suptitle(f"{keys.model}\n{counts}: {shared}", fontsize=9)
    columns = max(map(len, rows))
    cells = panel.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for row, heads in enumerate(rows):
        for column in range(columns):
            axes = cells[row][column]
            if column >= len(heads):
                axes.set_axis_off()
                continue
            image = _draw_cell(axes, keys, heads[column], limit)
            last = row == len(rows) - 1
            axes.tick_params(labelbottom=last, bottom=last, labelleft=column == 0, left=column == 0)
        if grouped and len({keys.reads[head] for head in heads}) == 1:  # the other side may have several
            cells[row][0].set_ylabel(f"group {row}", fontsize=8, fontweight="bold")
    panel.supxlabel("feature of the head", fontsize=8)
    return image


def _draw_cell(axes: Any, keys: Keys, head: int, limit: float) -> Any:
    values = keys.of_query_head(head)  # [tokens, head_dim]
    image = axes.imshow(values, cmap=_COLORMAP, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    color = _FRAME_COLORS[keys.reads[head] % len(_FRAME_COLORS)]
    axes.set_title(f"query {head} reads KV {keys.reads[head]}", fontsize=6.5, pad=3, color=color)
    tokens, features = values.shape
    step = -(-tokens // _MAX_LABELS)
    axes.set_yticks(range(0, tokens, step), [_short(token) for token in keys.tokens[::step]], fontsize=5)
    axes.set_xticks([0, features - 1], ["0", str(features - 1)], fontsize=6)
    axes.tick_params(length=0, pad=1.5)
    for side in axes.spines.values():
        side.set_linewidth(1.6)
        side.set_color(color)
    return image


def _short(token: str) -> str:
    return token if len(token) <= 8 else f"{token[:7]}…"


def _draw_colorbar(panel: SubFigure, image: Any) -> None:
    bar = panel.colorbar(image, cax=panel.add_axes((0.12, 0.2, 0.16, 0.55)), extend="both")
    bar.set_label("value in the key", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
