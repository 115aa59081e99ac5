"""How a tensor of a cache lies: the order of its four axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Literal

import onnx_ir as ir

Axis = Literal["batch", "kv_heads", "sequence", "head_dim"]
Layout = tuple[Axis, Axis, Axis, Axis]

USUAL: Layout = ("batch", "kv_heads", "sequence", "head_dim")


def layouts_of(
    shape: Sequence[int | str | None], sequence: int, *, batch: int | None, heads: int, head_dim: int
) -> Iterator[Layout]:
    """Yield the layouts that a declared shape may have, the usual one first.

    Args:
        shape: Numbers and names.
        sequence: The axis of the tokens.
        batch: The size of the batch where it is a number.
        heads: Key and value heads.
        head_dim: Features of one head.

    >>> list(layouts_of(["b", 2, 8, "p"], 3, batch=None, heads=2, head_dim=8))
    [('batch', 'kv_heads', 'head_dim', 'sequence')]
    """
    sizes = {"batch": batch, "kv_heads": heads, "head_dim": head_dim}
    for first, second, third, fourth in permutations(USUAL):
        layout: Layout = first, second, third, fourth
        if len(shape) == len(layout) and layout.index("sequence") == sequence:
            asked = [(size, sizes[axis]) for size, axis in zip(shape, layout, strict=True) if axis != "sequence"]
            if all(size == wanted or not isinstance(size, int) for size, wanted in asked):
                yield layout


def declared(value: ir.Value) -> tuple[int | str | None, ...]:
    """The dimensions that a value declares; None for one without a name."""
    return tuple(size if isinstance(size, int) else size.value for size in value.shape or ())


def names_of(value: ir.Value) -> list[str | None]:
    """The names of the dimensions that a value declares; None for a number, and for one without a name."""
    return [None if isinstance(size, int) else size for size in declared(value)]
