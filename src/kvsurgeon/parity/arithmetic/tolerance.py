"""Tolerances: how far equal computations may differ, by their arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import onnx

from kvsurgeon.parity.model_source import all_nodes

Arithmetic = Literal["float64", "float32", "float16", "bfloat16", "quantized", "dynamic"]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Allowed difference. An error is the largest difference, divided by the spread of the reference's values.

    Attributes:
        bound: Largest error that is allowed.
        agreement: Fraction of the tokens whose most likely next token must agree.
        tie: Difference, divided by the spread, below which two logits are equally likely.
        reason: Source of these numbers.
    """

    bound: float
    agreement: float
    tie: float
    reason: str

    def with_bound(self, bound: float) -> Tolerance:
        """Return the tolerance with another bound, and ties in proportion."""
        return replace(self, bound=bound, tie=self.tie * bound / self.bound)


TOLERANCES: dict[Arithmetic, Tolerance] = {
    "float64": Tolerance(bound=1e-5, agreement=1.0, tie=2e-5, reason=(
        "sums differ near 1e-15, but tables and norms inside are often float32: 4e-7 measured")),
    "float32": Tolerance(bound=3e-4, agreement=1.0, tie=6e-4, reason=(
        "sums in another order: 2e-5 over two layers, 5e-5 over thirty (measured); a wrong cache 1e-2 and more")),
    "float16": Tolerance(bound=3e-2, agreement=0.9, tie=3e-2, reason=(
        "11 bits of mantissa: rounding is 5e-4 of a value, in every operator; 4e-3 measured over two layers")),
    "bfloat16": Tolerance(bound=1.5e-1, agreement=0.9, tie=1e-1, reason=(
        "8 bits of mantissa: rounding is 4e-3 of a value, in every operator")),
    "quantized": Tolerance(bound=1e-1, agreement=0.9, tie=5e-2, reason=(
        "fixed ranges: a difference of 1e-7 may round to the next of 256 steps, near 2e-2, and layers add to it")),
    "dynamic": Tolerance(bound=3.5e-1, agreement=0.8, tie=1e-1, reason=(
        "each call measures its ranges: the same tokens in a shorter call differ by up to 2.2e-1 (measured)")),
}  # fmt: skip

ROUNDED: frozenset[Arithmetic] = frozenset(("quantized", "dynamic"))  # activations to 8 bits, in ranges of a call
ROUNDINGS = 3  # in ranges of the call, of the calls before, and of the whole text

_FOUR_BITS = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}  # onnxruntime fuses their products into `MatMulNBits`
_DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
_FLOATS: dict[int, Arithmetic] = {  # coarsest first
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.DOUBLE: "float64",
}


def arithmetic_of(model: onnx.ModelProto) -> Arithmetic:
    """Return the coarsest arithmetic that the model computes in."""
    nodes = all_nodes(model)
    operators = {node.op_type for node in nodes}
    if operators & _DYNAMIC:
        return "dynamic"
    if "QuantizeLinear" in operators or any(name.startswith(("QLinear", "QGemm")) for name in operators):
        return "quantized"
    if any(_rounds_activations(node) for node in nodes):
        return "quantized"
    if any(initializer.data_type in _FOUR_BITS for initializer in model.graph.initializer):
        return "quantized"
    return float_type_of(model)


def float_type_of(model: onnx.ModelProto) -> Arithmetic:
    """Return the coarsest floating-point type that the model computes in. Weights that are cast first do not count."""
    graph, nodes = model.graph, all_nodes(model)
    widened = {node.input[0] for node in nodes if node.op_type == "Cast"}
    widened -= {name for node in nodes if node.op_type != "Cast" for name in node.input}
    types = {weight.data_type for weight in graph.initializer if weight.name not in widened}
    types |= {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output, *graph.value_info]}
    types |= {a.i for node in nodes if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
    return next((name for onnx_type, name in _FLOATS.items() if onnx_type in types), "float32")


def _rounds_activations(node: onnx.NodeProto) -> bool:
    """Whether onnxruntime rounds activations to int8, as it does in products that it fuses with `DequantizeLinear`."""
    options = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "DequantizeLinear":
        return bool(options.get("block_size"))
    return node.op_type == "MatMulNBits" and options.get("accuracy_level") == 4
