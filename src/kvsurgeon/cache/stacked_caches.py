"""Stacked caches: one input holds the cached tensors of several layers, or keys and values, along an axis.

Before: `past [layers, heads, past, head_dim]` is sliced along the first axis, and `present` concatenates what is made
of each slice. After: an input `past[i]` and an output `present[i]` for each slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvsurgeon.cache.pairs import has_features
from kvsurgeon.dataflow.input_dimensions import required_inputs
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import chain, is_operator, through
from kvsurgeon.ops.content import is_shape_only
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic.fact import axis_of

_VIEWS = (Trait.IDENTITY, Trait.TRANSPOSE, Trait.RESHAPE)


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """A value that is the part [start, stop) of an input along an axis.

    Attributes:
        value: The value.
        axis: The axis.
        start: Index of the first element.
        stop: Index after the last element.
        keeps_axis: Whether the value has the axis; otherwise it is one element without it.
    """

    value: ir.Value
    axis: int
    start: int
    stop: int
    keeps_axis: bool = True


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """An input and an output that hold several cached tensors along an axis.

    Attributes:
        past: The input.
        present: The output.
        slices: What reads the input.
        pieces: For each part, in order, the value that the output has there.
    """

    past: ir.Value
    present: ir.Value
    slices: tuple[_Slice, ...]
    pieces: tuple[ir.Value, ...]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Bounds of the parts, in order."""
        return _bounds(self.slices)


def unstack_caches(model: ir.Model) -> ir.Model:
    """Return a model with an input and an output for each part of its stacked caches.

    The original is not changed: the result is a copy, or the original itself if it has none.
    """
    copy, stack = model, _first_stack(model.graph)
    while stack is not None:
        if copy is model:
            copy = copy_model(model)
            stack = _first_stack(copy.graph)
            continue
        _unstack(Editor(copy), stack)
        stack = _first_stack(copy.graph)
    return copy


def _first_stack(graph: ir.Graph) -> _Stack | None:
    """Return the first input that only slices along one axis read, if an output is made of them in their order."""
    for past in required_inputs(graph):
        slices = _slices(past) if has_features(past) else ()
        bounds = _bounds(slices)
        if len({one.axis for one in slices}) != 1 or len(bounds) < 2 or not _is_tiled(past, slices[0].axis, bounds):
            continue
        parts = [{one.value for one in slices if (one.start, one.stop) == part} for part in bounds]
        for present in graph.outputs:
            node = through(present, {"Identity"}).producer()
            if not is_operator(node, "Concat") or node is None or len(node.inputs) != len(parts):
                continue
            pieces = [value for value in node.inputs if value is not None]
            made = [part & set(chain(piece, _first_input)) for piece, part in zip(pieces, parts, strict=False)]
            if len(pieces) == len(parts) and all(made):
                return _Stack(past=past, present=present, slices=slices, pieces=tuple(pieces))
    return None


def _first_input(node: ir.Node) -> ir.Value | None:
    """Return the first input of a node that moves its elements, or writes or appends others."""
    is_moved = has_trait(node, *_VIEWS, Trait.SELECT, Trait.SCATTER) or is_operator(node, "Concat")
    return node.inputs[0] if is_moved and node.inputs else None


def _slices(past: ir.Value) -> tuple[_Slice, ...]:
    """Return what reads a part of an input along an axis; nothing if something else reads its content."""
    found: list[_Slice] = []
    for node, index in past.uses():
        if is_shape_only(node) or node.graph is None:  # the latter was removed as dead code
            continue
        parts = list(_parts(past, node)) if index == 0 else []
        if not parts:
            return ()
        found += parts
    return () if past.is_graph_output() else tuple(found)


def _parts(past: ir.Value, node: ir.Node) -> Iterator[_Slice]:
    """Yield the parts of an input that a node selects at constant positions along one axis."""
    rank = len(past.shape or ())
    numbers = [small_constant(value) for value in node.inputs[1:]]
    axis = axis_of(node.attributes.get_int("axis", 0), rank)
    if is_operator(node, "Slice") and len(numbers) in (3, 4):
        bounds = [None if array is None else array.reshape(-1).tolist() for array in numbers]
        if any(one is None or len(one) != 1 for one in bounds) or (len(bounds) == 4 and bounds[3] != [1]):
            return
        start, stop, axis = (one[0] for one in bounds[:3] if one is not None)
        axis = axis_of(axis, rank)
        size = past.shape[axis] if past.shape is not None else None
        if isinstance(size, int):
            start, stop, _ = slice(start, stop).indices(size)
            yield _Slice(value=node.outputs[0], axis=axis, start=start, stop=stop)
    elif is_operator(node, "Gather") and numbers[0] is not None and numbers[0].size == 1:
        size = past.shape[axis] if past.shape is not None else None
        if isinstance(size, int):
            place = int(numbers[0].reshape(-1)[0]) % size
            keeps = numbers[0].ndim == 1
            yield _Slice(value=node.outputs[0], axis=axis, start=place, stop=place + 1, keeps_axis=keeps)
    elif is_operator(node, "Split"):
        size = past.shape[axis] if past.shape is not None else None
        count = len(node.outputs)
        sizes = numbers[0].tolist() if numbers and numbers[0] is not None else node.attributes.get_ints("split")
        if isinstance(size, int) and (sizes is not None or size % count == 0):
            ends = np.cumsum(sizes if sizes is not None else [size // count] * count).tolist()
            for value, start, stop in zip(node.outputs, [0, *ends], ends, strict=False):
                yield _Slice(value=value, axis=axis, start=start, stop=stop)


def _bounds(slices: tuple[_Slice, ...]) -> list[tuple[int, int]]:
    return sorted({(one.start, one.stop) for one in slices})


def _is_tiled(past: ir.Value, axis: int, bounds: list[tuple[int, int]]) -> bool:
    """Return whether the parts cover an axis once."""
    ends = [0, *(stop for _, stop in bounds)]
    return [start for start, _ in bounds] == ends[:-1] and past.shape is not None and past.shape[axis] == ends[-1]


def _unstack(editor: Editor, stack: _Stack) -> None:
    """Replace a stacked input and its output by one for each part."""
    graph, past, axis = editor.graph, stack.past, stack.slices[0].axis
    assert past.shape is not None
    drops_axis = not all(one.keeps_axis for one in stack.slices)
    editor.before = next(iter(graph), None)
    whole: list[ir.Value] = []
    for place, (start, stop) in enumerate(stack.bounds):
        kept, sizes = list(past.shape), list(past.shape)
        kept[axis] = stop - start
        if drops_axis:
            del sizes[axis]
        name = editor.unique_name(f"{past.name}[{place}]")
        part = ir.Value(name=name, type=past.type, shape=ir.Shape(sizes if drops_axis else kept))
        graph.inputs.insert(graph.inputs.index(past), part)
        axes = editor.constant([axis], name="axis")
        with_axis = part
        if drops_axis:
            with_axis = editor.node(
                "Unsqueeze", [part, axes], name=f"{name}.kept", dtype=past.dtype, shape=ir.Shape(kept)
            )
        whole.append(with_axis)
        for one in stack.slices:
            if (one.start, one.stop) == (start, stop):
                one.value.replace_all_uses_with(with_axis if one.keeps_axis else part)
    joined = editor.node("Concat", whole, {"axis": axis}, name=f"{past.name}.all", dtype=past.dtype, shape=past.shape)
    past.replace_all_uses_with(joined)  # its shape is read
    graph.inputs.remove(past)
    _unstack_output(editor, stack)
    editor.finish()


def _unstack_output(editor: Editor, stack: _Stack) -> None:
    """Replace a stacked output by one for each part."""
    outputs = editor.graph.outputs
    index = outputs.index(stack.present)
    outputs.remove(stack.present)
    for place, piece in enumerate(stack.pieces):
        value = through(piece, lambda node: is_operator(node, "Unsqueeze") or is_operator(node, "Identity"))
        if value.producer() is None or value.is_graph_output():
            value = editor.node("Identity", [value], name="piece")
        value.type = stack.past.type
        value.name = editor.unique_name(f"{stack.present.name}[{place}]")
        outputs.insert(index + place, value)
