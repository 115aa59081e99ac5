"""Quantized caches of `GroupQueryAttention`: the operator quantizes rows by scales that are constants.

Source: the schema of onnxruntime 1.32; `k_scale` and `v_scale` are float32, `[1]` or `[kv_heads * head_dim]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.cache.pairs import CachePair
from kvsurgeon.cache.signature import QUANTIZED, CacheSignature
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor, NodeBuilder

RANGE = {8: (-128, 127), 4: (-8, 7)}  # integers, by bits
_KEY = 3  # index of the input of past keys
_SCALES = {3: 12, 4: 13}  # index of the input of scales, by that of the past
_FLOAT = ir.DataType.FLOAT


def scales_of(largest: np.ndarray, bits: int) -> np.ndarray:
    """Return the scales by which the largest numbers become the largest integers."""
    return np.maximum(largest / RANGE[bits][1], np.finfo(np.float32).tiny).astype(np.float32)


def check_operators(pairs: Sequence[CachePair]) -> None:
    """Check that `GroupQueryAttention` updates each cached tensor.

    Raises:
        UnsupportedError: Something else does.
    """
    for pair in pairs:
        if pair.node.op_type != "GroupQueryAttention" or pair.past.dtype not in (_FLOAT, ir.DataType.FLOAT16):
            raise UnsupportedError(
                "constant scales need an operator that takes them", code=Code.PASS_PRECONDITION, at=pair.past.name,
                expected="FLOAT or FLOAT16 that GroupQueryAttention updates",
                found=f"{pair.past.dtype} that {pair.node.op_type} updates",
                hint="run fuse-attention first, or use scales=per-token",
            )  # fmt: skip


def quantize_operators(model: ir.Model, pairs: Sequence[CachePair], scales: Mapping[str, np.ndarray], bits: int) -> int:
    """Make operators store integers in the cache, and return the number of edits.

    Args:
        model: The model.
        pairs: Its cache.
        scales: Scales, `[1]` or `[kv_heads * head_dim]`, by the name of the cache input.
        bits: Bits of an integer.
    """
    editor, dtype = Editor(model), QUANTIZED[bits]
    for pair in pairs:
        past, place = pair.past, pair.operands.past
        scale = scales[past.name or ""]
        value = editor.initializer(ir.Tensor(scale, name=editor.unique_name(f"{past.name}.scale")))
        form = "PER_TENSOR" if scale.size == 1 else "PER_CHANNEL"
        users = [(node, index) for node, index in past.uses() if node.op_type == pair.node.op_type]
        for node, index in users:  # in all layers that share it
            node.resize_inputs(max(len(node.inputs), _SCALES[place] + 1))
            editor.replace_input(node, _SCALES[place], value)
            prefix = "k" if place == _KEY else "v"
            editor.set_attributes(node, {f"{prefix}_quant_type": form, "kv_cache_bit_width": bits})
            _store(node.outputs[index - 2], dtype, bits)
        _store(past, dtype, bits)
        _store(pair.present, dtype, bits)
    editor.finish()
    return editor.edits


def _store(value: ir.Value, dtype: ir.DataType, bits: int) -> None:
    """Declare a cached tensor as integers of some bits; its last axis has bytes."""
    if value.dtype is not dtype:
        value.type = ir.TensorType(dtype)
        if value.shape is not None and isinstance(value.shape[-1], int):
            value.shape = ir.Shape([*value.shape[:-1], -(-value.shape[-1] * bits // 8)])


def quantized_points(
    analysis: Analysis, signature: CacheSignature, scales: Mapping[str, np.ndarray], bits: int
) -> ir.Model:
    """Return the analyzed model with its cached tensors rounded as the operator does, with standard operators.

    Raises:
        UnsupportedError: The cache has other tensors than attention needs.
    """
    editor, done = Editor(analysis.model), set[ir.Value]()
    for kind in ("key", "value"):
        entries = sorted((one for one in signature.entries if one.kind == kind), key=lambda one: one.layer or 0)
        operands = [(site.keys if kind == "key" else site.values)[0] for site in analysis.sites]
        points = {operand.cache_point.value: operand.cache_point for operand in operands}
        if len(points) != len(entries):
            raise UnsupportedError(
                "the cache has other tensors than attention needs", code=Code.UNKNOWN_CACHE, at=entries[0].past,
                expected=f"{len(points)} tensors of {kind}s", found=str(len(entries)),
            )  # fmt: skip
        for point, entry in zip(points.values(), entries, strict=True):
            if point.value not in done:
                done.add(point.value)
                _round(editor, analysis, point, scales[entry.past], bits)
    editor.before = None
    editor.finish()
    return analysis.model


def _round(editor: Editor, analysis: Analysis, point: CachePoint, scale: np.ndarray, bits: int) -> None:
    """Round a cached tensor for all that reads it."""
    users = list(point.value.uses())
    editor.before = min((node for node, _ in users), key=analysis.flow.order.__getitem__)
    op = NodeBuilder(editor, f"{point.value.name}.rounded")
    divisor = op.constant(_in_layout(scale, point))
    rows = point.value if point.dtype is _FLOAT else op.Cast(point.value, to=_FLOAT)
    least, most = (op.number(limit, _FLOAT) for limit in RANGE[bits])
    one, zero = op.number(1, _FLOAT), op.number(0, ir.DataType.INT8)
    integers = op.QuantizeLinear(op.Clip(op.Div(rows, divisor), least, most), one, zero)
    rounded = op.Mul(op.DequantizeLinear(integers, one, zero), divisor)
    rounded = rounded if point.dtype is _FLOAT else op.Cast(rounded, to=point.dtype)
    for node, index in users:
        editor.replace_input(node, index, rounded)


def _in_layout(scale: np.ndarray, point: CachePoint) -> np.ndarray:
    """Return scales in the layout of a cached tensor: one for each feature, or one for all."""
    if scale.size == 1:
        return scale.reshape([1] * point.rank)
    sizes = [
        size if isinstance(size, int) and place in point.order[1:] else 1 for place, size in enumerate(point.parts)
    ]
    ordered = [sizes[place] for place in point.order]
    parts = scale.reshape(ordered).transpose([point.order.index(place) for place in range(len(point.order))])
    return parts if len(point.parts) == point.rank else parts.reshape([*parts.shape[: point.rank - 1], -1])
