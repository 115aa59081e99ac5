"""One latent replaces the values of all heads: exactly if their rank allows it, and never where it cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder, in_bfloat16
from exports import after
from grouped import grouped_attention
from laws import assert_law, difference, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.heads.low_rank_values import LowRankValues
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.passes.opset.raise_opset import RaiseOpset


class LowRank(Decoder):
    """Values of two heads of 8 features have rank 5."""

    def weight(self, name: str, rows: int, columns: int, gain: float = 1.0) -> str:
        if name != "value":
            return super().weight(name, rows, columns, gain)
        values = self._random.standard_normal((rows, 5)) @ self._random.standard_normal((5, columns)) / rows
        return self.graph.constant(values, self.config.dtype, to=name)


CONFIG = Config(layers=2, vocabulary=9)
BIAS = {"values": "v0 = MatMul(x, v_weight) v = Add(v0, bias)", "constants": "float[6] bias"}
FUSED: dict[str, Any] = {
    "keys": "kv = MatMul(x, both) k, v = Split<axis = -1, num_outputs = 2>(kv)", "values": "",
    "constants": "float[8, 12] both",
}  # fmt: skip
FLAT: dict[str, Any] = {
    "repeated_values": "vf = Reshape(vh, v3)",
    "context": "ones = Reshape(one, single) n1 = Reshape(length, single) w3 = Concat<axis = 0>(last, n1, n1) "
    "v3 = Concat<axis = 0>(last, n1, three) s4 = Concat<axis = 0>(last, four, n1, three)",
    "constants": "int64[1] single = {1}, int64[1] three = {3}, int64[1] four = {4}",
}  # fmt: skip
ONE_HEAD: dict[str, Any] = {
    "repeated_keys": "nk = MatMul(x, narrow_k) ky = Unsqueeze(nk, single)",
    "repeated_values": "vf = MatMul(x, narrow_v)",
    "context": "ones = Reshape(one, single) n1 = Reshape(length, single) n4 = Mul(n1, four) "
    "w3 = Concat<axis = 0>(last, n4, n1) s4 = Concat<axis = 0>(last, four, n1, three)",
    "constants": f"{FLAT['constants']}, float[8, 3] narrow_k, float[8, 3] narrow_v",
}  # fmt: skip
SUMMED = "wf = Reshape(weights, w3) sf = MatMul(wf, vf) summed = Reshape(sf, s4)"
FUSED_OPERATOR = FuseAttention(operator="attention")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "ids.txt"
    path.write_text(" ".join(map(str, np.random.default_rng(0).integers(0, 9, 240))))
    return path


def applied(model: onnx.ModelProto, rank: int, text: Path) -> tuple[Subject, Changed]:
    subject = Subject.of(model)
    subject.text = text
    outcome = LowRankValues(rank=rank).apply(subject)
    assert isinstance(outcome, Changed)
    return subject, outcome


def logits(model: onnx.ModelProto, original: onnx.ModelProto) -> np.ndarray:
    return in_onnxruntime(model)(texts(original))["logits"]


def test_values_of_low_rank_are_replaced_exactly_with_a_smaller_cache(text: Path) -> None:
    model = LowRank(CONFIG).model()
    subject, outcome = applied(model, 5, text)
    assert difference(logits(io.to_proto(subject.model), model), logits(model, model)) < 1e-4
    assert outcome.cache_bytes is not None
    before, after = outcome.cache_bytes
    assert after / before == (16 + 5) / 32
    result = io.to_proto(subject.model)
    Inject().apply(subject)
    assert_law(result, io.to_proto(subject.model), texts(model))


def test_a_fixed_batch(text: Path) -> None:
    model = LowRank(Config(layers=1, vocabulary=9, static=(2, 9))).model()
    subject, _ = applied(model, 5, text)
    assert difference(logits(io.to_proto(subject.model), model), logits(model, model)) < 1e-4


def test_attention_as_one_operator_is_written_in_others(text: Path) -> None:
    model = after(LowRank(Config(layers=1, vocabulary=9)).model(), RaiseOpset(opset=23), FUSED_OPERATOR)
    assert any(node.op_type == "Attention" for node in model.graph.node)
    subject, _ = applied(model, 5, text)
    assert difference(logits(io.to_proto(subject.model), model), logits(model, model)) < 1e-4


@pytest.mark.parametrize(
    "parts",
    [{}, BIAS, FUSED, FLAT, ONE_HEAD],
    ids=["plain", "a bias", "one product for keys and values", "heads in the batch", "one head for all queries"],
)
def test_the_graph_computes_what_projected_values_give(parts: dict[str, Any], text: Path) -> None:
    written = grouped_attention(**parts)
    if "vf" in written:
        written = written.replace("summed = MatMul(weights, vy)", SUMMED)
    model = read(written)
    subject, outcome = applied(model, 2, text)
    assert outcome.equal_models is not None
    ((expected, _),) = outcome.equal_models()
    found = logits(io.to_proto(subject.model), model)
    assert difference(found, logits(io.to_proto(expected), model)) < 1e-4
    assert difference(found, logits(model, model)) > 1e-3  # the rank is too low for no loss


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ("v0 = MatMul(x, v_weight) v = LayerNormalization(v0, norm)", "separate columns"),
        ("v0 = MatMul(x, v_weight) rf = Cast<to = 1>(rows) v = Mul(v0, rf)", "depend on the position|not a linear map"),
    ],
)
def test_values_that_are_not_linear_are_rejected(values: str, reason: str, text: Path) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        applied(read(grouped_attention(values=values, constants="float[6] norm")), 2, text)


def test_einsums_are_rejected_with_the_pass_that_replaces_them(text: Path) -> None:
    product = 'summed = Einsum<equation = "bhnm,bhmd->bhnd">(weights, vy)'
    model = grouped_attention().replace("summed = MatMul(weights, vy)", product)
    with pytest.raises(UnsupportedError, match="run einsum-to-matmul first"):
        applied(read(model), 2, text)


def test_a_result_that_something_else_reads_is_rejected(text: Path) -> None:
    model = grouped_attention().replace("logits = MatMul(joined, out)", "b = Add(joined, q) logits = MatMul(b, out)")
    with pytest.raises(UnsupportedError, match="depends on the token"):
        applied(read(model), 2, text)


def test_ranks_and_texts_that_are_missing(text: Path) -> None:
    model = Decoder(CONFIG).model()
    with pytest.raises(UsageError, match="--text FILE"):
        LowRankValues(rank=2).apply(Subject.of(model))
    with pytest.raises(UsageError, match="rank"):
        LowRankValues(rank=0).apply(Subject.of(model))
    subject = Subject.of(model)
    subject.text = text
    assert isinstance(LowRankValues(rank=16).apply(subject), Unchanged)


def test_bfloat16_is_rejected(text: Path) -> None:
    subject = Subject.of(in_bfloat16(Decoder(CONFIG).model()))
    subject.text = text
    with pytest.raises(UnsupportedError, match=r"rounded twice.*found bfloat16"):
        LowRankValues(rank=3).apply(subject)
