"""Buffers of `GroupQueryAttention` that hold the rows of a sliding window, and buffers with some more rows than it."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder
from exports import after
from laws import difference, dims_of, in_onnxruntime

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.cache.window_cache import WindowCache
from kvsurgeon.passes.contract import Subject, Unchanged
from kvsurgeon.passes.interface.add_query_lengths import AddQueryLengths
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.runtime import CachedDecoder, ContinuousBatch, open_session
from kvsurgeon.targets.genai import GENAI_SLIDING_WINDOW
from kvsurgeon.workflow.build_target import build_target
from kvsurgeon.workflow.pipeline import Pipeline

WINDOW = 4
ROWS = ["max_length", "last_4_rows", "max_length"]


@functools.cache
def original(**options: object) -> onnx.ModelProto:
    return Decoder(Config(layers=3, head_dim=16, max_length=128, window=WINDOW, **options)).model()


@functools.cache
def all_rows(**options: object) -> onnx.ModelProto:
    fused = FuseAttention(padding="lengths")
    return after(original(**options), Inject(cache="static", past_length="mask"), fused)


@functools.cache
def windowed(**options: object) -> onnx.ModelProto:
    return after(all_rows(**options), WindowCache())


def rows(model: onnx.ModelProto) -> list[int | str]:
    """Return the rows of the keys of each layer."""
    return [dims_of(value)[2] for value in model.graph.input if value.name.endswith(".key")]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "ids.txt"
    path.write_text(", ".join(map(str, np.random.default_rng(0).integers(0, 61, 400))))
    return path


@pytest.mark.parametrize(
    "options", [{}, {"windowed": (0, 1, 2)}, {"position_ids": True}], ids=["mixed", "all", "positions"]
)
def test_results_are_the_same_beyond_the_window(options):
    report = verify(original(**options), windowed(**options), effort="quick", seed=3)
    assert (report.verdict, report.problems) == ("same", ())


def test_buffers_have_the_rows_of_the_window():
    assert rows(windowed()) == ROWS
    decoder = CachedDecoder(open_session(windowed(), threads=1))
    tokens = np.arange(11)[None]
    decoder.run(decoder.inputs.feeds(tokens, np.ones_like(tokens)))
    assert [decoder.cached_rows(entry).shape[2] for entry in decoder.cache] == [11, 11, 4, 4, 11, 11]


@pytest.mark.parametrize("further", [0, 1, 16])
@pytest.mark.parametrize("chunk", [1, 7])
def test_a_runtime_may_allocate_more_rows(further, chunk):
    run, tokens = in_onnxruntime(windowed()), np.arange(42)[None] % 61
    pasts = {
        value.name: np.full([1, 2, WINDOW + further if "1" in value.name else 64, 16], 7, np.float32)
        for value in windowed().graph.input[2:]
    }
    parts = []
    for start in range(0, 42, chunk):
        found = run(
            {"input_ids": tokens[:, start : start + chunk], "attention_mask": np.ones((1, start + chunk), int), **pasts}
        )
        pasts = {name: found[name.replace("past_key_values", "present")] for name in pasts}
        parts.append(found["logits"])
    expected = in_onnxruntime(original())({"input_ids": tokens, "attention_mask": np.ones_like(tokens)})["logits"]
    assert difference(np.concatenate(parts, axis=1), expected) < 1e-5


def test_a_shorter_window_is_found():
    wrong = onnx.ModelProto.FromString(windowed().SerializeToString())
    (operator,) = (
        node for node in wrong.graph.node if any(one.name == "sliding_window_cache" for one in node.attribute)
    )
    next(one for one in operator.attribute if one.name == "local_window_size").i = 3
    assert verify(original(), wrong, effort="quick", seed=3).verdict == "different"


def test_sequences_of_a_batch_drop_rows_at_lengths_of_their_own():
    options = {"position_ids": True, "windowed": (0, 1, 2)}
    model = after(windowed(**options), AddQueryLengths())
    batch = ContinuousBatch(open_session(model, threads=1), rows=2, capacity=64)
    texts = [np.arange(40) % 61, np.arange(25)]
    numbers = [batch.start(text[:count].tolist())[0] for text, count in zip(texts, (13, 2), strict=True)]
    for counts in ((1, 1), (1, 9), (6, 1), (4, 4), (1, 1)):
        parts = {
            number: text[batch.lengths[number] :][:count].tolist()
            for number, text, count in zip(numbers, texts, counts, strict=True)
        }
        found = batch.advance(parts)
        for number, text in zip(numbers, texts, strict=True):
            tokens = text[None, : batch.lengths[number]]
            given = {
                "input_ids": tokens,
                "attention_mask": np.ones_like(tokens),
                "position_ids": np.arange(tokens.size)[None],
            }
            expected = in_onnxruntime(original(**options))(given)["logits"][0, -len(parts[number]) :]
            assert difference(found[number], expected) < 1e-5


def test_dropped_rows_do_not_come_back():
    batch = ContinuousBatch(open_session(windowed(position_ids=True), threads=1), rows=2, capacity=64)
    number, _ = batch.start([1, 2, 3])
    batch.shorten(number, 2)
    batch.extend(number, [3, 4, 5])
    with pytest.raises(UsageError, match="at most 4 tokens, of which a window has all rows, found 5"):
        batch.shorten(number, 4)


def test_the_windows_are_found_and_removed_again():
    assert isinstance(WindowCache().apply(Subject.of(windowed())), Unchanged)
    restored = after(windowed(), Retarget(cache="static", past_length="mask"))
    assert rows(restored) == ["max_length"] * 3
    assert verify(all_rows(), restored, effort="quick", seed=3).verdict == "same"


def test_passes_that_restore_a_cache_reject_it():
    with pytest.raises(
        UnsupportedError, match="expected a cache of all rows, found the last 4, as GroupQueryAttention"
    ):
        Pipeline.parse("merge-kv-heads{kv-heads=1}").run(windowed())


@pytest.mark.parametrize(
    "order", ["quantize-cache{scales=per-channel},window-cache", "window-cache,quantize-cache{scales=per-channel}"]
)
def test_rows_of_a_window_are_quantized_by_scales_from_all_rows(order, text):
    subject = Subject.of(all_rows())
    subject.text = text
    run = Pipeline.parse(order).run(subject)
    result = io.to_proto(run.model)
    assert rows(result) == ROWS
    ((rounded, _),) = next(one.equal_models for one in run.changes if one.equal_models is not None)()
    assert verify(io.to_proto(rounded), result, effort="quick", seed=3).verdict == "same"


def test_a_static_cache_that_no_operator_updates_is_rejected():
    with pytest.raises(UnsupportedError, match=r"a dynamic cache only.*fuse-attention with padding=lengths"):
        Pipeline.parse("inject{cache=static},window-cache").run(original())


def test_onnxruntime_genai_is_told_the_layers():
    result = build_target(original(), GENAI_SLIDING_WINDOW, verify=False)
    assert rows(result.to_proto()) == ROWS
    assert any("max_length of at least 4, the rows of a window, found 128" in note for note in result.notes)
