"""Operators whose output has a static size and starts at a dynamic position."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.graph.editor import Editor
from kvsurgeon.ops.gather import slice_bounds
from kvsurgeon.passes.shapes.constant_folding import replace_uses
from kvsurgeon.symbolic.fact import OperatorCall


def make_ranges_static(model: ir.Model, editor: Editor, shapes: Shapes) -> None:
    """Replace `Range(p, p + n)` by `p + [0, ..., n)`, and `Slice` from p by `Gather` at these indices."""
    for node in list(model.graph):
        fact = shapes.facts.get(node.outputs[0])
        if fact is None or fact.shape is None or not all(isinstance(size, int) for size in fact.shape):
            continue
        call, output = shapes.call(node), None
        if node.op_type == "Range" and not _is_constant(call, 0) and call.numbers(2) == (1,):
            output = _indices(editor, node.inputs[0], fact.shape[0], fact.dtype)
        elif node.op_type == "Slice" and len(node.inputs) > 2 and not _is_constant(call, 1):
            output = _gather(editor, call, [int(size) for size in fact.shape if isinstance(size, int)])
        if output is not None:
            replace_uses(editor, node.outputs[0], output)
            output.type = output.type or node.outputs[0].type


def _is_constant(call: OperatorCall, index: int) -> bool:
    numbers = call.numbers(index)
    return numbers is not None and all(isinstance(number, (int, float)) for number in numbers)


def _indices(editor: Editor, start: ir.Value | None, count: object, dtype: ir.DataType | None) -> ir.Value | None:
    """Return `start + [0, ..., count)`."""
    if start is None or not isinstance(count, int) or dtype is None:
        return None
    offsets = editor.constant(np.arange(count), dtype.numpy(), name="places")
    return editor.node("Add", [offsets, start], name=f"{start.name}.on", dtype=dtype, shape=[count])


def _gather(editor: Editor, call: OperatorCall, sizes: list[int]) -> ir.Value | None:
    """Return a `Gather` along each axis with a dynamic start, and a `Slice` along the others."""
    bounds, value, starts = slice_bounds(call), call.node.inputs[0], call.node.inputs[1]
    if bounds is None or value is None or starts is None or any(step != 1 for step in bounds[3]):
        return None
    dtype = starts.dtype or ir.DataType.INT64
    for place, (axis, start, end, _) in enumerate(zip(*bounds, strict=True)):
        if isinstance(start, int) and isinstance(end, int):
            ends = [editor.constant([bound], dtype.numpy(), name="bound") for bound in (start, end)]
            axes = editor.constant([axis], dtype.numpy(), name="axes")
            value = editor.node("Slice", [value, *ends, axes], name=f"{value.name}.sliced", dtype=value.dtype)
            continue
        first = starts
        if len(bounds[0]) > 1:
            first = editor.node("Gather", [starts, editor.constant([place])], name="start", dtype=dtype, shape=[1])
        rows = _indices(editor, first, sizes[axis], dtype)
        value = editor.node("Gather", [value, rows], {"axis": axis}, name=f"{value.name}.rows", dtype=value.dtype)
    return value
