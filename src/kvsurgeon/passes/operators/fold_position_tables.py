"""Compute what depends on positions alone by one lookup in a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import shapes_of
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import is_fed, is_operator, producers, through, upstream
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.host_inputs.boundary import find_context, token_and_cache_inputs
from kvsurgeon.passes.host_inputs.tabulate import open_context, tabulate

MAX_ROWS = 32_768  # of a table whose numbers are computed


@dataclass(frozen=True, kw_only=True)
class FoldPositionTables:
    """Replace what a graph computes from the rows of a position table by one lookup in a table of the results.

    Before: rows of a constant table, such as one of rotary angles, are gathered by an input of positions, then
    reshaped, repeated or computed with. After: `Gather(table, positions)` of a table `[positions, features]`, with as
    many rows as the original one.

    Not handled: rows that also depend on a mask or on the number of tokens, and angles that are computed without a
    table.

    Attributes:
        input: Name of the input of positions, int64 `[batch, length]`.
    """

    name: ClassVar[str] = "fold-position-tables"

    input: str = "position_ids"

    def apply(self, subject: Subject) -> Outcome:
        """Replace the values of `subject.model`.

        Raises:
            UnsupportedError: The model has no cache.
        """
        graph = subject.model.graph
        positions = next((value for value in graph.inputs if value.name == self.input), None)
        if positions is None:
            return Unchanged(reason=f"the model has no input `{self.input}`")
        with deep_recursion():
            tables = list(_Tables(graph, positions).find())
        if not tables:
            return Unchanged(reason="no table is looked up by positions and computed with")
        editor = Editor(subject.model)
        rows: dict[tuple[str, bytes] | ir.Value, ir.Value] = {}
        for table in tables:
            table.value.replace_all_uses_with(_placed(editor, table, positions, rows))
        editor.edits += len(tables)
        editor.finish()
        return Changed(edits=editor.edits)


def _keeps_order(node: ir.Node) -> bool:
    """Return whether a node changes nothing but the shape."""
    return has_trait(node, Trait.RESHAPE) or is_operator(node, "Identity")


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A value that is a row of a table for each position.

    Attributes:
        value: The value.
        unit_axes: Its axes of size 1, except the batch.
        table: A table `[positions, features]`: one of the graph, or its numbers.
    """

    value: ir.Value
    unit_axes: Sequence[int]
    table: ir.Value | npt.NDArray[Any]


class _Tables:
    """Finds the values that are rows of a table."""

    def __init__(self, graph: ir.Graph, positions: ir.Value) -> None:
        self.graph, self.positions = graph, positions
        self.tokens, self.caches = token_and_cache_inputs(graph)
        self.shapes = shapes_of(graph)

    def find(self) -> Iterator[_Table]:
        """Yield the values that are not yet a lookup in a table of two axes by the input."""
        for value in find_context(self.graph, self.tokens, self.caches):
            lookups = self._lookups(value)
            if lookups:
                found = self._stored(value) or self._computed(value, min(lookups))
                if found is not None:
                    yield found

    def _lookups(self, value: ir.Value) -> list[int]:
        """Return the number of rows of each table that a value is computed from; nothing if it reads other inputs."""
        before = list(upstream([value], inputs=content_inputs))
        if {one for one in before if is_fed(one)} != {self.positions}:
            return []
        last = through(value, {"Unsqueeze"}).producer()
        if last is not None and _size_of_table(last) is not None and last.inputs[1] is self.positions:
            return []
        return [rows for node in producers(before) if (rows := self._rows(node)) is not None]

    def _rows(self, node: ir.Node) -> int | None:
        """Return the number of rows of the table of floats that a node looks positions up in; None for other nodes."""
        if not is_operator(node, "Gather", "GatherElements") or node.inputs[0] is None:
            return None
        if self.positions not in upstream([node.inputs[1]], inputs=content_inputs):
            return None
        table = self.shapes[node.inputs[0]]
        rows = None if table.shape is None else table.shape[_axis(node)]
        is_table = table.dtype is not None and table.dtype.is_floating_point()
        return rows if is_table and isinstance(rows, int) else None

    def _stored(self, value: ir.Value) -> _Table | None:
        """Return a table of weights whose rows are looked up by the positions themselves; its numbers are not read."""
        node = through(value, _keeps_order).producer()
        size = None if node is None else _size_of_table(node)
        if node is None or size is None:
            return None
        table, indices = node.inputs
        assert table is not None
        assert indices is not None
        inner = (self.shapes[value].shape or ())[1:]
        units = [axis for axis, one in enumerate(inner, 1) if one == 1]
        is_row = len(inner) - len(units) == 2 and inner[-1] == size[1]
        if not is_row or not self._are_positions(indices, size[0]):
            return None
        return _Table(value=value, unit_axes=units, table=table)

    def _are_positions(self, indices: ir.Value, length: int) -> bool:
        """Return whether indices are the positions themselves, up to axes of size 1."""
        if through(indices, _keeps_order) is self.positions:
            return True
        try:
            (found,) = open_context(self.graph, [indices], self.tokens, self.caches)(0, length)
        except UnsupportedError:
            return False
        return np.array_equal(found.ravel(), np.arange(length))

    def _computed(self, value: ir.Value, length: int) -> _Table | None:
        """Return the numbers of a value for each position."""
        try:
            run = open_context(self.graph, [value], self.tokens, self.caches)
            found = tabulate(run, [value], min(length, MAX_ROWS))
        except UnsupportedError:
            return None
        rows = [one for one in found if one.kind == "rows" and one.table.ndim == 2]
        if not rows:
            return None
        return _Table(value=value, unit_axes=[axis for axis in rows[0].unit_axes if axis], table=rows[0].table)


def _size_of_table(node: ir.Node) -> tuple[int, int] | None:
    """Return the size of the constant `[rows, features]` whose rows a node looks up; None for other nodes."""
    tensor = constant_tensor(node.inputs[0]) if is_operator(node, "Gather") and _axis(node) == 0 else None
    if tensor is None or not tensor.dtype.is_floating_point() or len(tensor.shape) != 2:
        return None
    rows, features = tensor.shape.numpy()
    return rows, features


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 0


def _placed(
    editor: Editor, found: _Table, positions: ir.Value, rows: dict[tuple[str, bytes] | ir.Value, ir.Value]
) -> ir.Value:
    """Return the rows of a table at the given positions, in the layout of the value that it replaces."""
    table = found.table
    key = table if isinstance(table, ir.Value) else (str(table.dtype), table.tobytes())
    if key not in rows:
        source = table if isinstance(table, ir.Value) else editor.constant(table, table.dtype, name="position_table")
        rows[key] = editor.node(
            "Gather", [source, positions], {"axis": 0}, name="position_rows", dtype=found.value.dtype or source.dtype
        )
    if not found.unit_axes:
        return rows[key]
    axes = editor.constant(found.unit_axes)
    return editor.node("Unsqueeze", [rows[key], axes], name="position_rows.placed", dtype=rows[key].dtype)
