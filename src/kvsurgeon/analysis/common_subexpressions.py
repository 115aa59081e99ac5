"""Context that is computed twice in the same way is one: exporters repeat masks and tables in every layer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import onnx_ir as ir

from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.constants import constant_tensor, is_weight


def find_same(nodes: Sequence[ir.Node], kinds: dict[ir.Value, ValueKind], shapes: Shapes) -> dict[ir.Value, ir.Value]:
    """Return for each context value the first one that is computed by the same operators from the same values."""
    first: dict[Hashable, ir.Value] = {}
    same: dict[ir.Value, ir.Value] = {}
    constants: dict[ir.Value, Hashable] = {}
    for node in nodes:
        if kinds.get(node.outputs[0]) is not ValueKind.CONTEXT or node.op_type.startswith("Random"):
            continue
        inputs: list[Hashable] = []
        for value in node.inputs:
            if value is None or value in kinds:
                inputs.append(None if value is None else same.get(value, value))
                continue
            if value not in constants:
                constants[value] = _constant_key(value)
            inputs.append(constants[value])
        how = (node.domain, node.op_type, _attributes(node), tuple(inputs))
        for index, value in enumerate(node.outputs):
            known = shapes.facts.get(value)
            key: Hashable = (how, index)
            if known is not None and known.value is not None:
                key = (known.dtype, known.value.shape, tuple(known.value.reshape(-1)))
            same[value] = first.setdefault(key, value)
    return {value: original for value, original in same.items() if value is not original}


def _constant_key(value: ir.Value) -> Hashable:
    tensor = constant_tensor(value)
    if tensor is None or is_weight(tensor) or tensor.dtype is ir.DataType.STRING:
        return value
    array = tensor.numpy()
    return (str(tensor.dtype), array.shape, array.tobytes())


def _attributes(node: ir.Node) -> Hashable:
    return tuple(sorted((name, repr(attribute.value)) for name, attribute in node.attributes.items()))
