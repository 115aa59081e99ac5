"""Keys and values of cross-attention are computed once, by a second model that runs before the decoder."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from attentions import attention
from laws import ALLOWED, difference, in_chunks, in_onnxruntime
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.separate_cross_attention import FILE, SeparateCrossAttention
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.workflow.companions import connected
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

MASK = "em = Unsqueeze(encoder_mask, middle)\n on = Cast<to = 9>(em)\n cm = Where(on, cs, low)\n"


def decoder(*, keys: str = "perm = [0, 2, 3, 1]", mask: bool = True, batch: str = "b") -> str:
    """Return a decoder with heads; sizes of reshapes are read from the tokens and from the encoder's output."""
    sizes = (
        "bs = Shape<end = 1>(x)\n ns = Shape<start = 1, end = 2>(x)\n es = Shape<start = 1, end = 2>(encoder)\n"
        "qsizes = Concat<axis = 0>(bs, ns, two_of_four)\n ksizes = Concat<axis = 0>(bs, es, two_of_four)\n"
        "msizes = Concat<axis = 0>(bs, ns, eight)\n"
    )
    body = (
        "cq = MatMul(c, wq)\n cq4 = Reshape(cq, qsizes)\n cqh = Transpose<perm = [0, 2, 1, 3]>(cq4)\n"
        "ck = MatMul(encoder, wk)\n ck4 = Reshape(ck, ksizes)\n"
        f"ckt = Transpose<{keys}>(ck4)\n cs = MatMul(cqh, ckt)\n"
    )
    end = (
        f"cw = Softmax<axis = -1>({'cm' if mask else 'cs'})\n cv = MatMul(encoder, wv)\n cv4 = Reshape(cv, ksizes)\n"
        "cvh = Transpose<perm = [0, 2, 1, 3]>(cv4)\n co = MatMul(cw, cvh)\n"
        "cot = Transpose<perm = [0, 2, 1, 3]>(co)\n logits = Reshape(cot, msizes)"
    )
    text = attention(
        inputs="float[b, e, 8] encoder" + (", int64[b, e] encoder_mask" if mask else ""),
        constants="int64[2] two_of_four = {2, 4}, int64[1] eight = {8}, int64[2] middle = {1, 2}",
        after=sizes + body + (MASK if mask else "") + end,
    )
    return text.replace("[b,", f"[{batch},")


def feeds(encoder_length: int, batch: int = 2) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    mask = np.ones((batch, encoder_length), np.int64)
    mask[-1, 2:] = 0
    return {
        "x": random.standard_normal((batch, 9, 8)).astype(np.float32),
        "encoder": random.standard_normal((batch, encoder_length, 8)).astype(np.float32),
        "encoder_mask": mask,
    }


@pytest.mark.parametrize("encoder_length", [3, 20])
@pytest.mark.parametrize("batch", ["b", "2"])
def test_both_models_in_a_chain_compute_what_the_original_does(encoder_length, batch):
    original = read(decoder(batch=batch))
    subject = Subject.of(original)
    outcome = Inject(cross_attention="separate").apply(subject)
    assert isinstance(outcome, Changed)
    result, first = io.to_proto(subject.model), io.to_proto(outcome.companions[FILE].model)
    assert [value.name for value in first.graph.input] == ["encoder"]
    assert [value.name for value in result.graph.input] == [
        "x", "encoder_mask", "past_key_values.0.encoder.key", "past_key_values.0.encoder.value",
        "past_key_values.0.decoder.key", "past_key_values.0.decoder.value",
    ]  # fmt: skip
    given = feeds(encoder_length)
    cross = in_onnxruntime(first)({"encoder": given["encoder"]})
    assert cross["present.0.encoder.key"].shape == (2, 2, encoder_length, 4)
    whole = {name: given[name] for name in ("x", "encoder_mask")}
    whole |= {taken: cross[name] for name, taken in outcome.companions[FILE].connections.items()}
    steps = in_chunks(result, in_onnxruntime(result), whole, (4, 5, 6))
    found = np.concatenate([step["logits"] for step in steps], axis=1)
    assert difference(found, in_onnxruntime(original)(given)["logits"]) < ALLOWED["float32"]


def first_call_decoder(given: dict[str, np.ndarray]) -> tuple[onnx.ModelProto, list[np.ndarray]]:
    """Return the decoder that computes cross-attention in its first call, and the logits of calls on its tokens."""
    subject = Subject.of(read(decoder()))
    Inject(cross_attention="first-call").apply(subject)
    model = io.to_proto(subject.model)
    return model, run_with_first_call(model, given)


def run_with_first_call(model: onnx.ModelProto, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    run, outputs, logits = in_onnxruntime(model), [value.name for value in model.graph.output], []
    pasts = {
        value.name: np.zeros([size.dim_value or 2 * (not axis) for axis, size in enumerate(sizes)], np.float32)
        for value in model.graph.input
        if value.name.startswith("past") and (sizes := value.type.tensor_type.shape.dim)
    }
    for start, end in ((0, 4), (4, 5), (5, 9)):
        if start:
            given = given | {"encoder": np.full_like(given["encoder"], np.nan)}  # not read any more
        results = run(given | pasts | {"x": given["x"][:, start:end], "use_cache_branch": np.array([start > 0])})
        pasts = {name.replace("present", "past_key_values"): results[name] for name in outputs if name != "logits"}
        logits.append(results["logits"])
    return logits


def test_one_model_computes_cross_attention_in_its_first_call_only():
    given = feeds(5)
    model, found = first_call_decoder(given)
    assert [value.name for value in model.graph.input] == [
        "x", "encoder_mask", "encoder", "use_cache_branch",
        "past_key_values.0.decoder.key", "past_key_values.0.decoder.value",
        "past_key_values.0.encoder.key", "past_key_values.0.encoder.value",
    ]  # fmt: skip
    expected = in_onnxruntime(read(decoder()))(given)["logits"]
    assert difference(np.concatenate(found, axis=1), expected) < ALLOWED["float32"]
    assert sum(one.dims == [8, 8] for one in model.graph.initializer) == len(("wq", "wk", "wv"))  # each is there once


def test_a_first_call_is_verified_and_a_wrong_later_call_is_found():
    model, _ = first_call_decoder(feeds(5))
    assert verify(read(decoder()), model, effort="quick", seed=1).verdict == "same"
    (choice,) = (node for node in model.graph.node if node.op_type == "If")
    then = next(one.g for one in choice.attribute if one.name == "then_branch")
    (key, value) = then.node
    key.input[0], value.input[0] = value.input[0], key.input[0]
    assert verify(read(decoder()), model, effort="quick", seed=1).verdict == "different"


def test_an_input_of_the_name_of_the_choice_is_refused():
    model = read(decoder().replace("encoder_mask", "use_cache_branch"))
    with pytest.raises(UnsupportedError, match="already has an input"):
        Inject(cross_attention="first-call").apply(Subject.of(model))


def test_sizes_of_hidden_states_are_read_from_the_encoder_output():
    text = decoder().replace("bs = Shape<end = 1>(x)", "shape = Shape(c)\n bs = Gather(shape, first)")
    outcome = Inject(cross_attention="separate").apply(Subject.of(read(text)))
    assert isinstance(outcome, Changed)
    assert [value.name for value in outcome.companions[FILE].model.graph.inputs] == ["encoder"]


def test_the_connected_model_has_the_inputs_of_the_original():
    original = read(decoder())
    subject = Subject.of(original)
    outcome = SeparateCrossAttention().apply(subject)
    whole = io.to_proto(connected(subject.model, outcome.companions))
    assert {value.name for value in whole.graph.input} == {"x", "encoder", "encoder_mask"}
    assert difference(*(in_onnxruntime(model)(feeds(5))["logits"] for model in (whole, original))) < ALLOWED["float32"]


def test_both_models_are_verified_and_written(tmp_path):
    path = tmp_path / "before" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(read(decoder(mask=False)).SerializeToString())
    pipeline = Pipeline((Inject(cross_attention="separate"),))
    run = run_and_save(path, pipeline, tmp_path / "after" / "decoder.onnx", effort="quick", seed=1)
    assert run.verification is not None
    assert run.verification.verdict == "same"
    assert {"decoder.onnx", FILE} <= {file.name for file in (tmp_path / "after").iterdir()}


def test_a_certificate_of_two_models_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(read(decoder(mask=False)).SerializeToString())
    pipeline = Pipeline((Inject(cross_attention="separate"),))
    with pytest.raises(UsageError, match="one model"):
        run_and_save(path, pipeline, tmp_path / "after.onnx", certificate=tmp_path / "c.json", effort="quick")


def test_a_decoder_without_cross_attention_is_refused():
    with pytest.raises(UnsupportedError, match="no keys of cross-attention"):
        Inject(cross_attention="separate").apply(Subject.of(read(attention())))


def test_names_must_be_unique():
    with pytest.raises(UsageError, match="unique"):
        SeparateCrossAttention(past="past.{layer}").apply(Subject.of(read(decoder())))
