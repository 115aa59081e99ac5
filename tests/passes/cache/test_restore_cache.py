"""A cache of any mode and layout can be removed, and restored with the same mode, layout and names."""

from __future__ import annotations

import functools

import onnx
import pytest
from attentions import attention
from decoders import Config, Decoder
from exports import export, injected
from laws import assert_law, dims_of
from onnx import helper
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.remove_cache import RemoveCache, detach_cache, reattach_cache
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.contract import Subject
from kvsurgeon.passes.heads.expand_gqa import ExpandGqa
from kvsurgeon.passes.heads.replicate_kv_heads import ReplicateKvHeads
from kvsurgeon.passes.interface.rename_io import RenameIo
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

AXES = ("batch", "kv_heads", "sequence", "head_dim")
TRANSPOSED_KEYS = ("kv_heads", "batch", "head_dim", "sequence")
FORMS = {
    "dynamic": {},
    "transposed": {"key_layout": TRANSPOSED_KEYS, "value_layout": ("batch", "sequence", "kv_heads", "head_dim")},
    "static": {"cache": "static"},
    "static, length from mask": {"cache": "static", "past_length": "mask"},
    "static, length from positions": {"cache": "static", "past_length": "positions"},
    "static, 48 rows": {"cache": "static", "max_length": 48},
    "static, 48 rows, length from positions": {"cache": "static", "past_length": "positions", "max_length": 48},
    "static, transposed": {"cache": "static", "key_layout": TRANSPOSED_KEYS},
    "new tokens": {"cache": "new-tokens"},
    "new tokens, length from an input": {"cache": "new-tokens", "past_length": "input"},
    "new tokens, length from positions": {
        "cache": "new-tokens",
        "past_length": "positions",
        "key_layout": TRANSPOSED_KEYS,
    },
    "half": {"cache_dtype": "float16", "past": "p_{kind}_{layer}", "present": "n_{kind}_{layer}"},
}


@functools.cache
def decoder() -> onnx.ModelProto:
    return Decoder(Config(layers=2, position_ids=True)).model()


@functools.cache
def cached(form: str) -> onnx.ModelProto:
    return injected(decoder(), **FORMS[form])


def interface(model: onnx.ModelProto) -> list[tuple[str, int, list[int | str]]]:
    values = (*model.graph.input, *model.graph.output)
    return [(value.name, value.type.tensor_type.elem_type, dims_of(value)) for value in values]


def detached_and_reattached(model: onnx.ModelProto) -> onnx.ModelProto:
    subject = Subject.of(model)
    reattach_cache(subject, detach_cache(subject))
    result = io.to_proto(subject.model)
    onnx.checker.check_model(result)
    return result


@pytest.mark.parametrize("opset", [18, 24])
@pytest.mark.parametrize("form", FORMS)
def test_a_restored_cache_is_the_one_before(form, opset):
    model = cached(form) if opset == 18 else injected(read(attention(), opset), **FORMS["static, transposed"])
    result = detached_and_reattached(model)
    assert interface(result) == interface(model)
    assert "max_length" in FORMS[form] or result.metadata_props == model.metadata_props


@pytest.mark.parametrize("form", FORMS)
def test_heads_can_be_replicated_in_any_cache(form):
    done = run_and_save(cached(form), Pipeline((ReplicateKvHeads(repeat=2),)))
    assert done.verification.verdict == "same"
    result = io.to_proto(done.model)
    for before, after in zip(interface(cached(form)), interface(result), strict=True):
        assert before[:2] == after[:2]
    pasts = [value for value in result.graph.input if len(dims_of(value)) == 4]
    layouts = [FORMS[form].get(option, AXES) for option in ("key_layout", "value_layout")] * 2
    assert [dims_of(past)[layout.index("kv_heads")] for past, layout in zip(pasts, layouts, strict=True)] == [4] * 4


@pytest.mark.parametrize("form", FORMS)
def test_any_cache_can_be_removed(form):
    done = run_and_save(cached(form), Pipeline((RemoveCache(),)))
    assert done.verification.verdict == "same"
    result = io.to_proto(done.model)
    assert [value.name for value in result.graph.input] == [value.name for value in decoder().graph.input]
    rows = FORMS[form].get("max_length")
    assert rows is None or {dims_of(value)[1] for value in result.graph.input} == {rows}
    if rows is None and form != "half":
        assert_law(decoder(), injected(result))


@pytest.mark.parametrize("wanted", ["dynamic", "static, length from positions", "new tokens, length from an input"])
@pytest.mark.parametrize("form", ["transposed", "static, length from mask", "new tokens, length from positions"])
def test_retarget_gives_what_inject_gives(form, wanted):
    done = run_and_save(cached(form), Pipeline((Retarget(**FORMS[wanted]),)))
    assert done.verification.verdict == "same"
    assert interface(io.to_proto(done.model)) == interface(cached(wanted))


@pytest.mark.parametrize("form", ["static", "new tokens, length from an input"])
def test_the_length_input_keeps_its_name_and_position(form):
    subject = Subject.of(cached(form))
    RenameIo(names=("past_sequence_length:n",)).apply(subject)
    subject.model.graph.inputs.insert(0, subject.model.graph.inputs.pop())
    model = io.to_proto(subject.model)
    assert model.graph.input[0].name == "n"
    assert interface(detached_and_reattached(model)) == interface(model)


@pytest.mark.parametrize(("elements", "dims"), [("INT32", [1]), ("INT64", []), ("INT32", [])])
def test_the_length_input_keeps_its_type_and_shape(elements, dims):
    model = onnx.ModelProto()
    model.CopyFrom(cached("static"))
    (given,) = (value for value in model.graph.input if value.name == "past_sequence_length")
    given.CopyFrom(helper.make_tensor_value_info("given", getattr(onnx.TensorProto, elements), dims))
    as_list = helper.make_node("Reshape", ["wide", "one_number"], ["past_sequence_length"])
    model.graph.node.insert(0, helper.make_node("Cast", ["given"], ["wide"], to=onnx.TensorProto.INT64))
    model.graph.node.insert(1, as_list)
    model.graph.initializer.append(helper.make_tensor("one_number", onnx.TensorProto.INT64, [1], [1]))
    result = detached_and_reattached(model)
    assert interface(result) == interface(model)
    assert run_and_save(model, Pipeline((ReplicateKvHeads(repeat=2),))).verification.verdict == "same"


def test_metadata_distinguishes_axes_of_equal_size():
    layout = ("batch", "head_dim", "kv_heads", "sequence")
    model = injected(export("gpt2_torchscript_sdpa"), key_layout=layout)
    subject = Subject.of(model)
    assert {entry.layout for entry in detach_cache(subject).entries if entry.kind == "key"} == {layout}


def test_rows_not_written_after_the_past_are_rejected():
    model = onnx.ModelProto()
    model.CopyFrom(cached("static, length from positions"))
    (first,) = (node for node in model.graph.node if node.output[0] == "position.first")
    first.output[0] = "position.before"
    model.graph.initializer.append(helper.make_tensor("beyond", onnx.TensorProto.INT64, [1], [3]))
    after = helper.make_node("Add", ["position.before", "beyond"], ["position.first"])
    model.graph.node.insert(list(model.graph.node).index(first) + 1, after)
    with pytest.raises(UnsupportedError, match="may not be written directly after"):
        RemoveCache().apply(Subject.of(model))


def test_buffers_of_different_capacities_are_rejected():
    model = onnx.ModelProto()
    model.CopyFrom(cached("static, 48 rows"))
    past = next(value for value in model.graph.input if value.name == "past_key_values.0.key")
    past.type.tensor_type.shape.dim[2].dim_value = 32
    with pytest.raises(UnsupportedError, match=r"fixed length.*32"):
        RemoveCache().apply(Subject.of(model))


def test_keys_of_different_layouts_cannot_be_restored():
    model = onnx.ModelProto()
    model.CopyFrom(cached("dynamic"))
    graph = model.graph
    past = next(value for value in graph.input if value.name == "past_key_values.0.key")
    sizes = past.type.tensor_type.shape.dim
    sizes[1].dim_param, sizes[2].dim_value = sizes[2].dim_param, sizes[1].dim_value
    transposed = helper.make_node("Transpose", ["past_key_values.0.key"], ["transposed"], perm=[0, 2, 1, 3])
    for node in graph.node:
        node.input[:] = ["transposed" if name == "past_key_values.0.key" else name for name in node.input]
    graph.node.insert(0, transposed)
    before = model.SerializeToString(deterministic=True)
    subject = Subject.of(model)
    with pytest.raises(UnsupportedError, match="cannot be restored"):
        ExpandGqa().apply(subject)
    assert io.to_proto(subject.model).SerializeToString(deterministic=True) == before
