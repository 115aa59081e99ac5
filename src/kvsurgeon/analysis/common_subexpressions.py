"""Common subexpressions of context: exporters repeat masks and tables in every layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import onnx_ir as ir

from kvsurgeon.dataflow.element_expressions import ElementExpressions
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.value_numbering import ValueNumbering, constant_key


def find_common_subexpressions(
    nodes: Sequence[ir.Node], kinds: Mapping[ir.Value, ValueKind], shapes: Shapes
) -> dict[ir.Value, ir.Value]:
    """Return for each context value that repeats or copies an earlier one that first value."""
    elements = ElementExpressions(shapes)

    def source(value: ir.Value) -> ir.Value | None:
        return elements.copied(value) if kinds.get(value) is ValueKind.CONTEXT else None

    def leaf(value: ir.Value) -> Hashable | None:
        if kinds.get(value) is not ValueKind.CONTEXT:
            return value if value in kinds else constant_key(value) or value
        fact = shapes.facts.get(value)
        if fact is None or fact.value is None:
            return None
        return fact.dtype, fact.value.shape, tuple(fact.value.reshape(-1))

    context = (node for node in nodes if kinds.get(node.outputs[0]) is ValueKind.CONTEXT)
    return ValueNumbering(leaf, source=source).representatives(value for node in context for value in node.outputs)
