"""Without its cache a model computes its first call, and a restored cache is the one it had."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from attentions import attention
from decoders import CachedDecoder, Config
from exports import NAMES, ONE_OF_EACH, export, injected, injected_export
from laws import ALLOWED, assert_law, difference, dims_of, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache, detach_cache, reattach_cache
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.opset.raise_opset import RaiseOpset
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

JOINED = """case (float[b, n, 8] x, float[b, p, 8] keys, float[b, p, 8] values)
=> (float[b, n, 8] logits, float[b, t, 8] all_keys, float[b, t, 8] all_values)
<float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, int64 nought = {0}, int64 one = {1}, int64[1] first = {0},
 int64[1] second = {1}, float low = {-10000.0}>
{
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  all_keys = Concat<axis = 1>(keys, k)
  all_values = Concat<axis = 1>(values, v)
  before = Shape(keys)
  past = Gather(before, one)
  sizes = Shape(x)
  new = Gather(sizes, one)
  total = Add(past, new)
  columns = Range(nought, total, one)
  rows = Range(past, total, one)
  column = Unsqueeze(columns, first)
  row = Unsqueeze(rows, second)
  allowed = LessOrEqual(column, row)
  kt = Transpose<perm = [0, 2, 1]>(all_keys)
  s = MatMul(q, kt)
  masked = Where(allowed, s, low)
  w = Softmax<axis = -1>(masked)
  logits = MatMul(w, all_values)
}"""

FUSED = """case (float[b, n, 8] x, float[b, 2, p, 4] a, float[b, 2, p, 4] b)
=> (float[b, n, 8] logits, float[b, 2, t, 4] c, float[b, 2, t, 4] d)
<float[8, 8] wk, float[8, 8] wv>
{
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  logits, c, d = Attention<q_num_heads = 2, kv_num_heads = 2, is_causal = 1>(x, k, v, "", a, b)
}"""


def removed(model: onnx.ModelProto) -> onnx.ModelProto:
    subject = Subject.of(model)
    assert isinstance(RemoveCache().apply(subject), Changed)
    result = io.to_proto(subject.model)
    onnx.checker.check_model(result)
    return result


def assert_same(one: onnx.ModelProto, other: onnx.ModelProto) -> None:
    """Whole texts, the second padded on the left, give the same logits."""
    feeds = texts(one)
    expected, found = (in_onnxruntime(model)(feeds)["logits"] for model in (one, other))
    assert difference(found, expected, feeds.get("attention_mask")) <= ALLOWED[str(expected.dtype)]


@pytest.mark.parametrize("name", NAMES)
def test_an_injected_cache_can_be_removed(name):
    result = removed(injected_export(name))
    assert [value.name for value in result.graph.input] == [value.name for value in export(name).graph.input]
    assert [value.name for value in result.graph.output] == [value.name for value in export(name).graph.output]
    assert_same(export(name), result)


@pytest.mark.parametrize("past_length", ["shape", "input"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_new_tokens_cache_can_be_removed(name, past_length):
    subject = Subject.of(export(name))
    layout = ("kv_heads", "batch", "head_dim", "sequence")
    Inject(cache="new-tokens", key_layout=layout, past_length=past_length).apply(subject)
    result = removed(io.to_proto(subject.model))
    assert len(result.graph.output) == len(export(name).graph.output)
    assert [value.name for value in result.graph.input] == [value.name for value in export(name).graph.input]
    assert_same(export(name), result)


@pytest.mark.parametrize("opset", [None, 24])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_static_cache_can_be_removed(name, opset):
    subject = Subject.of(export(name))
    if opset is not None:
        RaiseOpset(opset=opset).apply(subject)
    Inject(cache="static").apply(subject)
    result = removed(io.to_proto(subject.model))
    assert [value.name for value in result.graph.input] == [value.name for value in export(name).graph.input]
    assert_same(export(name), result)
    assert_law(export(name), injected(result))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_calls_are_of_any_length_while_buffers_of_fixed_rows_are_detached(name):
    model = export(name)
    subject = Subject.of(model)
    Inject(cache="static", max_length=37).apply(subject)
    detach_cache(subject)
    detached = io.to_proto(subject.model)
    assert [str(dims_of(value)) for value in detached.graph.input] == [
        str(dims_of(value)) for value in model.graph.input
    ]
    assert_same(model, detached)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_cache_can_be_injected_after_removal(name):
    assert_law(export(name), injected(removed(injected_export(name))))


@pytest.mark.parametrize("config", [Config(), Config(attention_mask=False), Config(position_ids=True)])
def test_a_cache_of_another_exporter_can_be_removed(config):
    cached = CachedDecoder(config).model()
    result = removed(cached)
    assert not any("past" in dim for value in result.graph.input for dim in map(str, dims_of(value)))
    assert_law(result, cached)
    assert_law(result, injected(result))


def test_names_do_not_matter_for_removal():
    result = removed(read(JOINED))
    assert [value.name for value in result.graph.input] == ["x"]
    assert [value.name for value in result.graph.output] == ["logits"]
    x = texts(result)["x"]
    empty = np.zeros((2, 0, 8), np.float32)
    expected = in_onnxruntime(read(JOINED))({"x": x, "keys": empty, "values": empty})["logits"]
    assert difference(in_onnxruntime(result)({"x": x})["logits"], expected) == 0
    assert_law(result, injected(result))


def test_lengths_computed_from_the_past_are_replaced():
    result = removed(read(JOINED))
    kinds = [node.op_type for node in result.graph.node]
    assert "Concat" not in kinds
    assert "Add" not in kinds  # past + new is new
    assert kinds.count("Shape") == 1


def test_the_past_of_an_operator_is_disconnected():
    result = removed(read(FUSED, opset=23))
    (node,) = (node for node in result.graph.node if node.op_type == "Attention")
    assert list(node.output) == ["logits"]
    assert len(node.input) == 3
    assert_law(result, injected(result))


def test_a_cache_in_another_layout_can_be_removed():
    text = JOINED.replace("float[b, p, 8] keys", "float[b, 8, p] keys").replace("t, 8] all_keys", "8, t] all_keys")
    text = text.replace("Concat<axis = 1>(keys, k)", "Concat<axis = 2>(keys, kr)").replace(
        "k = MatMul(x, wk)", "k = MatMul(x, wk)\n  kr = Transpose<perm = [0, 2, 1]>(k)"
    )
    text = text.replace("kt = Transpose<perm = [0, 2, 1]>(all_keys)", "kt = Identity(all_keys)")
    text = text.replace("past = Gather(before, one)", "last = Add(one, one)\n  past = Gather(before, last)")
    result = removed(read(text))
    assert_same(removed(read(JOINED)), result)


@pytest.mark.parametrize("opset", [18])
def test_a_mask_of_the_past_is_removed_too(opset):
    text = JOINED.replace("float[b, p, 8] values)", "float[b, p, 8] values, float[b, p] bias)").replace(
        "s = MatMul(q, kt)",
        "s0 = MatMul(q, kt)\n  own = ReduceSum<keepdims = 0>(x, two)\n  none = Mul(own, zero)\n"
        "  bias_all = Concat<axis = 1>(bias, none)\n  bias_row = Unsqueeze(bias_all, second)\n"
        "  s = Add(s0, bias_row)",
    )
    text = text.replace("int64 nought", "int64[1] two = {2}, float zero = {0.0}, int64 nought")
    assert_same(removed(read(JOINED)), removed(read(text, opset)))


AGAIN = "all_values = Concat<axis = 1>(values, v)"
REFUSED = {
    "fixed length": JOINED.replace("b, p, 8", "b, 4, 8"),
    "more than its update": JOINED.replace(
        "s = MatMul(q, kt)", "s0 = MatMul(q, kt)\n  m = ReduceSum<keepdims = 0>(keys)\n  s = Add(s0, m)"
    ),
    "two outputs": JOINED.replace("all_values)\n<", "all_values, float[b, t, 8] again)\n<").replace(
        AGAIN, f"{AGAIN}\n  again = Concat<axis = 1>(values, q)"
    ),
    "no output returns it with new rows": JOINED.replace(
        AGAIN, "half = Mul(values, low)\n  all_values = Concat<axis = 1>(half, v)"
    ),
}


@pytest.mark.parametrize(("reason", "text"), REFUSED.items())
def test_an_unsupported_cache_leaves_the_model_unchanged(reason, text):
    subject = Subject.of(read(text))
    before = io.to_proto(subject.model).SerializeToString(deterministic=True)
    with pytest.raises(UnsupportedError, match=reason):
        RemoveCache().apply(subject)
    assert io.to_proto(subject.model).SerializeToString(deterministic=True) == before


def test_a_further_output_that_returns_the_cache_too_is_kept():
    text = JOINED.replace("=> (float[b, n, 8] logits", "=> (float[b, n, 8] logits, float[b, t, 8] own")
    without = removed(read(text.replace(AGAIN, f"{AGAIN}\n  own = Identity(all_values)")))
    assert [value.name for value in without.graph.output] == ["logits", "own"]


@pytest.mark.parametrize("one", [RemoveCache(), Retarget()])
def test_a_model_without_a_cache_is_unchanged(one):
    outcome = one.apply(Subject.of(export("decoder")))
    assert isinstance(outcome, Unchanged)
    assert "has no cache" in outcome.reason


def test_names_and_order_are_restored():
    model = CachedDecoder(Config(layers=2)).model()
    rename(model, {"past_key_values.0.key": "k", "past_key_values.1.key": "present.0.key", "present.0.key": "kk"})
    model.graph.input.insert(0, model.graph.input.pop())
    order = [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    subject = Subject.of(model)
    signature = detach_cache(subject)
    assert [(entry.layer, entry.kind) for entry in signature.entries] == [
        (1, "value"), (0, "key"), (0, "value"), (1, "key")
    ]  # fmt: skip
    whole = io.to_proto(subject.model)
    reattach_cache(subject, signature)
    result = io.to_proto(subject.model)
    assert [value.name for value in result.graph.input] == order[0]
    assert [value.name for value in result.graph.output] == order[1]
    assert {dims_of(value)[1] for value in result.graph.input if len(dims_of(value)) == 4} == {2}
    assert whole.graph.output[0].name == "logits"


def rename(model: onnx.ModelProto, names: dict[str, str]) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def test_a_cache_of_unknown_layout_cannot_be_restored():
    with pytest.raises(UnsupportedError, match="cannot be restored"):
        detach_cache(Subject.of(read(JOINED)))


def test_a_tensor_that_no_attention_reads_is_no_cache():
    text = JOINED.replace("all_keys = Concat<axis = 1>(keys, k)", "all_keys = Concat<axis = 1>(keys, q)")
    text = text.replace("Transpose<perm = [0, 2, 1]>(all_keys)", "Transpose<perm = [0, 2, 1]>(k)")
    with pytest.raises(UnsupportedError, match="neither a key nor a value"):
        Retarget().apply(Subject.of(read(text)))


@pytest.mark.parametrize("model", [read(JOINED), read(FUSED, opset=23), CachedDecoder(Config(layers=2)).model()])
def test_retarget_is_verified_call_by_call(model):
    done = run_and_save(model, Pipeline((Retarget(past="k.{layer}.{kind}", present="p.{layer}.{kind}"),)))
    assert done.verification.verdict == "same"
    names = [value.name for value in done.model.graph.inputs]
    assert "k.0.key" in names
    assert not any("past" in name for name in names)


@pytest.mark.parametrize("model", [read(JOINED), CachedDecoder(Config(layers=2)).model()])
def test_removal_is_verified(model):
    assert run_and_save(model, Pipeline((RemoveCache(),))).verification.verdict == "same"


@pytest.mark.parametrize("opset", [18, 24])
@pytest.mark.parametrize("options", [{"cache": "static"}, {"cache": "new-tokens"}], ids=lambda one: one["cache"])
def test_static_and_new_tokens_caches_are_recognized(options, opset):
    model = injected(read(attention(), opset), **options)
    with pytest.raises(UnsupportedError, match="already has a cache"):
        Inject().apply(Subject.of(model))


def test_inject_names_the_passes_for_an_existing_cache():
    with pytest.raises(
        UnsupportedError, match=r"already has a cache.* - at `keys` \(remove-cache removes it, retarget"
    ):
        Inject().apply(Subject.of(read(JOINED)))
