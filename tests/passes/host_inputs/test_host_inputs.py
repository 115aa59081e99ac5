"""The metadata is enough to compute the inputs that replace context, wherever the rows of the cache are."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attentions import attention
from decoders import Config, Decoder
from exports import ONE_OF_EACH, export
from laws import ALLOWED, difference, dims_of, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.host_inputs.describe import describe, hides_later_keys
from kvsurgeon.passes.host_inputs.host_inputs import HostInputs
from kvsurgeon.passes.host_inputs.tabulate import ContextTable
from kvsurgeon.passes.interface.integer_inputs import Int32Inputs
from kvsurgeon.passes.operators.remove_nan_guards import RemoveNanGuards
from kvsurgeon.rewrite.cache_metadata import CONTEXT_KEY

CAPACITY = 12  # rows of a past, most of them not filled
MODELS = {name: export(name) for name in ONE_OF_EACH} | {
    "own": Decoder(Config(layers=2)).model(),
    "own, positions given": Decoder(Config(layers=2, position_ids=True)).model(),
    "own, no mask": Decoder(Config(layers=2, attention_mask=False)).model(),
}


def given(model: onnx.ModelProto, **options) -> onnx.ModelProto:
    subject = Subject.of(model)
    Inject(cache="new-tokens").apply(subject)
    assert isinstance(HostInputs(**options).apply(subject), Changed)
    Int32Inputs().apply(subject)
    result = io.to_proto(subject.model)
    onnx.checker.check_model(result)
    return result


def host_input(description: dict, past: int, new: int) -> np.ndarray:
    """One input of a call whose past is at the end of `CAPACITY` rows."""
    queries, keys = past + np.arange(new), past + np.arange(-CAPACITY, new)
    if description["kind"] == "rows":
        return np.array(description["table"])[queries].reshape(1, 1, new, -1)
    if description["kind"] == "columns":
        return np.atleast_2d(description["table"])[None, :, None, np.maximum(keys, 0)]
    distance = queries[:, None] - keys
    visible = np.atleast_2d(description["seen"])
    numbers = (
        np.broadcast_to(visible, (len(visible), 99))[:, np.maximum(distance, 0)] if visible.shape[1] == 1 else None
    )
    numbers = visible[:, np.maximum(distance, 0)] if numbers is None else numbers
    return np.where((distance >= 0) & (keys >= 0), numbers, description["hidden"])[None]


def logits(model: onnx.ModelProto, ids: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    run = in_onnxruntime(model)
    (inputs,) = (json.loads(entry.value)["inputs"] for entry in model.metadata_props if entry.key == CONTEXT_KEY)
    types = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in model.graph.input}
    shapes = {v.name: dims_of(v) for v in model.graph.input if v.name.startswith("past")}
    caches = {name: np.full([1, heads, CAPACITY, width], 7.0) for name, (_, heads, _, width) in shapes.items()}
    outputs, past = [], 0
    for size in sizes:
        feeds = {model.graph.input[0].name: ids[None, past : past + size], **caches}
        feeds |= {name: host_input(one, past, size) for name, one in inputs.items()}
        found = run({name: array.astype(types[name]) for name, array in feeds.items()})
        for name in caches:
            caches[name] = np.concatenate([caches[name], found[name.replace("past_key_values", "present")]], axis=2)
            caches[name] = caches[name][:, :, -CAPACITY:]
        outputs.append(found["logits"][0])
        past += size
    return np.concatenate(outputs)


@pytest.mark.parametrize("name", MODELS)
def test_the_descriptions_are_sufficient(name):
    model = MODELS[name]
    result = given(model, max_length=32)
    feeds = texts(model, batch=1)
    expected = in_onnxruntime(model)(feeds)["logits"][0]
    found = logits(result, feeds["input_ids"][0], (4, 1, 3, 1))
    assert difference(found, expected) <= ALLOWED[str(expected.dtype)]


def test_masks_and_rotary_tables_are_inputs_of_rank_4():
    result = given(MODELS["llama_dynamo_sdpa"])
    shapes = {value.name: dims_of(value) for value in result.graph.input if not value.name.startswith("past")}
    assert shapes == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": [1, 1, "sequence_length", "total_sequence_length"],
        "position_ids_cos": [1, 1, "sequence_length", 4],
        "position_ids_sin": [1, 1, "sequence_length", 4],
    }
    assert not {"Range", "Cos", "Sin", "LessOrEqual"} & {node.op_type for node in result.graph.node}


def test_nan_guards_are_removed():
    subject = Subject.of(export("llama_dynamo_sdpa"))
    before = io.to_proto(subject.model)
    assert isinstance(RemoveNanGuards().apply(subject), Changed)
    result = io.to_proto(subject.model)
    assert "IsNaN" in {node.op_type for node in before.graph.node}
    assert "IsNaN" not in {node.op_type for node in result.graph.node}
    feeds = texts(before, padded=False)
    expected, found = (in_onnxruntime(model)(feeds)["logits"] for model in (before, result))
    assert difference(found, expected) == 0


def test_a_guard_of_another_value_is_unchanged():
    model = read(attention(after="odd = IsNaN(c)\n  logits = Where(odd, low, c)"))
    assert isinstance(RemoveNanGuards().apply(Subject.of(model)), Unchanged)


def test_a_value_repeated_for_each_token_stays_in_the_graph():
    text = attention(constants="float[2, 1, 1] sink, int64[1] three = {3}").replace(
        "w = Softmax<axis = -1>(masked_scores)",
        "s4 = Unsqueeze(masked_scores, second)\n  two = Shape<start = 0, end = 2>(x)\n"
        "  target = Concat<axis = 0>(first_of, heads, last_of, second)\n  extra = Expand(sink, target)\n"
        "  both = Expand(s4, wide)\n  wall = Concat<axis = -1>(both, extra)\n  all = Softmax<axis = -1>(wall)\n"
        "  kept = Slice(all, first, minus, three)\n  w = ReduceMean<keepdims = 0>(kept, second)",
    )
    text = text.replace(
        "two = Shape<start = 0, end = 2>(x)",
        "first_of = Shape<start = 0, end = 1>(x)\n  last_of = Shape<start = 1, end = 2>(x)\n"
        "  wide = Concat<axis = 0>(second, heads, second, second)",
    ).replace("int64 nought", "int64[1] heads = {2}, int64[1] minus = {-1}, int64 nought")
    model = read(text)
    result = given(model, max_length=32)
    assert [value.name for value in result.graph.input if not value.name.startswith("past")] == ["x", "attention_mask"]


def of_two_heads(bias: str) -> str:
    """An attention whose queries of two heads are on one axis, and a bias is added to the scores."""
    return attention(
        query="twice = Concat<axis = -1>(q0, q0)\n  q = Reshape(twice, joined)",
        scores=f"sizes_of = Shape(s0)\n  {bias}\n  s1 = Add(s0, bias)\n  width = Slice(sizes_of, third, fourth)\n"
        "  target = Concat<axis = 0>(first, minus, heads, width)\n  s = Reshape(s1, target)",
        allowed="earlier = LessOrEqual(row, column)\n  allowed = Unsqueeze(earlier, second)",
        after="c0 = ReduceMean<axes = [2], keepdims = 0>(c4)\n  logits = Identity(c0)",
        constants="int64[3] joined = {0, -1, 8}, int64[1] fourth = {3}, int64[1] minus = {-1}, int64[1] heads = {2}",
    ).replace("c = MatMul(w, v)", "v4 = Unsqueeze(v, second)\n  c4 = MatMul(w, v4)")


def test_a_constant_bias_for_queries_of_all_heads_stays_in_the_graph():
    model = read(of_two_heads("bias = ConstantOfShape<value = float[1] {2.0}>(sizes_of)"), 17)
    result = given(model, max_length=32)
    assert [value.name for value in result.graph.input if not value.name.startswith("past")] == ["x", "attention_mask"]


def test_context_with_heads_and_queries_on_one_axis_is_rejected():
    bias = "far = Cast<to = 1>(at)\n  bias = Expand(far, sizes_of)"
    subject = Subject.of(read(of_two_heads(bias), 17))
    Inject(cache="new-tokens").apply(subject)
    with pytest.raises(UnsupportedError, match="cannot be described to the application"):
        HostInputs(max_length=32).apply(subject)


def test_no_more_positions_are_described_than_the_model_has():
    result = given(MODELS["gpt2_torchscript_sdpa"], max_length=4096)
    (metadata,) = (json.loads(entry.value) for entry in result.metadata_props if entry.key == CONTEXT_KEY)
    assert 32 <= metadata["places"] <= 4096


def test_a_mask_of_more_than_distance_is_rejected():
    text = attention(
        allowed="mine = Div(column, four)\n  theirs = Div(row, four)\n  same = Equal(mine, theirs)\n"
        "  before = LessOrEqual(row, column)\n  allowed = And(same, before)",
        constants="int64 four = {4}",
    )
    subject = Subject.of(read(text))
    Inject(cache="new-tokens").apply(subject)
    with pytest.raises(UnsupportedError, match="more than the distance"):
        HostInputs(max_length=32).apply(subject)
    assert subject.model.graph.inputs[0].name == "x"


def test_a_model_without_a_cache_is_rejected():
    with pytest.raises(UnsupportedError, match="only a model with a cache"):
        HostInputs().apply(Subject.of(MODELS["own"]))


def test_a_bias_by_distance_that_hides_no_key():
    text = attention(
        scores="near = Sub(row, column)\n  far = Cast<to = 1>(near)\n  bias = Mul(far, half)\n  s = Add(s0, bias)"
    )
    model = read(text)
    (inputs,) = (
        json.loads(e.value)["inputs"] for e in given(model, max_length=32).metadata_props if e.key == CONTEXT_KEY
    )
    assert sorted(one["hidden"] for one in inputs.values()) == [-10_000.0, 0.0]
    random = np.random.default_rng(0).normal(size=(9, 8)).astype(np.float32)
    expected = in_onnxruntime(model)({"x": random[None]})["logits"][0]
    assert difference(logits(given(model), random, (4, 1, 4)), expected) < ALLOWED["float32"]


def test_equal_rows_are_described_for_each_position():
    for kind, table in (("rows", np.ones((40, 3))), ("columns", np.ones((2, 40)))):
        context = ContextTable(value=ir.Value(name="v"), kind=kind, unit_axes=(), table=table)
        assert describe(context, hidden_elsewhere=True) == {"kind": kind, "table": table.tolist()}


def test_a_mask_must_hide_later_keys():
    assert not hides_later_keys(
        ContextTable(value=ir.Value(name="v"), kind="mask", unit_axes=(), table=np.zeros((40, 40)))
    )
    with pytest.raises(UnsupportedError, match="does not hide later keys"):
        describe(
            ContextTable(value=ir.Value(name="v"), kind="mask", unit_axes=(), table=np.zeros((40, 40))),
            hidden_elsewhere=False,
        )


def test_a_short_maximum_length_is_raised_to_the_minimum():
    result = given(MODELS["own"], max_length=8)
    (metadata,) = (json.loads(entry.value) for entry in result.metadata_props if entry.key == CONTEXT_KEY)
    assert metadata["places"] == 32
