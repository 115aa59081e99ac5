"""Certificates: their form, their confirmation, and everything that is not confirmed."""

import copy
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from decoders import Config, Decoder
from onnx import numpy_helper

import kvsurgeon
from kvsurgeon.errors import (
    CertificateError,
    Code,
    InvalidCertificateError,
    KvsurgeonError,
    UnsupportedError,
    UsageError,
)
from kvsurgeon.passes.contract import Subject
from kvsurgeon.workflow import verification
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "certificate.schema.json").read_text("utf-8"))
DATA = "model.data"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an original, its result in another folder, and the certificate."""
    folder = tmp_path_factory.mktemp("certified")
    original = folder / "original"
    original.mkdir()
    model = Decoder(Config()).model()
    onnx.save(model, original / "model.onnx", save_as_external_data=True, location=DATA, size_threshold=512)
    (original / "config.json").write_text('{"model_type": "tiny"}')
    kvsurgeon.inject(original, folder / "result", effort="quick", seed=5, certificate=folder / "c.json")
    return folder


@pytest.fixture
def copied(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def confirm(folder):
    return kvsurgeon.confirm(folder / "c.json", folder / "result")


def edited(folder, edit):
    """Edit the certificate of a folder."""
    statement = json.loads((folder / "c.json").read_text())
    edit(statement)
    (folder / "c.json").write_text(json.dumps(statement))


def redigested(folder):
    """Write the digests of the files as they are now, as somebody does who changes a model and its certificate."""

    def edit(statement):
        listed = [("result", statement["subject"]), ("original", statement["predicate"]["original"]["files"])]
        for name, files in listed:
            for file in files:
                file["digest"]["sha256"] = hashlib.sha256((folder / name / file["name"]).read_bytes()).hexdigest()

    edited(folder, edit)


# Form


def violations(value, schema, at="$"):
    """Yield where a value violates a schema, of which the keywords of docs/certificate.schema.json are known."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    types["null"] = type(None)
    named = schema.get("type", list(types))
    wanted = [types[name] for name in ([named] if isinstance(named, str) else named)]
    fits = any(isinstance(value, one) and (one is bool or not isinstance(value, bool)) for one in wanted)
    number = isinstance(value, int | float)
    checks = [
        fits or "type" not in schema,
        "const" not in schema or value == schema["const"],
        "enum" not in schema or value in schema["enum"],
        not isinstance(value, str) or re.search(schema.get("pattern", ""), value),
        not number or schema.get("minimum", value) <= value <= schema.get("maximum", value),
        not isinstance(value, list) or len(value) >= schema.get("minItems", 0),
        not isinstance(value, dict) or set(schema.get("required", ())) <= value.keys(),
    ]
    if not all(checks):
        yield at
    for key, inner in value.items() if isinstance(value, dict) else ():
        rest = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
        yield from [f"{at}.{key}"] if rest is False else violations(inner, rest, f"{at}.{key}")
    for index, inner in enumerate(value if isinstance(value, list) else ()):
        yield from violations(inner, schema.get("items", {}), f"{at}[{index}]")


def test_a_certificate_is_an_in_toto_statement_with_digests_of_all_files(made):
    statement = json.loads((made / "c.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert [file["name"] for file in statement["subject"]] == ["model.onnx", DATA, "config.json"]
    for file in statement["subject"]:
        content = (made / "result" / file["name"]).read_bytes()
        assert file["digest"] == {"sha256": hashlib.sha256(content).hexdigest()}
    original = statement["predicate"]["original"]
    assert original["location"] == "original/model.onnx"
    assert [file["name"] for file in original["files"]] == ["model.onnx", DATA]


def test_it_states_passes_obligations_with_evidence_and_measurements(made):
    predicate = json.loads((made / "c.json").read_text())["predicate"]
    assert predicate["passes"][0]["options"]["cache"] == "dynamic"
    (proof,) = predicate["proofs"]
    assert [one["name"] for one in proof["obligations"]] == ["causal", "prefix-stable", "padding", "batch"]
    assert proof["obligations"][0]["status"] == "measured"
    assert max(proof["obligations"][0]["lengths"]) > 1000
    measurements = predicate["measurements"]
    assert measurements["seed"] == 5
    assert all(text["error"] <= measurements["bound"] for text in measurements["texts"])
    assert len({text["digest"] for text in measurements["texts"]}) == len(measurements["texts"]) > 4


def test_it_fits_the_published_schema(made):
    statement = json.loads((made / "c.json").read_text())
    assert not list(violations(statement, SCHEMA))
    wrong = copy.deepcopy(statement)
    wrong["predicate"]["proofs"][0]["obligations"][0]["status"] = "certain"
    wrong["predicate"]["unknown"] = 1
    del wrong["subject"][0]["digest"]["sha256"]
    assert set(violations(wrong, SCHEMA)) == {
        "$.subject[0].digest", "$.predicate.proofs[0].obligations[0].status", "$.predicate.unknown"
    }  # fmt: skip


def test_it_fits_the_published_schema_for_another_validator(made):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads((made / "c.json").read_text()), SCHEMA)


# Writing


def test_a_run_without_verification_or_with_a_loss_has_no_certificate(made, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="verified"):
        kvsurgeon.inject(made / "original", out, verify=False, certificate=tmp_path / "c.json")
    lossy = Pipeline.parse("merge-kv-heads{kv-heads=1}")
    with pytest.raises(UsageError, match="does not preserve"):
        run_and_save(made / "original", lossy, out, certificate=tmp_path / "c.json")
    assert not out.exists()
    assert not (tmp_path / "c.json").exists()


def test_a_certificate_replaces_only_certificates(copied):
    keep = copied / "notes.json"
    keep.write_text('{"_type": "notes"}')
    with pytest.raises(UsageError, match="choose another path"):
        kvsurgeon.inject(copied / "original", copied / "other", certificate=keep)
    with pytest.raises(UsageError, match="choose another path"):
        kvsurgeon.inject(copied / "original", copied / "other", certificate=copied / "original" / DATA, force=True)
    assert keep.read_text() == '{"_type": "notes"}'
    kvsurgeon.inject(copied / "original", copied / "result", effort="quick", certificate=copied / "c.json")
    assert confirm(copied).repeated.ok


def test_models_in_memory_functions_and_targets_have_no_certificate(made, tmp_path):
    model = onnx.load(made / "original" / "model.onnx")
    with pytest.raises(UsageError, match="in a file"):
        kvsurgeon.inject(model, tmp_path / "out", certificate=tmp_path / "c.json")

    def edit(model: ir.Model) -> None: ...

    with pytest.raises(UsageError, match="cannot state pass edit"):
        run_and_save(made / "original", Pipeline((edit,)), tmp_path / "out", certificate=tmp_path / "c.json")
    with pytest.raises(UsageError, match="target"):
        kvsurgeon.inject(made / "original", tmp_path / "out", target="genai", certificate=tmp_path / "c.json")


# Confirmation


def test_a_certificate_is_confirmed_wherever_its_files_are(copied, tmp_path):
    found = confirm(copied)
    assert found.repeated.seed == 5
    assert found.fresh.ok
    assert found.fresh.effort == "normal"
    assert len(found.files) == 5
    (copied / "original").rename(tmp_path / "elsewhere")
    with pytest.raises(UnsupportedError, match="without the original") as raised:
        confirm(copied)
    assert raised.value.code is Code.NOT_CONFIRMABLE
    assert kvsurgeon.confirm(copied / "c.json", copied / "result", tmp_path / "elsewhere").repeated.ok


@pytest.mark.parametrize("pack", [False, True])
def test_a_pipeline_in_the_folder_of_the_model_is_confirmed(copied, pack):
    passes = Pipeline.parse("int32-inputs,inject{cache=static,max-length=64}")
    out = copied / "original" / "cached.onnx"
    run_and_save(copied / "original", passes, out, effort="quick", pack=pack, certificate=copied / "d.json")
    found = kvsurgeon.confirm(copied / "d.json", out)
    assert [one.name for one in found.obligations] == ["causal", "prefix-stable", "padding", "batch"]


def test_new_weights_and_a_new_config_are_confirmed(copied):
    (copied / "original" / "config.json").write_text('{"num_attention_heads": 4, "num_key_value_heads": 2}')
    twice = Pipeline.parse("replicate-kv-heads{repeat=2},inject")
    run_and_save(copied / "original", twice, copied / "twice", effort="quick", certificate=copied / "d.json")
    assert kvsurgeon.confirm(copied / "d.json", copied / "twice").repeated.ok


def test_a_model_that_replaced_its_original_needs_the_original(copied, tmp_path):
    shutil.copytree(copied / "original", tmp_path / "kept")
    kvsurgeon.inject(copied / "original", copied / "original", effort="quick", certificate=copied / "d.json")
    with pytest.raises(CertificateError, match="the original"):
        kvsurgeon.confirm(copied / "d.json", copied / "original")
    assert kvsurgeon.confirm(copied / "d.json", copied / "original", tmp_path / "kept").repeated.ok


def test_other_versions_are_named_and_all_else_is_repeated(copied, monkeypatch):
    edited(copied, lambda statement: statement["predicate"]["tool"]["versions"].update(numpy="1.0"))
    with pytest.raises(UnsupportedError, match=r"expected numpy 1.0, found .*; all other statements hold"):
        confirm(copied)


def test_a_text_that_cannot_be_compared_is_stated_as_such(copied, monkeypatch):
    def verify_all_but_one(*models, **options):
        first, *others = (found := verify_models(*models, **options)).comparisons
        skipped = replace(first, verdict="unknown", error=None, agreement=None)
        return replace(found, comparisons=(skipped, *others))

    verify_models = verification.verify_models
    monkeypatch.setattr(verification, "verify_models", verify_all_but_one)
    kvsurgeon.inject(copied / "original", copied / "result", effort="quick", certificate=copied / "c.json")
    statement = json.loads((copied / "c.json").read_text())
    assert not list(violations(statement, SCHEMA))
    assert confirm(copied).repeated.ok
    edited(copied, lambda statement: statement["predicate"]["measurements"]["texts"][0].update(error=0.0))
    with pytest.raises(CertificateError, match="whole prefill"):
        confirm(copied)


def test_a_result_whose_cache_cannot_be_read_again_is_confirmed_with_its_note(copied, monkeypatch):
    def cannot_read(subject):
        raise UnsupportedError("the cache is unknown")

    monkeypatch.setattr(Subject, "cache", cannot_read)
    kvsurgeon.inject(copied / "original", copied / "result", effort="quick", certificate=copied / "c.json")
    assert "the cache is unknown" in (copied / "c.json").read_text()
    assert confirm(copied).repeated.ok


# Not confirmed: files


def flip(path, place=-100):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["model.onnx", DATA, "config.json"])
@pytest.mark.parametrize("folder", ["result", "original"])
def test_a_changed_byte_is_found(copied, folder, file):
    flip(copied / folder / file, 5)
    with pytest.raises(CertificateError) as raised:
        confirm(copied)
    assert raised.value.code is Code.NOT_CONFIRMED


def test_a_changed_bit_of_a_weight_is_found_even_with_new_digests(copied):
    flip(copied / "result" / DATA, 8)  # the last bit of a mantissa, which no measurement shows
    redigested(copied)
    with pytest.raises(CertificateError, match="give another model"):
        confirm(copied)


def swap(model):
    """Exchange two weights of equal shape."""
    weights = {}
    for tensor in model.graph.initializer:
        key = tuple(tensor.dims), tensor.data_type
        if len(tensor.dims) == 2 and key in weights:
            first, second = numpy_helper.to_array(weights[key]), numpy_helper.to_array(tensor)
            weights[key].CopyFrom(numpy_helper.from_array(second, weights[key].name))
            tensor.CopyFrom(numpy_helper.from_array(first, tensor.name))
            return
        weights.setdefault(key, tensor)
    raise AssertionError("no two weights have a shape")


def shift(model):
    """Make a number that some node reads another one."""
    tensor = next(one for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT)
    tensor.CopyFrom(numpy_helper.from_array(np.array(numpy_helper.to_array(tensor) * 1.5), tensor.name))


def rename(model):
    model.graph.node[3].name = "other"


@pytest.mark.parametrize("change", [swap, shift, rename])
def test_another_model_is_found_even_with_new_digests(copied, change):
    model = onnx.load(copied / "result" / "model.onnx")
    change(model)
    (copied / "result" / DATA).unlink()
    onnx.save(model, copied / "result" / "model.onnx", save_as_external_data=True, location=DATA, size_threshold=512)
    redigested(copied)
    with pytest.raises(CertificateError, match="give another model"):
        confirm(copied)


def test_another_original_is_found_even_with_new_digests(copied):
    flip(copied / "original" / DATA, 8)
    redigested(copied)
    with pytest.raises(CertificateError, match="give another model"):
        confirm(copied)


def test_a_certificate_of_another_model_is_not_confirmed(copied):
    onnx.save(Decoder(Config(layers=1)).model(), copied / "original" / "model.onnx")
    kvsurgeon.inject(copied / "original", copied / "other", effort="quick")
    with pytest.raises(CertificateError, match="digest"):
        kvsurgeon.confirm(copied / "c.json", copied / "other")


def test_a_model_whose_error_the_stated_seed_does_not_show_is_not_confirmed(copied, monkeypatch):
    def verify_lucky_seeds(*models, seed=None, **options):
        found = verify_models(*models, seed=seed, **options)
        return found if seed is not None else replace(found, faults=("a fault that few texts show",))

    verify_models = verification.verify_models
    monkeypatch.setattr(verification, "verify_models", verify_lucky_seeds)
    with pytest.raises(CertificateError, match="a fault that few texts show"):
        confirm(copied)


# Not confirmed: other text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '{"predicate": {}, "predicate": {}}', "\xff", "[" * 200 + "]" * 200]
)
def test_other_text_is_no_certificate(copied, text):
    (copied / "c.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(KvsurgeonError) as raised:
        confirm(copied)
    assert raised.value.exit_code == 4


def test_a_truncated_certificate_and_one_with_a_key_twice_are_none(copied):
    text = (copied / "c.json").read_text()
    for other in (text[: len(text) // 2], text.replace('"seed": 5', '"seed": 6,\n"seed": 5')):
        (copied / "c.json").write_text(other)
        with pytest.raises(InvalidCertificateError):
            confirm(copied)
