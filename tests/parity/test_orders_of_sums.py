"""What an original's own logits move by when its sums are taken in another order is no mistake of the surgery's."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Decoder
from onnx import helper, numpy_helper

from kvsurgeon.parity import TOLERANCES, verifier, verify
from kvsurgeon.runtime import open_session

ALLOWED = TOLERANCES["float32"].error


def nudged(model: onnx.ModelProto, by: float) -> onnx.ModelProto:
    """The model with logits that are off by up to `by`, each by its own."""
    graph = model.graph
    maker = next(node for node in graph.node if "logits" in node.output)
    maker.output[:] = ["logits.own"]
    for name, value in (("often", 1000.0), ("by", by)):
        graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    graph.node.extend(
        helper.make_node(operator, inputs, [output])
        for operator, inputs, output in (
            ("Mul", ["logits.own", "often"], "logits.turned"),
            ("Sin", ["logits.turned"], "logits.wave"),
            ("Mul", ["logits.wave", "by"], "logits.off"),
            ("Add", ["logits.own", "logits.off"], "logits"),
        )
    )
    return model


def rewritten(by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime's optimisation moves the original's logits by so much, and nobody else's."""

    def open_rewritten(source, *, optimisation, name, **options):
        if name == "the original" and optimisation != "off":
            source = nudged(Decoder().model(), by)
        return open_session(source, optimisation=optimisation, name=name, **options)

    monkeypatch.setattr(verifier, "open_session", open_rewritten)


@pytest.mark.parametrize("by", [5 * ALLOWED, 9 * ALLOWED])
def test_an_original_that_moves_as_much_itself_is_no_reason_to_refuse(by, monkeypatch):
    rewritten(by, monkeypatch)
    report = verify(Decoder().model(), CachedDecoder().model(), threads=1)

    assert report.verdict == "same"
    assert ALLOWED < report.error < report.tolerance.error <= 10 * ALLOWED
    assert "the original's own logits move by" in report.notes[-1]


def test_one_that_does_not_move_is_held_to_what_is_usual():
    report = verify(Decoder().model(), nudged(CachedDecoder().model(), 5 * ALLOWED), threads=1)

    assert report.verdict == "different"
    assert report.tolerance.error == ALLOWED


def test_what_is_far_off_is_different_however_much_the_original_moves(monkeypatch):
    rewritten(60 * ALLOWED, monkeypatch)
    report = verify(Decoder().model(), CachedDecoder().model(), threads=1)

    assert report.verdict == "different"
    assert report.tolerance.error == ALLOWED
