"""Pictures of masks: a grid with a row for each query and a column for each key, as SVG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

from kvsurgeon.anatomy import Mask
from kvsurgeon.proof.attention.attention_pattern import AttentionPattern

_CELLS = 16  # rows and columns of a picture
_CELL, _GAP = 13, 1  # units of the picture
_NEW = 3  # rows of new tokens in the picture of the two lengths
_TOKENS = 8  # of the picture of the two lengths


def mask_picture(mask: Mask, pattern: AttentionPattern) -> tuple[Markup, int]:
    """Return a picture of a mask, and the number of tokens that one cell stands for."""
    tokens, visible = _visible(mask, pattern)
    kinds = [["on" if cell else "off" for cell in row] for row in visible]
    return _grid(kinds, f"mask: {mask.kind}; rows are queries, columns are keys"), tokens


def two_lengths_pictures() -> tuple[Markup, Markup]:
    """Return the scores of an export, N by N, and those of a call with a cache, S by T."""
    size = range(_TOKENS)
    export = [["on" if key <= query else "off" for key in size] for query in size]
    past = _TOKENS - _NEW
    call = [
        ["gone" if query < past else "off" if key > query else "past" if key < past else "new" for key in size]
        for query in size
    ]
    return (
        _grid(export, "scores of an export: N queries by N keys"),
        _grid(call, "scores of a call with a cache: S queries by T keys"),
    )


def _visible(mask: Mask, pattern: AttentionPattern) -> tuple[int, np.ndarray]:
    """Return the tokens of a cell, and [query, key] of bool: whether the query attends to the key.

    A mask of another form is shown by its measured weights.
    """
    if mask.kind == "other":
        weights = pattern.weights if pattern.uniform_weights is None else pattern.uniform_weights
        rows = (np.nan_to_num(weights) != 0).reshape(-1, *weights.shape[-2:]).any(axis=0)
        return 1, rows[: 2 * _CELLS, : 2 * _CELLS]
    span = mask.window or mask.chunk or 1
    tokens = max(1, -(-2 * span // _CELLS))
    query, key = np.arange(_CELLS)[:, None], np.arange(_CELLS)[None, :]
    visible = key <= query
    if mask.window is not None:
        visible = visible & ((query - key) * tokens < mask.window)
    if mask.chunk is not None:
        visible = visible & (query * tokens // mask.chunk == key * tokens // mask.chunk)
    return tokens, visible


def _grid(kinds: Sequence[Sequence[str]], title: str) -> Markup:
    """Return a grid of cells, each with the CSS class of its kind."""
    width, height = len(kinds[0]) * _CELL, len(kinds) * _CELL
    cells = Markup("").join(
        Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>').format(
            kind, column * _CELL, row * _CELL, _CELL - _GAP, _CELL - _GAP
        )
        for row, line in enumerate(kinds)
        for column, kind in enumerate(line)
    )
    return Markup('<svg class="grid" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width - _GAP, height - _GAP, escape(title), cells
    )
