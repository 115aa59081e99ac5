"""How far two computations of the same thing may differ, by the arithmetic that they are done in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx

from kvsurgeon.errors import InvalidModelError
from kvsurgeon.runtime import Source, model_file

Arithmetic = Literal["float64", "float32", "float16", "bfloat16", "quantised", "dynamic"]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What may differ. An error is the largest difference over the spread of the original's values.

    Attributes:
        error: Largest error that is allowed.
        agreement: Part of the positions at which the likeliest token must be the same.
        tie: Two logits that differ by less, in the same measure as the error, are equally likely.
        reason: Where the numbers come from.
    """

    error: float
    agreement: float
    tie: float
    reason: str

    def widened(self, error: float) -> Tolerance:
        """Return the tolerance with that much allowed, if it is more, and ties in proportion."""
        return replace(self, error=error, tie=self.tie * error / self.error) if error > self.error else self


TOLERANCES: dict[Arithmetic, Tolerance] = {
    "float64": Tolerance(
        error=1e-5,
        agreement=1.0,
        tie=2e-5,
        reason="sums differ near 1e-15, but tables and norms inside are often float32: 4e-7 measured",
    ),
    "float32": Tolerance(
        error=3e-4,
        agreement=1.0,
        tie=6e-4,
        reason="sums in another order: 2e-5 over two layers, 5e-5 over thirty (measured); a wrong cache 1e-2 and more",
    ),
    "float16": Tolerance(
        error=3e-2,
        agreement=0.9,
        tie=3e-2,
        reason="11 bits of mantissa: rounding is 5e-4 of a value, in every operator; 4e-3 measured over two layers",
    ),
    "bfloat16": Tolerance(
        error=1.5e-1,
        agreement=0.9,
        tie=1e-1,
        reason="8 bits of mantissa: rounding is 4e-3 of a value, in every operator",
    ),
    "quantised": Tolerance(
        error=1e-1,
        agreement=0.9,
        tie=5e-2,
        reason="fixed ranges: a difference of 1e-7 may round to the next of 256 steps, near 2e-2, and layers add to it",
    ),
    "dynamic": Tolerance(
        error=3.5e-1,
        agreement=0.8,
        tie=1e-1,
        reason="each call measures its own ranges: the same tokens in a shorter call differ by up to 2.2e-1 (measured)",
    ),
}

ROUNDED: frozenset[Arithmetic] = frozenset(("quantised", "dynamic"))  # to 8 bits, by what shares a call

_DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
_FLOATS: dict[int, Arithmetic] = {
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.DOUBLE: "float64",
}
_COARSEST: tuple[Arithmetic, ...] = ("bfloat16", "float16", "float32", "float64")


def load_graph(source: Source) -> onnx.ModelProto:
    """Return the model without its external weights.

    Raises:
        InputError: There is no such file.
        InvalidModelError: It is not ONNX.
    """
    if isinstance(source, onnx.ModelProto):
        return source
    path: Path = model_file(source)
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, of whichever protobuf is installed
        raise InvalidModelError(f"expected an ONNX model, found something else - at `{path}`") from error


def arithmetic_of(model: onnx.ModelProto) -> Arithmetic:
    """Return the coarsest arithmetic that the model computes in."""
    nodes = list(_within(model.graph.node)) + [node for f in model.functions for node in _within(f.node)]
    operators = {node.op_type for node in nodes}
    if operators & _DYNAMIC:
        return "dynamic"
    if "QuantizeLinear" in operators or any(name.startswith(("QLinear", "QGemm")) for name in operators):
        return "quantised"
    if any(_rounds_activations(node) for node in nodes):
        return "quantised"
    types = _types(model, nodes)
    return next((name for name in _COARSEST if name in types), "float32")


def _rounds_activations(node: onnx.NodeProto) -> bool:
    level = next((attribute.i for attribute in node.attribute if attribute.name == "accuracy_level"), 0)
    return node.op_type == "MatMulNBits" and level == 4  # onnxruntime then rounds the activations to int8


def _types(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> set[Arithmetic]:
    graph = model.graph
    found = {initializer.data_type for initializer in graph.initializer}
    found |= {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output, *graph.value_info]}
    found |= {a.i for node in nodes if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
    return {_FLOATS[onnx_type] for onnx_type in found if onnx_type in _FLOATS}


def _within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from _within(graph.node)
