"""The three cache modes compute what the model without a cache computes, whatever unfilled rows contain."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from attentions import of_six_tokens, switched_beyond
from decoders import Config, Decoder
from exports import NAMES, ONE_OF_EACH, after, export, injected
from laws import ALLOWED, Arrays, difference, dims_of, in_onnxruntime, texts
from written import read

from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.opset.raise_opset import RaiseOpset

MAX = 32  # rows of a buffer
SPARE = 5  # rows of a past that stay unfilled
STALE = 7.0  # content of unfilled rows

TRANSPOSED = ("kv_heads", "batch", "head_dim", "sequence")
CACHE_MODES = {
    "static": {"cache": "static"},
    "static, fixed": {"cache": "static", "max_length": MAX},
    "static, copied rows": {"cache": "static", "past_length": "mask"},
    "new tokens": {"cache": "new-tokens"},
    "new tokens, unfilled rows": {"cache": "new-tokens", "past_length": "input"},
    "new tokens, unfilled rows, transposed": {"cache": "new-tokens", "past_length": "input", "key_layout": TRANSPOSED},
    "dynamic, transposed": {"key_layout": TRANSPOSED},
    "static, transposed": {"cache": "static", "key_layout": TRANSPOSED, "value_layout": TRANSPOSED},
}


def in_calls(model: onnx.ModelProto, whole: Arrays, cuts: Sequence[int]) -> np.ndarray:
    """Manage the cache by the model's dimensions, and return the logits of all calls."""
    run, inputs = in_onnxruntime(model), {value.name: value for value in model.graph.input}
    outputs = {value.name: dims_of(value) for value in model.graph.output}
    batch = next(iter(whole.values())).shape[0]
    sizes = {"batch_size": batch, "max_length": MAX, "past_sequence_length": 0, "cache_length": SPARE}
    pasts = {
        name: np.full([sizes.get(size, size) for size in dims_of(value)], STALE, dtype_of(value))
        for name, value in inputs.items()
        if name.startswith("past_key_values")
    }
    unfilled = SPARE if "cache_length" in dims_of(inputs[next(iter(pasts))]) else None
    found = []
    for start, stop in itertools.pairwise((0, *cuts, max(array.shape[1] for array in whole.values()))):
        feeds = {name: piece(array, dims_of(inputs[name]), start, stop, unfilled) for name, array in whole.items()}
        if "past_sequence_length" in inputs:
            feeds["past_sequence_length"] = np.array([start])
        given = run({**feeds, **pasts})
        for name in pasts:
            present = name.replace("past_key_values", "present")
            rows = given[present]
            if "sequence_length" in outputs[present]:
                rows = np.concatenate([pasts[name], rows], outputs[present].index("sequence_length"))
            pasts[name] = rows
        found.append(given["logits"])
    return np.concatenate(found, axis=1)


def dtype_of(value: onnx.ValueInfoProto) -> np.dtype:
    return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


def piece(array: np.ndarray, dims: Sequence[int | str], start: int, stop: int, unfilled: int | None) -> np.ndarray:
    if dims[1] in ("max_length", MAX):
        padding = (unfilled, 0) if unfilled is not None else (0, MAX - stop)
        return np.pad(array[:, :stop], ((0, 0), padding))
    return array[:, :stop] if dims[1] == "total_sequence_length" else array[:, start:stop]


def assert_same(name: str, allowed: float = ALLOWED["float32"], **options: object) -> None:
    whole = texts(export(name), batch=3, length=11)
    expected = in_onnxruntime(export(name))(whole)["logits"]
    found = in_calls(injected(export(name), **options), whole, (4, 5, 6))
    assert difference(found, expected, whole["attention_mask"]) <= allowed


@pytest.mark.parametrize("options", CACHE_MODES.values(), ids=CACHE_MODES)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_chunks_of_a_padded_batch(name, options):
    assert_same(name, **options)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(ONE_OF_EACH)))
def test_static_cache_on_every_export(name):
    assert_same(name, cache="static", max_length=MAX)


def test_float16_cache():
    assert_same("llama_dynamo_sdpa", 2e-3, cache="static", cache_dtype="float16")
    model = injected(export("llama_dynamo_sdpa"), cache_dtype="float16")
    kept = {dtype_of(value) for value in model.graph.input if value.name.startswith("past")}
    assert kept == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache": "dynamic", "past_length": "input"}, "expected past-length shape, found input"),
        ({"cache": "new-tokens", "max_length": 64}, "expected no max-length"),
        ({"key_layout": ("batch", "batch", "sequence", "head_dim")}, "expected a layout of batch, kv_heads"),
    ],
)
def test_options_that_exclude_each_other(options, said):
    with pytest.raises(UsageError, match=said):
        injected(export("decoder"), **options)


def test_past_length_from_positions_needs_an_input_of_positions():
    with pytest.raises(UnsupportedError, match="no input gives the number of past tokens"):
        injected(export("decoder"), cache="static", past_length="positions")


@pytest.mark.parametrize("called", ["position_ids", "where", "token_type_ids"])
def test_positions_are_found_by_their_use(called):
    original = renamed(Decoder(Config(layers=1, position_ids=True)).model(), "position_ids", called)
    model = injected(original, cache="static", past_length="positions")
    assert [node.input[0] for node in model.graph.node if "positions.flat" in node.output[0]] == [called]
    model = renamed(model, called, "position_ids")
    assert verify(renamed(original, called, "position_ids"), model, threads=1).verdict == "same"


def renamed(model: onnx.ModelProto, old: str, new: str) -> onnx.ModelProto:
    text = onnx.ModelProto()
    text.CopyFrom(model)
    for value in text.graph.input:
        value.name = new if value.name == old else value.name
    for node in text.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
    return text


@pytest.mark.parametrize("name", ["static", "new tokens, unfilled rows", "dynamic, transposed"])
def test_verification_stays_within_the_maximum_length(name):
    original = read(switched_beyond(80))
    report = verify(original, injected(original, **CACHE_MODES[name]), threads=1)
    assert (report.verdict, report.problems) == ("same", ())
    assert max(trial.length for trial in report.comparisons) > 70
    assert any("the candidate model takes no more" in note for note in report.notes)


def test_capacity_above_the_maximum_length_is_rejected():
    with pytest.raises(UnsupportedError, match="expected max-length of at most 6, found 32"):
        injected(of_six_tokens(), cache="static", max_length=MAX)


@pytest.mark.parametrize("opset", [23, 24])
def test_onnxruntime_names_what_more_tokens_than_rows_exceed(opset):
    model = after(export("llama_dynamo_sdpa"), RaiseOpset(opset=opset), Inject(cache="static"))
    sizes = {"batch_size": 1, "max_length": 8, "sequence_length": 9}
    feeds = {
        value.name: np.ones([sizes.get(size, size) for size in dims_of(value)], dtype_of(value))
        for value in model.graph.input
    }
    with pytest.raises(Exception, match=r"Name:'present\.0\.\w+/tokens_exceed_the_rows_of_the_static_cache'"):
        in_onnxruntime(model)(feeds)


def test_static_cache_of_a_fixed_length_export_has_that_capacity():
    model = injected(of_six_tokens(), cache="static")
    past = next(value for value in model.graph.input if value.name.startswith("past"))
    assert dims_of(past) == ["batch_size", 1, 6, 8]


def test_unfilled_rows_are_rejected_for_a_fixed_length_export():
    with pytest.raises(UnsupportedError, match="no context for them"):
        injected(of_six_tokens(), cache="new-tokens", past_length="input")
    injected(of_six_tokens(), cache="new-tokens")
