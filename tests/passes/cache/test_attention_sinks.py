"""All layers attend to the first tokens and a window of the last ones, of which alone they cache the rows."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder
from exports import after, export
from laws import Arrays, dims_of, in_onnxruntime
from onnx import TensorProto

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache
from kvsurgeon.passes.cache.window_cache import WindowCache
from kvsurgeon.passes.contract import Subject, Unchanged
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

WINDOW, SINKS, LENGTH = 4, 2, 19
LIMITED = WindowCache(window=WINDOW, sinks=SINKS)
CHUNKS = ((19,), (1,) * 19, (2, 9, 1, 1, 5, 1), (8, 11), (1, 3, 15))
CONFIG = Config(layers=2, windowed=())
LAYOUT = ("kv_heads", "sequence", "head_dim", "batch")


class WithGivenMask(Decoder):
    """The decoder with a mask of queries and keys that an input gives in addition."""

    def declare(self) -> None:
        super().declare()
        self.graph.input("given", TensorProto.BOOL, [*self.token_dims()[:1], 1, "sequence", "sequence"])

    def visible(self, layer: int) -> str:
        return self.graph.op("And", super().visible(layer), "given")


def visible_keys(mask: np.ndarray, window: int = WINDOW, sinks: int = SINKS) -> np.ndarray:
    """Return which keys a window and the first tokens that a mask marks leave, `[batch, 1, queries, keys]`."""
    batch, length = mask.shape
    found = np.zeros((batch, 1, length, length), bool)
    for row in range(batch):
        first = [column for column in range(length) if mask[row, column]][:sinks]
        for query in range(length):
            found[row, 0, query, first] = True
            found[row, 0, query, max(0, query - window + 1) : query + 1] = True
    return found


@functools.cache
def limited(config: Config = CONFIG, **options: tuple[str, ...]) -> onnx.ModelProto:
    return after(Decoder(config).model(), Inject(**options), LIMITED)


def masks(name: str) -> np.ndarray:
    mask = np.ones((3, LENGTH), np.int64)
    if name == "left padding":
        mask[1, :1] = mask[2, :11] = 0  # less than the window and more
    if name == "gaps":
        mask[0, 1:3] = mask[1, [0, 4, 9]] = mask[2, :8] = mask[2, 9:14] = 0
    return mask


def run_in_chunks(model: onnx.ModelProto, feeds: Arrays, chunks: tuple[int, ...], layout: tuple[str, ...]) -> Arrays:
    run, batch, start, found = in_onnxruntime(model), len(feeds["input_ids"]), 0, []
    axis, pasts = layout.index("sequence"), {}
    for value in model.graph.input:
        if value.name not in feeds:
            sizes = [size if isinstance(size, int) else batch for size in dims_of(value)]
            sizes[axis] = 0
            pasts[value.name] = np.zeros(sizes, np.float32)
    for end in np.cumsum(chunks):
        given = {
            name: array[:, :end] if name == "attention_mask" else array[:, start:end] for name, array in feeds.items()
        }
        outputs = run({**given, **pasts})
        pasts = {name: outputs[name.replace("past_key_values", "present")] for name in pasts}
        found.append(outputs["logits"])
        start = end
        assert all(rows.shape[axis] == min(end, WINDOW + SINKS) for rows in pasts.values())
    return {"logits": np.concatenate(found, axis=1)}


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("name", ["no padding", "left padding", "gaps"])
def test_chunks_give_what_the_original_gives_with_the_mask_of_a_window(name, chunks):
    mask = masks(name)
    feeds = {"input_ids": np.random.default_rng(1).integers(0, 61, mask.shape), "attention_mask": mask}
    expected = in_onnxruntime(WithGivenMask(CONFIG).model())({**feeds, "given": visible_keys(mask)})["logits"]
    found = run_in_chunks(limited(), feeds, chunks, ("batch", "kv_heads", "sequence", "head_dim"))["logits"]
    counts = mask.astype(bool)
    np.testing.assert_allclose(found[counts], expected[counts], atol=2e-5)


def test_caches_in_another_layout():
    mask = masks("left padding")
    feeds = {"input_ids": np.random.default_rng(2).integers(0, 61, mask.shape), "attention_mask": mask}
    expected = in_onnxruntime(WithGivenMask(CONFIG).model())({**feeds, "given": visible_keys(mask)})["logits"]
    model = limited(key_layout=LAYOUT, value_layout=LAYOUT)
    found = run_in_chunks(model, feeds, CHUNKS[2], LAYOUT)["logits"]
    np.testing.assert_allclose(found[mask.astype(bool)], expected[mask.astype(bool)], atol=2e-5)


def test_a_model_without_a_mask_keeps_the_first_rows():
    config = Config(layers=2, windowed=(), attention_mask=False, position_ids=True)
    feeds = {
        "input_ids": np.random.default_rng(3).integers(0, 61, (1, LENGTH)),
        "position_ids": np.arange(LENGTH)[None],
    }
    given = visible_keys(np.ones((1, LENGTH)))
    expected = in_onnxruntime(WithGivenMask(config).model())({**feeds, "given": given})["logits"]
    found = run_in_chunks(limited(config), feeds, CHUNKS[2], ("batch", "kv_heads", "sequence", "head_dim"))["logits"]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_an_export():
    run = Pipeline.parse("inject,window-cache{window=5,sinks=3}").run(export("llama_dynamo_sdpa"))
    (models,) = run.changes[-1].equal_models()
    report = verify(*map(io.to_proto, models), effort="quick", seed=3)
    assert report.verdict == "same", report.problems


def test_layers_with_a_window_keep_it():
    model = limited(Config(layers=3, windowed=(1,), window=3))
    rows = [dims_of(value)[2] for value in model.graph.input if value.name.endswith("key")]
    assert rows == ["first_2_last_4_rows", "last_3_rows", "first_2_last_4_rows"]


def test_windows_of_sinks_alone_need_no_gather():
    model = after(Decoder(CONFIG).model(), Inject(), WindowCache(window=WINDOW, sinks=0))
    assert "GatherElements" not in {node.op_type for node in model.graph.node}
    assert dims_of(model.graph.input[2])[2] == "last_4_rows"


def test_the_cache_is_found_and_removed_again():
    subject = Subject.of(limited())
    assert {one.cache_mode for one in subject.cache()} == {"last-rows"}
    assert isinstance(LIMITED.apply(subject), Unchanged)
    removed = after(limited(), RemoveCache())
    assert verify(removed, limited(), effort="quick", seed=3).verdict == "same"


def test_the_loss_and_the_bytes_are_reported(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(Decoder(CONFIG).model(), path)
    run = run_and_save(path, Pipeline((Inject(), LIMITED)), tmp_path / "out", seed=0)
    assert run.loss.kl_divergence > 1e-3
    assert run.cache_bytes == (4096 * 2 * 2 * 2 * 8 * 4, 6 * 2 * 2 * 2 * 8 * 4)


def test_rows_that_are_dropped_too_early_are_found():
    run = Pipeline((Inject(), LIMITED)).run(Decoder(CONFIG).model())
    ((expected, _),) = run.changes[-1].equal_models()
    wrong = onnx.ModelProto.FromString(limited().SerializeToString())
    nodes = {name: node for node in wrong.graph.node for name in node.output}
    wrong.graph.initializer.append(onnx.numpy_helper.from_array(np.array([SINKS + 1]), "later"))
    nodes[nodes["present.1.key"].input[1]].input[1] = "later"
    assert verify(io.to_proto(expected), wrong, effort="quick", seed=3).verdict == "different"


def test_a_mask_with_a_bias_by_distance_is_rejected():
    with pytest.raises(UnsupportedError, match="causal with a bias"):
        Pipeline((Inject(), LIMITED)).run(export("bloom_torchscript_eager"))


def test_a_given_mask_of_queries_and_keys_is_rejected():
    with pytest.raises(UnsupportedError, match="the first tokens of a text are not known"):
        Pipeline((Inject(), LIMITED)).run(WithGivenMask(CONFIG).model())


@pytest.mark.parametrize("options", [{"window": 0}, {"window": 4, "sinks": -1}])
def test_numbers_of_tokens_are_checked(options):
    with pytest.raises(UsageError):
        Pipeline((Inject(), WindowCache(**options))).run(Decoder(CONFIG).model())


@pytest.mark.parametrize("sinks", [0, 2])
def test_left_padding_in_rows_that_a_window_keeps_is_not_compared(sinks):
    """Padding attends to the keys that its call holds, which are fewer in chunks; no token attends to it."""
    run = Pipeline((Inject(), WindowCache(window=32, sinks=sinks))).run(Decoder(CONFIG).model())
    ((expected, _),) = run.changes[-1].equal_models()
    report = verify(io.to_proto(expected), io.to_proto(run.model), seed=1)
    assert report.verdict == "same"
    assert "left padding" in {one.scenario for one in report.comparisons}
