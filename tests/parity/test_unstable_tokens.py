"""Tokens at which rounding alone moves the reference model's logits further than allowed are left out, if few are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Decoder
from onnx import helper, numpy_helper

from kvsurgeon.parity import verify
from kvsurgeon.parity.arithmetic.rounding import ReferenceNoise

TOKEN = 7


def off_at_one_token(by: float) -> onnx.ModelProto:
    """Return a decoder with a cache whose logits are off where the text has one token."""
    model = CachedDecoder().model()
    graph = model.graph
    maker = next(node for node in graph.node if "logits" in node.output)
    maker.output[:] = ["logits.exact"]
    for name, value in (("token", np.int64(TOKEN)), ("last", np.array([-1])), ("by", np.float32(by))):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    graph.node.extend(
        helper.make_node(operator, inputs, [output], **attributes)
        for operator, inputs, output, attributes in (
            ("Equal", ["input_ids", "token"], "is_token", {}),
            ("Cast", ["is_token"], "at_token", {"to": onnx.TensorProto.FLOAT}),
            ("Unsqueeze", ["at_token", "last"], "at_token.row", {}),
            ("Mul", ["at_token.row", "by"], "logits.off", {}),
            ("Add", ["logits.exact", "logits.off"], "logits", {}),
        )
    )
    return model


def unstable(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    monkeypatch.setattr(
        ReferenceNoise, "stable_tokens", lambda _self, scenario, _bound: ~np.isin(scenario.tokens, tokens)
    )


def test_a_few_unstable_tokens_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = off_at_one_token(0.02)
    assert verify(Decoder().model(), model, seed=1, threads=1).verdict == "different"  # all its tokens are stable
    unstable(monkeypatch, [TOKEN])
    report = verify(Decoder().model(), model, seed=1, threads=1)
    assert report.verdict == "same"
    count = sum(one.left_out for one in report.comparisons)
    assert count > 0
    assert f"{count} tokens were left out: rounding alone" in " ".join(report.notes)


def test_a_text_of_unstable_tokens_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    unstable(monkeypatch, list(range(30)))  # of 61
    assert verify(Decoder().model(), off_at_one_token(0.02), seed=1, threads=1).verdict == "different"


def test_a_large_difference_is_no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    unstable(monkeypatch, [TOKEN])
    assert verify(Decoder().model(), off_at_one_token(5.0), seed=1, threads=1).verdict == "different"
