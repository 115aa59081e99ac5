"""What compilers of vendors are given: the interface, the operators and the side files that they ask for."""

import json

import onnx
import pytest
from decoders import Config, Decoder
from exports import ONE_OF_EACH, export

from kvsurgeon import io
from kvsurgeon.delivery import deliver
from kvsurgeon.errors import Refused
from kvsurgeon.passes.contract import Subject
from kvsurgeon.passes.fix_shapes import FixShapes
from kvsurgeon.targets.tensorrt import OPERATORS


def dims(value):
    return [size.dim_value or size.dim_param for size in value.type.tensor_type.shape.dim]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each target."""
    home = tmp_path_factory.mktemp("vendors")
    model = export("llama_torchscript_sdpa")
    for target, options in (("tensorrt", {"max_length": 24}), ("qaic", {}), ("qnn", {})):
        deliver(model, target, home / target, options=options)
    return home


def test_tensorrt_writes_buffers_of_fixed_sizes_in_place(folders):
    graph = onnx.load(folders / "tensorrt" / "model.onnx").graph
    inputs = {value.name: dims(value) for value in graph.input}
    assert inputs["past_key_values.0.key"] == [1, 2, 24, 8]
    assert inputs["attention_mask"] == [1, 24]
    scatters = [node for node in graph.node if node.op_type == "TensorScatter"]
    assert {node.output[0] for node in scatters} == {value.name for value in graph.output} - {"logits"}
    assert {node.input[0] for node in scatters} <= set(inputs)
    assert {node.op_type for node in graph.node} <= OPERATORS


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_tensorrt_has_every_operator_of(name):
    assert all(not remark.stops for remark in deliver(export(name), "tensorrt", options={"max_length": 24}).remarks)


def test_tensorrt_is_told_how_much_room_there_is():
    with pytest.raises(Refused, match=r"expected max-length of at most \d+, found 2048"):
        deliver(Decoder(Config(layers=1)).model(), "tensorrt")


def test_qaic_is_given_positions_and_keeps_its_state(folders):
    graph = onnx.load(folders / "qaic" / "model.onnx").graph
    assert {value.name: dims(value) for value in graph.input} == {
        "input_ids": [1, "seq_len"],
        "position_ids": [1, "seq_len"],
        **{f"past_{kind}.{layer}": [1, 2, "ctx_len", 8] for layer in (0, 1) for kind in ("key", "value")},
    }
    retained = [f"past_{kind}.{layer}_RetainedState" for layer in (0, 1) for kind in ("key", "value")]
    assert [value.name for value in graph.output] == ["logits", *retained]
    assert dims(graph.output[0])[:2] == [1, 1]


def test_qaic_is_compiled_for_prefill_and_for_a_step(folders):
    sizes = json.loads((folders / "qaic" / "specializations.json").read_text("utf-8"))["specializations"]
    assert [size["seq_len"] for size in sizes] == ["32", "1"]
    assert all(size["batch_size"] == "1" and int(size["ctx_len"]) >= 32 for size in sizes)
    listed = (folders / "qaic" / "custom_io.yaml").read_text("utf-8").splitlines()
    assert listed[:2] == [" - IOName: past_key.0", "   Precision: float16"]
    assert sum("IOName" in line for line in listed) == 8


def test_qnn_is_given_context_and_gives_new_rows(folders):
    graph = onnx.load(folders / "qnn" / "model.onnx").graph
    inputs = {value.name: dims(value) for value in graph.input}
    assert inputs["input_ids"] == [1, "sequence_length"]
    assert inputs["past_key_0_in"] == [2, 1, 8, "cache_length"]
    assert inputs["past_value_0_in"] == [2, 1, "cache_length", 8]
    assert {value.name: dims(value) for value in graph.output}["past_key_0_out"] == [2, 1, 8, "sequence_length"]
    told = json.loads((folders / "qnn" / "context.json").read_text("utf-8"))["inputs"]
    assert {name: how["kind"] for name, how in told.items()} == {
        "attention_mask": "mask", "position_ids_cos": "rows", "position_ids_sin": "rows"
    }  # fmt: skip
    assert set(told) < set(inputs)


@pytest.mark.parametrize("tokens", [16, 1])
def test_qnn_is_fixed_for_prefill_and_for_a_step(folders, tokens):
    subject = Subject.of(folders / "qnn")
    FixShapes(tokens=tokens, max_length=64).apply(subject)
    graph = io.to_proto(subject.model).graph
    inputs = {value.name: dims(value) for value in graph.input}
    assert inputs["attention_mask"] == [1, 1, tokens, 64]
    assert inputs["past_key_0_in"] == [2, 1, 8, 64 - tokens]
    assert {value.name: dims(value) for value in graph.output}["past_value_0_out"] == [2, 1, tokens, 8]
    assert not {node.op_type for node in graph.node} & {"Shape", "Range", "IsNaN", "Expand", "ConstantOfShape"}
