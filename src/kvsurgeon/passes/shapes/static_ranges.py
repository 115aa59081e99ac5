"""As many numbers as a shape says, from a start that a call gives: what is counted is fixed, where from is not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.graph.editor import Editor
from kvsurgeon.ops.gather import slice_bounds
from kvsurgeon.symbolic.fact import OperatorCall


def count_from_starts(model: ir.Model, editor: Editor, shapes: Shapes) -> None:
    """`Range(p, p + n)` becomes `p + [0, ..., n)`, and `Slice` from p a `Gather` at such numbers."""
    for node in list(model.graph):
        fact = shapes.facts.get(node.outputs[0])
        if fact is None or fact.shape is None or not all(isinstance(size, int) for size in fact.shape):
            continue
        call = shapes.call(node)
        made = None
        if node.op_type == "Range" and not _is_number(call, 0) and call.numbers(2) == (1,):
            made = _counted(editor, node.inputs[0], fact.shape[0], fact.dtype)
        elif node.op_type == "Slice" and len(node.inputs) > 2 and not _is_number(call, 1):
            made = _picked(editor, call, [int(size) for size in fact.shape if isinstance(size, int)])
        if made is not None:
            _hand_over(editor, node.outputs[0], made)


def _is_number(call: OperatorCall, index: int) -> bool:
    numbers = call.numbers(index)
    return numbers is not None and all(isinstance(number, (int, float)) for number in numbers)


def _counted(editor: Editor, start: ir.Value | None, count: object, dtype: ir.DataType | None) -> ir.Value | None:
    if start is None or not isinstance(count, int) or dtype is None:
        return None
    places = editor.constant(np.arange(count), dtype.numpy(), name="places")
    return editor.node("Add", [places, start], name=f"{start.name}.on", dtype=dtype, shape=[count])


def _picked(editor: Editor, call: OperatorCall, sizes: list[int]) -> ir.Value | None:
    """Rows from a start on, along each axis that has one; the other axes are sliced as they were."""
    bounds, value, starts = slice_bounds(call), call.node.inputs[0], call.node.inputs[1]
    if bounds is None or value is None or starts is None or any(step != 1 for step in bounds[3]):
        return None
    for place, (axis, start, end, _) in enumerate(zip(*bounds, strict=True)):
        dtype = starts.dtype or ir.DataType.INT64
        if isinstance(start, int) and isinstance(end, int):
            ends = [editor.constant([bound], dtype.numpy(), name="bound") for bound in (start, end)]
            axes = editor.constant([axis], dtype.numpy(), name="axes")
            value = editor.node("Slice", [value, *ends, axes], name=f"{value.name}.sliced", dtype=value.dtype)
            continue
        first = starts
        if len(bounds[0]) > 1:
            first = editor.node("Gather", [starts, editor.constant([place])], name="start", dtype=dtype, shape=[1])
        rows = _counted(editor, first, sizes[axis], dtype)
        assert rows is not None
        value = editor.node("Gather", [value, rows], {"axis": axis}, name=f"{value.name}.rows", dtype=value.dtype)
    return value


def _hand_over(editor: Editor, value: ir.Value, made: ir.Value) -> None:
    for node, index in list(value.uses()):
        editor.replace_input(node, index, made)
    if made.type is None:
        made.type = value.type
