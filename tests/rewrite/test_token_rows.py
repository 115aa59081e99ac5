"""A static cache with a past length for each sequence: each is computed as if it were alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from exports import ONE_OF_EACH, after, export, operators
from laws import difference
from onnx import helper
from recurrences import CONVOLUTION, hybrid, scan
from written import read

from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.opset.raise_opset import RaiseOpset
from kvsurgeon.runtime import ContinuousBatch, UncachedDecoder, open_session

PER_SEQUENCE = Inject(cache="static", past_length="per-sequence")
CHUNKS = ((7, 12, 3), (1, 1, 1), (2, 1, 5), (1, 4, 3))  # new tokens of three sequences


def check_each_sequence(original: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Check the logits of three sequences in one batch with those of each alone, also after one of them goes back."""
    batch = ContinuousBatch(open_session(model, threads=1), rows=3, capacity=32)
    reference = UncachedDecoder(open_session(original, threads=1))
    texts = np.random.default_rng(0).integers(3, 20, (3, 40))
    starts = {batch.start(text[:1].tolist())[0]: text for text in texts}
    for chunks in CHUNKS:
        parts = {
            number: text[batch.lengths[number] :][:count].tolist()
            for count, (number, text) in zip(chunks, starts.items(), strict=True)
        }
        found = batch.advance(parts)
        for number, part in parts.items():
            tokens = starts[number][None, : batch.lengths[number]]
            expected = reference.run(reference.inputs.feeds(tokens, np.ones_like(tokens)))[reference.logits][0]
            assert difference(found[number], expected[-len(part) :]) < 1e-5
        batch.shorten(number, batch.lengths[number] - 1)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_each_sequence_is_computed_as_if_it_were_alone(name):
    model = after(export(name), PER_SEQUENCE)
    given = {value.name: value for value in model.graph.input}
    assert [dim.dim_param for dim in given["past_sequence_length"].type.tensor_type.shape.dim] == ["batch_size"]
    check_each_sequence(export(name), model)


def test_tensor_scatter_writes_at_the_past_length_of_each_sequence():
    original = after(export("llama_dynamo_sdpa"), RaiseOpset(opset=24))
    model = after(original, PER_SEQUENCE)
    assert [node.op_type for node in model.graph.node].count("TensorScatter") == 4
    check_each_sequence(export("llama_dynamo_sdpa"), model)


@pytest.mark.parametrize("opset", [20, 24])
@pytest.mark.parametrize(
    "layout", [("sequence", "kv_heads", "batch", "head_dim"), ("kv_heads", "batch", "sequence", "head_dim")]
)
def test_layouts_with_another_axis_than_the_batch_first(layout, opset):
    original = export("llama_dynamo_sdpa")
    passes = [RaiseOpset(opset=24)] if opset == 24 else []
    model = after(original, *passes, Inject(cache="static", past_length="per-sequence", key_layout=layout))
    assert operators(model).count("TensorScatter") == (2 if opset == 24 else 0)  # of the values
    assert verify(original, model, threads=1).verdict == "same"


@pytest.mark.parametrize(("text", "state"), [(CONVOLUTION, "0.conv_state"), (scan(), "0.recurrent_state")])
def test_a_state_would_take_the_padding_of_shorter_sequences_for_tokens(text, state):
    model = read(hybrid(text))
    after(model, Inject(cache="static"))
    with pytest.raises(UnsupportedError, match=f"padding of shorter sequences would enter a state.*{state}"):
        after(model, PER_SEQUENCE)


def test_the_cache_is_removed_and_changed_like_any_other():
    original = export("gpt2_torchscript_sdpa")
    model = after(original, PER_SEQUENCE)
    assert verify(original, model, threads=1).verdict == "same"
    assert verify(original, after(model, RemoveCache()), threads=1).verdict == "same"
    assert verify(original, after(model, Retarget()), threads=1).verdict == "same"
    check_each_sequence(original, after(model, Retarget(cache="static", past_length="per-sequence")))


MASKED = """
masked (int64[batch, length] input_ids) => (float[batch, length, 24] logits)
<float[24, 8] table, float[8, 8] wk, float[8, 8] wv, float[8, 24] head, int64[1] zero = {0}, int64[1] first = {1},
 int64[1] two = {2}, int64 one = {1}, int64 minus = {-1}, float[64, 64] bias, float lowest = {-10000.0}>
{
  x = Gather(table, input_ids)
  k = MatMul(x, wk)
  kt = Transpose<perm = [0, 2, 1]>(k)
  v = MatMul(x, wv)
  s = MatMul(x, kt)
  sizes = Shape(input_ids)
  n = Slice(sizes, first, two)
  square = Concat<axis = 0>(n, n)
MASK
  scores = Add(s, mask)
  w = Softmax<axis = -1>(scores)
  c = MatMul(w, v)
  logits = MatMul(c, head)
}
"""
UPPER = "  full = Expand(lowest, square)\n  mask = Trilu<upper = 1>(full, one)"
MASKS = {
    "an upper triangle": UPPER,
    "a lower triangle of ones": "  ones = ConstantOfShape<value = float[1] {1.0}>(square)\n"
    "  kept = Trilu<upper = 0>(ones)\n  visible = Cast<to = 9>(kept)\n  free = Sub(lowest, lowest)\n"
    "  mask = Where(visible, free, lowest)",
    "a band": "  ones = ConstantOfShape<value = float[1] {1.0}>(square)\n  kept = Trilu<upper = 0>(ones)\n"
    "  near = Trilu<upper = 1>(kept, minus)\n  visible = Cast<to = 9>(near)\n  free = Sub(lowest, lowest)\n"
    "  mask = Where(visible, free, lowest)",
    "a triangle of booleans": "  yes = Equal(one, one)\n  all = Expand(yes, square)\n  kept = Trilu<upper = 0>(all)\n"
    "  free = Sub(lowest, lowest)\n  mask = Where(kept, free, lowest)",
    "a transposed triangle": "  full = Expand(lowest, square)\n  below = Trilu<upper = 0>(full, minus)\n"
    "  mask = Transpose<perm = [1, 0]>(below)",
    "a table cut along one axis and then the other": UPPER.replace("mask", "causal")
    + "\n  rows = Slice(bias, zero, n, zero)\n  near = Slice(rows, zero, n, first)\n  mask = Add(causal, near)",
    "a table cut along both axes": UPPER.replace("mask", "causal")
    + "\n  zeros = Concat<axis = 0>(zero, zero)\n  near = Slice(bias, zeros, square)\n  mask = Add(causal, near)",
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_of_a_mask_the_rows_of_the_new_tokens_alone_are_computed(mask):
    original = read(MASKED.replace("MASK", mask))
    model = after(original, PER_SEQUENCE)
    check_each_sequence(original, model)
    assert not [shape for shape in shapes_of_step(model, capacity=32) if shape.count(32) > 1]


PLACED = """
  embedded = Gather(table, input_ids)
  ends = Shape<start = 1>(input_ids)
  end = Squeeze(ends)
  nought = Sub(one, one)
  counted = Range(nought, end, one)
  places = Cast<to = 1>(counted)
  rows = Slice(stored, zero, ends, zero)
  column = Unsqueeze(places, first)
  row = Unsqueeze(places, zero)
  frequencies = Unsqueeze(scales, zero)
POSITIONS
  x = Add(embedded, positions)"""
POSITIONS = {
    "a table that is dequantized by column": "positions = DequantizeLinear(rows, scales)",
    "a product of matrices": "angles = MatMul(column, frequencies)\n positions = Sin(angles)",
    "a product of matrices, the positions last": "standing = Transpose(frequencies)\n angles = MatMul(standing, row)\n"
    " waves = Sin(angles)\n positions = Transpose(waves)",
    "an Einsum": 'angles = Einsum<equation = "i,j->ij">(places, scales)\n positions = Sin(angles)',
    "an Einsum, the positions last": "standing = Transpose(frequencies)\n"
    ' angles = Einsum<equation = "dk,ks->ds">(standing, row)\n waves = Sin(angles)\n positions = Transpose(waves)',
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_positions_of_each_sequence_are_computed(positions):
    """An axis that an operator counts from the front has another index behind the batch."""
    placed = PLACED.replace("POSITIONS", positions)
    text = MASKED.replace("MASK", UPPER).replace("  x = Gather(table, input_ids)", placed)
    original = read(text.replace("<float[24, 8] table", "<int8[64, 8] stored, float[8] scales, float[24, 8] table"))
    check_each_sequence(original, after(original, PER_SEQUENCE))


def shapes_of_step(model: onnx.ModelProto, capacity: int) -> list[tuple[int, ...]]:
    """Return the shapes of all values that nodes compute in a step of two sequences."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    names = [output for node in model.graph.node for output in node.output]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    feeds = {
        "input_ids": np.ones((2, 1), np.int64),
        "past_sequence_length": np.array([3, 7]),
        **{f"past_key_values.0.{part}": np.zeros((2, 1, capacity, 8), np.float32) for part in ("key", "value")},
    }
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [value.shape for value in session.run(names, feeds)]


@pytest.mark.parametrize("mask", ["", UPPER], ids=["causal by itself", "a mask"])
def test_attention_as_one_operator_is_decomposed(mask):
    """Its mask would differ by sequence, and it reads one for all."""
    inputs, causal = ("x, k, v, mask", 0) if mask else ("x, k, v", 1)
    text = (
        MASKED.replace("MASK", mask).replace("scores = Add(s, mask)", "").replace("w = Softmax<axis = -1>(scores)", "")
    )
    fused = f"c = Attention<q_num_heads = 1, kv_num_heads = 1, is_causal = {causal}>({inputs})"
    original = read(text.replace("c = MatMul(w, v)", fused), opset=23)
    check_each_sequence(original, after(original, PER_SEQUENCE))


def test_positions_that_count_tokens_need_one_length_for_all():
    counted = UPPER + "\n  real = Greater(input_ids, one)\n  ones = Cast<to = 7>(real)\n  at = CumSum(ones, one)\n"
    text = MASKED.replace("MASK", counted + "  learned = Gather(bias, at)\n  low = Slice(learned, zero, eight, two)")
    text = text.replace("c = MatMul(w, v)", "cv = MatMul(w, v)\n  c = Add(cv, low)").replace(
        "<", "<int64[1] eight = {8}, ", 1
    )
    with pytest.raises(UnsupportedError, match=r"one number for all sequences of a batch.*use past-length=input"):
        after(read(text), PER_SEQUENCE)


def test_a_batch_of_one_has_one_past_length():
    model = onnx.ModelProto.FromString(export("llama_dynamo_sdpa").SerializeToString())
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(UnsupportedError, match="separate past lengths only in a batch of any size"):
        after(model, PER_SEQUENCE)


def test_only_a_static_cache_has_separate_past_lengths():
    with pytest.raises(UsageError, match="cache dynamic: expected past-length shape, found per-sequence"):
        after(export("llama_dynamo_sdpa"), Inject(past_length="per-sequence"))


def test_the_verifier_runs_sequences_of_different_lengths():
    """Of the broken model every sequence has the past length of the first one."""
    original, model = export("llama_dynamo_sdpa"), after(export("llama_dynamo_sdpa"), PER_SEQUENCE)
    calls: list[tuple[int, int, str]] = []
    report = verify(original, model, threads=1, progress=lambda *call: calls.append(call))
    assert report.verdict == "same"
    assert report.comparisons[-1].scenario == "ragged batch"
    assert calls == [(number, len(calls), one.scenario) for number, one in enumerate(report.comparisons)]
    for node in model.graph.node:
        node.input[:] = ["of_all" if name == "past_sequence_length" else name for name in node.input]
    nodes = [
        helper.make_node("Gather", ["past_sequence_length", "zero"], ["first"]),
        helper.make_node("Shape", ["past_sequence_length"], ["count"]),
        helper.make_node("Expand", ["first", "count"], ["of_all"]),
    ]
    every = [*nodes, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(every)
    model.graph.initializer.append(helper.make_tensor("zero", onnx.TensorProto.INT64, [1], [0]))
    report = verify(original, model, threads=1)
    assert report.verdict == "different"
    assert {one.scenario for one in report.comparisons if one.verdict == "different"} == {"ragged batch"}
