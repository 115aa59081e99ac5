"""Cache removal: partial evaluation of the graph for an empty past.

A cache input without rows is given, and what follows from it is folded: a `Concat` with it leaves the new rows, its
length is 0, and numbers computed from that change. Recurrent states are zeros. So the result computes what the model
computes in a first call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from kvsurgeon.cache.cache_branch import take_cache_branch
from kvsurgeon.cache.empty_cache import DYNAMIC_HINT, empty_dimensions, fill_buffers, inputs_of_past_length
from kvsurgeon.cache.layout import declared_names, declared_shape
from kvsurgeon.cache.length_inputs import find_length_inputs, past_length_source, set_to_zero
from kvsurgeon.cache.pairs import CachePair, find_cache_pairs
from kvsurgeon.cache.signature import CacheSignature, SignatureEntry
from kvsurgeon.cache.stacked_caches import unstack_caches
from kvsurgeon.cache.states import FixedState, find_recurrent_states
from kvsurgeon.cache.unknown_caches import find_unknown_caches
from kvsurgeon.dataflow.input_dimensions import Dimensions, declared_dimensions, resolve_inputs
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.decompose.simplify import simplify_model
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import all_inputs, is_operator
from kvsurgeon.ops.gather import slice_bounds
from kvsurgeon.ops.table import find_links
from kvsurgeon.resizing.lengths import LengthValues, sources_of
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import Fact, axis_of, known
from kvsurgeon.symbolic.sequence_axes import Length

_HINT = "the cache cannot be removed"


@dataclass(frozen=True, kw_only=True)
class RemovedCache:
    """A model without its cache.

    Attributes:
        model: The model without the cache.
        signature: The cache that was removed.
        edits: Number of edits.
    """

    model: ir.Model
    signature: CacheSignature
    edits: int


def remove_cache(model: ir.Model, *, dynamic: bool = False) -> RemovedCache | None:
    """Return a copy of a model without its cache; None if it has none. The model is unchanged.

    Args:
        model: The model.
        dynamic: Whether calls are of any length if buffers have a fixed number of rows: that number is the length
            wherever the graph has it. The result computes the same at this length, and is to be proved at others.

    Raises:
        UnsupportedError: The cache cannot be removed: a cache input has a fixed length, is read elsewhere, or is
            updated in an unknown way.
    """
    model = with_separate_caches(model)
    unknown = find_unknown_caches(model.graph)
    if unknown:
        past, found = next(iter(unknown.items()))
        raise UnsupportedError(
            "the cache is updated in an unknown way", code=Code.UNKNOWN_CACHE, at=past.name,
            expected="new rows appended to the past, returned alone, or written into it", found=found,
            hint="use the model without a cache",
        )  # fmt: skip
    if not find_cache_pairs(model.graph) and not find_recurrent_states(model.graph):
        return None
    copy = simplify_model(model)
    if copy is model:
        copy = copy_model(model)
    try:
        signature, edits = _remove(copy, dynamic=dynamic)
    except UnsupportedError:  # other axes may have as many elements
        if not dynamic:
            raise
        return remove_cache(model)
    return RemovedCache(model=copy, signature=signature, edits=edits)


def with_separate_caches(model: ir.Model) -> ir.Model:
    """Return a model with an input and an output for each cached tensor, and no branch without the cache.

    The original is not changed: the result is a copy, or the original itself if it is one.

    Raises:
        UnsupportedError: An input chooses between branches, and which of them uses the cache is unknown.
    """
    return unstack_caches(take_cache_branch(model))


def _remove(model: ir.Model, *, dynamic: bool) -> tuple[CacheSignature, int]:
    """Remove the cache of a model in place, and return its signature and the number of edits."""
    graph, editor = model.graph, Editor(model)
    pairs, states = find_cache_pairs(graph), find_recurrent_states(graph)
    entries = [_entry(pair) for pair in pairs]
    empty = [pair.past for pair in pairs] + inputs_of_past_length(graph, pairs)
    lengths = find_length_inputs(graph, pairs)
    zeros = [state.past for state in states]
    affected = _downstream(graph, [*empty, *zeros, *(length.value for length in lengths)])
    inputs, outputs = (tuple(v.name or "" for v in values) for values in (graph.inputs, graph.outputs))
    capacity = fill_buffers(graph, editor, pairs, dynamic=dynamic)
    outputs_before = {value.name: declared_shape(value) for value in graph.outputs}
    for present in (*(pair.present for pair in pairs), *(state.present for state in states)):
        graph.outputs.remove(present)
    for value in (*empty, *zeros, *(length.value for length in lengths if length.is_whole_input)):
        graph.inputs.remove(value)
    for length in sorted(lengths, key=lambda length: length.is_whole_input):  # elements of an input before the input
        set_to_zero(graph, editor, length)
    _declare_all_tokens_new(graph, {_sequence_dim(pair.present, pair.axis) for pair in pairs} | {Length.TOTAL.value})
    declared, tokens = declared_dimensions(graph)
    removed = empty_dimensions([*empty, *zeros], pairs, declared)
    given = resolve_inputs(graph, list(graph), declared | removed, tokens)
    dimensions, shapes = {value: given.dimensions[value] for value in declared}, given.shapes
    folding = _Folding(editor, shapes, empty, LengthValues(editor, sources_of(dimensions)))
    rows = [folding.disconnect(pair) for pair in pairs]
    entries += [_recurrent_entry(state) for state in states]
    rows += [folding.set_to_zero(state.past, given.dimensions[state.past]) for state in states]
    for node in affected:
        folding.fold(node)
    editor.finish()
    _check_unused(graph, pairs, empty)
    _declare_shapes(graph, dimensions, shapes.facts)
    if capacity is not None and dynamic:
        _check_sizes(graph, resolve_inputs(graph, list(graph), *declared_dimensions(graph)).shapes, outputs_before)
    past_length = past_length_source(lengths, pairs)
    signature = CacheSignature(
        entries=tuple(
            replace(entry, rows=folding.current(value).name or "") for entry, value in zip(entries, rows, strict=True)
        ),
        inputs=inputs, outputs=outputs, past_length=past_length, capacity=capacity,
        length_input=next((one for one in lengths if one.is_whole_input), None) if past_length == "input" else None,
    )  # fmt: skip
    return signature, editor.edits


def _check_sizes(graph: ir.Graph, shapes: Shapes, declared: Mapping[str | None, Sequence[int | str | None]]) -> None:
    """Check that nothing else than rows had as many elements: no constant along an axis of tokens, and no output.

    Raises:
        UnsupportedError: One has, such as a table of masks.
    """
    for value in graph.outputs:
        pairs = zip(declared.get(value.name, ()), shapes[value].shape or (), strict=False)
        before = next((one for one, size in pairs if isinstance(one, int) and not isinstance(size, int)), None)
        if before is not None:
            raise _not_rows(value, before)
    for node in graph:
        _check_sizes_of_node(node, shapes)


def _check_sizes_of_node(node: ir.Node, shapes: Shapes) -> None:
    links = find_links(shapes.call(node))
    if links is None or links.row_major:
        return
    sizes = defaultdict[Hashable, set[Dimension]](set)
    for value, labels in zip(node.inputs, links.inputs, strict=False):
        shape = None if value is None else shapes[value].shape
        for label, size in zip(labels or (), shape or (), strict=False):
            if label is not None and label != links.joined:
                sizes[label].add(size)
    for found in sizes.values():
        numbers = [size for size in found if isinstance(size, int) and size != 1]
        if numbers and len(found - {1}) > len(numbers):
            raise _not_rows(node.outputs[0], numbers[0])


def _not_rows(value: ir.Value, found: int) -> UnsupportedError:
    return UnsupportedError(
        "an axis has the number of rows of the cache", code=Code.FIXED_LENGTH, at=value.name,
        expected="a dynamic length", found=str(found), hint=_HINT,
    )  # fmt: skip


class _Folding:
    """Folding of what is known for an empty past.

    Attributes:
        editor: The editor of the graph.
        shapes: Shapes and known content of all values, for an empty past.
        empty: The inputs that are empty.
        lengths: Lengths at run time.
    """

    def __init__(self, editor: Editor, shapes: Shapes, empty: Sequence[ir.Value], lengths: LengthValues) -> None:
        self.editor = editor
        self.shapes = shapes
        self.empty = empty
        self.lengths = lengths
        self._replaced: dict[ir.Value, ir.Value] = {}

    def disconnect(self, pair: CachePair) -> ir.Value:
        """Disconnect the past from the operator that updates it, and return the new rows."""
        node, operands = pair.node, pair.operands
        if node.op_type == "Concat":
            return node.outputs[0]
        rows = node.inputs[operands.rows] or node.inputs[0]  # the latter holds queries, keys and values
        assert rows is not None
        if not operands.is_declared:
            self._replace(node.outputs[0], rows)
            return rows
        self.editor.replace_input(node, operands.past, None)
        for option in operands.options:
            self.editor.remove_attribute(node, option)
        given = [index for index, value in enumerate(node.inputs) if value is not None]
        node.resize_inputs(given[-1] + 1)
        return rows

    def set_to_zero(self, past: ir.Value, sizes: Sequence[Dimension]) -> ir.Value:
        """Replace a recurrent state by zeros, and return them."""
        assert past.dtype is not None
        zero = self.editor.constant(0, past.dtype.numpy(), name="zero")
        inputs = [zero, self.lengths.vector(sizes)]
        zeros = self.editor.node("Expand", inputs, name=f"{past.name}.zeros", dtype=past.dtype)
        self.shapes.facts[zeros] = self.shapes[past]
        self._replace(past, zeros)
        return zeros

    def fold(self, node: ir.Node) -> None:
        """Replace the outputs of a node that are known for an empty past."""
        if node.op_type == "Concat":
            self._drop_empty_inputs(node)
        elif is_operator(node, "Slice") and self._keeps_all(node):
            assert node.inputs[0] is not None
            self._replace(node.outputs[0], node.inputs[0])
            return
        for value in node.outputs:
            fact = self.shapes.facts.get(value)
            folded = None if fact is None else self._folded(node, value, fact)
            if folded is not None:
                self._replace(value, folded)

    def _drop_empty_inputs(self, node: ir.Node) -> None:
        """Drop the inputs of a `Concat` that have no rows."""
        full = [value for value in node.inputs if value is not None and not self._has_no_rows(node, value)]
        if len(full) == 1:
            self._replace(node.outputs[0], full[0])
        elif full and len(full) < len(node.inputs):
            for index, value in enumerate(full):
                self.editor.replace_input(node, index, value)
            node.resize_inputs(len(full))

    def _keeps_all(self, node: ir.Node) -> bool:
        """Return whether a `Slice` takes rows of which the new ones are all: of a static cache, or the last ones."""
        bounds = slice_bounds(self.shapes.call(node))
        shapes = [None if value is None else self.shapes[value].shape for value in (node.inputs[0], node.outputs[0])]
        is_forward = bounds is not None and set(bounds[3]) == {1}
        return is_forward and shapes[0] is not None and shapes[0] == shapes[1]

    def _has_no_rows(self, node: ir.Node, value: ir.Value) -> bool:
        shape = self.shapes[value].shape
        return shape is not None and shape[axis_of(node.attributes["axis"].as_int(), len(shape))] == 0

    def _folded(self, node: ir.Node, value: ir.Value, fact: Fact) -> ir.Value | None:
        """Return a constant or another value with the same known content, or a new one if the past was read."""
        if fact.value is None or fact.dtype is None:
            return None
        if all(isinstance(number, (int, float, np.number, np.bool_)) for number in fact.value.reshape(-1)):
            dtype = fact.dtype.numpy()
            constant = self.editor.constant(fact.value.astype(dtype), dtype, name=value.name or "numbers")
            self.shapes.facts[constant] = known(fact.value, fact.dtype)
            return constant
        for source in node.inputs:
            if source is not None and source not in self.empty and _same(self.shapes[source], fact):
                return source
        if not any(source in self.empty for source in node.inputs):
            return None
        try:
            written = self.lengths.typed(self.lengths.array(fact.value), fact.dtype)
        except UnsupportedError:  # a size that no other input has; it may be dead code
            return None
        self.shapes.facts[written] = fact
        return written

    def _replace(self, value: ir.Value, by: ir.Value) -> None:
        if value.is_graph_output():
            by = self.editor.replace_output(value, by)
        self._replaced[value] = by
        value.replace_all_uses_with(by)
        self.editor.edits += 1

    def current(self, value: ir.Value) -> ir.Value:
        while value in self._replaced:
            value = self._replaced[value]
        return value


def _check_unused(graph: ir.Graph, pairs: Sequence[CachePair], empty: Sequence[ir.Value]) -> None:
    """Check that nothing reads an empty input any more, and drop the cache outputs of operators.

    Raises:
        UnsupportedError: Something reads an empty input or a cache output.
    """
    for node in graph:
        for value in all_inputs(node):
            if value in empty:
                raise UnsupportedError(
                    f"{node.op_type} reads a cache input for more than its update", code=Code.UNKNOWN_CACHE,
                    at=value.name, found=f"`{node.outputs[0].name}`", hint=_HINT,
                )  # fmt: skip
    for pair in pairs:
        index, outputs = pair.operands.present, pair.node.outputs
        if not pair.operands.is_declared or index >= len(outputs):
            continue
        if outputs[index].uses():
            raise UnsupportedError(
                f"the present of {pair.node.op_type} is read elsewhere", code=Code.UNKNOWN_CACHE,
                at=outputs[index].name, hint=_HINT,
            )  # fmt: skip
        outputs[index].name = ""
        kept = max((place for place, value in enumerate(outputs) if value.name), default=0)
        pair.node.resize_outputs(kept + 1)


def _downstream(graph: ir.Graph, values: Sequence[ir.Value]) -> list[ir.Node]:
    """Return the nodes that depend on values, in order, including those that capture one in a subgraph."""
    found, nodes = set(values), []
    for node in graph:
        if any(value in found for value in all_inputs(node)):
            found.update(node.outputs)
            nodes.append(node)
    return nodes


def _declare_all_tokens_new(graph: ir.Graph, totals: Collection[str | None]) -> None:
    """Declare that inputs for all tokens are as long as those for the new ones, because there is no past.

    Args:
        graph: The graph without its cache.
        totals: Names of dimensions of all tokens; None is no name.
    """
    declared, length = declared_dimensions(graph)
    axes = [(value, axis) for value, sizes in declared.items() for axis, size in enumerate(sizes) if size == length]
    size = next((value.shape[axis] for value, axis in axes if value.shape is not None), None)
    for value in declared if size is not None else ():
        sizes = list(value.shape or ())
        value.shape = ir.Shape([size if _is_named(one, totals) else one for one in sizes])


def _is_named(size: int | ir.SymbolicDim, names: Collection[str | None]) -> bool:
    return isinstance(size, ir.SymbolicDim) and size.value is not None and size.value in names


def _sequence_dim(value: ir.Value, axis: int) -> str | None:
    size = None if value.shape is None else value.shape[axis]
    return size.value if isinstance(size, ir.SymbolicDim) else None


def _entry(pair: CachePair) -> SignatureEntry:
    past = pair.past
    assert past.shape is not None
    if past.dtype is None or (isinstance(past.shape[pair.axis], int) and not pair.has_fixed_rows):
        raise UnsupportedError(
            "a cache input has a fixed length, so it cannot be empty", code=Code.FIXED_LENGTH, at=past.name,
            expected=f"a dynamic axis {pair.axis}", found=str(past.shape), hint=DYNAMIC_HINT,
        )  # fmt: skip
    return SignatureEntry(
        past=past.name or "", present=pair.present.name or "", dtype=past.dtype, shape=declared_shape(past),
        axis=pair.axis, rows="", is_declared=pair.operands.is_declared, cache_mode=pair.cache_mode,
        operator=pair.node.op_type, window=pair.window,
    )  # fmt: skip


def _recurrent_entry(state: FixedState) -> SignatureEntry:
    past = state.past
    assert past.dtype is not None
    return SignatureEntry(
        past=past.name or "", present=state.present.name or "", dtype=past.dtype, shape=declared_shape(past),
        axis=0, rows="", is_declared=False, cache_mode="recurrent", operator="",
    )  # fmt: skip


def _same(one: Fact, other: Fact) -> bool:
    """Return whether two values have the same known content, shape and type."""
    if one.value is None or other.value is None or one.dtype is not other.dtype:
        return False
    return one.value.shape == other.value.shape and bool(np.all(one.value == other.value))


def _declare_shapes(graph: ir.Graph, dimensions: Dimensions, facts: dict[ir.Value, Fact]) -> None:
    """Declare the shapes of inputs and values, with one name for each dimension."""
    names: dict[Dimension, str | None] = {}
    for value, sizes in dimensions.items():
        for name, size in zip(declared_names(value), sizes, strict=True):
            if not isinstance(size, int):
                names.setdefault(size, name)
    for value, sizes in dimensions.items():
        value.shape = ir.Shape([size if isinstance(size, int) else names[size] for size in sizes])
    for value in (value for node in graph for value in node.outputs):
        fact = facts.get(value)
        if value.shape is not None and fact is not None:
            shape = [size if isinstance(size, int) else names.get(size) for size in fact.shape or ()]
            value.shape = None if fact.shape is None else ir.Shape(shape)
