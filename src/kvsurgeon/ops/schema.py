"""Shapes of operators without a rule: ONNX's shape inference, with symbols as dimension names."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import NOTHING, Fact, OperatorCall

STANDARD_DOMAINS = ("", "ai.onnx")


def by_schema(call: OperatorCall) -> list[Fact]:
    """An operator without a rule here: ONNX's own inference, fed with our symbols as names."""
    node = call.node
    blank = [NOTHING] * len(node.outputs)
    if node.domain not in STANDARD_DOMAINS or any(f is not None and f.shape is None for f in call.inputs):
        return blank
    names: dict[str, Dimension] = {}
    try:
        schema = onnx.defs.get_schema(node.op_type, call.opset, "")
        proto = ir.serde.serialize_node(node)
        types = {
            value.name or "": onnx.helper.make_tensor_type_proto(
                int(fact.dtype or 1), [_dimension_name(s, names) for s in fact.shape or ()]
            )
            for value, fact in zip(node.inputs, call.inputs, strict=True)
            if value is not None and fact is not None
        }
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, proto, types, opset_imports=[onnx.helper.make_opsetid("", call.opset)]
        )
    except Exception:
        return blank
    return [_read_type(inferred.get(value.name or ""), names, call) for value in node.outputs]


def _dimension_name(size: Dimension, names: dict[str, Dimension]) -> int | str:
    if isinstance(size, int):
        return size
    names[str(size)] = size
    return str(size)


def _read_type(proto: onnx.TypeProto | None, names: dict[str, Dimension], call: OperatorCall) -> Fact:
    if proto is None or not proto.tensor_type.HasField("shape"):
        return NOTHING
    sizes: list[Dimension] = []
    for size in proto.tensor_type.shape.dim:
        if size.HasField("dim_value"):
            sizes.append(size.dim_value)
        else:
            sizes.append(names.get(size.dim_param) or call.unknown())
    return Fact(tuple(sizes), ir.DataType(proto.tensor_type.elem_type))
