"""Definitions of operators of later opsets by operators of all opsets from 13 on.

Source of the semantics: onnx, docs/Operators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from kvsurgeon.graph.editor import NodeBuilder
from kvsurgeon.symbolic.fact import Fact

Definition = Callable[[ir.Node, Fact, NodeBuilder], ir.Value]


def definition(node: ir.Node, fact: Fact) -> Definition | None:
    """Return the function that adds what computes a node; None if there is none.

    Args:
        node: The node, of which only the first output is used.
        fact: The type and the shape of its first input.
    """
    further = [output for output in node.outputs[1:] if output.uses() or output.is_graph_output()]
    if further or fact.dtype is None:
        return None
    if node.op_type == "LayerNormalization":
        return None if fact.rank is None else _layer_normalization
    return _gelu if node.op_type == "Gelu" else None


def _layer_normalization(node: ir.Node, fact: Fact, op: NodeBuilder) -> ir.Value:
    """Add `(x - mean) / sqrt(variance + epsilon) * scale + bias`, with statistics in the type of `stash_type`."""
    value, inner = node.inputs[0], ir.DataType(node.attributes.get_int("stash_type", 1))
    axis = node.attributes.get_int("axis", -1)
    assert fact.dtype is not None
    assert fact.rank is not None
    axes = list(range(axis - fact.rank if axis >= 0 else axis, 0))
    centered = op.Cast(value, to=inner) if fact.dtype is not inner else value
    centered = op.Sub(centered, op.ReduceMean(centered, axes=axes))
    variance = op.ReduceMean(op.Mul(centered, centered), axes=axes)
    epsilon = op.number(node.attributes.get_float("epsilon", 1e-5), inner)
    result = op.Div(centered, op.Sqrt(op.Add(variance, epsilon)))
    result = op.Cast(result, to=fact.dtype) if fact.dtype is not inner else result
    result = op.Mul(result, node.inputs[1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return result if bias is None else op.Add(result, bias)


def _gelu(node: ir.Node, fact: Fact, op: NodeBuilder) -> ir.Value:
    """Add `x / 2 * (1 + erf(x / sqrt(2)))`, or the approximation of it by tanh."""
    value, dtype = node.inputs[0], fact.dtype
    assert dtype is not None
    if node.attributes.get_string("approximate", "none") == "tanh":
        cubic = op.Mul(op.Mul(op.Mul(value, value), value), op.number(0.044715, dtype))
        curve = op.Tanh(op.Mul(op.Add(value, cubic), op.number(math.sqrt(2 / math.pi), dtype)))
    else:
        curve = op.Erf(op.Div(value, op.number(math.sqrt(2), dtype)))
    return op.Mul(op.Mul(value, op.Add(curve, op.number(1.0, dtype))), op.number(0.5, dtype))
