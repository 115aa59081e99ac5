"""Targets for decoders of embeddings write the embedding of token ids too, or reject the model."""

from __future__ import annotations

import json

import onnx
import pytest
from decoders import Config, Decoder
from onnx import helper

from kvsurgeon.targets.target import EMBEDDING, VISION
from kvsurgeon.workflow.build_target import build_target, check_target

CONFIG = {"model_type": "gemma3", "image_token_id": 7, "text_config": {"model_type": "other"}, "eos_token_id": 2}
TARGETS_OF_EMBEDDINGS = ("genai-pipeline", "transformers-js-image-text")


@pytest.fixture
def folder(tmp_path):
    """A folder with a decoder of embeddings, the embedding, a vision encoder, and a config."""
    source = tmp_path / "source"
    source.mkdir()
    decoder = Decoder(Config(layers=1, windowed=(), position_ids=True)).model()
    nodes, inputs = decoder.graph.node, decoder.graph.input
    lookup = next(node for node in nodes if node.op_type == "Gather" and node.input[1] == "input_ids")
    table = next(one for one in decoder.graph.initializer if one.name == lookup.input[0])
    ids = next(one for one in inputs if one.name == "input_ids")
    batch, length = (one.dim_param for one in ids.type.tensor_type.shape.dim)
    embeddings = helper.make_tensor_value_info("inputs_embeds", table.data_type, [batch, length, table.dims[1]])
    gather = helper.make_node("Gather", [table.name, "input_ids"], ["inputs_embeds"])
    embedding = helper.make_graph([gather], "embedding", [ids], [embeddings], [table])
    save(embedding, source / EMBEDDING)
    nodes.remove(lookup)
    for node in nodes:  # sizes of the batch and of the text are read from the embeddings
        node.input[:] = ["inputs_embeds" if name in (lookup.output[0], "input_ids") else name for name in node.input]
    inputs.remove(ids)
    inputs.insert(0, embeddings)
    onnx.save(decoder, source / "decoder_model.onnx")
    pixels, features = (helper.make_tensor_value_info(one, 1, ["p", 8]) for one in ("pixel_values", "image_features"))
    node = helper.make_node("Relu", ["pixel_values"], ["image_features"])
    save(helper.make_graph([node], "vision", [pixels], [features]), source / VISION)
    (source / "config.json").write_text(json.dumps(CONFIG))
    return source


def save(graph, path):
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)


def blocking(folder, target):
    return [str(one) for one in check_target(folder / "decoder_model.onnx", target) if one.blocking]


def test_genai_gets_a_pipeline_of_an_embedding_and_a_decoder(folder, tmp_path):
    out = tmp_path / "out"
    build_target(folder / "decoder_model.onnx", "genai-pipeline", out, verify=False)
    model = json.loads((out / "genai_config.json").read_text())["model"]
    assert model["type"] == "decoder-pipeline"
    sessions = [session for stage in model["decoder"]["pipeline"] for session in stage.values()]
    given = {"input_ids", *(one for names in model["decoder"]["inputs"].values() for one in [names] if "%" not in one)}
    for session in sessions:  # each input is given by the client or by the session before
        graph = onnx.load(out / session["filename"]).graph
        assert {value.name for value in graph.input} == set(session["inputs"])
        assert {name for name in session["inputs"] if not name.startswith("past_")} <= given
        given |= set(session["outputs"])


def test_transformers_js_gets_an_embedding_a_vision_encoder_and_a_decoder(folder, tmp_path):
    out = tmp_path / "out"
    build_target(folder / "decoder_model.onnx", "transformers-js-image-text", out, verify=False)
    files = {"decoder_model_merged.onnx", "embed_tokens.onnx", "vision_encoder.onnx"}
    assert {one.name for one in (out / "onnx").iterdir()} == files
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["text_config"]["num_hidden_layers"]) == ("gemma3", 1)


@pytest.mark.parametrize("target", TARGETS_OF_EMBEDDINGS)
def test_a_missing_or_different_embedding_is_refused(folder, target):
    embedding = onnx.load(folder / EMBEDDING)
    embedding.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(embedding, folder / EMBEDDING)
    assert any("as the decoder takes, found float16" in reason for reason in blocking(folder, target))
    (folder / EMBEDDING).unlink()
    assert "the embedding of token ids is not next to the decoder" in blocking(folder, target)[0]


@pytest.mark.parametrize("target", ["genai", "optimum"])
def test_a_target_for_token_ids_says_so(folder, target):
    assert "for a decoder of embeddings use a target that takes `inputs_embeds`" in blocking(folder, target)[0]


def test_positions_of_three_axes_need_a_model_type_that_feeds_them(folder):
    decoder = onnx.load(folder / "decoder_model.onnx")
    positions = next(one for one in decoder.graph.input if one.name == "position_ids")
    dims = positions.type.tensor_type.shape.dim
    dims.insert(0, onnx.TensorShapeProto.Dimension(dim_value=3))
    first = helper.make_node("Gather", ["position_ids", "first_axis"], ["positions_of_text"])
    for node in decoder.graph.node:
        node.input[:] = ["positions_of_text" if name == "position_ids" else name for name in node.input]
    decoder.graph.node.insert(0, first)
    decoder.graph.initializer.append(helper.make_tensor("first_axis", onnx.TensorProto.INT64, [], [0]))
    onnx.save(decoder, folder / "decoder_model.onnx")
    for target in TARGETS_OF_EMBEDDINGS:
        assert any("expected [batch, sequence]" in one for one in blocking(folder, target))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "qwen2_vl"}))
    assert blocking(folder, "transformers-js-image-text") == []
