"""Targets for encoder-decoder models write a decoder and an encoder, or reject the model."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from laws import in_onnxruntime
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.workflow.build_target import build_target, check_target

CONFIG = {"model_type": "other", "d_model": 64, "encoder_attention_heads": 4, "decoder_start_token_id": 1}
DECODER = """decoder (int64[b, n] input_ids, float[b, e, 8] encoder_hidden_states) => (float[b, n, 16] logits)
<float[16, 8] table, float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, float[8, 16] head, float low = {-10000.0},
 int64 one = {1}, int64[4] heads = {0, 0, 2, 4}, int64[3] merged = {0, 0, 8}>
{
  x = Gather(table, input_ids)
  q0 = MatMul(x, wq)
  q1 = Reshape(q0, heads)
  q = Transpose<perm = [0, 2, 1, 3]>(q1)
  k0 = MatMul(x, wk)
  k1 = Reshape(k0, heads)
  kt = Transpose<perm = [0, 2, 3, 1]>(k1)
  v0 = MatMul(x, wv)
  v1 = Reshape(v0, heads)
  v = Transpose<perm = [0, 2, 1, 3]>(v1)
  s = MatMul(q, kt)
  sizes = Shape<start = 2>(s)
  zeros = ConstantOfShape(sizes)
  hidden = Add(zeros, low)
  future = Trilu<upper = 1>(hidden, one)
  masked = Add(s, future)
  w = Softmax<axis = -1>(masked)
  c0 = MatMul(w, v)
  c1 = Transpose<perm = [0, 2, 1, 3]>(c0)
  c = Reshape(c1, merged)
  cq0 = MatMul(c, wq)
  cq1 = Reshape(cq0, heads)
  cq = Transpose<perm = [0, 2, 1, 3]>(cq1)
  ck0 = MatMul(encoder_hidden_states, wk)
  ck1 = Reshape(ck0, heads)
  ck = Transpose<perm = [0, 2, 3, 1]>(ck1)
  cv0 = MatMul(encoder_hidden_states, wv)
  cv1 = Reshape(cv0, heads)
  cv = Transpose<perm = [0, 2, 1, 3]>(cv1)
  cs = MatMul(cq, ck)
  cw = Softmax<axis = -1>(cs)
  a0 = MatMul(cw, cv)
  a1 = Transpose<perm = [0, 2, 1, 3]>(a0)
  a = Reshape(a1, merged)
  logits = MatMul(a, head)
}"""
ENCODER = """encoder ({input}) => (float[batch_size, e, 8] last_hidden_state)
<float[{rows}, 8] weights> {{ {nodes} }}"""
TEXT = ENCODER.format(
    input="int64[batch_size, e] input_ids", rows=16, nodes="last_hidden_state = Gather(weights, input_ids)"
)
AUDIO = ENCODER.format(
    input="float[batch_size, 3, e] input_features", rows=3,
    nodes="t = Transpose<perm = [0, 2, 1]>(input_features) last_hidden_state = MatMul(t, weights)",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder with a decoder, an encoder of texts, and a config."""
    source = tmp_path / "source"
    source.mkdir()
    onnx.save(read(DECODER), source / "decoder_model.onnx")
    onnx.save(read(TEXT), source / "encoder_model.onnx")
    (source / "config.json").write_text(json.dumps(CONFIG))
    return source


def build(folder, target):
    done = build_target(folder / "decoder_model.onnx", target, folder.parent / "out", verify=False)
    return done, folder.parent / "out"


def blocking(folder, target):
    return [str(one) for one in check_target(folder / "decoder_model.onnx", target) if one.blocking]


def test_optimum_gets_a_merged_decoder_the_encoder_and_sizes_of_empty_caches(folder):
    done, out = build(folder, "optimum-seq2seq")
    assert {"decoder_model_merged.onnx", "encoder_model.onnx", "config.json"} == {one.name for one in out.iterdir()}
    config = json.loads((out / "config.json").read_text())
    assert (config["encoder_attention_heads"], config["d_model"]) == (2, 8)
    assert (config["original_encoder_attention_heads"], config["original_d_model"]) == (4, 64)
    assert any("d_model 64 by 8" in note for note in done.notes)
    assert "use_cache_branch" in {value.name for value in done.model.graph.inputs}


def test_transformers_js_gets_data_files_of_their_own_names(folder):
    for name in ("decoder_model", "encoder_model"):
        model = onnx.load(folder / f"{name}.onnx")
        onnx.save(model, folder / f"{name}.onnx", save_as_external_data=True, location=f"{name}.bin", size_threshold=0)
    done, out = build(folder, "transformers-js-seq2seq")
    names = {one.name for one in (out / "onnx").iterdir()}
    assert names == {f"{name}{end}" for name in ("decoder_model_merged.onnx", "encoder_model.onnx")
                     for end in ("", "_data")}  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {
        "decoder_model_merged": 1,
        "encoder_model": 1,
    }
    assert (config["model_type"], config["original_model_type"]) == ("bart", "other")
    onnx.checker.check_model(str(out / "onnx" / "encoder_model.onnx"))
    assert done.path == out / "onnx" / "decoder_model_merged.onnx"


def test_transformers_js_needs_a_model_type_for_audio(folder):
    onnx.save(read(AUDIO), folder / "encoder_model.onnx")
    assert "expected a model type of lite-whisper" in blocking(folder, "transformers-js-seq2seq")[0]


def test_the_encoder_of_genai_computes_keys_and_values_of_cross_attention(folder):
    onnx.save(read(AUDIO), folder / "encoder_model.onnx")
    _, out = build(folder, "genai-whisper")
    encoder = onnx.load(out / "encoder.onnx")
    names = [f"present.0.encoder.{kind}" for kind in ("key", "value")]
    assert [value.name for value in encoder.graph.output] == ["last_hidden_state", *names]
    sound = np.random.default_rng(1).standard_normal((2, 3, 7)).astype(np.float32)
    found = in_onnxruntime(encoder)({"input_features": sound})
    weights = {one.name: onnx.numpy_helper.to_array(one) for one in read(DECODER).graph.initializer}
    for name, weight in zip(names, ("wk", "wv"), strict=True):
        expected = (found["last_hidden_state"] @ weights[weight]).reshape(2, 7, 2, 4).transpose(0, 2, 1, 3)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)
    config = json.loads((out / "genai_config.json").read_text())["model"]
    assert config["decoder"]["inputs"]["cross_past_key_names"] == "past_key_values.%d.encoder.key"
    assert (config["decoder"]["head_size"], config["decoder"]["num_attention_heads"]) == (4, 2)


@pytest.mark.parametrize("target", ["optimum-seq2seq", "transformers-js-seq2seq", "genai-whisper"])
def test_a_decoder_needs_an_encoder_next_to_it(folder, target):
    (folder / "encoder_model.onnx").unlink()
    assert "the encoder is not next to the decoder" in blocking(folder, target)[0]
    with pytest.raises(UnsupportedError, match="the encoder is not next"):
        build(folder, target)
    assert not (folder.parent / "out").exists()


def test_an_encoder_must_have_the_names_and_the_opset_of_the_client(folder):
    onnx.save(read(TEXT.replace("last_hidden_state", "hidden")), folder / "encoder_model.onnx")
    assert "encoder: expected an output `last_hidden_state`" in blocking(folder, "optimum-seq2seq")[0]
    assert "encoder: expected no inputs but `input_features`" in " ".join(blocking(folder, "genai-whisper"))
    onnx.save(read(AUDIO, opset=17), folder / "encoder_model.onnx")
    assert "different versions of operators" in blocking(folder, "genai-whisper")[0]


def test_other_heads_of_cross_attention_are_refused_where_one_shape_is_assumed(folder):
    text = DECODER.replace("heads = {0, 0, 2, 4}", "heads = {0, 0, 2, 4}, int64[4] four = {0, 0, 4, 2}")
    for name in ("cq1", "ck1", "cv1"):
        text = text.replace(f"{name} = Reshape({name[:2]}0, heads)", f"{name} = Reshape({name[:2]}0, four)")
    onnx.save(read(text), folder / "decoder_model.onnx")
    assert "cross-attention of [2] heads" in blocking(folder, "optimum-seq2seq")[0]
    assert blocking(folder, "transformers-js-seq2seq") == []
