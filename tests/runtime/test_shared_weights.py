"""External weights are mapped once for all sessions, and give what onnxruntime's own copies give."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder

from kvsurgeon.runtime import open_session, shared_weights
from kvsurgeon.runtime.tensors import from_runtime, to_runtime


@pytest.fixture(params=["float32", "float16"])
def folder(request, tmp_path):
    onnx.save(
        Decoder(Config(dtype=request.param)).model(), tmp_path / "model.onnx", save_as_external_data=True,
        location="model.data", size_threshold=512,
    )  # fmt: skip
    return tmp_path


def logits(session):
    given = np.arange(6).reshape(2, 3)
    feeds = {one.name: to_runtime(np.ones_like(given) if "mask" in one.name else given) for one in session.inputs}
    return from_runtime(session.run(feeds)["logits"])


def test_two_sessions_read_the_same_pages(folder, monkeypatch):
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    expected = logits(open_session(model, folder=folder))
    assert len(shared_weights._mapped) == 0
    monkeypatch.setattr(shared_weights, "_LARGE", 1)
    monkeypatch.setattr(shared_weights, "_SMALLEST", 1)

    sessions = [open_session(model, folder=folder, optimization=level) for level in ("all", "off")]

    external = [one for one in model.graph.initializer if one.external_data]
    assert 0 < len(shared_weights._mapped) <= len(external)
    for session in sessions:
        np.testing.assert_allclose(
            logits(session), expected, rtol=1e-4, atol=1e-4 if expected.dtype == "float32" else 5e-3
        )
    del session
    sessions.clear()
    assert len(shared_weights._mapped) == 0
