"""Injection: the law that it must obey, what it does not depend on, and what it leaves unchanged."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from attentions import attention
from decoders import Config, Decoder
from exports import FILES, NAMES, ONE_OF_EACH, export, injected, injected_export
from laws import ALLOWED, assert_law, difference, dims_of, in_chunks, in_onnxruntime, texts
from onnx import helper, numpy_helper
from written import read

from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


# The law: prefill(n) + decode(m) == full(n + m)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_any_split_of_a_sequence_gives_the_same(name, seed):
    random = np.random.default_rng(seed)
    length = int(random.integers(3, 24))
    cuts = sorted(set(random.integers(1, length, 4).tolist()))
    whole = texts(export(name), batch=1, length=length, seed=seed)
    assert_law(export(name), injected_export(name), whole, cuts)


@pytest.mark.parametrize("name", NAMES)
def test_a_left_padded_batch_of_three(name):
    whole = texts(export(name), batch=3, length=11)
    assert whole["attention_mask"].sum(axis=1).tolist() == [11, 9, 7]
    assert_law(export(name), injected_export(name), whole, (6, 7, 8))


@pytest.mark.parametrize("name", ["llama_dynamo_sdpa", "gpt2_torchscript_eager", "decoder"])
def test_an_empty_past_is_like_no_past(name):
    whole = texts(export(name), length=7)
    (step,) = in_chunks(injected_export(name), in_onnxruntime(injected_export(name)), whole, ())
    expected = in_onnxruntime(export(name))(whole)["logits"]
    assert difference(step["logits"], expected, whole["attention_mask"]) <= ALLOWED["float32"]


def test_with_the_optimizations_of_onnxruntime():
    optimized = functools.partial(in_onnxruntime, optimized=True)
    for name in ("llama_dynamo_sdpa", "gemma2_torchscript_eager"):
        assert_law(export(name), injected_export(name), start=optimized)


def test_float16():
    original = Decoder(Config(layers=2, dtype="float16")).model()
    result = injected(original)
    pasts = [value for value in result.graph.input if value.name.startswith("past")]
    assert {value.type.tensor_type.elem_type for value in pasts} == {onnx.TensorProto.FLOAT16}
    assert_law(original, result)


OTHERS = {
    "position_ids": Config(layers=2, position_ids=True),
    "no mask": Config(layers=2, attention_mask=False),
    "static": Config(layers=2, static=(2, 9)),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_other_inputs(config):
    original = Decoder(config).model()
    assert_law(original, injected(original), texts(original, batch=2, length=9, padded=config.static is None))


# What it does not depend on


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every value and node is called by a number, inputs as well; `logits` and what the feeds are called are kept."""
    result = copy_of(model)
    names = {"logits": "logits", "": ""}

    def name(old: str) -> str:
        return names.setdefault(old, f"{(len(names) * 7919) % 100003:05d}")

    for node in result.graph.node:
        node.name = name(f"node {node.name}")
        node.input[:] = [name(one) for one in node.input]
        node.output[:] = [name(one) for one in node.output]
    graph = result.graph
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = name(value.name)
    return result


def shuffled(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """The nodes in another order in which every value is made before it is used."""
    random = np.random.default_rng(seed)
    result = copy_of(model)
    waiting, made = list(result.graph.node), {""}
    produced = {name for node in waiting for name in node.output}
    ordered = []
    while waiting:
        ready = [node for node in waiting if all(name in made or name not in produced for name in node.input)]
        chosen = ready[random.integers(len(ready))]
        waiting.remove(chosen)
        ordered.append(chosen)
        made.update(chosen.output)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def padded_out(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """Identity on every fifth edge; where the value is known to be float, also a cast to double and back."""
    random = np.random.default_rng(seed)
    result = copy_of(model)
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    nodes = []
    for node in result.graph.node:
        for index, name in enumerate(node.input):
            if not name or random.random() > 0.2:
                continue
            between = f"{name}.{len(nodes)}"
            if types.get(name) == onnx.TensorProto.FLOAT and random.random() < 0.5:
                nodes.append(helper.make_node("Cast", [name], [f"{between}.wide"], to=onnx.TensorProto.DOUBLE))
                nodes.append(helper.make_node("Cast", [f"{between}.wide"], [between], to=onnx.TensorProto.FLOAT))
            else:
                nodes.append(helper.make_node("Identity", [name], [between]))
            node.input[index] = between
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def constants_as_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    result = copy_of(model)
    made = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in result.graph.initializer]
    nodes = [*made, *result.graph.node]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.initializer[:], result.graph.node[:]
    result.graph.node.extend(copies)
    return result


def constants_as_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    result = copy_of(model)
    kept = []
    for node in result.graph.node:
        if node.op_type != "Constant":
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
            continue
        value = helper.get_attribute_value(node.attribute[0])
        tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.array(value))
        tensor.name = node.output[0]
        result.graph.initializer.append(tensor)
    del result.graph.node[:]
    result.graph.node.extend(kept)
    return result


def without_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    result = copy_of(model)
    del result.graph.value_info[:]
    return result


def optimized(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


CHANGES = {
    "shuffled": shuffled, "padded out": padded_out, "constants as nodes": constants_as_nodes,
    "constants as initializers": constants_as_initializers, "no stored shapes": without_shapes,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_equivalent_graphs_give_the_same(name, change):
    changed = CHANGES[change](export(name))
    onnx.checker.check_model(changed)
    result = injected(changed)
    assert_law(export(name), result)
    interface, plain = ([(value.name, dims_of(value)) for value in model.graph.input] for model in
                        (result, injected_export(name)))  # fmt: skip
    assert interface == plain


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_names_do_not_matter(name):
    original = renamed(export(name))
    result = injected(original)
    plain = injected_export(name)
    assert [dims_of(value) for value in result.graph.input] == [dims_of(value) for value in plain.graph.input]
    called = dict(zip((v.name for v in export(name).graph.input), (v.name for v in original.graph.input), strict=True))
    whole = texts(export(name))
    expected = in_onnxruntime(export(name))(whole)["logits"]
    steps = in_chunks(result, in_onnxruntime(result), {called[key]: array for key, array in whole.items()}, (4, 5))
    found = np.concatenate([step["logits"] for step in steps], axis=1)
    assert difference(found, expected, whole["attention_mask"]) <= ALLOWED["float32"]


@pytest.mark.parametrize("name", ["llama_torchscript_eager", "gpt2_dynamo_sdpa", "gemma2_dynamo_eager"])
def test_optimized_models_give_the_same(name, tmp_path):
    assert_law(export(name), injected(optimized(export(name), tmp_path)))


def fixed(model: onnx.ModelProto, batch: int, length: int) -> onnx.ModelProto:
    """Every shape is a number, as in a static export; stored shapes are dropped, as they name lengths."""
    result = without_shapes(model)
    for value in (*result.graph.input, *result.graph.output):
        for size, number in zip(value.type.tensor_type.shape.dim, (batch, length), strict=False):
            size.dim_value = number
    return result


@pytest.mark.parametrize("folded", [False, True], ids=["as it is", "folded"])
@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if name != "gpt2_torchscript_sdpa"])
def test_an_export_of_fixed_length(name, folded, tmp_path):
    original = fixed(export(name), 1, 9)
    result = injected(optimized(original, tmp_path) if folded else original)
    assert_law(original, result, texts(original, batch=1, length=9))


def test_a_flattened_mask_at_a_fixed_length():
    original = fixed(export("gpt2_torchscript_sdpa"), 1, 9)
    assert_law(original, injected(original), texts(original, batch=1, length=9))


def test_a_mask_flattened_with_the_batch_is_right_at_lengths_that_the_export_did_not_have():
    result = injected(fixed(export("bloom_torchscript_eager"), 2, 9))
    report = verify(export("bloom_torchscript_eager"), result, threads=1)
    assert report.verdict == "same", report


# What it leaves alone


@pytest.mark.parametrize("name", FILES)
def test_other_nodes_are_identical(name):
    before = {tuple(node.output): node for node in export(name).graph.node}
    after = {tuple(node.output): node for node in injected_export(name).graph.node}
    kept = [output for output, node in after.items() if output in before and node.input == before[output].input]
    assert len(kept) > 0.5 * len(after)
    assert all(after[output].SerializeToString() == before[output].SerializeToString() for output in kept)

    weights = {tensor.name: tensor for tensor in export(name).graph.initializer if len(tensor.raw_data) > 600}
    still = {tensor.name: tensor for tensor in injected_export(name).graph.initializer}
    assert weights
    assert all(still[name].SerializeToString() == tensor.SerializeToString() for name, tensor in weights.items())


def test_metadata_and_names_are_kept():
    original = copy_of(export("llama_dynamo_sdpa"))
    original.producer_name, original.doc_string, original.graph.name = "an exporter", "a model", "main"
    original.metadata_props.add(key="licence", value="free")
    original.graph.metadata_props.add(key="made", value="by hand")
    result = injected(original)
    assert (result.producer_name, result.doc_string, result.graph.name) == ("an exporter", "a model", "main")
    assert {entry.key: entry.value for entry in result.metadata_props}["licence"] == "free"
    assert {entry.key: entry.value for entry in result.graph.metadata_props}["made"] == "by hand"
    scopes = {node.output[0]: [e.value for e in node.metadata_props] for node in original.graph.node}
    found = {node.output[0]: [e.value for e in node.metadata_props] for node in result.graph.node}
    assert all(found[name] == scopes[name] for name in scopes.keys() & found.keys())


@pytest.mark.parametrize("name", FILES)
def test_every_new_value_has_a_type(name):
    result = injected_export(name)
    old = {output for node in export(name).graph.node for output in node.output}
    typed = {
        value.name for value in (*result.graph.value_info, *result.graph.output) if value.type.tensor_type.elem_type
    }
    new = {output for node in result.graph.node for output in node.output if output} - old
    assert new <= typed


@pytest.mark.parametrize("name", FILES)
def test_names_are_unique(name):
    graph = injected_export(name).graph
    values = [
        *(v.name for v in graph.input),
        *(t.name for t in graph.initializer),
        *(o for n in graph.node for o in n.output),
    ]
    assert len(values) == len(set(values))
    nodes = [node.name for node in graph.node if node.name]
    assert len(nodes) == len(set(nodes))


@pytest.mark.parametrize("name", FILES)
def test_the_interface(name):
    result, layers = injected_export(name), 2
    assert [value.name for value in result.graph.input] == [
        "input_ids", "attention_mask",
        *(f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")),
    ]  # fmt: skip
    assert [value.name for value in result.graph.output] == [
        "logits",
        *(f"present.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")),
    ]
    dims = {value.name: dims_of(value) for value in (*result.graph.input, *result.graph.output)}
    assert dims["input_ids"] == ["batch_size", "sequence_length"]
    assert dims["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert dims["logits"][:2] == ["batch_size", "sequence_length"]
    batch, heads, past, width = dims["past_key_values.1.value"]
    assert (batch, past) == ("batch_size", "past_sequence_length")
    assert all(isinstance(size, int) for size in (heads, width))
    assert dims["present.1.value"] == [batch, heads, "total_sequence_length", width]


# Names, outputs, options


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_layers_of_one_part_of_a_model_count_on_from_those_before(cache):
    original = export("llama_dynamo_sdpa")
    result = injected(original, cache=cache, first_layer=10)
    pasts = [value.name for value in result.graph.input if value.name.startswith("past_key_values")]
    assert pasts == [f"past_key_values.{layer}.{kind}" for layer in (10, 11) for kind in ("key", "value")]
    assert verify(original, result).verdict == "same"


def test_a_negative_first_layer_is_rejected():
    with pytest.raises(UsageError, match="option first-layer: expected a number from 0"):
        Inject(first_layer=-1)


@pytest.mark.parametrize("name", ["past_key_values.0.key", "present.0.value"])
def test_an_inner_value_of_that_name_is_renamed(name):
    text = attention(hidden='"TAKEN" = Neg(x)\n h = Neg("TAKEN")').replace("TAKEN", name)
    original = read(text)
    result = injected(original)
    assert_law(original, result)
    assert name in {value.name for value in (*result.graph.input, *result.graph.output)}


def test_a_weight_of_that_name_is_renamed():
    original = read(attention().replace("wq", '"past_key_values.0.key"'))
    result = injected(original)
    assert_law(original, result)
    assert "past_key_values.0.key_inner" in {tensor.name for tensor in result.graph.initializer}


def test_an_output_of_that_name_is_rejected():
    text = attention(after='logits = Identity(c)\n "present.0.key" = Neg(c)').replace(
        "=> (float[b, n, 8] logits)", '=> (float[b, n, 8] logits, float[b, n, 8] "present.0.key")'
    )
    with pytest.raises(UnsupportedError, match="already has an input or output of that name"):
        injected(read(text))


def test_other_outputs_have_the_new_tokens():
    original = copy_of(export("llama_dynamo_sdpa"))
    inner = next(node.output[0] for node in original.graph.node if node.op_type == "Softmax")
    hidden = next(node.output[0] for node in original.graph.node if node.op_type in ("MatMul", "Gemm"))
    types = onnx.shape_inference.infer_shapes(original).graph.value_info
    for name in (hidden, inner):
        original.graph.output.append(next(value for value in types if value.name == name))
    result = injected(original)
    assert_law(original, result)
    assert_law(original, result, output=hidden)
    assert dims_of(next(value for value in result.graph.output if value.name == inner))[-2:] == [
        "sequence_length", "total_sequence_length"
    ]  # fmt: skip


def test_name_templates():
    result = injected(export("gpt2_dynamo_eager"), past="past.{kind}s[{layer}]", present="present_{layer}_{kind}")
    assert [value.name for value in result.graph.input][2:4] == ["past.keys[0]", "past.values[0]"]
    assert [value.name for value in result.graph.output][1:3] == ["present_0_key", "present_0_value"]
    assert_law(export("gpt2_dynamo_eager"), result)


@pytest.mark.parametrize("past", ["past.{layer}", "past.{kind}", "past"])
def test_templates_without_unique_names_are_rejected(past):
    subject = Subject.of(export("gpt2_dynamo_eager"))
    with pytest.raises(UsageError, match="layer"):
        Inject(past=past).apply(subject)


@pytest.mark.parametrize("past", ["past.{number}.{kind}", "past.{layer", "past.{layer!x}.{kind}"])
def test_invalid_templates_are_rejected(past):
    with pytest.raises(UsageError):
        Inject(past=past).apply(Subject.of(export("gpt2_dynamo_eager")))


@pytest.mark.parametrize("name", ["llama_dynamo_sdpa", "llama_torchscript_eager", "decoder"])
def test_a_second_injection_is_rejected(name):
    with pytest.raises(UnsupportedError, match="already has a cache"):
        Inject().apply(Subject.of(injected_export(name)))


def test_edits_are_counted_and_assumptions_noted():
    subject = Subject.of(export("llama_dynamo_sdpa"))
    outcome = Inject().apply(subject)
    assert outcome.edits > 8
    assert outcome.notes == ()
    quantized = read(attention(constants="float[8, 8] zw", key=(
        "u, s_, p = DynamicQuantizeLinear(k0)\n f = DequantizeLinear(u, s_, p)\n k = Identity(f)")))  # fmt: skip
    outcome = Inject().apply(Subject.of(quantized))
    assert "dynamic quantization" in outcome.notes[0]
