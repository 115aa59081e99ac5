"""Decoders with further outputs: each kind of value that an export may return beside its logits.

An output is right if a call with a cache returns what the model without a cache returns for the text so far: all of it,
or, as the logits do, the rows of the new tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from decoders import Config, Decoder, Graph
from onnx import TensorProto, helper

from kvsurgeon.runtime import CachedDecoder, UncachedDecoder, open_session

NAME = "further"

Rows = Literal["all", "new"]  # of the text so far: all of them, or those of the new tokens


class RecordingDecoder(Decoder):
    """The decoder, which remembers the names of its keys, values and masks."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.keys: dict[int, str] = {}
        self.values: dict[int, str] = {}
        self.masks: dict[int, str] = {}

    def update_cache(self, layer: int, key: str, value: str) -> tuple[str, str]:
        self.keys[layer], self.values[layer] = key, value
        return key, value

    def visible(self, layer: int) -> str:
        self.masks[layer] = super().visible(layer)
        return self.masks[layer]


AddNodes = Callable[[Graph, RecordingDecoder], str]


@dataclass(frozen=True, kw_only=True)
class FurtherOutput:
    """One further output.

    Attributes:
        add: Adds the nodes that compute it, and returns its name.
        onnx_type: Its element type; that of the model if undefined.
        dims: Its dimensions.
        rows: Rows that a call with a cache returns; None if it can only be refused.
    """

    add: AddNodes
    onnx_type: int
    dims: tuple[str | int, ...]
    rows: Rows | None


def _length(graph: Graph, like: str = "input_ids", axis: int = 1) -> str:
    return graph.op("Gather", graph.op("Shape", like), graph.constant(axis))


def _cast(graph: Graph, value: str, onnx_type: int) -> str:
    name = f"extra/Cast_{len(graph.nodes)}"
    graph.nodes.append(helper.make_node("Cast", [value], [name], to=onnx_type))
    return name


def _positions(graph: Graph) -> str:
    return graph.op("Range", graph.constant(0), _length(graph), graph.constant(1))


def _causal(graph: Graph) -> str:
    rows = _positions(graph)
    column = graph.op("Unsqueeze", rows, graph.constant([1]))
    return graph.op("LessOrEqual", graph.op("Unsqueeze", rows, graph.constant([0])), column)


def _softmax(decoder: RecordingDecoder) -> str:
    return next(node.output[0] for node in decoder.graph.nodes if node.op_type == "Softmax")


def _last_index(graph: Graph) -> str:
    count = graph.op("ReduceSum", "attention_mask", graph.constant([1]), keepdims=0)
    return graph.op("Sub", count, graph.constant(1))


def _gathered_by_mask(graph: Graph) -> str:
    """The hidden state of the last token that the mask counts, as sequence classification reads it."""
    batch = graph.op("Range", graph.constant(0), _length(graph, axis=0), graph.constant(1))
    pairs = [graph.op("Unsqueeze", one, graph.constant([1])) for one in (batch, _last_index(graph))]
    return graph.op("GatherND", "layers.0.output", graph.op("Concat", *pairs, axis=1))


I, F, B, MODEL = TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL, TensorProto.UNDEFINED  # noqa: E741
HIDDEN = "layers.0.output"
OUTPUTS: dict[str, FurtherOutput] = {}


def kind(name: str, onnx_type: int, dims: tuple[str | int, ...], rows: Rows | None, add: AddNodes) -> None:
    OUTPUTS[name] = FurtherOutput(add=add, onnx_type=onnx_type, dims=dims, rows=rows)


# Values of the whole text
kind("length", I, (), "all", lambda g, d: _length(g))
kind("length_1", I, (1,), "all", lambda g, d: g.op("Gather", g.op("Shape", "input_ids"), g.constant([1])))
kind("length_int32", TensorProto.INT32, (), "all", lambda g, d: _cast(g, _length(g), TensorProto.INT32))
kind("length_of_hidden", I, (), "all", lambda g, d: _length(g, HIDDEN))
kind("length_of_mask", I, (), "all", lambda g, d: _length(g, "attention_mask"))
kind("length_float", F, (), "all", lambda g, d: g.op("Sqrt", _cast(g, _length(g), F)))
kind("shape", I, (2,), "all", lambda g, d: g.op("Shape", "input_ids"))
kind("shape_of_hidden", I, (3,), "all", lambda g, d: g.op("Shape", HIDDEN))
kind("size", I, (), "all", lambda g, d: g.op("Size", "input_ids"))
kind("batch", I, (), "all", lambda g, d: _length(g, axis=0))
kind("last_position", I, (), "all", lambda g, d: g.op("Sub", _length(g), g.constant(1)))
kind("half", I, (), "all", lambda g, d: g.op("Div", _length(g), g.constant(2)))
kind("is_long", B, (), "all", lambda g, d: g.op("Greater", _length(g), g.constant(7)))
kind("positions", I, ("sequence",), "all", lambda g, d: _positions(g))
kind("positions_float", F, (1, "sequence"), "all",
     lambda g, d: g.op("Unsqueeze", _cast(g, _positions(g), F), g.constant([0])))  # fmt: skip
kind("positions_from_end", I, ("sequence",), "all",
     lambda g, d: g.op("Sub", g.op("Sub", _length(g), g.constant(1)), _positions(g)))  # fmt: skip
kind("positions_batch", I, ("batch", "sequence"), "all",
     lambda g, d: g.op(
         "Expand", g.op("Unsqueeze", _positions(g), g.constant([0])), g.op("Shape", "input_ids")))  # fmt: skip
kind("positions_flat", I, ("n",), "all", lambda g, d: g.op("Reshape", g.op("Expand", g.op(
    "Unsqueeze", _positions(g), g.constant([0])), g.op("Shape", "input_ids")), g.constant([-1])))  # fmt: skip
kind("causal", B, ("sequence", "sequence"), "all", lambda g, d: _causal(g))
kind("causal_float", F, ("sequence", "sequence"), "all", lambda g, d: _cast(g, _causal(g), F))
kind("causal_trilu", F, ("sequence", "sequence"), "all", lambda g, d: g.op("Trilu", g.op(
    "ConstantOfShape", g.op("Concat", g.op("Gather", g.op("Shape", "input_ids"), g.constant([1])), g.op(
        "Gather", g.op("Shape", "input_ids"), g.constant([1])), axis=0)), upper=1))  # fmt: skip
kind("mask_of_layer", B, ("batch", 1, "sequence", "sequence"), "all", lambda g, d: d.masks[0])
kind("window_of_layer", B, ("batch", 1, "sequence", "sequence"), "all", lambda g, d: d.masks[1])
kind("given_mask", I, ("batch", "sequence"), "all", lambda g, d: "attention_mask")
kind("given_mask_float", F, ("batch", "sequence"), "all", lambda g, d: _cast(g, "attention_mask", F))
kind("tokens_that_count", I, ("batch",), "all",
     lambda g, d: g.op("ReduceSum", "attention_mask", g.constant([1]), keepdims=0))  # fmt: skip
kind("position_of_mask", I, ("batch", "sequence"), "all",
     lambda g, d: g.op("Sub", g.op("CumSum", "attention_mask", g.constant(1)), g.constant(1)))  # fmt: skip
kind("last_index", I, ("batch",), "all", lambda g, d: _last_index(g))
kind("table", F, (3,), "all", lambda g, d: g.op("Mul", g.constant([1.0, 2, 3], "float32"), g.constant(2, "float32")))
kind("cosines", F, ("sequence", 4), "all", lambda g, d: g.op(
    "Gather", g.constant(np.cos(np.arange(2048 * 4).reshape(2048, 4)), "float32"), _positions(g)))  # fmt: skip

# Values of each token
kind("hidden", MODEL, ("batch", "sequence", 32), "new", lambda g, d: HIDDEN)
kind("hidden_flat", F, ("n", 32), "new", lambda g, d: g.op("Reshape", HIDDEN, g.constant([-1, 32])))
kind("hidden_swapped", F, ("sequence", "batch", 32), "new", lambda g, d: g.op("Transpose", HIDDEN, perm=[1, 0, 2]))
kind("norm", F, ("batch", "sequence"), "new",
     lambda g, d: g.op("ReduceL2", HIDDEN, g.constant([-1]), keepdims=0))  # fmt: skip
kind("choice", I, ("batch", "sequence"), "new", lambda g, d: g.op("ArgMax", HIDDEN, axis=-1, keepdims=0))
kind("choice_int32", TensorProto.INT32, ("batch", "sequence"), "new",
     lambda g, d: _cast(g, g.op("ArgMax", HIDDEN, axis=-1, keepdims=0), TensorProto.INT32))  # fmt: skip
kind("probabilities", F, ("batch", "sequence", 32), "new", lambda g, d: g.op("Softmax", HIDDEN, axis=-1))
kind("half_precision", TensorProto.FLOAT16, ("batch", "sequence", 32), "new",
     lambda g, d: _cast(g, HIDDEN, TensorProto.FLOAT16))  # fmt: skip
kind("given_ids", I, ("batch", "sequence"), "new", lambda g, d: "input_ids")
kind("is_zero", B, ("batch", "sequence"), "new", lambda g, d: g.op("Equal", "input_ids", g.constant(0)))
kind("keys", MODEL, ("batch", 2, "sequence", 8), "all", lambda g, d: d.keys[0])
kind("values", MODEL, ("batch", 2, "sequence", 8), "all", lambda g, d: d.values[1])
kind("keys_in_rows", F, ("batch", "sequence", 2, 8), "new",
     lambda g, d: g.op("Transpose", d.keys[0], perm=[0, 2, 1, 3]))  # fmt: skip
kind("scores", MODEL, ("batch", 4, "sequence", "sequence"), "new", lambda g, d: "layers.0.scores")
kind("weights", MODEL, ("batch", 4, "sequence", "sequence"), "new", lambda g, d: _softmax(d))
kind("mean_weights", F, ("batch", "sequence", "sequence"), "new",
     lambda g, d: g.op("ReduceMean", _softmax(d), g.constant([1]), keepdims=0))  # fmt: skip
kind("largest_weight", F, ("batch", 4, "sequence"), "new",
     lambda g, d: g.op("ReduceMax", _softmax(d), g.constant([-1]), keepdims=0))  # fmt: skip
kind("last_hidden", F, ("batch", 32), "all", lambda g, d: g.op("Gather", HIDDEN, g.constant(-1), axis=1))
kind("last_hidden_slice", F, ("batch", 1, 32), "all", lambda g, d: g.op(
    "Slice", HIDDEN, g.constant([-1]), g.constant([2**62]), g.constant([1])))  # fmt: skip

# Values of all tokens, which no cache holds
kind("first_hidden", F, ("batch", 32), None, lambda g, d: g.op("Gather", HIDDEN, g.constant(0), axis=1))
kind("first_id", I, ("batch",), None, lambda g, d: g.op("Gather", "input_ids", g.constant(0), axis=1))
kind("mean_hidden", F, ("batch", 32), None,
     lambda g, d: g.op("ReduceMean", HIDDEN, g.constant([1]), keepdims=0))  # fmt: skip
kind("max_hidden", F, ("batch", 32), None, lambda g, d: g.op("ReduceMax", HIDDEN, g.constant([1]), keepdims=0))
kind("sum_of_ids", I, ("batch",), None, lambda g, d: g.op("ReduceSum", "input_ids", g.constant([1]), keepdims=0))
kind("sum_of_all", I, (), None, lambda g, d: g.op("ReduceSum", "input_ids", keepdims=0))
kind("running_ids", I, ("batch", "sequence"), "new", lambda g, d: g.op("CumSum", "input_ids", g.constant(1)))
kind("flipped", F, ("batch", "sequence", 32), None, lambda g, d: g.op(
    "Slice", HIDDEN, g.constant([-1]), g.constant([-(2**62)]), g.constant([1]), g.constant([-1])))  # fmt: skip
kind("second_last", F, ("batch", 32), None, lambda g, d: g.op("Gather", HIDDEN, g.constant(-2), axis=1))
kind("without_first", F, ("batch", "m", 32), None, lambda g, d: g.op(
    "Slice", HIDDEN, g.constant([1]), g.constant([2**62]), g.constant([1])))  # fmt: skip
kind("longest_norm", I, ("batch",), None, lambda g, d: g.op("ArgMax", g.op(
    "ReduceL2", HIDDEN, g.constant([-1]), keepdims=0), axis=1, keepdims=0))  # fmt: skip
kind("classified", F, ("batch", 32), None, lambda g, d: _gathered_by_mask(g))
kind("weights_of_keys", F, ("batch", 4, "sequence"), None,
     lambda g, d: g.op("ReduceSum", _softmax(d), g.constant([2]), keepdims=0))  # fmt: skip
kind("nonzero", I, (2, "m"), None, lambda g, d: g.op("NonZero", "input_ids"))
kind("masked_hidden", F, ("batch", "sequence", 32), "new", lambda g, d: g.op("Mul", HIDDEN, _cast(
    g, g.op("Unsqueeze", "attention_mask", g.constant([2])), F)))  # fmt: skip
kind("scaled_by_length", F, ("batch", "sequence", 32), None,
     lambda g, d: g.op("Mul", HIDDEN, _cast(g, _length(g), F)))  # fmt: skip


def with_output(name: str, config: Config | None = None) -> onnx.ModelProto:
    """Return the decoder with one further output."""
    decoder = RecordingDecoder(config or Config(layers=2, window=3))
    model, output, graph = decoder.model(), OUTPUTS[name], Graph("extra/")
    graph.output(output.add(graph, decoder), NAME, output.onnx_type or decoder.config.onnx_type, output.dims)
    model.graph.node.extend(graph.nodes)
    model.graph.initializer.extend(graph.initializers)
    model.graph.output.extend(graph.outputs)
    onnx.checker.check_model(model)
    return model


def rows_returned(
    original: onnx.ModelProto, injected: onnx.ModelProto, tokens: np.ndarray, mask: np.ndarray, cuts: Sequence[int]
) -> set[str]:
    """Run a text in chunks that end at the cuts; return which rows the further output has after a past."""
    reference, decoder = UncachedDecoder(open_session(original)), CachedDecoder(open_session(injected))
    feeds = decoder.inputs.feeds(tokens, mask)
    decoder.reset()
    found = set()
    for past, total in itertools.pairwise((0, *cuts)):
        outputs = decoder.advance(decoder.inputs.part(feeds, past, total))
        so_far = reference.run(reference.inputs.feeds(tokens[:, :total], mask[:, :total]))
        rows = _rows(outputs[NAME], so_far[NAME], past, total)
        if past or rows != "all":  # the rows of a first call are new, and all
            found.add(rows)
    return found


def _rows(found: np.ndarray, expected: np.ndarray, past: int, total: int) -> str:
    """Return "all" or "new", the rows of the text so far that an output has, or else what is wrong with it."""
    if found.dtype == expected.dtype and found.shape == expected.shape and _is_close(found, expected):
        return "all"
    for axis, (have, want) in enumerate(zip(found.shape, expected.shape, strict=False)):
        if have * total == want * (total - past):  # [sequence], or [batch * sequence]
            sizes = (*expected.shape[:axis], want // total, total, *expected.shape[axis + 1 :])
            part = expected.reshape(sizes).take(range(past, total), axis=axis + 1).reshape(
                *expected.shape[:axis], have, *expected.shape[axis + 1 :]
            )  # fmt: skip
            if found.dtype == part.dtype and found.shape == part.shape and _is_close(found, part):
                return "new"
    return f"other numbers: {found.dtype} {found.shape} for {expected.shape} after {past} of {total} tokens"


def _is_close(found: np.ndarray, expected: np.ndarray) -> bool:
    bound = 2e-2 if found.dtype == np.float16 else 2e-5
    return np.allclose(found, expected, atol=bound, rtol=1e-3)
