"""What a host is told: the numbers that it makes a call's context of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.host_inputs.tabulate import Array, Context

HIDDEN = -10_000.0  # added to a score, it leaves no weight, in half precision too


def halves(context: Context) -> bool:
    """Whether the features of rows are so many numbers twice, as those of rotary tables are."""
    if context.kind != "rows" or context.table.ndim < 2 or context.table.shape[1] % 2:
        return False
    first, second = np.split(context.table, 2, axis=1)
    return bool(np.array_equal(first, second))


def told(context: Context, *, hidden_elsewhere: bool) -> Mapping[str, Any]:
    """Return what the host must know of one input.

    A mask has a number for each distance between a query and an earlier key, and one for all other keys, which hides
    them, or may be any where another mask does; rows have numbers for each place, columns for the place of each key.

    Raises:
        UnsupportedError: A mask depends on more than distance, or nothing hides later keys.
    """
    if context.kind == "mask":
        return {"kind": "mask", **_by_distance(context, hidden_elsewhere)}
    table = context.table
    if halves(context):
        table = np.split(table, 2, axis=1)[0]
    return {"kind": context.kind, "table": table.tolist()}


def is_hiding(context: Context) -> bool:
    """Whether it is a mask that by itself leaves later keys no weight."""
    return context.kind == "mask" and (context.table.dtype == bool or hides(context) <= HIDDEN)


def hides(context: Context) -> Any:
    """Return what a mask holds where a key comes after the query."""
    places = context.table.shape[-1]
    future = np.triu(np.ones((places, places), dtype=bool), 1)
    hidden = context.table[..., future]
    return hidden.max() if hidden.dtype != bool else bool(hidden[..., 0].flat[0])


def _by_distance(context: Context, hidden_elsewhere: bool) -> dict[str, Any]:
    table = context.table if context.table.ndim == 3 else context.table[None]
    places = table.shape[-1]
    hidden = hides(context)
    seen = np.stack([table[:, distance, 0] for distance in range(places)], axis=-1)  # [heads, distance]
    for distance in range(places):
        diagonal = np.diagonal(table, -distance, axis1=1, axis2=2)
        if not np.array_equal(diagonal, np.broadcast_to(diagonal[:, :1], diagonal.shape)):
            raise UnsupportedError("a mask depends on more than the distance of query and key", at=context.value.name)
    if seen.dtype == bool:
        numbers = np.where(seen == hidden, HIDDEN, 0.0)
    else:
        numbers = np.maximum(seen.astype(np.float64), HIDDEN)
        if not is_hiding(context):
            if not hidden_elsewhere:
                raise UnsupportedError(
                    "a mask hides later keys by too small a number", at=context.value.name, found=str(hidden)
                )
            return {"seen": _numbers(numbers), "hidden": 0.0}
    return {"seen": _numbers(numbers), "hidden": HIDDEN}


def _numbers(array: Array) -> Any:
    """The numbers as lists, or one number where they are all the same."""
    if array.size and (array == array.flat[0]).all() and array.ndim == 2:
        return array.flat[0].item()
    return array.tolist()
