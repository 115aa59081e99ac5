"""Computed weights are in an unnamed file during verification: sessions read it, and nothing of it stays."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

import kvsurgeon
from kvsurgeon import io
from kvsurgeon.errors import UsageError
from kvsurgeon.io import staging
from kvsurgeon.passes.heads.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.heads.replicate_kv_heads import ReplicateKvHeads
from kvsurgeon.runtime import open_session
from kvsurgeon.runtime.tensors import from_runtime, to_runtime
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

DEMO = Path(kvsurgeon.__file__).parent / "demo" / "model"
pytestmark = pytest.mark.skipif(not os.path.isdir(staging.OPEN_FILES), reason="open files have no paths here")


@pytest.fixture(autouse=True)
def _all_weights_are_large(monkeypatch):
    monkeypatch.setattr(staging, "EMBEDDED", 0)
    monkeypatch.setattr(staging, "_SMALLEST", 1)


def outside(proto):
    return [one.name for one in proto.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]


def logits(proto):
    session = open_session(proto, threads=1)
    given = np.arange(6).reshape(2, 3)
    feeds = {one.name: to_runtime(np.ones_like(given) if "mask" in one.name else given) for one in session.inputs}
    return from_runtime(session.run(feeds)["logits"])


def test_sessions_read_computed_weights(tmp_path):
    model = Pipeline((ReplicateKvHeads(repeat=2),)).run(io.load(DEMO)).model
    embedded = io.to_proto(model)

    with io.staged(model, tmp_path / "absent" / "out") as proto:
        assert outside(proto)
        assert not outside(embedded)
        assert proto.ByteSize() < embedded.ByteSize()
        assert not list(tmp_path.iterdir())
        np.testing.assert_array_equal(logits(proto), logits(embedded))

    assert not list(tmp_path.iterdir())
    assert io.to_proto(model) == embedded


def test_few_computed_weights_are_embedded(monkeypatch, tmp_path):
    model = Pipeline((ReplicateKvHeads(repeat=2),)).run(io.load(DEMO)).model
    monkeypatch.setattr(staging, "EMBEDDED", 1 << 30)

    with io.staged(model, tmp_path) as proto:
        assert not outside(proto)


def test_the_verified_change_is_saved(tmp_path):
    done = run_and_save(DEMO, Pipeline((ReplicateKvHeads(repeat=2),)), tmp_path / "out")

    assert done.verification is not None
    assert done.verification.verdict == "same"
    assert not outside(onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False))


def test_accuracy_loss_is_measured_layer_by_layer(monkeypatch):
    merged = Pipeline((MergeKvHeads(kv_heads=1),))
    staged = run_and_save(DEMO, merged, per_layer=True).loss
    monkeypatch.setattr(staging, "EMBEDDED", 1 << 30)

    assert staged == run_and_save(DEMO, merged, per_layer=True).loss


def test_a_full_disk_is_reported_in_one_line(monkeypatch):
    def full(tensor, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging, "_write", full)
    with pytest.raises(UsageError, match="cannot write weights for verification: No space left on device; choose"):
        run_and_save(DEMO, Pipeline((ReplicateKvHeads(repeat=2),)))
