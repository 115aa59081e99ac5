"""Models of two layers written as text: shared keys, shared weights, different positions, and a fixed batch."""

from __future__ import annotations

import pytest
from laws import assert_law, difference, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.analysis.analysis import analyze
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.heads.counts import counts_of
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject
from kvsurgeon.passes.heads.expand_gqa import ExpandGqa
from kvsurgeon.passes.heads.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.heads.replicate_kv_heads import ReplicateKvHeads
from kvsurgeon.passes.heads.share_kv_layers import ShareKvLayers

# Each layer has 4 query heads and 2 KV heads of 3; keys are scaled by the cosine of their position.
TEXT = """
g (int64[{batch}, sequence_length] input_ids) => (float[{batch}, sequence_length, 9] logits)
 <float[9, 8] table, float[8, 9] head, {weights}
  int64[4] q_shape = {{0, 0, 4, 3}}, int64[4] k_shape = {{0, 0, 2, 3}}, int64[3] flat = {{0, 0, 12}},
  int64[1] two = {{2}}, int64[5] times = {{1, 1, 2, 1, 1}}, int64[4] grouped = {{0, 4, -1, 3}},
  float low = {{-10000}}, float none = {{0}}, int64 zero = {{0}}, int64 one = {{1}}, int64[2] column = {{-1, 1}},
  int64[3] by_token = {{-1, 1, 1}}>
{{
  x0 = Gather(table, input_ids)
  shape = Shape(input_ids)
  length = Gather(shape, one)
  row = Range(zero, length, one)
  rows = Reshape(row, column)
  visible = LessOrEqual(row, rows)
  mask = Where(visible, none, low)
  place = Cast<to = 1>(row)
  {layers}
  logits = MatMul(x2, head)
}}
"""
WEIGHTS = "float[8, 12] qw{i}, float[8, 6] kw{i}, float[6] bias{i}, float[8, 6] vw{i}, float[12, 8] out{i}, {speed}"
LAYER = """
  q{i} = MatMul(x{i}, qw{i})
  qh{i} = Reshape(q{i}, q_shape)
  qt{i} = Transpose<perm = [0, 2, 1, 3]>(qh{i})
  kp{i} = MatMul(x{i}, {keys})
  kb{i} = Add(bias{i}, kp{i})
  kh{i} = Reshape(kb{i}, k_shape)
  {rotated}
  kt{i} = Transpose<perm = [0, 2, 1, 3]>(kc{i})
  ku{i} = Unsqueeze(kt{i}, two)
  ke{i} = Expand(ku{i}, times)
  kr{i} = Reshape(ke{i}, grouped)
  kx{i} = Transpose<perm = [0, 1, 3, 2]>(kr{i})
  vp{i} = MatMul(x{i}, vw{i})
  vh{i} = Reshape(vp{i}, k_shape)
  vt{i} = Transpose<perm = [0, 2, 1, 3]>(vh{i})
  vu{i} = Unsqueeze(vt{i}, two)
  ve{i} = Expand(vu{i}, times)
  vr{i} = Reshape(ve{i}, grouped)
  s{i} = MatMul(qt{i}, kx{i})
  sm{i} = Add(s{i}, mask)
  w{i} = Softmax(sm{i})
  c{i} = MatMul(w{i}, vr{i})
  cb{i} = Transpose<perm = [0, 2, 1, 3]>(c{i})
  cj{i} = Reshape(cb{i}, flat)
  o{i} = MatMul(cj{i}, out{i})
  x{next} = Add(x{i}, o{i})
"""
ROTATED = """
  angle{i} = Mul(place, speed{i})
  cos{i} = Cos(angle{i})
  cosine{i} = Reshape(cos{i}, by_token)
  kc{i} = Mul(kh{i}, cosine{i})
"""
SPEED = "float speed{i} = {{{value}}},"
TABLE = "float[9, 1, 1] cosine{i},"  # as in an export of a fixed length
NOT_ROTATED = "kc{i} = Identity(kh{i})"


def subject(*, second=ROTATED, speed=0.25, keys="kw1", batch="batch_size"):
    weights = WEIGHTS.format(i=0, speed=SPEED.format(i=0, value=0.25))
    weights += WEIGHTS.format(i=1, speed=SPEED.format(i=1, value=speed))
    layers = LAYER.format(i=0, next=1, keys="kw0", rotated=ROTATED.format(i=0))
    layers += LAYER.format(i=1, next=2, keys=keys, rotated=second.format(i=1))
    return Subject.of(read(TEXT.format(batch=batch, weights=weights, layers=layers)))


def of_fixed_length(second):
    weights = "".join(WEIGHTS.format(i=i, speed=TABLE.format(i=i)) for i in range(2))
    tables = ("cosine0", second)
    layers = "".join(
        LAYER.format(i=i, next=i + 1, keys=f"kw{i}", rotated=f"kc{i} = Mul(kh{i}, {tables[i]})") for i in range(2)
    )
    text = TEXT.format(batch="batch_size", weights=weights, layers=layers)
    return Subject.of(read(text.replace("sequence_length", "9")))


def logits(subject, *, batch=2):
    proto = io.to_proto(subject.model)
    return in_onnxruntime(proto)(texts(proto, batch=batch))["logits"]


def entries(subject):
    return len({site.keys[0].cache_point.value for site in analyze(subject.model).sites})


def kv_heads(subject):
    analysis = analyze(subject.model)
    return [counts_of(analysis.flow, head).kv_heads for head in analysis.sites]


@pytest.mark.parametrize("method", ["mean", "running", "first"])
def test_layers_with_equal_rotation_share_keys(method):
    given = subject()

    ShareKvLayers(kv_layers=1, method=method).apply(given)

    assert entries(given) == 1


def test_heads_of_shared_layers_are_merged():
    given, merged_first = subject(), subject()
    ShareKvLayers(kv_layers=1).apply(given)
    given.changed()

    outcome = MergeKvHeads(kv_heads=1).apply(given)

    MergeKvHeads(kv_heads=1).apply(merged_first)
    merged_first.changed()
    ShareKvLayers(kv_layers=1).apply(merged_first)
    assert (entries(given), kv_heads(given)) == (1, [1, 1])
    assert difference(logits(given), logits(merged_first)) < 1e-5  # both are means of the same four heads
    ((expected, found),) = outcome.equal_models()
    assert difference(logits(Subject.of(found)), logits(Subject.of(expected))) < 1e-5


@pytest.mark.parametrize("method", ["mean", "running", "first"])
@pytest.mark.parametrize("other", [{"speed": 0.5}, {"second": NOT_ROTATED}])
def test_layers_with_other_rotation_do_not_share_keys(method, other):
    given = subject(**other)
    before = logits(given)

    with pytest.raises(
        UnsupportedError, match="layer 1: cannot share keys and values with layer 0: they are computed differently"
    ):
        ShareKvLayers(kv_layers=1, method=method).apply(given)

    assert difference(logits(given), before) == 0


def test_position_tables_of_a_fixed_length_are_no_weights():
    alike, otherwise = of_fixed_length("cosine0"), of_fixed_length("cosine1")

    ShareKvLayers(kv_layers=1).apply(alike)

    assert entries(alike) == 1
    with pytest.raises(UnsupportedError, match="cannot share keys and values with layer 0"):
        ShareKvLayers(kv_layers=1).apply(otherwise)


@pytest.mark.parametrize("change", [ExpandGqa(), ReplicateKvHeads(repeat=2)])
@pytest.mark.parametrize("keys", ["kw0", "kw1"])
def test_weights_shared_by_two_layers_are_replaced_in_both(change, keys):
    given = subject(keys=keys)
    before = logits(given)

    change.apply(given)

    assert kv_heads(given) == [4, 4]
    assert difference(logits(given), before) < 1e-5
    MergeKvHeads(kv_heads=2).apply(given)
    assert kv_heads(given) == [2, 2]
    assert difference(logits(given), before) < 1e-5


def test_weights_shared_by_two_layers_are_averaged_with_themselves():
    given, apart = subject(keys="kw0"), subject(keys="kw1")
    apart.model.graph.initializers["kw1"].const_value = apart.model.graph.initializers["kw0"].const_value
    assert difference(logits(given), logits(apart)) == 0

    for one in (given, apart):
        ShareKvLayers(kv_layers=1).apply(one)

    assert difference(logits(given), logits(apart)) < 1e-6


@pytest.mark.parametrize("change", [ExpandGqa(), ReplicateKvHeads(repeat=2)])
def test_a_fixed_batch_is_unchanged(change):
    given = subject(batch=3)
    before = logits(given, batch=3)

    change.apply(given)

    assert kv_heads(given) == [4, 4]
    assert difference(logits(given, batch=3), before) < 1e-5
    Inject().apply(given)
    shapes = [value.shape for value in given.model.graph.inputs if value.name.startswith("past_key_values.")]
    assert len(shapes) == 4
    assert {tuple(shape)[:2] for shape in shapes} == {(3, 4)}


CHANGES = {
    "expanded": ([ExpandGqa()], 4),
    "merged": ([MergeKvHeads(kv_heads=1)], 1),
    "merged and expanded": ([MergeKvHeads(kv_heads=1), ExpandGqa()], 4),
    "replicated and merged": ([ReplicateKvHeads(repeat=2), MergeKvHeads(kv_heads=2)], 2),
    "merged, replicated, merged": (
        [MergeKvHeads(kv_heads=1), ReplicateKvHeads(repeat=2), MergeKvHeads(kv_heads=1)],
        1,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_single_head_is_not_mistaken_for_a_batch_of_one(name):
    changes, heads = CHANGES[name]
    given, dynamic = subject(batch=1), subject()
    for change in changes:
        change.apply(given)
        change.apply(dynamic)

    assert kv_heads(given) == kv_heads(dynamic) == [heads, heads]
    assert difference(logits(given, batch=1), logits(dynamic, batch=1)) < 1e-5
    without = io.to_proto(given.model)
    Inject().apply(given)
    assert_law(without, io.to_proto(given.model), texts(without, batch=1))
