"""A small decoder with places where something can be put in: see `Place`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

import numpy as np
import onnx
from onnx import TensorProto, helper

from adversarial_models.graph_writer import GraphWriter

HIDDEN, VOCABULARY, LAYERS = 32, 97, 2
ORDINARY_TOKENS = 90  # tokens below have embeddings of ordinary size, those from here on of growing size
ROWS = 4200  # of the table of positions, unless a decoder is to end earlier

Change = Callable[["Context", str], str]
"""Adds nodes behind a value and returns the changed value."""


@dataclass(kw_only=True)
class Context:
    """What a change may read, by name."""

    write: GraphWriter
    layer: int = 0
    total: str = ""  # int64 [1], the total length
    positions: str = ""  # int64 [S]
    values: dict[str, str] = field(default_factory=dict)  # values for further outputs

    @property
    def query_positions(self) -> str:
        return str(self.write("Unsqueeze", self.positions, [1]))  # [S, 1]

    @property
    def key_positions(self) -> str:
        return str(self.write("Unsqueeze", self.positions, [0]))  # [1, T]


@dataclass(frozen=True, kw_only=True)
class Design:
    """A decoder: its sizes, how it is written, and what is put in where."""

    heads: int = 4
    kv_heads: int = 4
    positions: str = "learned"  # learned, rotary, sinusoidal, alibi
    norm: str = "rms"  # rms, layer
    has_mask: bool = True
    takes_positions: bool = False  # as an input, in addition to those that it counts
    causal: str = "compare"  # compare, trilu, subtract, cumsum
    masking: str = "add"  # add, where, fill
    total: str = "shape-gather"
    opset: int = 17
    constant_nodes: bool = False
    rows: int = ROWS
    changes: Mapping[str, Change] = field(default_factory=dict)  # by place
    layers_changed: tuple[int, ...] = (0, 1)

    @property
    def head_dim(self) -> int:
        return 4 if self.heads > 8 else 8


# place: shape of the value there
PLACES = {
    "hidden": "[B, S, D] after the embedding",
    "positions": "int64 [S], index into the table of positions, or what angles are computed of",
    "angles": "[S, head_dim / 2] of a rotary embedding",
    "query": "[B, H, S, head_dim]",
    "key": "[B, H, S, head_dim]",
    "value": "[B, H, S, head_dim]",
    "scores": "[B, H, S, T] scaled, before the mask",
    "allowed": "bool [S, T] or [.., S, T]: which keys a query reads",
    "bias": "[.., S, T] to add to the scores",
    "output": "[B, S, H * head_dim]",
    "residual": "[B, S, D] output of the feed-forward layer",
    "normed": "[B, S, D] input of the feed-forward layer",
    "logits": "[B, S, V]",
}
TOTALS = (
    "shape-gather",
    "shape-range",
    "shape-slice",
    "size",
    "mask-shape",
    "hidden-shape",
    "last-position",
    "mask-sum",
    "ones-sum",
)


def draw_design(random: Random, *, heads: int) -> Design:
    """Return a decoder in one of many variants, with nothing put in."""
    has_mask = random.random() < 0.6
    totals = [name for name in TOTALS if has_mask or not name.startswith("mask")]
    return Design(
        heads=heads,
        kv_heads=random.choice([heads, heads, max(1, heads // 2), 1]),
        positions=random.choice(["learned", "learned", "rotary", "sinusoidal", "alibi"]),
        norm=random.choice(["rms", "layer"]),
        has_mask=has_mask,
        causal=random.choice(["compare", "compare", "trilu", "subtract", "cumsum"]),
        masking=random.choice(["add", "add", "where", "fill"]),
        total=random.choice(totals),
        opset=random.choice([17, 17, 18]),
        constant_nodes=random.random() < 0.4,
    )


def build(design: Design, random: Random) -> tuple[GraphWriter, onnx.ModelProto]:
    """Return the model of a design; weights are drawn from `random`."""
    write = GraphWriter(random, opset=design.opset, constant_nodes=design.constant_nodes)
    decoder = _Decoder(design=design, write=write, context=Context(write=write))
    return write, decoder.build()


def embedding_scales() -> np.ndarray:
    """Return the size of the embedding of each token, [V]: ordinary ones, then 2 to 128 times as large."""
    sizes = np.ones(VOCABULARY)
    sizes[ORDINARY_TOKENS:] = 2.0 ** np.arange(1, VOCABULARY - ORDINARY_TOKENS + 1)
    return sizes


@dataclass(kw_only=True)
class _Decoder:
    design: Design
    write: GraphWriter
    context: Context

    def build(self) -> onnx.ModelProto:
        write, context = self.write, self.context
        table = write.noise.standard_normal((VOCABULARY, HIDDEN)) * embedding_scales()[:, None]
        hidden = write("Gather", write.weight(table.astype(np.float32)), "input_ids")
        length = write("Squeeze", write("Gather", write("Shape", "input_ids"), [1]), [0])
        context.positions = write("Range", 0, length, 1)
        context.total = self._total(hidden)
        positions = self._changed("positions", context.positions)
        hidden = self._embedded(hidden, positions)
        hidden = self._changed("hidden", hidden)
        mask = self._mask()
        angles = self._angles(positions) if self.design.positions == "rotary" else None
        for layer in range(LAYERS):
            context.layer = layer
            hidden = self._layer(hidden, mask, angles)
        logits = write("MatMul", self._normalized(hidden), write.random_weight(HIDDEN, VOCABULARY))
        context.values["hidden"] = hidden
        logits = self._changed("logits", logits)
        return self._finished(logits)

    def _finished(self, logits: str) -> onnx.ModelProto:
        dims = ["batch", "seq"]
        inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, dims)]
        if self.design.has_mask:
            inputs.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, dims))
        if self.design.takes_positions:
            inputs.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, dims))
        self.write.nodes.append(helper.make_node("Identity", [logits], ["logits"]))
        shape = self.context.values.get("logits_shape", "batch,seq,97").split(",")
        sizes = [int(size) if size.isdigit() else size for size in shape]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, sizes)]
        if "extra" in self.context.values:
            self.write.nodes.append(helper.make_node("Identity", [self.context.values["extra"]], ["extra"]))
            kind, _, shape = self.context.values["extra_shape"].partition(":")
            sizes = [int(size) if size.isdigit() else size for size in shape.split(",") if size]
            outputs.append(helper.make_tensor_value_info("extra", int(kind), sizes))
        return self.write.model(inputs, outputs)

    def _changed(self, place: str, value: str) -> str:
        change = self.design.changes.get(place)
        in_layer = place in ("query", "key", "value", "scores", "output", "residual", "normed")
        if change is None or (in_layer and self.context.layer not in self.design.layers_changed):
            return value
        return change(self.context, value)

    def _total(self, hidden: str) -> str:
        write = self.write
        ids = "input_ids"
        makers: dict[str, Callable[[], str]] = {
            "shape-gather": lambda: write("Gather", write("Shape", ids), [1]),
            "shape-range": lambda: write("Shape", ids, start=1, end=2),
            "shape-slice": lambda: write("Slice", write("Shape", ids), [1], [2], [0]),
            "size": lambda: write("Div", write("Size", ids), write("Gather", write("Shape", ids), [0])),
            "mask-shape": lambda: write("Gather", write("Shape", "attention_mask"), [-1]),
            "hidden-shape": lambda: write("Gather", write("Shape", hidden), [1]),
            "last-position": lambda: write("Add", write.reduce("ReduceMax", self.context.positions, [0]), [1]),
            "mask-sum": lambda: write(
                "Reshape", write.reduce("ReduceMax", write.reduce("ReduceSum", "attention_mask", [1]), None), [1]
            ),
            "ones-sum": lambda: write.reduce(
                "ReduceSum",
                write(
                    "ConstantOfShape",
                    write("Shape", ids, start=1),
                    value=helper.make_tensor("one", TensorProto.INT64, [1], [1]),
                ),
                [0],
            ),
        }
        return makers[self.design.total]()

    def _embedded(self, hidden: str, positions: str) -> str:
        write = self.write
        if self.design.positions == "learned":
            table = write.random_weight(self.design.rows, HIDDEN, scale=1.0)
            return str(write("Add", hidden, write("Gather", table, write("Unsqueeze", positions, [0]))))
        if self.design.positions == "sinusoidal":
            angles = self._angles(positions, size=HIDDEN)
            sines = write("Concat", write("Sin", angles), write("Cos", angles), axis=-1)
            return str(write("Add", hidden, write("Unsqueeze", sines, [0])))
        return hidden

    def _angles(self, positions: str, size: int | None = None) -> str:
        write, size = self.write, size or self.design.head_dim
        frequencies = 1000.0 ** -(np.arange(0, size, 2) / size)
        angles = write("Mul", write("Unsqueeze", write.to_float(positions), [1]), frequencies[None].astype(np.float32))
        return self._changed("angles", angles)

    def _mask(self) -> str:
        """Return which keys a query reads, bool [.., S, T], and keep the bias of a decoder that has one."""
        write, context = self.write, self.context
        allowed = self._changed("allowed", self._causal())
        context.values["causal"] = allowed
        if self.design.has_mask:
            keys = write("Unsqueeze", write("Cast", "attention_mask", to=TensorProto.BOOL), [1, 2])
            allowed = write("And", allowed, keys)
        context.values["allowed"] = allowed
        bias = None
        if self.design.positions == "alibi":
            distances = write("Sub", context.key_positions, context.query_positions)
            slopes = 2.0 ** -np.arange(1, self.design.heads + 1)
            bias = write("Mul", write.to_float(distances), slopes[:, None, None].astype(np.float32))
        if "bias" in self.design.changes:
            bias = self.design.changes["bias"](context, bias or write.value(np.zeros((1, 1, 1), np.float32)))
        if bias:
            context.values["bias"] = bias
        return allowed

    def _causal(self) -> str:
        write, context = self.write, self.context
        queries, keys = context.query_positions, context.key_positions
        if self.design.causal == "trilu":
            length = write("Shape", context.positions)
            ones = write(
                "ConstantOfShape",
                write("Concat", length, length, axis=0),
                value=helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]),
            )
            return str(write("Cast", write("Trilu", ones, upper=0), to=TensorProto.BOOL))
        if self.design.causal == "subtract":
            return str(write("GreaterOrEqual", write("Sub", queries, keys), 0))
        if self.design.causal == "cumsum":
            ones = write.to_int(write("GreaterOrEqual", context.positions, 0))
            places = write("CumSum", ones, 0)
            return str(write("Not", write("Greater", write("Unsqueeze", places, [0]), write("Unsqueeze", places, [1]))))
        return str(write("LessOrEqual", keys, queries))

    def _normalized(self, hidden: str) -> str:
        write = self.write
        gain = write.weight((1 + 0.1 * write.noise.standard_normal(HIDDEN)).astype(np.float32))
        if self.design.norm == "layer":
            return str(write("LayerNormalization", hidden, gain, np.zeros(HIDDEN, np.float32), axis=-1))
        mean = write.reduce("ReduceMean", write("Mul", hidden, hidden), [-1])
        root = write("Sqrt", write("Add", mean, 1e-5))
        return str(write("Mul", write("Div", hidden, root), gain))

    def _layer(self, hidden: str, mask: str, angles: str | None) -> str:
        write = self.write
        attended = self._attention(self._normalized(hidden), mask, angles)
        hidden = write("Add", hidden, attended)
        normed = self._changed("normed", self._normalized(hidden))
        inner = write("Relu", write("MatMul", normed, write.random_weight(HIDDEN, 2 * HIDDEN)))
        branch = write("MatMul", inner, write.random_weight(2 * HIDDEN, HIDDEN))
        return str(write("Add", hidden, self._changed("residual", branch)))

    def _projected(self, normed: str, heads: int) -> str:
        write, size = self.write, self.design.head_dim
        flat = write("MatMul", normed, write.random_weight(HIDDEN, heads * size))
        split = write("Reshape", flat, [0, 0, heads, size])
        return str(write("Transpose", split, perm=[0, 2, 1, 3]))

    def _attention(self, normed: str, mask: str, angles: str | None) -> str:
        write, design, size = self.write, self.design, self.design.head_dim
        query = self._projected(normed, design.heads)
        key, value = (self._projected(normed, design.kv_heads) for _ in range(2))
        if angles:
            query, key = self._rotated(query, angles), self._rotated(key, angles)
        query = self._changed("query", query)
        key, value = self._changed("key", key), self._changed("value", value)
        key, value = self._repeated(key), self._repeated(value)
        scores = write("MatMul", query, write("Transpose", key, perm=[0, 1, 3, 2]))
        scores = self._changed("scores", write("Mul", scores, size**-0.5))
        if "bias" in self.context.values:
            scores = write("Add", scores, self.context.values["bias"])
        self.context.values["scores"] = scores
        weights = self._softmax(scores, mask)
        self.context.values["probabilities"] = weights
        merged = write("Transpose", write("MatMul", weights, value), perm=[0, 2, 1, 3])
        merged = self._changed("output", write("Reshape", merged, [0, 0, design.heads * size]))
        return str(write("MatMul", merged, write.random_weight(design.heads * size, HIDDEN)))

    def _softmax(self, scores: str, mask: str) -> str:
        write = self.write
        if self.design.masking == "where":
            scores = write("Where", mask, scores, -1e9)
        elif self.design.masking == "fill":
            scores = write("Where", write("Not", mask), float(np.finfo(np.float32).min), scores)
        else:
            scores = write("Add", scores, write("Where", mask, 0.0, -1e4))
        return str(write("Softmax", scores, axis=-1))

    def _rotated(self, value: str, angles: str) -> str:
        write, half = self.write, self.design.head_dim // 2
        both = write("Concat", angles, angles, axis=-1)
        first = write("Slice", value, [0], [half], [3])
        second = write("Slice", value, [half], [2**62], [3])
        turned = write("Concat", write("Neg", second), first, axis=-1)
        return str(write("Add", write("Mul", value, write("Cos", both)), write("Mul", turned, write("Sin", both))))

    def _repeated(self, value: str) -> str:
        """Repeat each KV head for its group of query heads."""
        write, design = self.write, self.design
        if design.kv_heads == design.heads:
            return value
        count = design.heads // design.kv_heads
        if design.kv_heads == 1:
            return value  # broadcast
        apart = write("Unsqueeze", value, [2])
        tiled = write("Tile", apart, [1, 1, count, 1, 1])
        shape = write("Shape", value)
        batch, tail = write("Slice", shape, [0], [1]), write("Slice", shape, [2], [4])
        return str(write("Reshape", tiled, write("Concat", batch, [design.heads], tail, axis=0)))
