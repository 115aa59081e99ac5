"""Quantized rows of a cache: each row of each head has integers and a scale.

A row x has the scale s = max|x| / q, with q = 127 or 7, and the integers round(x / s), halves to even; no offset. Of 4
bits, a byte holds two: the feature f in its low bits, and f + head_dim / 2 in its high bits, each plus 8. A row is
quantized once, when it enters the cache, and attention reads every row from the cache, new ones too. So the result does
not depend on how a text is split into calls.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.rewrite.cache_tensors import CacheTensor

_FLOAT = ir.DataType.FLOAT
_LARGEST = {8: 127, 4: 7}  # integer, by bits
_OFFSET, _STEP = 8, 16  # of 4 bits in a byte
_SMALLEST = float(np.finfo(np.float32).tiny)  # scale of a row of zeros


def quantize_rows(editor: Editor, tensor: CacheTensor, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the integers of rows and their scales, in the layout of the cache."""
    op = NodeBuilder(editor, f"{tensor.point.value.name}.quantized")
    bits, axis = tensor.bits or 0, tensor.layout.index("head_dim")
    rows = _cast(op, rows, tensor.point.dtype, _FLOAT)
    largest = op.with_axes("ReduceMax", op.Abs(rows), [axis], keepdims=1)
    scale = op.Max(op.Div(largest, op.number(_LARGEST[bits], _FLOAT)), op.number(_SMALLEST, _FLOAT))
    numbers = op.Div(rows, scale)
    if bits == 4:
        half = tensor.point.head_dim // 2
        integers = op.Add(op.Round(numbers), op.number(_OFFSET, _FLOAT))
        low, high = editor.split(integers, [half, half], axis, name=f"{tensor.point.value.name}.halves")
        numbers = op.Add(low, op.Mul(high, op.number(_STEP, _FLOAT)))
    return op.QuantizeLinear(numbers, op.number(1, _FLOAT), op.number(0, tensor.dtype)), scale


def dequantize_rows(editor: Editor, tensor: CacheTensor, integers: ir.Value, scale: ir.Value) -> ir.Value:
    """Return the rows in the type of the model, from their integers and scales."""
    op = NodeBuilder(editor, f"{tensor.point.value.name}.dequantized")
    one = op.number(1, _FLOAT)
    if tensor.bits == 4:
        shift, offset = op.number(4, tensor.dtype), op.number(_OFFSET, tensor.dtype)
        high = op.BitShift(integers, shift, direction="RIGHT")
        low = op.BitShift(op.BitShift(integers, shift, direction="LEFT"), shift, direction="RIGHT")
        halves = [op.DequantizeLinear(half, one, offset) for half in (low, high)]
        numbers = op.Concat(*halves, axis=tensor.layout.index("head_dim"))
    else:
        numbers = op.DequantizeLinear(integers, one, op.number(0, tensor.dtype))
    return _cast(op, op.Mul(numbers, scale), _FLOAT, tensor.point.dtype)


def _cast(op: NodeBuilder, value: ir.Value, before: ir.DataType, after: ir.DataType) -> ir.Value:
    return value if before is after else op.Cast(value, to=after)
