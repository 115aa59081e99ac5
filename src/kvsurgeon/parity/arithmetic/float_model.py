"""Quantized models without rounding of activations, so that two of them compare exactly.

Rounding to 8 bits depends on the tokens that share a call. A model with a cache and one without therefore differ by
rounding, which may hide a small fault. Here each 8-bit activation becomes the number before rounding, `x / scale`, even
if it exceeds 8 bits, and all operators compute in floats. Weights keep their stored 8-bit values.

Sources: the ONNX specifications of `QuantizeLinear`, `DequantizeLinear`, `DynamicQuantizeLinear`, `MatMulInteger` and
`QLinearMatMul`; those of onnxruntime's contrib operators for the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.io.local_functions import nested_nodes

LARGEST = 1 << 30  # bytes of 8-bit weights, which take 4 times as many in floats
_LIMIT = 2.0**15  # saturates activations, so that the -inf of a mask stays finite
_EIGHT_BITS = (TensorProto.INT8, TensorProto.UINT8)
_ROUNDING = ("QLinear", "QAttention", "DynamicQuantize", "Bit")  # starts of names of operators
_FLOAT_ACTIVATIONS = 1  # `accuracy_level` of MatMulNBits

# Operators that copy elements, with the inputs that they copy from; None for all.
_COPIES: dict[str, tuple[int, ...] | None] = {
    "Concat": None,
    "Pad": (0, 2),
    "ScatterElements": (0, 2),
    "ScatterND": (0, 2),
    "TensorScatter": (0, 1),
    "Where": (1, 2),
    **dict.fromkeys(
        ("Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Split",
         "Squeeze", "Tile", "Transpose", "Unsqueeze"),
        (0,),
    ),
}  # fmt: skip

_Operand = tuple[int, int, int]  # inputs of number, scale and zero point; -1 for none

# Operators on 8-bit numbers: the operator on floats, its operands, the input of a bias to add, the inputs of the
# output's scale and zero point (-1 if the output is floating-point), and the inputs that must be scalars.
_FLOAT_OPERATORS: dict[str, tuple[str, tuple[_Operand, ...], int, tuple[int, int], tuple[int, ...]]] = {
    "MatMulIntegerToFloat": ("MatMul", ((0, 2, 4), (1, 3, 5)), 6, (-1, -1), (4,)),
    "DynamicQuantizeMatMul": ("MatMul", ((0, -1, -1), (1, 2, 3)), 4, (-1, -1), ()),
    "MatMulInteger": ("MatMul", ((0, -1, 2), (1, -1, 3)), -1, (-1, -1), (2,)),
    "ConvInteger": ("Conv", ((0, -1, 2), (1, -1, 3)), -1, (-1, -1), (2, 3)),
    "QGemm": ("Gemm", ((0, 1, 2), (3, 4, 5)), -1, (7, 8), ()),
    "QLinearMatMul": ("MatMul", ((0, 1, 2), (3, 4, 5)), -1, (6, 7), ()),
    "QLinearAdd": ("Add", ((0, 1, 2), (3, 4, 5)), -1, (6, 7), ()),
    "QLinearMul": ("Mul", ((0, 1, 2), (3, 4, 5)), -1, (6, 7), ()),
    "QLinearSigmoid": ("Sigmoid", ((0, 1, 2),), -1, (3, 4), ()),
    "QLinearLeakyRelu": ("LeakyRelu", ((0, 1, 2),), -1, (3, 4), ()),
}


def float_model(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return a model in float32 without rounding of activations to 8 bits; None if that is not possible.

    Pasts and presents of 8 bits become float32.
    """
    if model.functions:
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    try:
        _Rewrite(copy.graph).run()
    except UnsupportedError:
        return None
    return copy


class _Rewrite:
    """A rewrite of a graph, node by node in order."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.floats: set[str] = set()  # 8-bit values that are floats here
        self.measured: dict[str, str] = {}  # scales and zero points of a call, each with its number there
        self.budget = LARGEST
        self.nodes: list[onnx.NodeProto] = []
        self.rewrites = {
            "DynamicQuantizeLinear": self._dynamic_quantize,
            "QuantizeLinear": self._quantize,
            "DequantizeLinear": self._dequantize,
            "MatMulNBits": self._block_quantized,
            **dict.fromkeys(_FLOAT_OPERATORS, self._replace),
        }

    def run(self) -> None:
        """Rewrite all nodes.

        Raises:
            UnsupportedError: An operator rounds in a way that cannot be removed.
        """
        for value in [*self.graph.input, *self.graph.output]:
            if value.type.tensor_type.elem_type in _EIGHT_BITS and value.name not in self.weights:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
                self.floats.add(value.name)
        for node in list(self.graph.node):
            self.rewrites.get(node.op_type, self._keep)(node)
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)

    def _keep(self, node: onnx.NodeProto) -> None:
        """Keep an operator that copies 8-bit numbers, or takes none, nor does its subgraph."""
        inside = list(nested_nodes([node]))[1:]
        if inside and any(one.op_type in self.rewrites or self._reads_floats(one) for one in (node, *inside)):
            raise _unsupported("8-bit numbers in a subgraph", node.output[0])
        places = _COPIES.get(node.op_type, ())
        copied = {name for place, name in enumerate(node.input) if places is None or place in places} - {""}
        if copied & self.floats:
            if copied - self.floats:
                raise _unsupported("8-bit constants of unknown scale", node.output[0])
            self.floats.update(name for name in node.output if name)
        elif node.domain and self._reads_floats(node):
            raise _unsupported(f"operator {node.op_type} on 8-bit numbers", node.output[0])
        elif any(one.op_type.startswith(_ROUNDING) for one in (node, *inside)):
            raise _unsupported(f"operator {node.op_type}", node.output[0])
        else:
            node.input[:] = [self.measured.get(name, name) for name in node.input]
        self.nodes.append(node)

    def _reads_floats(self, node: onnx.NodeProto) -> bool:
        return not self.floats.isdisjoint(node.input)

    def _dynamic_quantize(self, node: onnx.NodeProto) -> None:
        """Divide by the scale of the call, so that whatever else depends on the range shows.

        The number is without its zero point, which is 0 except where an operator reads it as a number.
        """
        number, scale, zero = node.output
        none, one, steps = (self._constant(value, f"unrounded/{value}") for value in (0.0, 1.0, 255.0))
        low = self._add("Min", self._add("ReduceMin", node.input[0], keepdims=0), none)
        high = self._add("Max", self._add("ReduceMax", node.input[0], keepdims=0), none)
        step = self._add("Div", self._add("Sub", high, low), steps)
        scale = self._add("Where", self._add("Equal", step, none), one, step, output=scale)
        self._add("Div", node.input[0], scale, output=number)
        self._constant(0.0, zero)
        self.floats.update((number, zero))
        self.measured |= {scale: scale, zero: self._add("Sub", none, self._add("Div", low, scale))}

    def _quantize(self, node: onnx.NodeProto) -> None:
        if node.input[0] in self.weights:
            self.nodes.append(node)
        else:
            number, scale, zero = _inputs(node)[:3]
            self._rescale(number, scale, zero, node.output[0])

    def _dequantize(self, node: onnx.NodeProto) -> None:
        if node.input[0] in self.floats:
            self._add("Mul", node.input[0], self._scalar(node.input[1]), output=node.output[0])
        else:
            self.nodes.append(node)

    def _replace(self, node: onnx.NodeProto) -> None:
        """Replace an operator by the one on floats."""
        operator, operands, bias, (scale, zero), scalars = _FLOAT_OPERATORS[node.op_type]
        inputs = _inputs(node)
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        for place in scalars:
            self._scalar(inputs[place])
        read = [self._dequantized(*(inputs[place] for place in operand)) for operand in operands]
        if operator == "Gemm":
            read += self._gemm_bias(inputs, attributes)
        made = self._add(operator, *read, **attributes)
        if inputs[bias]:
            made = self._add("Add", made, inputs[bias])
        if inputs[scale]:
            self._rescale(made, inputs[scale], inputs[zero], node.output[0])
        else:
            self._add("Identity", made, output=node.output[0])
        if node.op_type in ("MatMulInteger", "ConvInteger"):
            self.floats.add(node.output[0])  # an int32, which a Cast makes a float

    def _gemm_bias(self, inputs: Sequence[str], attributes: Mapping[str, Any]) -> list[str]:
        """Return the bias of a `QGemm`, if any: its scale is the product of those of the operands."""
        left_scale, right_scale, bias = inputs[1], inputs[4], inputs[6]
        if attributes.get("transB"):
            self._scalar(right_scale)  # several scales would belong to the other axis
        if not bias:
            return []
        unit = self._add("Mul", self._scalar(left_scale), right_scale)
        return [self._add("Mul", self._add("Cast", bias, to=TensorProto.FLOAT), unit)]

    def _block_quantized(self, node: onnx.NodeProto) -> None:
        """Keep the operator with quantized weights, but disable rounding of activations."""
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = _FLOAT_ACTIVATIONS
        self.nodes.append(node)

    def _rescale(self, number: str, scale: str, zero: str, output: str) -> None:
        """Make an 8-bit value without rounding and without its zero point."""
        self._scalar(zero)
        limits = (self._constant(limit, f"unrounded/{limit}") for limit in (-_LIMIT, _LIMIT))
        self._add("Clip", self._add("Div", number, self._scalar(scale)), *limits, output=output)
        self.floats.add(output)

    def _dequantized(self, number: str, scale: str, zero: str) -> str:
        """Return the value of an 8-bit number as a float; weights are cast in the graph."""
        if number not in self.floats:
            if number in self.weights:
                self.budget -= int(np.prod(self.weights[number].dims, dtype=np.int64))
                if self.budget < 0:
                    raise _unsupported("8-bit weights are too large", number)
            number = self._add("Cast", number, to=TensorProto.FLOAT)
            if zero:
                number = self._add("Sub", number, self._add("Cast", zero, to=TensorProto.FLOAT))
        return self._add("Mul", number, scale) if scale else number

    def _scalar(self, name: str) -> str:
        """Return the name of an input that must be a scalar: a constant, or of the range of a call.

        Raises:
            UnsupportedError: It may have several elements, along some axis.
        """
        tensor = self.weights.get(name)
        if name in self.measured:
            return name
        if name and (tensor is None or np.prod(tensor.dims, dtype=np.int64) != 1):
            raise _unsupported("quantization parameters are no scalar", name)
        return name

    def _constant(self, value: float, name: str) -> str:
        if name not in self.weights:
            self.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
            self.weights[name] = self.graph.initializer[-1]
        return name

    def _add(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"unrounded/{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output


def _inputs(node: onnx.NodeProto) -> list[str]:
    """Return the inputs of a node, followed by empty names for those that it lacks."""
    return [*node.input, *[""] * (10 - len(node.input))]


def _unsupported(reason: str, at: str) -> UnsupportedError:
    return UnsupportedError(f"cannot remove rounding: {reason}", code=Code.NOT_VERIFIABLE, at=at)
