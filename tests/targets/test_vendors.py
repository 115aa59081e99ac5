"""Interface, operators and side files of the targets of vendors."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from decoders import Config, Decoder
from exports import ONE_OF_EACH, export

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.targets.tensorrt import OPERATORS
from kvsurgeon.workflow.build_target import build_target, check_target


def dims(value):
    return [size.dim_value or size.dim_param for size in value.type.tensor_type.shape.dim]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each target."""
    home = tmp_path_factory.mktemp("vendors")
    model = export("llama_torchscript_sdpa")
    for target, options in (("tensorrt", {"max_length": 24}), ("qaic", {}), ("qnn", {})):
        build_target(model, target, home / target, options=options)
    return home


def test_tensorrt_updates_fixed_buffers_in_place(folders):
    graph = onnx.load(folders / "tensorrt" / "model.onnx").graph
    inputs = {value.name: dims(value) for value in graph.input}
    assert inputs["past_key_values.0.key"] == [1, 2, 24, 8]
    assert inputs["attention_mask"] == [1, 24]
    scatters = [node for node in graph.node if node.op_type == "TensorScatter"]
    assert {node.output[0] for node in scatters} == {value.name for value in graph.output} - {"logits"}
    assert {node.input[0] for node in scatters} <= set(inputs)
    assert {node.op_type for node in graph.node} <= OPERATORS


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_tensorrt_supports_every_operator_of(name):
    assert all(not one.blocking for one in build_target(export(name), "tensorrt", options={"max_length": 24}).warnings)


@pytest.mark.parametrize("target", ["tensorrt", "qaic", "qnn"])
def test_the_text_length_is_limited_by_the_model(target):
    model = Decoder(Config(layers=1, windowed=(), max_length=100)).model()
    result = build_target(model, target)
    assert result.target.max_length == 100
    with pytest.raises(UnsupportedError, match="expected max-length of at most 100, found 101"):
        build_target(model, target, options={"max_length": 101})


def test_tensorrt_buffers_have_the_text_length():
    model = Decoder(Config(layers=1, windowed=(), max_length=100)).model()
    for options, rows in (({}, 100), ({"max_length": 40}, 40)):
        made = io.to_proto(build_target(model, "tensorrt", options=options).model)
        assert dims(next(value for value in made.graph.input if value.name.startswith("past_key"))) == [1, 2, rows, 8]


def test_qaic_has_positions_and_retained_state(folders):
    graph = onnx.load(folders / "qaic" / "model.onnx").graph
    assert {value.name: dims(value) for value in graph.input} == {
        "input_ids": [1, "seq_len"],
        "position_ids": [1, "seq_len"],
        **{f"past_{kind}.{layer}": [1, 2, "ctx_len", 8] for layer in (0, 1) for kind in ("key", "value")},
    }
    retained = [f"past_{kind}.{layer}_RetainedState" for layer in (0, 1) for kind in ("key", "value")]
    assert [value.name for value in graph.output] == ["logits", *retained]
    assert dims(graph.output[0])[:2] == [1, 1]


def test_qaic_is_compiled_for_prefill_and_decode_step(folders):
    sizes = json.loads((folders / "qaic" / "specializations.json").read_text("utf-8"))["specializations"]
    assert [size["seq_len"] for size in sizes] == ["32", "1"]
    assert all(size["batch_size"] == "1" and size["ctx_len"] == "128" for size in sizes)
    listed = (folders / "qaic" / "custom_io.yaml").read_text("utf-8").splitlines()
    assert listed[:2] == [" - IOName: past_key.0", "   Precision: float16"]
    assert sum("IOName" in line for line in listed) == 8


@pytest.mark.parametrize(("file", "tokens"), [("prefill.onnx", 128), ("decode.onnx", 1)])
def test_qnn_takes_context_and_returns_new_rows(folders, file, tokens):
    graph = onnx.load(folders / "qnn" / file).graph
    inputs = {value.name: dims(value) for value in graph.input}
    assert inputs["input_ids"] == [1, tokens]
    assert inputs["attention_mask"] == [1, 1, tokens, 1024]
    assert inputs["past_key_0_in"] == [2, 1, 8, 1024 - tokens]
    assert inputs["past_value_0_in"] == [2, 1, 1024 - tokens, 8]
    outputs = {value.name: dims(value) for value in graph.output}
    assert (outputs["past_key_0_out"], outputs["past_value_0_out"]) == ([2, 1, 8, tokens], [2, 1, tokens, 8])
    assert all(
        isinstance(size, int) for value in (*graph.input, *graph.output, *graph.value_info) for size in dims(value)
    )
    assert not {node.op_type for node in graph.node} & {"Shape", "Range", "IsNaN", "Expand", "ConstantOfShape"}
    described = json.loads((folders / "qnn" / "context.json").read_text("utf-8"))["inputs"]
    assert {name: how["kind"] for name, how in described.items()} == {
        "attention_mask": "mask", "position_ids_cos": "rows", "position_ids_sin": "rows"
    }  # fmt: skip
    assert set(described) < set(inputs)


@pytest.mark.parametrize("target", ["qaic", "qnn"])
def test_custom_operators_are_a_warning(target):
    model = onnx.ModelProto.FromString(Decoder(Config(layers=1, windowed=())).model().SerializeToString())
    gelu = onnx.helper.make_node("Gelu", ["logits.before"], ["logits"], domain="com.microsoft")
    makes = next(node for node in model.graph.node if "logits" in node.output)
    makes.output[0] = "logits.before"
    model.graph.node.append(gelu)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    (found,) = (one for one in check_target(model, target) if "not ONNX operators" in one.reason)
    assert (found.blocking, "com.microsoft.Gelu" in found.reason) == (False, True)
    assert not any(
        "not ONNX operators" in one.reason for one in check_target(Decoder(Config(layers=1)).model(), target)
    )


def weights_of(file):
    """Return the location, offset and length of each weight."""
    graph = onnx.load(file, load_external_data=False).graph
    return {
        one.name: tuple(sorted((entry.key, entry.value) for entry in one.external_data))
        for one in graph.initializer
        if one.external_data
    }


@pytest.mark.parametrize("outside", [True, False])
def test_both_files_of_qnn_share_one_data_file(tmp_path, outside):
    model = Decoder(Config(layers=2)).model()
    before = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=outside, location="data.bin", size_threshold=1024)
    done = build_target(tmp_path, "qnn", tmp_path / "made" / "qnn", options={"max_length": 48})
    assert done.path == tmp_path / "made" / "qnn"
    alone = shutil.copytree(done.path, tmp_path / "alone")
    assert sorted(path.name for path in alone.iterdir()) == [
        "context.json",
        "decode.onnx",
        "prefill.onnx",
        "weights.data",
    ]
    one, other = (weights_of(alone / name) for name in ("prefill.onnx", "decode.onnx"))
    assert one == other
    assert len(one) > 10
    for name in ("prefill.onnx", "decode.onnx"):
        assert onnxruntime.InferenceSession(alone / name).get_inputs()[0].shape == [1, 24 if name[0] == "p" else 1]
        kept = {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(alone / name).graph.initializer}
        assert all(np.array_equal(kept[weight], before[weight]) for weight in one)
