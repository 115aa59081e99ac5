"""Passes that adapt the interface of a model to a runtime: the result computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder
from exports import ONE_OF_EACH, export
from laws import ALLOWED, assert_law, difference, dims_of, in_onnxruntime, texts

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.interface.last_logits import LastLogits
from kvsurgeon.passes.interface.past_length_from_positions import PastLengthFromPositions
from kvsurgeon.passes.interface.remove_mask import RemoveMask
from kvsurgeon.passes.interface.rename_dims import RenameDims
from kvsurgeon.workflow.pipeline import Pipeline

MAX = 16
ALONE = RenameDims(dims=("batch_size=1",))
MODELS = {name: export(name) for name in ONE_OF_EACH} | {
    "own": Decoder(Config(layers=2)).model(),
    "own, positions given": Decoder(Config(layers=2, position_ids=True)).model(),
    "own, no mask": Decoder(Config(layers=2, attention_mask=False)).model(),
}


def made(model: onnx.ModelProto, *passes) -> onnx.ModelProto:
    result = io.to_proto(Pipeline(passes).run(model).model)
    onnx.checker.check_model(result)
    return result


def stepwise(model: onnx.ModelProto, ids: np.ndarray, sizes: tuple[int, ...], pads: int) -> list[np.ndarray]:
    """Give a model with buffers a text in chunks, each followed by padding with position -1."""
    run = in_onnxruntime(model)
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    shapes = {value.name: [MAX if d == "max_length" else d for d in dims_of(value)] for value in model.graph.input}
    types = {name: onnx.helper.tensor_dtype_to_np_dtype(kind) for name, kind in kinds.items()}
    past = {name: np.full(shape, 7, types[name]) for name, shape in shapes.items() if len(shape) == 4}
    answers, start = [], 0
    for size in sizes:
        end = start + size
        feeds = {
            "input_ids": np.array([[*ids[start:end], *[0] * pads]]),
            "position_ids": np.array([[*range(start, end), *[-1] * pads]]),
        }
        found = run({**feeds, **past})
        answers.append(found["logits"][0])
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        start = end
    return answers


@pytest.mark.parametrize(
    ("name", "capacity"), [*((name, None) for name in MODELS), ("own", MAX), ("bloom_torchscript_eager", MAX)]
)
def test_positions_replace_the_mask_and_the_length_input(name, capacity):
    model, inject = MODELS[name], Inject(cache="static", max_length=capacity)
    result = made(model, inject, RemoveMask(), ALONE, PastLengthFromPositions(), LastLogits())
    assert [value.name for value in result.graph.input][:2] == ["input_ids", "position_ids"]
    assert all(len(dims_of(value)) == 4 for value in result.graph.input[2:])
    feeds = texts(model, batch=1)
    expected = in_onnxruntime(model)(feeds)["logits"][0]
    for answer, last in zip(stepwise(result, feeds["input_ids"][0], (4, 1, 3, 1), 2), (3, 4, 7, 8), strict=True):
        assert answer.shape[0] == 1
        assert difference(answer[0], expected[last]) <= ALLOWED[str(expected.dtype)]


def test_the_lm_head_multiplies_one_token():
    result = made(MODELS["own"], Inject(cache="static"), RemoveMask(), ALONE, PastLengthFromPositions(), LastLogits())
    logits = next(value for value in result.graph.output if value.name == "logits")
    assert dims_of(logits) == [1, 1, 61]
    makers = {name: node for node in result.graph.node for name in node.output}
    head = makers[makers["logits"].input[0]]
    assert (makers["logits"].op_type, head.op_type, makers[head.input[0]].op_type) == ("Identity", "MatMul", "Gather")


def test_logits_that_are_read_elsewhere_are_selected_directly():
    model = onnx.ModelProto.FromString(MODELS["own"].SerializeToString())
    model.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["chances"], axis=-1))
    model.graph.output.append(onnx.helper.make_tensor_value_info("chances", 1, ["batch_size", "sequence_length", 61]))
    result = made(model, Inject(cache="static"), ALONE, PastLengthFromPositions(), LastLogits())
    (picked,) = (node for node in result.graph.node if "logits" in node.output)
    assert picked.op_type == "Gather"


def test_last_logits_of_a_batch_are_rejected():
    with pytest.raises(UnsupportedError, match="different last tokens"):
        made(MODELS["own"], Inject(cache="static"), PastLengthFromPositions(), LastLogits())


@pytest.mark.parametrize("batch", ["batch_size", 3])
def test_a_mask_has_the_batch_of_a_cache_in_another_layout(batch):
    layout = ("kv_heads", "sequence", "head_dim", "batch")
    model, dims = MODELS["gpt2_torchscript_sdpa"], RenameDims(dims=(f"batch_size={batch}",))
    result = made(model, Inject(cache="static", key_layout=layout), *([dims] if batch == 3 else []), RemoveMask())
    feeds = texts(model, batch=3, padded=False)
    expected = in_onnxruntime(model)(feeds)["logits"]
    given = {}
    for value in result.graph.input:
        sizes = [{"max_length": MAX, "batch_size": 3}.get(size, size) for size in dims_of(value)]
        if len(sizes) == 4:
            given[value.name] = np.full(sizes, 7, np.float32)
    found = in_onnxruntime(result)({"input_ids": feeds["input_ids"], "past_sequence_length": np.array([0]), **given})
    assert difference(found["logits"], expected) <= ALLOWED["float32"]


def test_a_token_input_as_long_as_the_buffer_is_no_mask():
    model = Decoder(Config(layers=1, static=(2, 9))).model()
    result = made(model, Inject(cache="static"), RemoveMask())
    assert [value.name for value in result.graph.input if len(dims_of(value)) < 4] == [
        "input_ids",
        "past_sequence_length",
    ]


def test_a_mask_of_past_and_new_tokens_is_rejected():
    subject = Subject.of(MODELS["own"])
    Inject().apply(subject)
    with pytest.raises(UnsupportedError, match="no cache input is as long as the mask"):
        RemoveMask().apply(subject)


def test_a_mask_is_removed_before_there_is_a_cache():
    model = MODELS["own"]
    unmasked = made(model, RemoveMask())
    feeds = texts(unmasked)
    ones = {"attention_mask": np.ones_like(feeds["input_ids"])}
    found, expected = (in_onnxruntime(one)(given) for one, given in ((unmasked, feeds), (model, feeds | ones)))
    assert difference(found["logits"], expected["logits"]) <= ALLOWED["float32"]
    assert_law(unmasked, made(unmasked, Inject()), whole=feeds)


@pytest.mark.parametrize("one", [RemoveMask(), PastLengthFromPositions(), RenameDims(dims=("nowhere=1",))])
def test_a_model_without_the_input_is_unchanged(one):
    assert isinstance(one.apply(Subject.of(MODELS["own, no mask"])), Unchanged)


def test_dimensions_are_renamed():
    subject = Subject.of(MODELS["own"])
    before = dims_of(MODELS["own"].graph.input[0])
    renamed = RenameDims(dims=(f"{before[1]}=seq_len", f"{before[0]}=1")).apply(subject)
    assert isinstance(renamed, Changed)
    assert dims_of(io.to_proto(subject.model).graph.input[0]) == [1, "seq_len"]


@pytest.mark.parametrize("text", ["sequence_length", "=4", "x="])
def test_dimensions_without_a_new_name_are_rejected(text):
    with pytest.raises(UsageError, match="sequence_length=seq_len"):
        RenameDims(dims=(text,)).apply(Subject.of(MODELS["own"]))
