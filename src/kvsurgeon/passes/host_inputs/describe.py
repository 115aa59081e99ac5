"""Description of context for the application: the numbers from which it computes the inputs of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.passes.host_inputs.tabulate import Array, ContextTable

HIDDEN = -10_000.0  # added to a score it leaves no weight, also in half precision


def has_equal_halves(context: ContextTable) -> bool:
    """Return whether rows contain the same features twice, as those of rotary tables do."""
    if context.kind != "rows" or context.table.ndim < 2 or context.table.shape[1] % 2:
        return False
    first, second = np.split(context.table, 2, axis=1)
    return bool(np.array_equal(first, second))


def describe(context: ContextTable, *, hidden_elsewhere: bool) -> Mapping[str, Any]:
    """Return the description of one input.

    A mask is described by a number for each distance between a query and an earlier key, and one number for all other
    keys. Rows are described by numbers for each position, columns by numbers for the position of each key.

    Args:
        context: The context.
        hidden_elsewhere: Whether another mask hides later keys, so that this one need not.

    Raises:
        UnsupportedError: A mask depends on more than the distance, or no mask hides later keys.
    """
    if context.kind == "mask":
        return {"kind": "mask", **_by_distance(context, hidden_elsewhere)}
    table = np.split(context.table, 2, axis=1)[0] if has_equal_halves(context) else context.table
    return {"kind": context.kind, "table": table.tolist()}


def hides_later_keys(context: ContextTable) -> bool:
    """Return whether the context is a mask that leaves later keys no weight."""
    return context.kind == "mask" and (context.table.dtype == bool or hidden_value(context) <= HIDDEN)


def hidden_value(context: ContextTable) -> Any:
    """Return the value of a mask for keys after the query: the largest one."""
    length = context.table.shape[-1]
    hidden = context.table[..., np.triu(np.ones((length, length), dtype=bool), 1)]
    return hidden.max() if hidden.dtype != bool else bool(hidden[..., 0].flat[0])


def _by_distance(context: ContextTable, hidden_elsewhere: bool) -> dict[str, Any]:
    table = context.table if context.table.ndim == 3 else context.table[None]
    distances = range(table.shape[-1])
    visible = np.stack([table[:, distance, 0] for distance in distances], axis=-1)  # [heads, distance]
    for distance in distances:
        diagonal = np.diagonal(table, -distance, axis1=1, axis2=2)
        if not np.array_equal(diagonal, np.broadcast_to(diagonal[:, :1], diagonal.shape)):
            raise UnsupportedError(
                "a mask depends on more than the distance of query and key", code=Code.PASS_PRECONDITION,
                at=context.value.name,
            )  # fmt: skip
    hidden = hidden_value(context)
    if visible.dtype == bool:
        numbers = np.where(visible == hidden, HIDDEN, 0.0)
    else:
        numbers = np.maximum(visible.astype(np.float64), HIDDEN)
    if hides_later_keys(context):
        return {"seen": _compressed(numbers), "hidden": HIDDEN}
    if not hidden_elsewhere:
        raise UnsupportedError(
            "a mask does not hide later keys", code=Code.PASS_PRECONDITION, at=context.value.name,
            expected=f"at most {HIDDEN:.0f}", found=str(hidden),
        )  # fmt: skip
    return {"seen": _compressed(numbers), "hidden": 0.0}


def _compressed(array: Array) -> Any:
    """Return the numbers as lists, or one number if all are equal."""
    if array.size and (array == array.flat[0]).all() and array.ndim == 2:
        return array.flat[0].item()
    return array.tolist()
