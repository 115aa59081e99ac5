"""Which inputs are a past, and which outputs their presents: decided by what the graph computes, never by names.

A present is an input with new rows joined behind it along one axis, or these rows alone, or an input into which they
were written. The graph writes that as a `Concat`, as a scatter, or leaves it to an operator that declares a past and a
present of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from kvsurgeon.dataflow.input_roles import real_inputs
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.symbolic.fact import axis_of

CacheMode = Literal[
    "dynamic", "static", "new-tokens"
]  # how a present is made: past and new rows, a buffer, new rows alone


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where an operator declares a past and its present, and where it is given the new rows."""

    past: int  # index of the input
    present: int  # index of the output
    rows: int  # index of the input
    axis: int  # of the sequence, in past and present
    counts: tuple[int, ...] = ()  # indices of the inputs that say how many rows there are
    ways: tuple[str, ...] = ()  # attributes that say how the past is kept, and nothing of what is computed


# Sources: the schemas of ONNX `Attention` (opset 23) and of onnxruntime's contrib operators.
SLOTS: dict[tuple[str, str], tuple[Slot, ...]] = {
    ("", "Attention"): (Slot(past=4, present=1, rows=1, axis=2), Slot(past=5, present=2, rows=2, axis=2)),
    ("com.microsoft", "GroupQueryAttention"): (
        Slot(past=3, present=1, rows=1, axis=2, counts=(5, 6), ways=("sliding_window_cache",)),
        Slot(past=4, present=2, rows=2, axis=2, counts=(5, 6), ways=("sliding_window_cache",)),
    ),
    ("com.microsoft", "MultiHeadAttention"): (
        Slot(past=6, present=1, rows=1, axis=2),
        Slot(past=7, present=2, rows=2, axis=2),
    ),
    ("com.microsoft", "Attention"): (Slot(past=4, present=1, rows=0, axis=3, ways=("past_present_share_buffer",)),),
}

# Operators that write rows into their first input: which input says where, and which holds the rows.
WRITERS = {"TensorScatter": (2, 1), "ScatterElements": (1, 2)}
WRITES = frozenset({*WRITERS, "ScatterND"})

_RESHAPED = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})  # the same elements in the same order


@dataclass(frozen=True, kw_only=True)
class CachePair:
    """An input that new rows are joined to, and the output that returns both."""

    past: ir.Value
    present: ir.Value
    node: ir.Node  # the `Concat`, or the operator that has a past of its own
    slot: Slot | None  # where the operator declares it; None for a `Concat`
    axis: int  # of the sequence in the past
    cache_mode: CacheMode = "dynamic"

    @property
    def is_written(self) -> bool:
        """Whether the past is a buffer that the new rows are written into."""
        return self.cache_mode == "static"

    @property
    def counts(self) -> tuple[ir.Value, ...]:
        """What says where rows are written."""
        places = (WRITERS[self.node.op_type][0],) if self.slot is None else self.slot.counts
        return tuple(value for place in places if (value := self.node.inputs[place]) is not None)


def find_cache_pairs(graph: ir.Graph) -> tuple[CachePair, ...]:
    """Return every past with its present, in the order of the graph's inputs.

    Raises:
        UnsupportedError: An input is returned twice, or its sequence axis cannot be told.
    """
    order = {value: place for place, value in enumerate(real_inputs(graph))}
    found: dict[ir.Value, CachePair] = {}
    inside = _joins_inside(graph, order)
    for present in graph.outputs:
        join = _join(present, order) or _of_rows(present, inside)
        if join is None:
            continue
        if join.past in found:
            raise UnsupportedError(
                "one past is returned by two outputs", at=join.past.name,
                found=f"`{found[join.past].present.name}` and `{present.name}`",
            )  # fmt: skip
        found[join.past] = join
    return tuple(sorted(found.values(), key=lambda join: order[join.past]))


def find_buffers(graph: ir.Graph) -> tuple[ir.Value, ...]:
    """Return the pasts whose presents are made in another way than by joining, such as by a `ScatterND`."""
    inputs = set(real_inputs(graph)) - {join.past for join in find_cache_pairs(graph)}
    returned = {_behind_views(value)[0] for value in graph.outputs}
    found: dict[ir.Value, None] = {}
    for node in graph:
        written = node.op_type in WRITES and node.outputs[0] in returned
        joined = node.op_type == "Concat" and len(node.inputs) == 2 and _source(node, 1) in returned
        past = _source(node, 0) if written or joined else None
        if past in inputs and past is not None and holds_features(past):
            found[past] = None
    return tuple(found)


def check_growth(graph: ir.Graph) -> None:
    """Hold that no cache is kept in a way that is not known.

    Raises:
        UnsupportedError: One is.
    """
    buffers = find_buffers(graph)
    if buffers:
        raise UnsupportedError(
            "how the cache is kept is not known", at=buffers[0].name,
            expected="new rows behind the past, alone, or written by a TensorScatter or a ScatterElements",
            found="rows that are written otherwise", hint="start from the model without a cache",
        )  # fmt: skip


def _source(node: ir.Node, index: int) -> ir.Value | None:
    value = node.inputs[index]
    return None if value is None else _behind_views(value)[0]


def holds_features(value: ir.Value) -> bool:
    """Whether an input holds several numbers for each token, as keys and values do, and masks do not."""
    return any(isinstance(size, int) and size > 1 for size in tuple(value.shape or ())[1:])


def slots_of(node: ir.Node) -> tuple[Slot, ...]:
    """Return where an operator declares pasts of its own."""
    return SLOTS.get((node.domain.replace("ai.onnx", ""), node.op_type), ())


def _join(present: ir.Value, inputs: dict[ir.Value, int]) -> CachePair | None:
    joined, _ = _behind_views(present)
    node = joined.producer()
    if node is None:
        return None
    for slot in slots_of(node):
        value = node.inputs[slot.past] if slot.past < len(node.inputs) else None
        if joined is node.outputs[min(slot.present, len(node.outputs) - 1)] and value is not None:
            past, views = _behind_views(value)
            if past in inputs:
                axis = _axis_before(views, slot.axis, past)
                return CachePair(
                    past=past, present=present, node=node, slot=slot, axis=axis, cache_mode=_kept(past, present, axis)
                )
    joins = node.op_type in WRITERS or (node.op_type == "Concat" and len(node.inputs) > 1)
    if not joins or node.inputs[0] is None:
        return None
    past, views = _behind_views(node.inputs[0])
    if past not in inputs or past.shape is None or not len(past.shape):
        return None
    said = node.attributes.get("axis")
    axis = _axis_before(views, -2 if said is None else said.as_int(), past)
    cache_mode: CacheMode = "static" if node.op_type in WRITERS else "dynamic"
    return CachePair(past=past, present=present, node=node, slot=None, axis=axis, cache_mode=cache_mode)


def _kept(past: ir.Value, present: ir.Value, axis: int) -> CacheMode:
    """How an operator keeps its past: in place where the present is declared to be as long, whatever that is."""
    sizes = [None if value.shape is None else value.shape[axis] for value in (past, present)]
    named = isinstance(sizes[0], int) or getattr(sizes[0], "value", None) is not None
    return "static" if named and sizes[0] == sizes[1] else "dynamic"


def _joins_inside(graph: ir.Graph, inputs: dict[ir.Value, int]) -> dict[ir.Value, list[ir.Node]]:
    """Every `Concat` of an input and something else, by what that is."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if node.op_type != "Concat" or len(node.inputs) != 2 or None in node.inputs:
            continue
        past, rows = (_behind_views(value)[0] for value in node.inputs if value is not None)
        if past in inputs and len(past.shape or ()) > 2 and (rows not in inputs or holds_features(rows)):
            found.setdefault(rows, []).append(node)
    return found


def _of_rows(present: ir.Value, inside: dict[ir.Value, list[ir.Node]]) -> CachePair | None:
    """The join whose new rows are returned, and not the whole."""
    nodes = inside.get(_behind_views(present)[0], [])
    if len(nodes) != 1 or nodes[0].inputs[0] is None:
        return None
    past, views = _behind_views(nodes[0].inputs[0])
    axis = _axis_before(views, nodes[0].attributes["axis"].as_int(), past)
    return CachePair(past=past, present=present, node=nodes[0], slot=None, axis=axis, cache_mode="new-tokens")


def _behind_views(value: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """The value whose elements these are, rearranged or not, and the nodes that rearranged them, last one first."""
    views: list[ir.Node] = []
    while (node := value.producer()) is not None and _is_view(node):
        views.append(node)
        source = node.inputs[0]
        assert source is not None
        value = source
    return value, views


def _is_view(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return False
    alone = node.op_type == "Concat" and len(node.inputs) == 1
    return alone or node.op_type in ("Identity", "Transpose") or node.op_type in _RESHAPED


def _axis_before(views: list[ir.Node], axis: int, past: ir.Value) -> int:
    """Which axis of the past became this one."""
    if past.shape is None:
        raise UnsupportedError("an input has no shape", at=past.name, expected="the shape of a past")
    if any(view.op_type in _RESHAPED for view in views):
        return _only_open_axis(past)
    axis = axis_of(axis, len(past.shape))
    for view in views:
        if view.op_type == "Transpose":
            order = view.attributes["perm"].as_ints() if "perm" in view.attributes else None
            axis = len(past.shape) - 1 - axis if order is None else order[axis]
    return axis


def _only_open_axis(past: ir.Value) -> int:
    """The sequence axis of a past that is reshaped before it is joined: the only one that may have any size."""
    places = list(_open_axes(past))
    if len(places) != 1:
        raise UnsupportedError(
            "the past is reshaped before it is joined, and which axis is its sequence cannot be told",
            at=past.name, expected="one axis of any size behind the batch", found=str(past.shape),
        )  # fmt: skip
    return places[0]


def _open_axes(past: ir.Value) -> Iterator[int]:
    for place, size in enumerate(past.shape or ()):
        if place and not isinstance(size, int):
            yield place
