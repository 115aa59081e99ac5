"""A graph while nothing is remembered: its past is empty, and so it needs none.

This is evaluation in part, and no recognising: a past of no rows is given, and what follows from it is written down.
Joined to new rows it leaves these, its length is 0, and numbers made of that are other numbers. So the result computes
what the original computes in its first call, whatever the original is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import sympy

from kvsurgeon.cache.first_call import UNFIXED, Dimensions, beside_the_past, empty_dimensions, fill_buffers
from kvsurgeon.cache.layout import declared, names_of
from kvsurgeon.cache.length_inputs import count_none, find_counters, tally_of
from kvsurgeon.cache.pairs import WRITERS, CachePair, check_growth, find_cache_pairs
from kvsurgeon.cache.signature import CacheEntry, CacheSignature
from kvsurgeon.dataflow.input_roles import read_inputs
from kvsurgeon.dataflow.shape_inference import infer_shapes
from kvsurgeon.decompose.simplify import simplify_model
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import all_inputs
from kvsurgeon.rewrite.lengths import LengthValues, Source
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import Fact, Numbers, axis_of, known


@dataclass(frozen=True, kw_only=True)
class Ejection:
    """A model without its cache, and what was taken out of it."""

    model: ir.Model
    signature: CacheSignature
    edits: int


def eject(model: ir.Model) -> Ejection | None:
    """Return the model without its cache; None where it has none. The model itself stays as it is.

    Raises:
        UnsupportedError: The cache cannot be taken out: a past has a fixed length, is used for more than being
            joined, or does
            not grow from call to call.
    """
    check_growth(model.graph)
    if not find_cache_pairs(model.graph):
        return None
    copy = simplify_model(model)
    if copy is model:
        copy = model.clone()
        copy.meta.update(model.meta)
    emptying = _Emptying(copy)
    signature = emptying.operate()
    return Ejection(model=copy, signature=signature, edits=emptying.editor.edits)


class _Emptying:
    """One ejection, from the first output that goes to the last dropped node."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.joins = find_cache_pairs(model.graph)
        self.entries = [_entry(join) for join in self.joins]
        self.empty = [join.past for join in self.joins] + beside_the_past(self.graph, self.joins)
        self.editor = Editor(model)
        self.counters = find_counters(model.graph, self.joins)
        self.reached = _downstream(self.graph, [*self.empty, *(counter.value for counter in self.counters)])
        self.instead: dict[ir.Value, ir.Value] = {}

    def operate(self) -> CacheSignature:
        """Do everything, and return what was taken out."""
        presents = {join.present for join in self.joins}
        inputs, outputs = (tuple(v.name or "" for v in values) for values in (self.graph.inputs, self.graph.outputs))
        room = fill_buffers(self.graph, self.joins)
        kept = [value for value in self.graph.outputs if value not in presents]
        self.graph.outputs.clear()
        self.graph.outputs.extend(kept)
        for value in (*self.empty, *(counter.value for counter in self.counters if counter.is_input)):
            self.graph.inputs.remove(value)
        for counter in self.counters:
            count_none(self.graph, self.editor, counter)
        given, _ = read_inputs(self.graph)
        opset = self.graph.opset_imports.get("", 1)
        self.shapes = infer_shapes(self.graph, given | empty_dimensions(self.empty, self.joins, given), opset)
        self.lengths = LengthValues(self.editor, _sources(given))
        rows = [self._rows(join) for join in self.joins]
        for node in self.reached:
            self._take(node)
        self.editor.finish()
        self._check_gone()
        _declare(self.graph, given, self.shapes.facts)
        named = zip(self.entries, rows, strict=True)
        entries = tuple(replace(entry, rows=self._now(value).name or "") for entry, value in named)
        tally = tally_of(self.counters, self.joins)
        return CacheSignature(entries=entries, inputs=inputs, outputs=outputs, tally=tally, room=room)

    def _rows(self, join: CachePair) -> ir.Value:
        """The rows that were joined to a past; an operator that joins them itself loses its past here."""
        if join.is_written and join.slot is None:
            rows = join.node.inputs[WRITERS[join.node.op_type][1]]
            assert rows is not None
            self._replace(join.node.outputs[0], rows)
            return rows
        if join.slot is None:
            return join.node.outputs[0]
        rows = join.node.inputs[join.slot.rows] or join.node.inputs[0]  # queries, keys and values in one
        assert rows is not None
        self.editor.replace_input(join.node, join.slot.past, None)
        for way in join.slot.ways:
            self.editor.remove_attribute(join.node, way)
        given = [place for place, value in enumerate(join.node.inputs) if value is not None]
        join.node.resize_inputs(given[-1] + 1)
        return rows

    def _take(self, node: ir.Node) -> None:
        """Write down what follows for one node."""
        if node.op_type == "Concat":
            self._leave_out_nothing(node)
        for value in node.outputs:
            fact = self.shapes.facts.get(value)
            if fact is not None and fact.value is not None and fact.dtype is not None:
                self._say(node, value, fact, fact.value)

    def _leave_out_nothing(self, node: ir.Node) -> None:
        """CachePair what has rows; what has none need not be joined."""
        full = [value for value in node.inputs if value is not None and not self._has_no_rows(node, value)]
        if len(full) == 1:
            self._replace(node.outputs[0], full[0])
        elif full and len(full) < len(node.inputs):
            for place, value in enumerate(full):
                self.editor.replace_input(node, place, value)
            node.resize_inputs(len(full))

    def _has_no_rows(self, node: ir.Node, value: ir.Value) -> bool:
        shape = self.shapes[value].shape
        return shape is not None and shape[axis_of(node.attributes["axis"].as_int(), len(shape))] == 0

    def _say(self, node: ir.Node, value: ir.Value, fact: Fact, numbers: Numbers) -> None:
        """Write known numbers down: as constants, as numbers that are there, or anew where the past was asked."""
        assert fact.dtype is not None
        if all(isinstance(number, (int, float, np.number, np.bool_)) for number in numbers.reshape(-1)):
            self._replace(value, self._constant(value, numbers, fact.dtype))
            return
        for source in node.inputs:
            if source is not None and source not in self.empty and _same(self.shapes[source], fact):
                self._replace(value, source)
                return
        if any(source in self.empty for source in node.inputs):
            try:
                written = self.lengths.typed(self.lengths.array(numbers), fact.dtype)
            except UnsupportedError:  # a size that no other input has: nobody may need it
                return
            self.shapes.facts[written] = fact
            self._replace(value, written)

    def _constant(self, value: ir.Value, numbers: Numbers, dtype: ir.DataType) -> ir.Value:
        constant = self.editor.constant(numbers.astype(dtype.numpy()), dtype.numpy(), name=value.name or "numbers")
        self.shapes.facts[constant] = known(numbers, dtype)
        return constant

    def _replace(self, value: ir.Value, by: ir.Value) -> None:
        self.instead[value] = by
        value.replace_all_uses_with(by, replace_graph_outputs=True)
        self.editor.edits += 1

    def _now(self, value: ir.Value) -> ir.Value:
        while value in self.instead:
            value = self.instead[value]
        return value

    def _check_gone(self) -> None:
        """See that nothing reads the past any more, nor what an operator returned of it.

        Raises:
            UnsupportedError: Something does.
        """
        for node in self.graph:
            for value in all_inputs(node):
                if value in self.empty:
                    raise UnsupportedError(
                        f"{node.op_type} reads the past for more than joining new rows to it", at=value.name,
                        found=f"`{node.outputs[0].name}`", hint="the cache stays where it is",
                    )  # fmt: skip
        for join in self.joins:
            if join.slot is not None:
                _drop_present(join.node, join.slot.present)


def _downstream(graph: ir.Graph, values: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes that depend on these values or on their shapes, in order."""
    reached, nodes = set(values), []
    for node in graph:
        if any(value in reached for value in all_inputs(node)):
            reached.update(node.outputs)
            nodes.append(node)
    return nodes


def _entry(join: CachePair) -> CacheEntry:
    past = join.past
    assert past.shape is not None
    if past.dtype is None or (isinstance(past.shape[join.axis], int) and not join.is_written):
        raise UnsupportedError(
            "the past has a fixed length, so it cannot be empty", at=past.name,
            expected=f"a symbol for axis {join.axis}", found=str(past.shape), hint=UNFIXED,
        )  # fmt: skip
    return CacheEntry(
        past=past.name or "", present=join.present.name or "", dtype=past.dtype, shape=declared(past), axis=join.axis,
        rows="", declared=join.slot is not None, cache_mode=join.cache_mode,
    )  # fmt: skip


def _sources(given: Dimensions) -> dict[sympy.Symbol, Source]:
    """Where each length can be read at run time."""
    sources: dict[sympy.Symbol, Source] = {}
    for value, sizes in given.items():
        for axis, size in enumerate(sizes):
            if not isinstance(size, int):
                sources.setdefault(size, Source(value=value, axis=axis))
    return sources


def _same(one: Fact, other: Fact) -> bool:
    """Whether two values hold the same known numbers in the same shape and type."""
    if one.value is None or other.value is None or one.dtype is not other.dtype:
        return False
    return one.value.shape == other.value.shape and bool(np.all(one.value == other.value))


def _drop_present(node: ir.Node, place: int) -> None:
    """Let an operator return no present; nobody reads it any more.

    Raises:
        UnsupportedError: Somebody does.
    """
    if place >= len(node.outputs):
        return
    if node.outputs[place].uses():
        raise UnsupportedError(
            f"what {node.op_type} returns as its present is read again", at=node.outputs[place].name,
            hint="the cache stays where it is",
        )  # fmt: skip
    node.outputs[place].name = ""
    kept = max((index for index, value in enumerate(node.outputs) if value.name), default=0)
    node.resize_outputs(kept + 1)


def _declare(graph: ir.Graph, given: Dimensions, facts: dict[ir.Value, Fact]) -> None:
    """Let declared shapes speak of the one length that there is now."""
    names: dict[Dimension, str | None] = {}
    for value, sizes in given.items():
        for name, size in zip(names_of(value), sizes, strict=True):
            if not isinstance(size, int):
                names.setdefault(size, name)
    for value, sizes in given.items():
        value.shape = ir.Shape([size if isinstance(size, int) else names[size] for size in sizes])
    for node in graph:
        for value in node.outputs:
            fact = facts.get(value)
            if value.shape is None or fact is None:
                continue
            if fact.shape is None:
                value.shape = None
            else:
                value.shape = ir.Shape([size if isinstance(size, int) else names.get(size) for size in fact.shape])
