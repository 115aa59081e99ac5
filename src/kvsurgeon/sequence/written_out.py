"""Fused attention of com.microsoft, written out in standard operators.

These operators project, split heads, mask and multiply in one node, with a dozen inputs that change what they mean.
Written out they are the same products as any other attention, and nothing else has to know them.
Source of what they compute: onnxruntime, docs/ContribOperators.md and its CPU kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.errors import Refused
from kvsurgeon.graph.liveness import find_alive
from kvsurgeon.graph.plain import in_plain_words
from kvsurgeon.sequence.kinds import read_inputs
from kvsurgeon.shapes.fact import Fact
from kvsurgeon.shapes.inference import Shapes, infer_shapes

FUSED = frozenset({"Attention", "QAttention", "MultiHeadAttention"})

Values = Sequence[ir.Value | None]


def in_standard_operators(model: ir.Model) -> ir.Model:
    """Return the model in plain words and without fused attention of com.microsoft.

    The model itself where there is nothing to write out; else a copy, so that the original stays as it was.

    Raises:
        Refused: One has inputs or attributes that say something that is not known here, such as a past.
    """
    plain = in_plain_words(model)
    if not any(_is_fused(node) for node in plain.graph):
        return plain
    copy = plain.clone()
    copy.meta.update(plain.meta)
    graph = copy.graph
    alive = find_alive(graph)
    dimensions, _ = read_inputs(graph)
    shapes = infer_shapes([node for node in graph if node in alive], dimensions, graph.opset_imports.get("", 1))
    for node in list(graph):
        if _is_fused(node) and node in alive:
            _Writer(graph, node, shapes).write()
    return copy


def _is_fused(node: ir.Node) -> bool:
    return node.domain == "com.microsoft" and node.op_type in FUSED


class _Writer:
    """Writes one fused attention out."""

    def __init__(self, graph: ir.Graph, node: ir.Node, shapes: Shapes) -> None:
        self.graph = graph
        self.node = node
        self.shapes = shapes
        self.heads = node.attributes.get_int("num_heads", 0)
        self.name = node.outputs[0].name or "attention"
        self._made = 0

    def write(self) -> None:
        """Put standard operators in the node's place.

        Raises:
            Refused: It has a past, gives more than its result, or is masked in a way that is not known here.
        """
        past = {"Attention": (4, 6), "QAttention": (8,), "MultiHeadAttention": (6, 7, 8, 9)}[self.node.op_type]
        if any(self._given(index) is not None for index in past):
            raise self._refused("the model already has a cache", "inject a model exported without one")
        if any(value.uses() or value.is_graph_output() for value in self.node.outputs[1:]):
            raise self._refused("its further outputs are used", "export without them")
        if self.node.attributes.get_int("do_rotary", 0) or not self.heads:
            raise self._refused("it turns queries and keys itself", "export with rotary positions of their own")
        query, key, value = self._of_heads()
        result = self._attended(query, key, value)
        result.type, result.shape = self.node.outputs[0].type, self.node.outputs[0].shape
        ir.convenience.replace_all_uses_with(self.node.outputs[0], result, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)
        result.name = self.name

    # From the inputs to [batch, heads, sequence, head_dim]

    def _of_heads(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        if self.node.op_type == "MultiHeadAttention":
            query, key, value = self._apart()
        else:
            query, key, value = self._split(self._projected(), self._widths())
        query, key, value = (self._heads_apart(one) for one in (query, key, value))
        return query, key, value

    def _projected(self) -> ir.Value:
        hidden, weights, bias = self._need(0), self._need(1), self._given(2)
        if self.node.op_type == "Attention":
            made = self._node("MatMul", [hidden, weights])
        else:
            zeros = [self._given(6), self._given(7)]
            summed = self._node("MatMulInteger", [hidden, weights, *zeros][: 4 if zeros[1] else 3 if zeros[0] else 2])
            scale = self._node("Mul", [self._need(3), self._need(4)])
            made = self._node("Mul", [self._node("Cast", [summed], to=self._dtype()), scale])
        return made if bias is None else self._node("Add", [made, bias])

    def _widths(self) -> list[int]:
        given = self.node.attributes.get_ints("qkv_hidden_sizes", None)
        if given:
            return list(given)
        width = (self._fact(1).shape or (None,))[-1]
        if not isinstance(width, int) or width % 3:
            raise self._refused("the width of its weights is unknown", "give the weights a shape")
        return [width // 3] * 3

    def _apart(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        query, key, value, bias = self._need(0), self._given(1), self._given(2), self._given(3)
        if key is None or value is None or any(len(self._fact(index).shape or ()) != 3 for index in range(3)):
            raise self._refused("its queries, keys and values are packed", "three tensors [batch, sequence, hidden]")
        if bias is None:
            return query, key, value
        sizes = [(self._fact(index).shape or ())[2] for index in range(3)]
        if not all(isinstance(size, int) for size in sizes):
            raise self._refused("the width of its inputs is unknown", "shapes that are known")
        parts = self._split(bias, [size for size in sizes if isinstance(size, int)], axis=0)
        query, key, value = (
            self._node("Add", [one, part]) for one, part in zip((query, key, value), parts, strict=True)
        )
        return query, key, value

    def _split(self, value: ir.Value, widths: Sequence[int], axis: int = 2) -> list[ir.Value]:
        ends = np.cumsum(widths)
        bounds = [(int(end) - width, int(end)) for end, width in zip(ends, widths, strict=True)]
        return [
            self._node("Slice", [value, *(self._numbers([number]) for number in (*bound, axis))]) for bound in bounds
        ]

    def _heads_apart(self, value: ir.Value) -> ir.Value:
        apart = self._node("Reshape", [value, self._numbers([0, 0, self.heads, -1])])
        return self._node("Transpose", [apart], perm=[0, 2, 1, 3])

    # Scores, weights, and what they are summed against

    def _attended(self, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        scores = self._node("MatMul", [query, self._node("Transpose", [key], perm=[0, 1, 3, 2])])
        scores = self._node("Mul", [scores, self._constant(np.array(self._scale(), self._numpy()))])
        bias = self._given({"Attention": 5, "MultiHeadAttention": 5}.get(self.node.op_type, -1))
        for added in (bias, self._mask()):
            scores = scores if added is None else self._node("Add", [scores, added])
        context = self._node("MatMul", [self._node("Softmax", [scores], axis=3), value])
        context = self._node("Transpose", [context], perm=[0, 2, 1, 3])
        return self._node("Reshape", [context, self._numbers([0, 0, -1])])

    def _scale(self) -> float:
        given = self.node.attributes.get_float("scale", 0.0)
        if given:
            return given
        width: Any = self._widths()[0] if self.node.op_type != "MultiHeadAttention" else (self._fact(0).shape or ())[2]
        if not isinstance(width, int):
            raise self._refused("the width of its queries is unknown", "shapes that are known")
        return 1.0 / math.sqrt(width // self.heads)

    def _mask(self) -> ir.Value | None:
        """What is added to the scores: [.., sequence, keys]; None where every key is seen."""
        mask = self._padding()
        if not self.node.attributes.get_int("unidirectional", 0):
            return mask
        zero, lowest = (self._constant(np.array(number, self._numpy())) for number in (0, np.finfo(self._numpy()).min))
        return self._node("Where", [self._causal(), zero if mask is None else mask, lowest])

    def _padding(self) -> ir.Value | None:
        place = {"Attention": 3, "QAttention": 5, "MultiHeadAttention": 4}[self.node.op_type]
        mask = self._given(place)
        if mask is None:
            return None
        rank = len(self._fact(place).shape or ())
        if rank not in (2, 3):
            raise self._refused(
                "its mask says where tokens begin or end", "a mask [batch, sequence], 1 where one counts"
            )
        seen = self._node("Greater", [mask, self._constant(np.array(0, self._fact(place).dtype.numpy()))])  # type: ignore[union-attr]
        seen = self._node("Reshape", [seen, self._numbers([0, 1, 1, -1])]) if rank == 2 else self._beside_heads(seen)
        numbers = (0.0, self.node.attributes.get_float("mask_filter_value", -10000.0))
        zero, filtered = (self._constant(np.array(number, self._numpy())) for number in numbers)
        return self._node("Where", [seen, zero, filtered])

    def _beside_heads(self, mask: ir.Value) -> ir.Value:
        """[batch, sequence, keys] as [batch, 1, sequence, keys]."""
        if self.graph.opset_imports.get("", 1) < 13:
            return self._node("Unsqueeze", [mask], axes=[1])
        return self._node("Unsqueeze", [mask, self._numbers([1])])

    def _causal(self) -> ir.Value:
        """[sequence, keys]: whether the key is not after the query."""
        zero, one = (self._constant(np.array(number)) for number in (0, 1))
        length = self._node("Gather", [self._node("Shape", [self._need(0)]), one])
        row = self._node("Range", [zero, length, one])
        column = self._node("Reshape", [row, self._numbers([-1, 1])])
        return self._node("Not", [self._node("Less", [column, row])])

    # Small words

    def _given(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if 0 <= index < len(self.node.inputs) else None

    def _need(self, index: int) -> ir.Value:
        value = self._given(index)
        if value is None:
            raise self._refused(f"its input {index} is missing", "a model that onnxruntime runs")
        return value

    def _fact(self, index: int) -> Fact:
        return self.shapes[self._need(index)]

    def _dtype(self) -> ir.DataType:
        return self._fact(3 if self.node.op_type == "QAttention" else 0).dtype or ir.DataType.FLOAT

    def _numpy(self) -> Any:
        return self._dtype().numpy()

    def _numbers(self, numbers: Sequence[int]) -> ir.Value:
        return self._constant(np.array(numbers, np.int64))

    def _constant(self, array: np.ndarray) -> ir.Value:
        self._made += 1
        name = f"{self.name}.constant_{self._made}"
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _node(self, operator: str, inputs: Values, **attributes: Any) -> ir.Value:
        built = ir.convenience.convert_attributes(_attributes(attributes))
        node = ir.Node("", operator, inputs, built, metadata_props=dict(self.node.metadata_props))
        self.graph.insert_before(self.node, node)
        return node.outputs[0]

    def _refused(self, reason: str, hint: str) -> Refused:
        return Refused(f"{self.node.op_type}: {reason}", at=self.name, hint=hint)


def _attributes(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: int(value) if isinstance(value, ir.DataType) else value for name, value in given.items()}
