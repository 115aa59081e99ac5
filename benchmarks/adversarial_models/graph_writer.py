"""Writes an ONNX graph node by node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Operand = str | np.ndarray | float | int | bool | Sequence[int] | Sequence[float] | None
AXES_BY_INPUT_FROM_18 = frozenset(
    {"ReduceMax", "ReduceMin", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceSumSquare", "ReduceProd"}
)
EXTERNAL_FILE = "model.onnx.data"


class GraphWriter:
    """Adds nodes, constants and weights, each under a new name."""

    def __init__(self, random: Random, *, opset: int = 17, constant_nodes: bool = False) -> None:
        self.random = random
        self.noise = np.random.default_rng(random.getrandbits(32))
        self.opset = opset
        self.constant_nodes = constant_nodes
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.outside: set[str] = set()  # names of weights in the external data file
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self._count = 0

    def __call__(self, operator: str, *operands: Operand, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; return the name of its output, or of all outputs if there are several."""
        inputs = [self.value(operand) for operand in operands]
        names = [self.name(operator) for _ in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def value(self, operand: Operand) -> str:
        """Return the name of an operand; numbers become constants, integers int64 and others float32."""
        if operand is None:
            return ""
        if isinstance(operand, str):
            return operand
        array = np.asarray(operand)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = self._constant(array)
        return self._constants[key]

    def _constant(self, array: np.ndarray) -> str:
        name = self.name("constant")
        if self.constant_nodes:
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
        else:
            self.weights[name] = array
        return name

    def weight(self, array: np.ndarray, *, outside: bool = False) -> str:
        """Add a weight, in the external data file if `outside`."""
        name = self.name("weight")
        self.weights[name] = array
        if outside:
            self.outside.add(name)
        return name

    def random_weight(self, *sizes: int, scale: float | None = None) -> str:
        spread = sizes[0] ** -0.5 if scale is None else scale
        return self.weight((self.noise.standard_normal(sizes) * spread).astype(np.float32))

    def reduce(self, operator: str, value: str, axes: Sequence[int] | None, *, keepdims: int = 1) -> str:
        """Add a reduction, whose axes are an input or an attribute by operator set; None for all axes."""
        if axes is None:
            return str(self(operator, value, keepdims=keepdims))
        if operator == "ReduceSum" or (self.opset >= 18 and operator in AXES_BY_INPUT_FROM_18):
            return str(self(operator, value, list(axes), keepdims=keepdims))
        return str(self(operator, value, axes=list(axes), keepdims=keepdims))

    def to_float(self, value: str) -> str:
        return str(self("Cast", value, to=TensorProto.FLOAT))

    def to_int(self, value: str) -> str:
        return str(self("Cast", value, to=TensorProto.INT64))

    def model(self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]) -> onnx.ModelProto:
        """Return the model, without what does not lead to an output."""
        nodes = self._needed([output.name for output in outputs])
        read = {name for node in nodes for name in _all_reads(node)}
        initializers = [numpy_helper.from_array(array, name) for name, array in self.weights.items() if name in read]
        graph = helper.make_graph(nodes, "decoder", inputs, outputs, initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)

    def _needed(self, names: Sequence[str]) -> list[onnx.NodeProto]:
        wanted, kept = set(names), []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                wanted |= _all_reads(node)
                kept.append(node)
        return kept[::-1]

    def save(self, model: onnx.ModelProto, folder: Path) -> Path:
        """Write the model, with the weights that are to be outside in a data file; return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        offset = 0
        with (folder / EXTERNAL_FILE).open("wb") if self.outside else open("/dev/null", "wb") as data:
            for tensor in model.graph.initializer:
                if tensor.name in self.outside:
                    raw = tensor.raw_data
                    data.write(raw)
                    onnx.external_data_helper.set_external_data(tensor, EXTERNAL_FILE, offset, len(raw))
                    tensor.ClearField("raw_data")
                    offset += len(raw)
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path


def _all_reads(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node or a subgraph of it reads."""
    reads = set(node.input) - {""}
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            reads |= {name for inner in attribute.g.node for name in _all_reads(inner)}
            reads |= {output.name for output in attribute.g.output}
    return reads
