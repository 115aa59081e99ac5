"""A graph that mutations can cut: what is known of its values, and words for adding to it and rewiring it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE})
INTEGERS = frozenset({TensorProto.INT64, TensorProto.INT32})
SMALL = 16  # elements of a constant that is looked at as parameters, not as weights


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One input of one node."""

    node: NodeProto
    index: int

    @property
    def value(self) -> str:
        return str(self.node.input[self.index])

    def __str__(self) -> str:
        return f"input {self.index} of {self.node.op_type} `{self.node.output[0]}`"


@dataclass(kw_only=True)
class Graph:
    """A model that is being mutated; every choice is drawn from `random`."""

    model: onnx.ModelProto
    random: Random
    damaged: bytes | None = None  # the file, where it is no longer what the model says
    _types: dict[str, tuple[int, int | None]] = field(default_factory=dict, init=False)
    _count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._types = _typed(self.model)

    @property
    def nodes(self) -> list[NodeProto]:
        return list(self.model.graph.node)

    @property
    def opset(self) -> int:
        versions = [entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")]
        return int(versions[0]) if versions else 1

    def type_of(self, value: str) -> int:
        """Element type of a value, 0 where it is unknown."""
        return self._types.get(value, (0, None))[0]

    def rank_of(self, value: str) -> int | None:
        return self._types.get(value, (0, None))[1]

    def nodes_of(self, *operators: str) -> list[NodeProto]:
        return [node for node in self.nodes if node.op_type in operators]

    def pick(self, choices: Sequence[Any]) -> Any:
        """One of the choices; None where there are none."""
        return self.random.choice(choices) if choices else None

    def edges(self, wanted: Callable[[int, int], bool]) -> list[Edge]:
        """Inputs of nodes whose element type and rank are wanted; constants are none."""
        made = {value for node in self.nodes for value in node.output}
        return [
            Edge(node=node, index=index)
            for node in self.nodes
            for index, value in enumerate(node.input)
            if value in made and (rank := self.rank_of(value)) is not None and wanted(self.type_of(value), rank)
        ]

    def makers(self) -> dict[str, NodeProto]:
        return {value: node for node in self.nodes for value in node.output}

    def readers(self, value: str) -> list[NodeProto]:
        return [node for node in self.nodes if value in node.input]

    def constants(self, wanted: Callable[[np.ndarray], bool]) -> list[tuple[str, TensorProto]]:
        """Small constants, by the value that holds them: initializers and `Constant` nodes."""
        found = [(tensor.name, tensor) for tensor in self.model.graph.initializer]
        found += [
            (node.output[0], attribute.t)
            for node in self.nodes_of("Constant")
            for attribute in node.attribute
            if attribute.name == "value"
        ]
        return [(name, tensor) for name, tensor in found if _is_small(tensor) and wanted(numpy_helper.to_array(tensor))]

    def constant(self, array: Any, dtype: Any = np.int64) -> str:
        """Add a constant and return its name."""
        name = self._fresh("constant")
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(array, dtype=dtype), name))
        return name

    def constant_like(self, value: str, number: Any) -> str:
        """Add a number of the element type of a value."""
        return self.constant(number, helper.tensor_dtype_to_np_dtype(self.type_of(value)))

    def before(self, node: NodeProto, operator: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> str:
        """Add a node in front of another and return its first output."""
        names = [self._fresh(operator.lower()) for _ in range(outputs)]
        place = next(place for place, other in enumerate(self.model.graph.node) if other is node or other == node)
        self.model.graph.node.insert(place, helper.make_node(operator, inputs, names, **attributes))
        return names[0]

    def reduced(self, node: NodeProto, operator: str, value: str, axis: int) -> str:
        """Add a `Reduce...` along one axis, which is kept, in front of a node."""
        if self.opset < (13 if operator == "ReduceSum" else 18):
            return self.before(node, operator, [value], axes=[axis], keepdims=1)
        return self.before(node, operator, [value, self.constant([axis])], keepdims=1)

    def length(self, node: NodeProto) -> str:
        """The number of tokens as an int64 tensor of one element, computed in front of a node."""
        tokens = self.model.graph.input[0]
        shape = self.before(node, "Shape", [tokens.name])
        place = 1 if len(tokens.type.tensor_type.shape.dim) > 1 else 0
        return self.before(node, "Gather", [shape, self.constant([place])], axis=0)

    def rewire(self, edge: Edge, value: str) -> None:
        edge.node.input[edge.index] = value

    def _fresh(self, name: str) -> str:
        self._count += 1
        return f"mutant.{name}.{self._count}"


def attribute_of(node: NodeProto, name: str) -> onnx.AttributeProto | None:
    return next((attribute for attribute in node.attribute if attribute.name == name), None)


def _is_small(tensor: TensorProto) -> bool:
    external = tensor.data_location == TensorProto.EXTERNAL
    known = tensor.data_type in FLOATS | INTEGERS | {TensorProto.BOOL}
    return not external and known and int(np.prod(tensor.dims, dtype=int)) <= SMALL


def _typed(model: onnx.ModelProto) -> dict[str, tuple[int, int | None]]:
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception:
        inferred = model
    found: dict[str, tuple[int, int | None]] = {}
    for value in _declared(inferred.graph):
        tensor = value.type.tensor_type
        found[value.name] = (tensor.elem_type, len(tensor.shape.dim) if tensor.HasField("shape") else None)
    for weight in inferred.graph.initializer:
        found[weight.name] = (weight.data_type, len(weight.dims))
    return found


def _declared(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    yield from graph.value_info
    yield from graph.input
    yield from graph.output
