"""Writes an ONNX graph node by node, in the handwriting of one exporter or the other."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Dims = Sequence[str | int]
ELEMENTS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
PAGE = 4096


class NodeWriter:
    """A graph being written.

    Args:
        opset: Of the default domain.
        dtype: Of weights and activations.
        constants_are_nodes: TorchScript writes a `Constant` node at each use; dynamo one initializer for all uses.
        metadata: Give each node as much metadata as dynamo does.
    """

    def __init__(self, *, opset: int, dtype: str, constants_are_nodes: bool, metadata: bool) -> None:
        self.opset = opset
        self.dtype = dtype
        self._constants_are_nodes = constants_are_nodes
        self._metadata = metadata
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._value_infos: list[onnx.ValueInfoProto] = []
        self._counts: Counter[str] = Counter()
        self._scope = ""

    @property
    def element(self) -> int:
        return ELEMENTS[self.dtype]

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put what is written meanwhile below a module's name."""
        before, self._scope = self._scope, f"{self._scope}/{name}"
        yield
        self._scope = before

    def node(self, operator: str, *inputs: str, dims: Dims | None = None, output: str = "", **attributes: Any) -> str:
        """Append a node and return its output's name; `dims` describe it."""
        described = dims is not None and not output
        output = output or self._name(operator)
        node = helper.make_node(operator, inputs, [output], name=output.removesuffix("_output_0"), **attributes)
        if self._metadata:
            _describe(node, self._scope)
        self._nodes.append(node)
        if dims is not None and described:
            self._value_infos.append(helper.make_tensor_value_info(output, self.element, list(dims)))
        return output

    def constant(self, value: object, dtype: str = "int64") -> str:
        """Return the name of a small constant."""
        array = np.asarray(value, NUMPY.get(dtype, dtype))
        if self._constants_are_nodes:
            return self.node("Constant", value=numpy_helper.from_array(array))
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._name("val")
            tensor = numpy_helper.from_array(array, self._constants[key])
            self._weights[tensor.name] = tensor
        return self._constants[key]

    def weight(self, name: str, *dims: int) -> str:
        """Return the name of a weight whose values are none of this graph's business yet."""
        self._weights[name] = TensorProto(name=name, data_type=self.element, dims=dims)
        return name

    def model(self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]) -> onnx.ModelProto:
        """Return what was written; weights have no data."""
        graph = helper.make_graph(self._nodes, "main_graph", inputs, outputs, list(self._weights.values()))
        graph.value_info.extend(self._value_infos)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="pytorch")

    def _name(self, operator: str) -> str:
        place = f"{self._scope}/{operator}" if self._constants_are_nodes else operator.lower()
        number = self._counts[place]
        self._counts[place] += 1
        tail = f"_{number}" if number else ""
        return f"{place}{tail}_output_0" if self._constants_are_nodes else f"{place}{tail}"


def fill_with_noise(model: onnx.ModelProto) -> None:
    """Give each weight without data small random values, the same for the same name."""
    for tensor in model.graph.initializer:
        if tensor.HasField("raw_data") or not tensor.dims:
            continue
        generator = np.random.default_rng(zlib.crc32(tensor.name.encode()))
        spread = 1.5 / np.sqrt(tensor.dims[0]) if len(tensor.dims) > 1 else 0.1
        center = 0.0 if len(tensor.dims) > 1 else 1.0  # a norm's gain
        values = generator.normal(center, spread, list(tensor.dims))
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        tensor.raw_data = values.astype(dtype).tobytes()


def put_weights_aside(model: onnx.ModelProto, location: str) -> int:
    """Point each weight without data into an external data file, and return how long that file must be."""
    offset = 0
    for tensor in model.graph.initializer:
        if tensor.HasField("raw_data"):
            continue
        width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        length = int(np.prod(tensor.dims, dtype=np.int64)) * width
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        offset += -(-length // PAGE) * PAGE
    return offset


def _describe(node: onnx.NodeProto, scope: str) -> None:
    """Add what dynamo adds to a node: about 1.7 kB of scopes, classes and a stack trace."""
    modules = [part for part in scope.replace("/", ".").split(".") if part]
    paths = [".".join(modules[: depth + 1]) for depth in range(len(modules))]
    classes = [f"transformers.models.llama.modeling_llama.{path.title().replace('.', '')}" for path in paths]
    frame = '  File "site-packages/transformers/models/llama/modeling_llama.py", line {}, in forward\n    {}\n'
    calls = [
        frame.format(100 + 37 * depth, f"hidden_states = self.{path}(hidden_states)")
        for depth, path in enumerate(["model", *paths, node.op_type, "rotary_emb.apply"])
    ]
    for key, value in (
        ("namespace", "/".join(f"{path}: {kind}" for path, kind in zip(paths, classes, strict=True))),
        ("pkg.torch.onnx.class_hierarchy", str(classes)),
        ("pkg.torch.onnx.fx_node", f"%{node.output[0]} : [num_users=1] = call_function({', '.join(node.input)})"),
        ("pkg.torch.onnx.name_scopes", str(paths)),
        ("pkg.torch.onnx.stack_trace", "".join(calls)),
    ):
        node.metadata_props.add(key=key, value=value)
