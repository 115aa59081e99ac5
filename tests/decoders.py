"""A tiny decoder written by hand, without a cache and with one, for tests that need a model they can trust.

Three layers, grouped queries (4 heads, 2 for keys and values), rotary positions, RMS norm, a sliding window in the
middle layer, padding by `attention_mask`. The weights are large enough that logits depend on order, positions and
masks.

`Decoder(config).model()` is what an exporter would give, `CachedDecoder(config).model()` what an injection should
give. Each step is a method, so that a wrong injection is a subclass that overrides one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
MASKED = -1e4  # added to masked scores; finite in float16 too


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of a decoder."""

    layers: int = 3
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    vocabulary: int = 61
    window: int = 4
    windowed: tuple[int, ...] = (1,)
    max_length: int = 128  # rows of the rotary table
    dtype: str = "float32"
    attention_mask: bool = True
    position_ids: bool = False
    static: tuple[int, int] | None = None  # batch and length, where every shape is fixed
    seed: int = 0

    @property
    def onnx_type(self) -> int:
        return helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))


class Graph:
    """An ONNX graph in the making: operators by name, constants by value."""

    def __init__(self, prefix: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._prefix = prefix
        self._scope = ""

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        outer, self._scope = self._scope, f"{name}."
        yield
        self._scope = outer

    def op(self, operator: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        """Add a node and return its output, called `to` within the scope or else after the operator."""
        output = self._scope + to if to else f"{self._prefix}{self._scope}{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], output, **attributes))
        return output

    def split(self, value: str, parts: int, axis: int) -> list[str]:
        outputs = [f"{self._prefix}{self._scope}Split_{len(self.nodes)}_{part}" for part in range(parts)]
        self.nodes.append(helper.make_node("Split", [value], outputs, axis=axis, num_outputs=parts))
        return outputs

    def constant(self, value: Any, dtype: str = "int64", to: str | None = None) -> str:
        name = self._scope + to if to else f"{self._prefix}{self._scope}constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def input(self, name: str, onnx_type: int, dims: Sequence[str | int]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, onnx_type, dims))
        return name

    def output(self, value: str, name: str, onnx_type: int, dims: Sequence[str | int]) -> None:
        if value != name:
            self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, onnx_type, dims))

    def model(self, name: str) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
        onnx.checker.check_model(model)
        return model


class Decoder:
    """The decoder without a cache: queries and keys have one length."""

    prefix = ""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self.graph = Graph(self.prefix)
        self._random = np.random.default_rng(self.config.seed)

    def model(self) -> onnx.ModelProto:
        config, graph = self.config, self.graph
        self.declare()
        with graph.scope("model"):
            hidden = graph.op("Gather", self.weight("embeddings", config.vocabulary, config.hidden), "input_ids")
        for layer in range(config.layers):
            with graph.scope(f"layers.{layer}"):
                hidden = graph.op("Add", hidden, self.attention(layer, self.norm(hidden)), to="after_attention")
                hidden = graph.op("Add", hidden, self.feed_forward(self.norm(hidden)), to="output")
        with graph.scope("model"):
            hidden = self.norm(hidden)
            logits = graph.op("MatMul", hidden, self.weight("head", config.hidden, config.vocabulary, gain=2.0))
        graph.output(logits, "logits", config.onnx_type, [*self.token_dims(), config.vocabulary])
        graph.outputs.insert(0, graph.outputs.pop())  # logits first, as exporters have it
        return graph.model("tiny_decoder")

    # What the model is given

    def token_dims(self) -> tuple[str | int, str | int]:
        return self.config.static or ("batch", "sequence")

    def mask_dims(self) -> tuple[str | int, str | int]:
        return self.token_dims()

    def declare(self) -> None:
        self.graph.input("input_ids", TensorProto.INT64, self.token_dims())
        if self.config.attention_mask:
            self.graph.input("attention_mask", TensorProto.INT64, self.mask_dims())
        if self.config.position_ids:
            self.graph.input("position_ids", TensorProto.INT64, self.token_dims())

    # The two lengths: positions of the new tokens

    def new_length(self) -> str:
        return self.size("input_ids", 1)

    def query_index(self) -> str:
        """Places of the new tokens, `[S]`."""
        return self.range(0, self.new_length())

    def key_index(self) -> str:
        """Places of all tokens, `[T]`."""
        return self.range(0, self.new_length())

    def rotary_index(self, layer: int) -> str:
        """Positions by which new queries and keys are rotated, `[S]` or `[B, S]`."""
        return "position_ids" if self.config.position_ids else self.query_index()

    def padding(self) -> str:
        """1 where a key counts, `[B, T]`."""
        return "attention_mask"

    # One layer

    def attention(self, layer: int, hidden: str) -> str:
        config, graph = self.config, self.graph
        query = self.rotate(layer, self.heads(hidden, "query", config.heads))
        key = self.rotate(layer, self.heads(hidden, "key", config.kv_heads, gain=2.0))
        value = self.heads(hidden, "value", config.kv_heads)
        key, value = self.update_cache(layer, key, value)
        key, value = self.repeat(layer, key), self.repeat(layer, value)
        scores = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = graph.op("Mul", scores, self.scale(layer), to="scores")
        bias = self.graph.op("Where", self.visible(layer), self.number(0.0), self.number(MASKED))
        weights = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
        context = graph.op("Transpose", graph.op("MatMul", weights, value), perm=[0, 2, 1, 3], to="context")
        merged = graph.op("Reshape", context, graph.constant([0, 0, config.heads * config.head_dim]))
        return graph.op("MatMul", merged, self.weight("out", config.heads * config.head_dim, config.hidden))

    def heads(self, hidden: str, name: str, count: int, gain: float = 1.0) -> str:
        """Project, and return `[B, heads, S, head_dim]`."""
        width = count * self.config.head_dim
        product = self.graph.op("MatMul", hidden, self.weight(name, self.config.hidden, width, gain=gain))
        shape = self.graph.constant([0, 0, count, self.config.head_dim])
        return self.graph.op("Transpose", self.graph.op("Reshape", product, shape), perm=[0, 2, 1, 3])

    def rotate(self, layer: int, heads: str) -> str:
        graph = self.graph
        cosine, sine = (self.rotary(layer, table) for table in (np.cos, np.sin))
        low, high = graph.split(heads, 2, axis=-1)
        rotated_half = graph.op("Concat", graph.op("Neg", high), low, axis=-1)
        return graph.op("Add", graph.op("Mul", heads, cosine), graph.op("Mul", rotated_half, sine))

    def rotary(self, layer: int, function: Any) -> str:
        """A rotary table at the positions of the new tokens, `[1, S, head_dim]` or `[B, 1, S, head_dim]`."""
        half = self.config.head_dim // 2
        angles = np.outer(np.arange(self.config.max_length), 10.0 ** (-2 * np.arange(half) / half))
        table = self.graph.constant(function(np.concatenate([angles, angles], axis=1)), self.config.dtype)
        rows = self.graph.op("Gather", table, self.rotary_index(layer))
        return self.graph.op("Unsqueeze", rows, self.graph.constant([-3]))

    def update_cache(self, layer: int, key: str, value: str) -> tuple[str, str]:
        """Key and value of all tokens."""
        return key, value

    def repeat(self, layer: int, heads: str) -> str:
        """Give each query head the key or value head of its group."""
        config, graph = self.config, self.graph
        groups = graph.constant([1, 1, config.heads // config.kv_heads, 1, 1])
        grouped = graph.op("Expand", graph.op("Unsqueeze", heads, graph.constant([2])), groups)
        return graph.op("Reshape", grouped, graph.constant([0, config.heads, -1, config.head_dim]))

    def scale(self, layer: int) -> str:
        return self.number(self.config.head_dim**-0.5)

    def visible(self, layer: int) -> str:
        """Return the keys that each query attends to, `[S, T]` or `[B, 1, S, T]`."""
        visible = self.causal(layer)
        if layer in self.config.windowed:
            visible = self.graph.op("And", visible, self.within(layer))
        if self.config.attention_mask:
            counts = self.graph.op("Greater", self.padding(), self.graph.constant(0))
            visible = self.graph.op("And", visible, self.graph.op("Unsqueeze", counts, self.graph.constant([1, 2])))
        return visible

    def causal(self, layer: int) -> str:
        return self.graph.op("LessOrEqual", self.row(self.key_index()), self.column(self.query_index()))

    def within(self, layer: int) -> str:
        first = self.graph.op("Sub", self.column(self.query_index()), self.graph.constant(self.width(layer)))
        return self.graph.op("Greater", self.row(self.key_index()), first)

    def width(self, layer: int) -> int:
        """Keys that a query sees in a windowed layer, its own included."""
        return self.config.window

    def feed_forward(self, hidden: str) -> str:
        graph, width = self.graph, self.config.hidden
        inner = graph.op("MatMul", hidden, self.weight("up", width, 2 * width))
        return graph.op("MatMul", graph.op("Tanh", inner), self.weight("down", 2 * width, width))

    def norm(self, hidden: str) -> str:
        graph = self.graph
        mean = graph.op("ReduceMean", graph.op("Mul", hidden, hidden), graph.constant([-1]))
        return graph.op("Div", hidden, graph.op("Sqrt", graph.op("Add", mean, self.number(1e-3))))

    # Small words

    def weight(self, name: str, rows: int, columns: int, gain: float = 1.0) -> str:
        values = self._random.standard_normal((rows, columns)) * gain / np.sqrt(1 if name == "embeddings" else rows)
        return self.graph.constant(values, self.config.dtype, to=name)

    def number(self, value: float) -> str:
        return self.graph.constant(value, self.config.dtype)

    def size(self, value: str, axis: int) -> str:
        return self.graph.op("Gather", self.graph.op("Shape", value), self.graph.constant(axis))

    def range(self, start: int | str, end: str) -> str:
        start = start if isinstance(start, str) else self.graph.constant(start)
        return self.graph.op("Range", start, end, self.graph.constant(1))

    def row(self, index: str) -> str:
        return self.graph.op("Unsqueeze", index, self.graph.constant([0]))

    def column(self, index: str) -> str:
        return self.graph.op("Unsqueeze", index, self.graph.constant([1]))


class CachedDecoder(Decoder):
    """The same decoder with a cache: queries are the new tokens, keys are all tokens so far."""

    prefix = "cached/"

    def token_dims(self) -> tuple[str | int, str | int]:
        return ("batch_size", "sequence_length")

    def mask_dims(self) -> tuple[str | int, str | int]:
        return ("batch_size", "total_sequence_length")

    def cached_layers(self) -> Sequence[int]:
        return range(self.config.layers)

    def declare(self) -> None:
        super().declare()
        for layer in self.cached_layers():
            for part in ("key", "value"):
                dims = ("batch_size", self.config.kv_heads, "past_sequence_length", self.config.head_dim)
                self.graph.input(f"past_key_values.{layer}.{part}", self.config.onnx_type, dims)

    def past_length(self) -> str:
        return self.size(f"past_key_values.{self.cached_layers()[0]}.key", 2)

    def total_length(self) -> str:
        return self.graph.op("Add", self.past_length(), self.new_length())

    def query_index(self) -> str:
        return self.range(self.past_length(), self.total_length())

    def key_index(self) -> str:
        return self.range(0, self.total_length())

    def update_cache(self, layer: int, key: str, value: str) -> tuple[str, str]:
        if layer not in self.cached_layers():
            return key, value
        key = self.append(layer, f"past_key_values.{layer}.key", key)
        value = self.append(layer, f"past_key_values.{layer}.value", value)
        self.present(layer, key, value)
        return key, value

    def append(self, layer: int, past: str, new: str) -> str:
        return self.graph.op("Concat", past, new, axis=2)

    def present(self, layer: int, key: str, value: str) -> None:
        dims = ("batch_size", self.config.kv_heads, "total_sequence_length", self.config.head_dim)
        self.graph.output(key, f"present.{layer}.key", self.config.onnx_type, dims)
        self.graph.output(value, f"present.{layer}.value", self.config.onnx_type, dims)


def in_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Change all of a model from float32 to bfloat16, and return it."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        tensor = value.type.tensor_type
        tensor.elem_type = TensorProto.BFLOAT16 if tensor.elem_type == TensorProto.FLOAT else tensor.elem_type
    for weight in model.graph.initializer:
        if weight.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(weight).astype(ml_dtypes.bfloat16)
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    for attribute in (one for node in model.graph.node for one in node.attribute):
        if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.BFLOAT16
    return model
