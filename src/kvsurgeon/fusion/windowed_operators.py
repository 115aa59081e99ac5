"""Windows of `GroupQueryAttention`: buffers that hold the rows of a sliding window, from which the operator drops rows.

Source: the schema of onnxruntime 1.32. Past and present are one buffer of at least as many rows as the window has, of
which the first hold the last tokens, in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import sympy

from kvsurgeon.cache.pairs import WINDOW_BUFFER, CachePair
from kvsurgeon.fusion.operators import GROUP_QUERY_ATTENTION
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.resizing.windows import Window
from kvsurgeon.symbolic.dim_names import dim_names
from kvsurgeon.symbolic.dimension import MAX

Operators = Mapping[ir.Node, Window]


def operators_with_windows(pairs: Sequence[CachePair]) -> Operators:
    """Return the operators that can drop the rows before a sliding window of buffers that no other layer needs."""
    found: dict[ir.Node, Window] = {}
    for pair in pairs:
        readers = {node for past in pair.node.inputs[3:5] if past is not None for node, _ in past.uses()}
        windows = {_window(node) for node in readers}
        window = windows.pop() if len(windows) == 1 else None
        if window is not None and pair.is_buffer and not any(value.uses() for value in pair.node.outputs[1:3]):
            found |= dict.fromkeys(readers, window)
    return found


def drop_rows(model: ir.Model, operators: Operators) -> int:
    """Make operators keep the rows of their windows alone, and return the number of edits."""
    editor = Editor(model)
    for node, window in operators.items():
        editor.set_attributes(node, {WINDOW_BUFFER: 1})
        _declare_rows(node, window.extent)
    editor.finish()
    return editor.edits


def with_all_rows(model: ir.Model) -> ir.Model:
    """Return a copy of a model whose operators drop no rows."""
    copy = copy_model(model)
    editor = Editor(copy)
    for node in copy.graph:
        if node.attributes.get_int(WINDOW_BUFFER, 0):
            editor.remove_attribute(node, WINDOW_BUFFER)
            _declare_rows(node, MAX)
    return copy


def _declare_rows(node: ir.Node, rows: sympy.Symbol) -> None:
    """Declare the rows of the buffers of an operator."""
    for value in (*node.inputs[3:5], *node.outputs[1:3]):
        if value is not None and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:2], *dim_names([rows]), *value.shape[3:]])


def _window(node: ir.Node) -> Window | None:
    size = node.attributes.get_int("local_window_size", -1)
    return Window(last=size) if GROUP_QUERY_ATTENTION.is_at(node) and size > 0 else None
