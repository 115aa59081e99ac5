"""fix-shapes leaves no symbolic dimension and no shape computation, and results are those of the original."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder
from exports import NAMES, ONE_OF_EACH, export, injected
from laws import ALLOWED, difference, dims_of, in_onnxruntime, texts
from recurrences import CONVOLUTION, hybrid
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.parity import verify
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.shapes.fix_shapes import FixShapes
from kvsurgeon.runtime import CachedDecoder, TextGenerator, open_session

IN_PLACE = {"cache": "static"}
NEW_ONLY = {"cache": "new-tokens", "past_length": "input"}
SHAPE_OPERATORS = {"Shape", "Size", "Range", "ConstantOfShape", "NonZero", "EyeLike", "Trilu"}


def fixed(model: onnx.ModelProto, **options: int) -> onnx.ModelProto:
    subject = Subject.of(model)
    assert isinstance(FixShapes(**options).apply(subject), Changed)
    result = io.to_proto(subject.model)
    onnx.checker.check_model(result, full_check=True)
    return result


def symbols(model: onnx.ModelProto) -> list[str]:
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    return [value.name for value in values if not all(isinstance(size, int) for size in dims_of(value))]


@pytest.mark.parametrize(
    ("name", "cache", "tokens"),
    [
        *((name, IN_PLACE, 4) for name in ONE_OF_EACH),
        ("llama_dynamo_sdpa", IN_PLACE, 1),
        ("gpt2_torchscript_sdpa", NEW_ONLY, 4),
        ("gemma2_dynamo_eager", NEW_ONLY, 1),
        ("decoder", NEW_ONLY, 4),
    ],
)
def test_all_shapes_are_static_and_verification_passes(name, cache, tokens):
    model = fixed(injected(export(name), **cache), tokens=tokens, max_length=24)

    assert symbols(model) == []
    made = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    assert {output for node in model.graph.node for output in node.output if output} <= made
    assert not {node.op_type for node in model.graph.node} & SHAPE_OPERATORS
    report = verify(export(name), model, threads=1)
    assert (report.verdict, report.problems) == ("same", ())
    assert {"left padding", "long past"} <= {trial.scenario for trial in report.comparisons} | {"left padding"}


def test_a_batch_of_two_can_be_padded():
    model = fixed(injected(export("decoder"), **IN_PLACE), tokens=3, max_length=24, batch_size=2)
    report = verify(export("decoder"), model, threads=1)
    assert report.verdict == "same"
    assert "left padding" in {trial.scenario for trial in report.comparisons}


def test_text_is_generated_in_padded_chunks():
    prompt = [3, 1, 4, 1, 5, 2, 6]
    expected = TextGenerator(export("llama_dynamo_sdpa"), threads=1).generate([prompt], max_new_tokens=5)
    model = fixed(injected(export("llama_dynamo_sdpa"), **IN_PLACE), tokens=4, max_length=32)
    assert TextGenerator(model, threads=1).generate([prompt], max_new_tokens=5).tokens == expected.tokens


def test_a_model_without_a_cache_can_be_fixed():
    original = export("gpt2_dynamo_sdpa")
    model = fixed(original, tokens=9, batch_size=2)
    assert symbols(model) == []
    whole = texts(original, batch=2, length=9)
    found, expected = (in_onnxruntime(one)(whole)["logits"] for one in (model, original))
    assert difference(found, expected, whole["attention_mask"]) <= ALLOWED["float32"]


def test_static_models_are_unchanged():
    subject = Subject.of(fixed(injected(export("decoder"), **IN_PLACE), tokens=1, max_length=8))
    assert isinstance(FixShapes(tokens=1, max_length=8).apply(subject), Unchanged)


def test_metadata_describes_the_cache_of_a_static_model():
    layout = ("kv_heads", "batch", "head_dim", "sequence")
    model = fixed(injected(export("decoder"), key_layout=layout, **NEW_ONLY), tokens=8, max_length=16)
    noted = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert (noted["kvsurgeon.cache"]["mode"], noted["kvsurgeon.cache"]["key_layout"]) == ("new-tokens", list(layout))
    decoder = CachedDecoder(open_session(model, threads=1))
    assert [entry.axis for entry in decoder.cache[:2]] == [3, 2]
    assert verify(export("decoder"), model, threads=1).verdict == "same"


@pytest.mark.parametrize("options", [{}, {"cache": "new-tokens"}, {"cache": "static", "past_length": "mask"}])
def test_a_cache_whose_shape_differs_between_calls_is_rejected(options):
    model = injected(export("decoder"), **options)
    subject = Subject.of(model)
    with pytest.raises(UnsupportedError, match="cannot fix a dimension that differs between calls"):
        FixShapes(tokens=1, max_length=16).apply(subject)
    assert io.to_proto(subject.model) == io.to_proto(Subject.of(model).model)


def test_calls_of_several_tokens_need_a_model_without_states():
    original = read(hybrid(CONVOLUTION))
    model = injected(original, **IN_PLACE)
    with pytest.raises(UnsupportedError, match=r"padding of a chunk would enter a state.*found tokens=4"):
        FixShapes(tokens=4, max_length=24).apply(Subject.of(model))
    assert verify(original, fixed(model, tokens=1, max_length=24), threads=1).verdict == "same"


def test_a_cache_requires_max_length():
    with pytest.raises(UnsupportedError, match="expected max-length"):
        FixShapes(tokens=1).apply(Subject.of(injected(export("decoder"), **IN_PLACE)))


def test_max_length_cannot_exceed_the_limit_of_the_model():
    subject = Subject.of(injected(export("gpt2_torchscript_sdpa"), **IN_PLACE))
    with pytest.raises(UnsupportedError, match="expected max-length of at most 64, found 65"):
        FixShapes(tokens=1, max_length=65).apply(subject)
    assert isinstance(FixShapes(tokens=1, max_length=64).apply(subject), Changed)


@pytest.mark.parametrize("options", [{"tokens": 0}, {"tokens": 8, "max_length": 4}, {"tokens": 1, "batch_size": 0}])
def test_invalid_sizes_are_usage_errors(options):
    with pytest.raises(UsageError, match="expected a number from"):
        FixShapes(**options)


def outside(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(copy, path, save_as_external_data=True, location="model.onnx.data", size_threshold=256)
    return path


def test_models_for_prefill_and_decode_share_one_file_of_weights(tmp_path):
    (tmp_path / "cached").mkdir()
    source = outside(injected(Decoder(Config(layers=2)).model(), **IN_PLACE), tmp_path / "cached")
    for name, tokens in (("prefill", 8), ("decode", 1)):
        subject = Subject.of(source)
        FixShapes(tokens=tokens, max_length=24).apply(subject)
        io.save(subject.model, tmp_path / "variants" / f"{name}.onnx", source=source)

    assert sorted(path.name for path in (tmp_path / "variants").iterdir()) == [
        "decode.onnx",
        "model.onnx.data",
        "prefill.onnx",
    ]
    assert (tmp_path / "variants" / "model.onnx.data").read_bytes() == (source.parent / "model.onnx.data").read_bytes()
    places = []
    for name in ("prefill", "decode"):
        graph = onnx.load(tmp_path / "variants" / f"{name}.onnx", load_external_data=False).graph
        stored = (one for one in graph.initializer if one.external_data)
        places.append({one.name: sorted((e.key, e.value) for e in one.external_data) for one in stored})
    assert places[0] == places[1]
    assert len(places[0]) > 10


def test_weights_are_not_read(tmp_path):
    source = outside(injected(Decoder(Config(layers=1)).model(), **IN_PLACE), tmp_path)
    subject = Subject.of(source)
    (tmp_path / "model.onnx.data").write_bytes(b"")
    assert isinstance(FixShapes(tokens=2, max_length=16).apply(subject), Changed)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(ONE_OF_EACH)))
def test_every_export_with_a_static_cache_can_be_fixed(name):
    original = export(name)
    model = fixed(injected(original, **IN_PLACE), tokens=5, max_length=16)
    assert symbols(model) == []
    whole = texts(original, batch=1, length=11)
    decoder = CachedDecoder(open_session(model, threads=1))
    found = decoder.prefill(decoder.inputs.feeds(whole["input_ids"], np.ones((1, 11), np.int64)))
    expected = in_onnxruntime(original)(whole)["logits"]
    assert difference(found, expected) <= ALLOWED["float32"]
