"""`prefill.onnx` computes the cache that the model computes, with fewer nodes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Config, Decoder
from laws import in_onnxruntime

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.io.locate import PREFILL_FILE
from kvsurgeon.passes.cache.separate_prefill import SeparatePrefill
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.heads.swiftkv import SwiftKv
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

CONFIG = Config(vocabulary=9, attention_mask=False)


def separated(subject: Subject) -> onnx.ModelProto:
    outcome = SeparatePrefill().apply(subject)
    assert isinstance(outcome, Changed)
    return io.to_proto(outcome.companions[PREFILL_FILE].model)


def products(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "MatMul" for node in model.graph.node)


def test_the_cache_is_that_of_the_model() -> None:
    model = CachedDecoder(CONFIG).model()
    prefill = separated(Subject.of(model))
    feeds = {"input_ids": np.array([[1, 2, 3, 4]])}
    for one in model.graph.input:
        if one.name != "input_ids":
            feeds[one.name] = np.zeros((1, CONFIG.kv_heads, 0, CONFIG.head_dim), np.float32)
    expected, found = (in_onnxruntime(one)(feeds) for one in (model, prefill))
    assert set(found) == set(expected) - {"logits"}
    assert all((found[name] == expected[name]).all() for name in found)
    assert products(prefill) < products(model)


def test_a_pass_after_it_would_leave_another_model_behind() -> None:
    with pytest.raises(UnsupportedError, match=r"`prefill.onnx` is a part of the model before quantize-cache"):
        Pipeline.parse("inject,separate-prefill,quantize-cache").run(Decoder(CONFIG).model())


def test_layers_behind_a_shared_input_are_left_out(tmp_path) -> None:
    text = tmp_path / "ids.txt"
    text.write_text(" ".join(map(str, np.random.default_rng(0).integers(0, 9, 100))))
    subject = Subject(model=io.load(CachedDecoder(CONFIG).model()), text=text)
    SwiftKv(after=1).apply(subject)
    softmax = [node for node in separated(subject).graph.node if node.op_type == "Softmax"]
    assert len(softmax) == 1  # attention of layer 0, whose result layer 1 reads


def test_a_second_run_changes_nothing() -> None:
    subject = Subject.of(separated(Subject.of(CachedDecoder(CONFIG).model())))
    assert isinstance(SeparatePrefill().apply(subject), Unchanged)


def test_a_model_without_a_cache_is_rejected() -> None:
    with pytest.raises(UnsupportedError, match="the model has no cache"):
        SeparatePrefill().apply(Subject.of(Decoder(CONFIG).model()))


def test_layers_behind_a_shared_input_may_share_their_cache(tmp_path) -> None:
    text = tmp_path / "ids.txt"
    text.write_text(" ".join(map(str, np.random.default_rng(0).integers(0, 9, 100))))
    passes = "swiftkv{after=1},share-kv-layers{map=0,1,2,2,2},inject,separate-prefill"
    model = Decoder(Config(layers=5, windowed=(), vocabulary=9)).model()
    run = run_and_save(model, Pipeline.parse(passes), text=text, effort="quick", seed=1)
    prefill = run.companions[PREFILL_FILE].model
    assert [value.name for value in prefill.graph.outputs] == [
        f"present.{layer}.{kind}" for layer in range(3) for kind in ("key", "value")
    ]
    assert sum(node.op_type == "Softmax" for node in prefill.graph) == 1
    before, after = run.cache_bytes
    assert (before * 3, run.loss is not None) == (after * 5, True)
