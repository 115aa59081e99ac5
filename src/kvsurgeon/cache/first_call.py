"""The inputs of a graph while nothing is remembered: what is empty with the past, and how many tokens a call has."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.cache.layout import declared, names_of
from kvsurgeon.cache.pairs import CachePair, holds_features
from kvsurgeon.dataflow.input_roles import read_inputs, real_inputs
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, Dimension

UNFIXED = "start from the model as it was before its shapes were fixed"

Dimensions = dict[ir.Value, tuple[Dimension, ...]]


def fill_buffers(graph: ir.Graph, joins: Sequence[CachePair]) -> int | None:
    """Let a call have as many tokens as buffers have rows, where that is a number; return it.

    Everything that was made for these rows is then for the tokens of the call, and nothing of a buffer is left over.

    Raises:
        UnsupportedError: A call has another number of tokens, or the buffers have not all as many rows.
    """
    buffers = [join for join in joins if join.is_written]
    rooms = {declared(join.past)[join.axis]: join.past for join in buffers}
    room = next((size for size in rooms if isinstance(size, int)), None)
    if room is None:
        return None
    given, length = read_inputs(graph)
    if len(rooms) > 1 or (isinstance(length, int) and length != room):
        raise UnsupportedError(
            "the past has a fixed length, so it cannot be empty", at=rooms[room].name,
            expected=f"buffers of {room} rows, and calls of any length",
            found=f"calls of {length} tokens, and buffers of {' and '.join(map(str, rooms))} rows", hint=UNFIXED,
        )  # fmt: skip
    for value, sizes in given.items():
        named = zip(declared(value), sizes, strict=True)
        value.shape = ir.Shape([room if size is LENGTH else name for name, size in named])
    return room


def beside_the_past(graph: ir.Graph, joins: Sequence[CachePair]) -> list[ir.Value]:
    """Inputs that have as many places as there are tokens in the past, such as a mask of its own: empty too.

    Raises:
        UnsupportedError: One is a past itself, and its present is not the past with new rows behind it.
    """
    lengths = {names_of(join.past)[join.axis] for join in joins if not join.is_written} - {None}
    pasts = [join.past for join in joins]
    found = [value for value in real_inputs(graph) if value not in pasts and lengths & set(names_of(value))]
    for value in found:
        if holds_features(value):
            raise UnsupportedError(
                "an input has a row for each token of the past, and no output returns these with new rows behind them",
                at=value.name, hint="the cache stays where it is",
            )  # fmt: skip
    return found


def empty_dimensions(empty: Sequence[ir.Value], joins: Sequence[CachePair], given: Dimensions) -> Dimensions:
    """The dimensions of what is empty, with 0 where the past's length was."""
    names: dict[str | None, Dimension] = {
        name: size
        for value, sizes in reversed(given.items())
        for name, size in zip(names_of(value), sizes, strict=True)
    }
    room = {join.past: LENGTH if join.is_written else 0 for join in joins}  # a buffer holds a call's rows, and no more
    names |= {names_of(join.past)[join.axis]: room[join.past] for join in joins}
    axes = {join.past: join.axis for join in joins}
    found: Dimensions = {}
    for value in empty:
        sizes: list[Dimension] = []
        for axis, (size, name) in enumerate(zip(value.shape or (), names_of(value), strict=True)):
            own = BATCH if axis == 0 else dim.symbol(f"{value.name}.{axis}")
            sizes.append(
                size if isinstance(size, int) else room[value] if axes.get(value) == axis else names.get(name, own)
            )
        found[value] = tuple(sizes)
    return found
