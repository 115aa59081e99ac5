"""Cache layouts: the order of the axes of a cached tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Literal

import onnx_ir as ir

Axis = Literal["batch", "kv_heads", "sequence", "head_dim"]
Layout = tuple[Axis, Axis, Axis, Axis]

DEFAULT_LAYOUT: Layout = ("batch", "kv_heads", "sequence", "head_dim")


def possible_layouts(
    shape: Sequence[int | str | None], sequence: int, *, batch: int | None, heads: int, head_dim: int
) -> Iterator[Layout]:
    """Yield the layouts that a declared shape allows, the default layout first.

    Args:
        shape: Sizes and names of the axes.
        sequence: Index of the sequence axis.
        batch: Size of the batch, if it is fixed.
        heads: Number of key/value heads.
        head_dim: Features of one head.

    >>> list(possible_layouts(["b", 2, 8, "p"], 3, batch=None, heads=2, head_dim=8))
    [('batch', 'kv_heads', 'head_dim', 'sequence')]
    """
    sizes = {"batch": batch, "kv_heads": heads, "head_dim": head_dim}
    for first, second, third, fourth in permutations(DEFAULT_LAYOUT):
        layout: Layout = first, second, third, fourth
        if len(shape) == len(layout) and layout.index("sequence") == sequence:
            pairs = [(size, sizes[axis]) for size, axis in zip(shape, layout, strict=True) if axis != "sequence"]
            if all(size == expected or not isinstance(size, int) for size, expected in pairs):
                yield layout


def declared_shape(value: ir.Value) -> tuple[int | str | None, ...]:
    """Return the sizes and names of the declared dimensions; None for a dimension without a name."""
    return tuple(size if isinstance(size, int) else size.value for size in value.shape or ())


def declared_names(value: ir.Value) -> list[str | None]:
    """Return the names of the declared dimensions; None for a fixed dimension and for one without a name."""
    return [None if isinstance(size, int) else size for size in declared_shape(value)]
