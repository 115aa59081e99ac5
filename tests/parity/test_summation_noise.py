"""The tolerance widens by the noise of the reference model's sums in another order, and no further."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Decoder
from onnx import helper, numpy_helper

from kvsurgeon.parity import TOLERANCES, model_source, verify
from kvsurgeon.runtime import open_session

BOUND = TOLERANCES["float32"].bound
TIGHT = pytest.approx(BOUND / 20)  # of a reference without noise


def nudged(model: onnx.ModelProto, by: float) -> onnx.ModelProto:
    """Return the model with an error of up to `by` in each logit."""
    graph = model.graph
    maker = next(node for node in graph.node if "logits" in node.output)
    maker.output[:] = ["logits.exact"]
    for name, value in (("often", 1000.0), ("by", by)):
        graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    graph.node.extend(
        helper.make_node(operator, inputs, [output])
        for operator, inputs, output in (
            ("Mul", ["logits.exact", "often"], "logits.scaled"),
            ("Sin", ["logits.scaled"], "logits.wave"),
            ("Mul", ["logits.wave", "by"], "logits.off"),
            ("Add", ["logits.exact", "logits.off"], "logits"),
        )
    )
    return model


def change_optimized_reference(by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the logits of the reference by graph optimization, and those of no other model."""

    def open_changed(source, *, optimization, name, **options):
        if name == "the reference model" and optimization != "off":
            source = nudged(Decoder().model(), by)
        return open_session(source, optimization=optimization, name=name, **options)

    monkeypatch.setattr(model_source, "open_session", open_changed)


@pytest.mark.parametrize("by", [5 * BOUND, 9 * BOUND])
def test_widens_the_bound_to_the_noise_of_the_reference(by, monkeypatch):
    change_optimized_reference(by, monkeypatch)
    report = verify(Decoder().model(), CachedDecoder().model(), threads=1)

    assert report.verdict == "same"
    assert BOUND < report.error < report.bound <= 10 * BOUND
    assert any("the reference model's logits differ by" in note for note in report.notes)


def test_keeps_the_bound_without_noise():
    report = verify(Decoder().model(), nudged(CachedDecoder().model(), 5 * BOUND), threads=1)

    assert report.verdict == "different"
    assert report.bound < BOUND / 5


def test_keeps_the_bound_if_the_error_is_large(monkeypatch):
    change_optimized_reference(60 * BOUND, monkeypatch)
    report = verify(Decoder().model(), CachedDecoder().model(), threads=1)

    assert report.verdict == "different"
    assert report.bound == TIGHT
