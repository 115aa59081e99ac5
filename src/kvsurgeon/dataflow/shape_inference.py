"""Shapes of a whole graph: one rule for each operator, asked once for each node, in order.

Stored shapes are not believed, except their rank where no rule reaches: exporters write wrong ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from kvsurgeon.errors import KvsurgeonError, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor, is_weight
from kvsurgeon.ops import attention, contraction, elementwise, generation, layout, reduction, slicing
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import NOTHING, Fact, OperatorCall, known

Rule = Callable[[OperatorCall], Fact | list[Fact]]

STANDARD_DOMAINS = ("", "ai.onnx")

RULES: dict[str, Rule] = {
    **dict.fromkeys(elementwise.BINARY, elementwise.binary),
    **dict.fromkeys(elementwise.UNARY, elementwise.unary),
    "Cast": elementwise.cast,
    "CastLike": elementwise.cast,
    "QuantizeLinear": elementwise.quantize,
    "DequantizeLinear": elementwise.dequantize,
    "DynamicQuantizeLinear": elementwise.dynamic_quantize,
    "Reshape": layout.reshape,
    "Flatten": layout.flatten,
    "Transpose": layout.transpose,
    "Unsqueeze": layout.unsqueeze,
    "Squeeze": layout.squeeze,
    "Expand": layout.expand,
    "Tile": layout.tile,
    "Concat": layout.concat,
    "Split": layout.split,
    "Slice": slicing.slice_,
    "Gather": layout.gather,
    "GatherBlockQuantized": layout.gather_block_quantized,
    "GatherElements": layout.gather_elements,
    "GatherND": layout.gather_nd,
    "Pad": layout.pad,
    "ScatterND": layout.scatter,
    "ScatterElements": layout.scatter,
    "Scatter": layout.scatter,
    "Shape": generation.shape,
    "Size": generation.size,
    "ConstantOfShape": generation.constant_of_shape,
    "Range": generation.range_,
    "OneHot": generation.one_hot,
    "EyeLike": generation.eye_like,
    "NonZero": generation.non_zero,
    "RandomNormalLike": generation.random_like,
    "RandomUniformLike": generation.random_like,
    **{f"Reduce{kind}": reduction.reduce for kind in
       ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")},
    "ArgMax": reduction.arg_extreme,
    "ArgMin": reduction.arg_extreme,
    "TopK": reduction.top_k,
    "CumSum": reduction.cumulative_sum,
    **dict.fromkeys(("Softmax", "LogSoftmax", "QLinearSoftmax", "Hardmax", "LpNormalization", "InstanceNormalization",
                     "GroupNormalization", "MeanVarianceNormalization", "BatchNormalization", "RotaryEmbedding",
                     "MRotaryEmbedding", "GatedRMSNorm", "BranchwiseRMSNorm", "GatedAdd", "SwiGLU", "CumProd",
                     "MoE", "QMoE"),
                    elementwise.same_as_first),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
                     "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), reduction.normalized),
    **dict.fromkeys(contraction.PRODUCTS, contraction.contraction),
    **dict.fromkeys(("Conv", "ConvInteger", "FusedConv", "QLinearConv"), contraction.convolution),
    **dict.fromkeys(("AveragePool", "MaxPool", "LpPool", "QLinearAveragePool"), contraction.pool),
    "QLinearConcat": layout.concat,
    "Attention": attention.attention,
    "QAttention": attention.packed_attention,
    "MultiHeadAttention": attention.multi_head_attention,
    "GroupQueryAttention": attention.group_query_attention,
    **dict.fromkeys(("EmbedLayerNormalization", "QEmbedLayerNormalization"), attention.embedding),
}  # fmt: skip


@contextmanager
def in_one_line(node: ir.Node) -> Iterator[None]:
    """Let what a rule stumbles over say at which node its inputs do not fit together.

    Raises:
        UnsupportedError: In place of whatever else was raised.
    """
    try:
        yield
    except KvsurgeonError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{node.op_type}: its inputs do not fit together",
            at=node.outputs[0].name, found=" ".join(str(error).split()) or type(error).__name__,
            hint="does onnxruntime run this model?",
        ) from error  # fmt: skip


@dataclass(slots=True)
class Shapes:
    """What is known of every value of a graph."""

    facts: dict[ir.Value, Fact] = field(default_factory=dict)
    bounds: set[int] = field(default_factory=set)  # the length is assumed to be at most the smallest of these
    opset: int = 0

    def __getitem__(self, value: ir.Value) -> Fact:
        """The fact of a value; constants are looked up when they are first asked for."""
        fact = self.facts.get(value)
        if fact is None:
            fact = self.facts[value] = _fact_of_constant(value)
        return fact

    def call(self, node: ir.Node) -> OperatorCall:
        """The node as a rule sees it."""
        facts = tuple(None if value is None else self[value] for value in node.inputs)
        return OperatorCall(node, facts, self.opset, self.bounds.add)


def _fact_of_constant(value: ir.Value) -> Fact:
    tensor = constant_tensor(value)
    if tensor is None:
        return NOTHING
    if is_weight(tensor) or tensor.size > 512 or tensor.dtype is ir.DataType.STRING:
        return Fact(tuple(tensor.shape.numpy()), tensor.dtype)
    return known(tensor.numpy(), tensor.dtype)


def infer_shapes(
    nodes: Iterable[ir.Node], inputs: Mapping[ir.Value, tuple[Dimension, ...]], opset: int, *, named: bool = False
) -> Shapes:
    """Return what is known of every value, given the dimensions of the graph's inputs.

    Args:
        nodes: In an order in which every value is made before it is used.
        inputs: Dimensions of each graph input.
        opset: Version of the standard operators.
        named: Whether a single whole number that is computed from more than shapes gets a name of its own, so that as
            much as lies between it and a sum with it is known.
    """
    shapes = Shapes(opset=opset)
    for value, dimensions in inputs.items():
        fact = Fact(dimensions, value.dtype)
        shapes.facts[value] = _named(value, fact) if named else fact
    for node in nodes:
        if node.op_type == "Constant":
            continue  # looked up when asked for
        call = shapes.call(node)
        rule = RULES.get(node.op_type, _by_schema)
        with in_one_line(node):
            found = rule(call)
        outputs = found if isinstance(found, list) else [found]
        for index, value in enumerate(node.outputs):
            fact = outputs[index] if index < len(outputs) else outputs[0]
            fact = fact if fact.shape is not None else _declared(value, fact, call)
            shapes.facts[value] = _named(value, fact) if named else fact
    return shapes


def _named(value: ir.Value, fact: Fact) -> Fact:
    """The fact with a symbol for a single whole number of which nothing else is known."""
    single = fact.shape is not None and all(size == 1 for size in fact.shape)
    if fact.value is not None or not single or fact.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return fact
    return known(np.full(fact.shape or (), dim.symbol(f"number `{value.name}`"), dtype=object), fact.dtype)


def _declared(value: ir.Value, fact: Fact, call: OperatorCall) -> Fact:
    """The rank that the model declares, where no rule reached; its dimensions where they are numbers."""
    if value.shape is None:
        return fact
    sizes = tuple(size if isinstance(size, int) else call.lost() for size in value.shape)
    return Fact(sizes, fact.dtype or value.dtype)


def _by_schema(call: OperatorCall) -> list[Fact]:
    """An operator without a rule here: ONNX's own inference, fed with our symbols as names."""
    node = call.node
    blank = [NOTHING] * len(node.outputs)
    if node.domain not in STANDARD_DOMAINS or any(f is not None and f.shape is None for f in call.inputs):
        return blank
    names: dict[str, Dimension] = {}
    try:
        schema = onnx.defs.get_schema(node.op_type, call.opset, "")
        proto = ir.to_proto(node)
        types = {
            value.name or "": onnx.helper.make_tensor_type_proto(
                int(fact.dtype or 1), [_spelled(s, names) for s in fact.shape or ()]
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


def _spelled(size: Dimension, names: dict[str, Dimension]) -> int | str:
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
            sizes.append(names.get(size.dim_param) or call.lost())
    return Fact(tuple(sizes), ir.DataType(proto.tensor_type.elem_type))


__all__ = ["RULES", "Shapes", "dim", "infer_shapes"]
