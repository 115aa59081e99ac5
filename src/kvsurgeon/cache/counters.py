"""Inputs that count past tokens: how many there are in a first call is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.cache.joins import Join
from kvsurgeon.errors import Refused
from kvsurgeon.graph.editor import Editor
from kvsurgeon.sequence.kinds import SHAPE_ONLY, real_inputs


def find_counters(joins: Sequence[Join]) -> list[ir.Value]:
    """Return the inputs that say how many tokens are past: where rows are written, or how many of them are filled.

    An operator that keeps its past itself may read that off a mask, which says as much of a call without one.

    Raises:
        Refused: It is read from something that says more.
    """
    found: dict[ir.Value, None] = {}
    for join in joins:
        counts = join.counts if join.is_written else ()
        told = _told_apart(join.past) if join.idiom == "new-only" else ()
        for value in _inputs_behind([*counts, *told]):
            if len(value.shape or ()) < 2 and value.dtype is not None and not value.dtype.is_floating_point():
                found[value] = None
            elif join.slot is None:
                raise Refused(
                    "where rows lie is told by an input that says more than a number", at=value.name,
                    expected="the number of past tokens", found=str(value.shape),
                )  # fmt: skip
    return list(found)


def _inputs_behind(values: Sequence[ir.Value | None]) -> Iterator[ir.Value]:
    """The graph's inputs whose numbers some values are made of."""
    pending, seen = list(values), set()
    while pending:
        value = pending.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is not None:
            pending += [] if node.op_type in SHAPE_ONLY else node.inputs
        elif value.is_graph_input() and not value.is_initializer():
            yield value


_SUMS = frozenset({"Add", "Sub", "Mul", "Neg"})
_ON_NUMBERS = _SUMS | {"Gather", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity"}


def _told_apart(past: ir.Value) -> Iterator[ir.Value | None]:
    """Yield the numbers that are added to the length of a past or taken from it: how many of its rows are filled."""
    asked = [node.outputs[0] for node, _ in past.uses() if node.op_type == "Shape"]
    seen, pending = set(asked), asked
    while pending:
        for node, index in pending.pop().uses():
            if node.op_type not in _ON_NUMBERS or (index and node.op_type not in _SUMS):
                continue
            if node.op_type in ("Add", "Sub"):
                yield from (value for value in node.inputs if value not in seen and _is_number(value))
            if node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                pending.append(node.outputs[0])


def _is_number(value: ir.Value | None) -> bool:
    return value is not None and (value.shape is None or len(value.shape) < 2)


def count_none(graph: ir.Graph, editor: Editor, counter: ir.Value) -> None:
    """Let whoever read the number of past tokens read 0, once or for each text."""
    assert counter.dtype is not None
    shape = [size if isinstance(size, int) else 1 for size in counter.shape or ()]
    none = editor.constant(np.zeros(shape), counter.dtype.numpy(), wish="no_past")
    batch = next(iter(spelled(counter)), None)
    given = next((value for value in real_inputs(graph) if batch is not None and batch in spelled(value)), None)
    if given is not None:
        sizes = editor.node("Shape", [given], wish="sizes", dtype=ir.DataType.INT64)
        place = editor.constant([spelled(given).index(batch)], wish="axis")
        texts = editor.node("Gather", [sizes, place], {"axis": 0}, wish="texts", dtype=ir.DataType.INT64)
        none = editor.node("Expand", [none, texts], wish="no_past_of_texts", dtype=none.dtype)
    counter.replace_all_uses_with(none)


def spelled(value: ir.Value) -> list[str | None]:
    """Return the names of a value's dimensions, None for a number."""
    return [None if isinstance(size, int) else size.value for size in value.shape or ()]
