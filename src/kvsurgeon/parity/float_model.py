"""A quantised model with nothing rounded, so that two of them can be held against each other exactly.

What is rounded to 8 bits depends on what shares a call, so a model with a cache and one without differ by rounding, and
a small mistake could hide in it. Here each 8-bit activation is the number that it would have been before rounding,
`x / scale`, far beyond 8 bits if need be, and all operators compute with that. Weights stay the 8-bit
numbers that are stored.

Sources: the ONNX specifications of `QuantizeLinear`, `DequantizeLinear`, `DynamicQuantizeLinear`, `MatMulInteger` and
`QLinearMatMul`; those of onnxruntime's contrib operators for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LARGEST = 1 << 30  # bytes of 8-bit weights: in a product they are 4 times as many
_FAR = 2.0**15  # what 8 bits saturate at stays a number, such as the -inf of a mask
_EIGHT_BITS = (TensorProto.INT8, TensorProto.UINT8)
_ACCURACY_OF_FLOATS = 1  # of MatMulNBits

# Operators that move numbers and make none, and where they read them; None for everywhere.
_MOVING: dict[str, tuple[int, ...] | None] = {
    "Concat": None,
    "Expand": (0,),
    "Flatten": (0,),
    "Gather": (0,),
    "GatherElements": (0,),
    "GatherND": (0,),
    "Identity": (0,),
    "Pad": (0, 2),
    "Reshape": (0,),
    "ScatterElements": (0, 2),
    "ScatterND": (0, 2),
    "Slice": (0,),
    "Split": (0,),
    "Squeeze": (0,),
    "TensorScatter": (0, 1),
    "Tile": (0,),
    "Transpose": (0,),
    "Unsqueeze": (0,),
    "Where": (1, 2),
}

# What an operator on 8-bit numbers computes of the numbers that these stand for.
_PLAIN = {
    "QLinearAdd": "Add",
    "QLinearMul": "Mul",
    "QLinearSigmoid": "Sigmoid",
    "QLinearLeakyRelu": "LeakyRelu",
}


class _RoundedError(Exception):
    """Something is rounded in a way that cannot be left out."""


def unrounded(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return the model with no activation rounded to 8 bits; None where that cannot be done.

    Pasts and presents of 8 bits become float32.
    """
    if model.functions or any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute):
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    try:
        _Unrounding(copy).operate()
    except _RoundedError:
        return None
    return copy


class _Unrounding:
    """One model, node after node; each finds its inputs as they are now."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.real: set[str] = set()  # what has 8 bits in the model, and is not rounded here
        self.left = LARGEST
        self.nodes: list[onnx.NodeProto] = []
        self.rules: dict[str, Callable[[onnx.NodeProto], None]] = {
            "DynamicQuantizeLinear": self._measured,
            "QuantizeLinear": self._rounded,
            "DequantizeLinear": self._restored,
            "MatMulInteger": self._integer_product,
            "MatMulIntegerToFloat": self._scaled_product,
            "DynamicQuantizeMatMul": self._measured_product,
            "QLinearMatMul": self._eight_bit_product,
            "QGemm": self._eight_bit_gemm,
            "MatMulNBits": self._few_bit_product,
            **dict.fromkeys(_PLAIN, self._eight_bit_operator),
        }

    def operate(self) -> None:
        """Write every node anew."""
        for value in [*self.graph.input, *self.graph.output]:
            if value.type.tensor_type.elem_type in _EIGHT_BITS and value.name not in self.weights:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
                self.real.add(value.name)
        for node in list(self.graph.node):
            rule = self.rules.get(node.op_type)
            if rule is not None:
                rule(node)
            else:
                self._keep(node)
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)

    def _keep(self, node: onnx.NodeProto) -> None:
        """An operator that makes no 8-bit numbers of its own: it moves them, or has nothing to do with them."""
        places = _MOVING.get(node.op_type, ())
        read = [place for place in (range(len(node.input)) if places is None else places) if place < len(node.input)]
        moved = {node.input[place] for place in read} - {""}
        if moved & self.real:
            if moved - self.real:
                raise _RoundedError  # 8-bit constants among them, of which nobody knows what they stand for
            self.real.update(name for name in node.output if name)
        elif node.op_type.startswith(("QLinear", "QAttention", "ConvInteger", "DynamicQuantize")):
            raise _RoundedError
        self.nodes.append(node)

    def _measured(self, node: onnx.NodeProto) -> None:
        """The range that is found does not matter: scale 1 and zero point 0 do as well as any."""
        number, scale, zero = (*node.output, "", "")[:3]
        self._add("Identity", node.input[0], into=number)
        for name, value in ((scale, 1.0), (zero, 0.0)):
            if name:
                self._constant(value, name)
        self.real.update((number, zero))

    def _rounded(self, node: onnx.NodeProto) -> None:
        if node.input[0] in self.weights:
            self.nodes.append(node)
            return
        number, scale, zero = _padded(node.input, 3)
        self._eight_bits(number, scale, zero, node.output[0])

    def _restored(self, node: onnx.NodeProto) -> None:
        if node.input[0] not in self.real:
            self.nodes.append(node)
            return
        self._add("Mul", node.input[0], self._one(node.input[1]), into=node.output[0])

    def _integer_product(self, node: onnx.NodeProto) -> None:
        left, right, left_zero, right_zero = _padded(node.input, 4)
        self._one(left_zero)
        made = self._add("MatMul", self._unshifted(left, left_zero), self._unshifted(right, right_zero))
        self._add("Identity", made, into=node.output[0])
        self.real.add(node.output[0])  # 32 bits in the model, which a Cast makes a number of

    def _scaled_product(self, node: onnx.NodeProto) -> None:
        left, right, left_scale, right_scale, left_zero, right_zero, bias = _padded(node.input, 7)
        self._one(left_zero)
        operands = (
            self._add("Mul", self._unshifted(number, zero), scale)
            for number, scale, zero in ((left, left_scale, left_zero), (right, right_scale, right_zero))
        )
        self._biased(self._add("MatMul", *operands), bias, node.output[0])

    def _measured_product(self, node: onnx.NodeProto) -> None:
        left, right, scale, zero, bias = _padded(node.input, 5)
        weights = self._add("Mul", self._unshifted(right, zero), scale)
        self._biased(self._add("MatMul", left, weights), bias, node.output[0])

    def _eight_bit_product(self, node: onnx.NodeProto) -> None:
        left, right = (self._meant(*node.input[start : start + 3]) for start in (0, 3))
        self._eight_bits(self._add("MatMul", left, right), node.input[6], node.input[7], node.output[0])

    def _eight_bit_gemm(self, node: onnx.NodeProto) -> None:
        """`alpha * A' @ B' + C`, where C has the scale of both; in 8 bits where an output scale is given."""
        left, left_scale, left_zero, right, right_scale, right_zero, bias, scale, zero = _padded(node.input, 9)
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if given.get("transB"):
            self._one(right_scale)  # several would lie along the other axis
        parts = [self._meant(left, left_scale, left_zero), self._meant(right, right_scale, right_zero)]
        if bias:
            unit = self._add("Mul", self._one(left_scale), right_scale)
            parts.append(self._add("Mul", self._add("Cast", bias, to=TensorProto.FLOAT), unit))
        made = self._add("Gemm", *parts, **given)
        if scale:
            self._eight_bits(made, scale, zero, node.output[0])
        else:
            self._add("Identity", made, into=node.output[0])

    def _eight_bit_operator(self, node: onnx.NodeProto) -> None:
        operands = 1 if len(node.input) <= 5 else 2  # then a scale and a zero point of the output
        read = [self._meant(*node.input[3 * place : 3 * place + 3]) for place in range(operands)]
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        scale, zero = _padded(node.input[3 * operands :], 2)
        self._eight_bits(self._add(_PLAIN[node.op_type], *read, **given), scale, zero, node.output[0])

    def _few_bit_product(self, node: onnx.NodeProto) -> None:
        """Its weights have few bits; whether activations are rounded as well is an attribute."""
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = _ACCURACY_OF_FLOATS
        self.nodes.append(node)

    def _meant(self, number: str, scale: str, zero: str) -> str:
        """The number that 8 bits stand for."""
        return self._add("Mul", self._unshifted(number, zero), scale)

    def _eight_bits(self, number: str, scale: str, zero: str, into: str) -> None:
        """Make `into`, which has 8 bits in the model, without rounding and without a zero point."""
        self._one(zero)
        limits = (self._constant(limit, f"unrounded/{limit}") for limit in (-_FAR, _FAR))
        self._add("Clip", self._add("Div", number, self._one(scale)), *limits, into=into)
        self.real.add(into)

    def _unshifted(self, number: str, zero: str) -> str:
        """Return the number less its zero point; weights become floating-point in the graph, not in the file."""
        if number in self.real:
            return number
        tensor = self.weights.get(number)
        if tensor is not None:
            self.left -= int(np.prod(tensor.dims, dtype=np.int64))
            if self.left < 0:
                raise _RoundedError
        whole = self._add("Cast", number, to=TensorProto.FLOAT)
        return self._add("Sub", whole, self._add("Cast", zero, to=TensorProto.FLOAT)) if zero else whole

    def _biased(self, number: str, bias: str, into: str) -> None:
        self._add(*(("Add", number, bias) if bias else ("Identity", number)), into=into)

    def _one(self, name: str) -> str:
        """Return the name of what has to be a single number.

        Raises:
            _RoundedError: It may be several, along an axis of its own.
        """
        tensor = self.weights.get(name)
        if name and (tensor is None or np.prod(tensor.dims, dtype=np.int64) != 1):
            raise _RoundedError
        return name

    def _constant(self, value: float, name: str) -> str:
        if name not in self.weights:
            self.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
            self.weights[name] = self.graph.initializer[-1]
        return name

    def _add(self, op_type: str, *inputs: str, into: str = "", **attributes: Any) -> str:
        into = into or f"unrounded/{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [into], **attributes))
        return into


def _padded(inputs: Sequence[str], count: int) -> list[str]:
    return [*inputs, *[""] * (count - len(inputs))]
