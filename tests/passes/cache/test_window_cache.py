"""Layers with a sliding window cache the rows of the window, and the model computes the same beyond it."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
from attentions import attention
from decoders import Config, Decoder
from exports import after, export
from recurrences import CONVOLUTION
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache
from kvsurgeon.passes.cache.window_cache import WindowCache
from kvsurgeon.passes.contract import Subject, Unchanged
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.passes.opset.raise_opset import RaiseOpset
from kvsurgeon.runtime import CachedDecoder, open_session
from kvsurgeon.workflow.pipeline import Pipeline

LOCAL_AND_GLOBAL = Config(windowed=(1,))
ALL_LOCAL = Config(windowed=(0, 1, 2), layers=3)
WITHOUT_MASK = Config(windowed=(0, 2), window=7, attention_mask=False)


@functools.cache
def original(config: Config) -> onnx.ModelProto:
    return Decoder(config).model()


@functools.cache
def windowed(config: Config) -> onnx.ModelProto:
    return after(original(config), Inject(), WindowCache())


@pytest.mark.parametrize("config", [LOCAL_AND_GLOBAL, ALL_LOCAL, WITHOUT_MASK], ids=["mixed", "all", "no mask"])
def test_results_are_the_same_beyond_the_window(config):
    report = verify(original(config), windowed(config), effort="quick", seed=3)
    assert report.verdict == "same", report.problems
    assert report.error < 1e-5


@pytest.mark.parametrize("name", ["gemma2_dynamo_eager", "gemma2_torchscript_eager"])
def test_exports_with_local_layers(name):
    model = after(export(name), Inject(), WindowCache())
    assert verify(export(name), model, effort="quick", seed=3).verdict == "same"


def test_attention_as_one_operator_is_written_in_others():
    fused = after(original(LOCAL_AND_GLOBAL), RaiseOpset(opset=23), FuseAttention(operator="attention"))
    assert [node.op_type for node in fused.graph.node].count("Attention") == 3
    assert verify(fused, after(fused, Inject(), WindowCache()), effort="quick", seed=3).verdict == "same"


def test_the_cache_does_not_grow_beyond_the_window():
    decoder = CachedDecoder(open_session(windowed(LOCAL_AND_GLOBAL), threads=1))
    tokens = np.arange(11)[None]
    decoder.run(decoder.inputs.feeds(tokens, np.ones_like(tokens)))
    rows = [decoder.cached_rows(entry).shape[2] for entry in decoder.cache]
    assert rows == [11, 11, 4, 4, 11, 11]


@pytest.mark.parametrize("name", ["present.1.key", "present.1.value"])
def test_a_shorter_window_is_found(name):
    wrong = onnx.ModelProto.FromString(windowed(LOCAL_AND_GLOBAL).SerializeToString())
    (cut,) = (node for node in wrong.graph.node if node.output[0] == name)
    wrong.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-2]), "two"))
    cut.input[1] = "two"
    assert verify(original(LOCAL_AND_GLOBAL), wrong, effort="quick", seed=3).verdict == "different"


def test_the_cache_is_found_and_removed_again():
    subject = Subject.of(windowed(LOCAL_AND_GLOBAL))
    modes = {(one.layer, one.kind): one.cache_mode for one in subject.cache()}
    assert [modes[layer, "key"] for layer in range(3)] == ["dynamic", "last-rows", "dynamic"]
    assert isinstance(WindowCache().apply(subject), Unchanged)
    removed = after(windowed(LOCAL_AND_GLOBAL), RemoveCache())
    assert verify(original(LOCAL_AND_GLOBAL), removed, effort="quick", seed=3).verdict == "same"


def test_the_last_rows_of_a_convolution_are_kept():
    convolution = read(attention(hidden=CONVOLUTION, constants="float[8, 1, 3] kernel"))
    model = after(convolution, Inject(), WindowCache(window=4))
    assert {one.kind: one.cache_mode for one in Subject.of(model).cache()}["conv_state"] == "last-rows"
    assert verify(after(model, RemoveCache()), model, effort="quick", seed=3).verdict == "same"


def test_passes_that_restore_a_cache_keep_its_windows():
    run = Pipeline.parse("quantize-cache").run(windowed(LOCAL_AND_GLOBAL))
    shapes = {value.name: value.shape[2] for value in run.model.graph.inputs if "key" in value.name}
    assert [str(shapes[f"past_key_values.1.{kind}"]) for kind in ("key", "key_scale")] == ["last_4_rows"] * 2
    ((expected, found),) = run.changes[-1].equal_models()
    assert verify(io.to_proto(expected), io.to_proto(found), effort="quick", seed=3).verdict == "same"


def test_a_layer_that_reads_the_rows_of_another_keeps_all_that_both_need():
    run = Pipeline.parse("share-kv-layers{kv-layers=2}").run(windowed(Config(windowed=(1, 2), layers=3)))
    rows = [str(value.shape[2]) for value in run.model.graph.inputs if value.name.endswith("key")]
    assert rows == ["past_sequence_length", "last_4_rows"]
    assert run.cache_bytes[1] == 2 * 2 * 8 * 4 * (4096 + 4)


def test_operators_that_update_a_cache_are_rejected():
    with pytest.raises(UnsupportedError, match="expected a cache of all rows, found the rows of a window"):
        Pipeline.parse("fuse-attention").run(windowed(LOCAL_AND_GLOBAL))


@pytest.mark.parametrize("mode", ["static", "new-tokens"])
def test_only_a_dynamic_cache_drops_rows(mode):
    with pytest.raises(UnsupportedError, match=f"of a dynamic cache only; expected dynamic, found {mode}"):
        Pipeline.parse(f"inject{{cache={mode}}},window-cache").run(original(LOCAL_AND_GLOBAL))


def test_the_number_of_past_tokens_must_be_known():
    config = Config(windowed=(0, 1, 2), attention_mask=False)
    with pytest.raises(UnsupportedError, match=r"no input gives a length.*with an attention mask"):
        Pipeline.parse("inject,window-cache").run(original(config))
