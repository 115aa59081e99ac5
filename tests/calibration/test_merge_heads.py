"""Merging by principal components loses nothing if heads are copies, and says which keys it can only average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from decoders import Config, Decoder, in_bfloat16
from grouped import grouped_attention, kv_heads, logits
from laws import difference, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.heads.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.heads.replicate_kv_heads import ReplicateKvHeads

TABLES = "angles = Mul(rows_f, rates) cos = Cos(angles) sin = Sin(angles)"
POSITIONS = "rows_f = Cast<to = 1>(rows)"


HALVES = (
    "HEAD_a, HEAD_b = Split<axis = -1, num_outputs = 2>(HEAD) HEAD_ac = Mul(HEAD_a, cos) HEAD_bs = Mul(HEAD_b, sin) "
    "HEAD_as = Mul(HEAD_a, sin) HEAD_bc = Mul(HEAD_b, cos) HEAD_x = Sub(HEAD_ac, HEAD_bs) "
    "HEAD_y = Add(HEAD_as, HEAD_bc) "
    "HEAD_r = Concat<axis = -1>(HEAD_x, HEAD_y)"
)
NEIGHBORS = (
    "HEAD_p = Reshape(HEAD, pairs_HEAD) HEAD_a0 = Gather<axis = -1>(HEAD_p, zero) "
    "HEAD_b0 = Gather<axis = -1>(HEAD_p, one) "
    "HEAD_ac = Mul(HEAD_a0, cos) HEAD_bs = Mul(HEAD_b0, sin) HEAD_as = Mul(HEAD_a0, sin) HEAD_bc = Mul(HEAD_b0, cos) "
    "HEAD_x0 = Sub(HEAD_ac, HEAD_bs) HEAD_y0 = Add(HEAD_as, HEAD_bc) HEAD_x = Unsqueeze(HEAD_x0, last) "
    "HEAD_y = Unsqueeze(HEAD_y0, last) HEAD_q = Concat<axis = -1>(HEAD_x, HEAD_y) HEAD_r = Reshape(HEAD_q, joined_HEAD)"
)
PARTLY = (
    "HEAD_a, HEAD_b, HEAD_c = Split<axis = -1>(HEAD, thirds) HEAD_ac = Mul(HEAD_a, cos) HEAD_bs = Mul(HEAD_b, sin) "
    "HEAD_as = Mul(HEAD_a, sin) HEAD_bc = Mul(HEAD_b, cos) HEAD_x = Sub(HEAD_ac, HEAD_bs) "
    "HEAD_y = Add(HEAD_as, HEAD_bc) "
    "HEAD_r = Concat<axis = -1>(HEAD_x, HEAD_y, HEAD_c)"
)


def rotary_model(rotation: str, head_dim: int, rates: int) -> str:
    """Return a decoder whose queries and keys are rotated."""
    text = grouped_attention(
        context=f"{POSITIONS} {TABLES}", head_dim=head_dim,
        constants=f"float[{rates}] rates = {{{', '.join(str(0.7**place) for place in range(rates))}}}, "
        f"int64[5] pairs_qt = {{0, 4, -1, {head_dim // 2}, 2}}, int64[5] pairs_kt = {{0, 2, -1, {head_dim // 2}, 2}}, "
        f"int64[4] joined_qt = {{0, 4, -1, {head_dim}}}, int64[4] joined_kt = {{0, 2, -1, {head_dim}}}, "
        f"int64[3] thirds = {{{rates}, {rates}, {head_dim - 2 * rates}}}",
    )  # fmt: skip
    text = text.replace("k5 = Unsqueeze(kt, two)", f"{rotation.replace('HEAD', 'kt')} k5 = Unsqueeze(kt_r, two)")
    return text.replace("raw = MatMul(qt, kx)", f"{rotation.replace('HEAD', 'qt')} raw = MatMul(qt_r, kx)")


EXACT = {
    "no positions": grouped_attention(),
    "halves": rotary_model(HALVES, 4, 2),
    "neighbors": rotary_model(NEIGHBORS, 4, 2),
    "a part of the features": rotary_model(PARTLY, 6, 2),
    "a bias": grouped_attention(
        keys="k0 = MatMul(x, k_weight) k = Add(k0, bias)", values="v0 = MatMul(x, v_weight) v = Add(bias, v0)",
        constants="float[6] bias",
    ),
    "transposed weights": grouped_attention(
        keys="kw = Transpose<perm = [1, 0]>(flipped) k = MatMul(x, kw)", constants="float[6, 8] flipped"
    ),
    "one product for keys and values": grouped_attention(
        keys="kv = MatMul(x, both) k, v = Split<axis = -1, num_outputs = 2>(kv)", values="",
        constants="float[8, 12] both",
    ),
    "keys and values head by head": grouped_attention(
        keys="kv = MatMul(x, both) pairs = Reshape(kv, apart) k1 = Gather<axis = 3>(pairs, zero) "
        "k = Reshape(k1, k_flat)",
        values="v1 = Gather<axis = 3>(pairs, one) v = Reshape(v1, k_flat)",
        constants="float[8, 12] both, int64[5] apart = {0, 0, 2, 2, 3}",
    ),
}  # fmt: skip
AVERAGED = {
    "a norm over all heads": grouped_attention(
        keys="k0 = MatMul(x, k_weight) k1 = Mul(k0, k0) k2 = ReduceMean<keepdims = 1>(k1, last) k3 = Sqrt(k2) "
        "k = Div(k0, k3)"
    ),
    "a norm": grouped_attention(
        keys="k0 = MatMul(x, k_weight) kk = Reshape(k0, k_shape) k1 = Mul(kk, kk) "
        "k2 = ReduceMean<keepdims = 1>(k1, last) "
        "k3 = Sqrt(k2) ks = Div(kk, k3) k = Reshape(ks, k_flat)"
    ),
    "a bound": grouped_attention(keys="k0 = MatMul(x, k_weight) k = Clip(k0, low_k, high_k)",
                                 constants="float low_k = {-40}, float high_k = {40}"),
    "a scale for each head": grouped_attention(
        keys="k0 = MatMul(x, k_weight) kk = Reshape(k0, k_shape) ks = Mul(kk, scale) k = Reshape(ks, k_flat)",
        constants="float[2, 1] scale = {1, 3}",
    ),
    "a scale that depends on the position": grouped_attention(
        keys="k0 = MatMul(x, k_weight) k = Mul(k0, decay)",
        context=f"{POSITIONS} decay = Sin(rows_f)",
    ),
}  # fmt: skip
KEPT = {
    "a gate": grouped_attention(
        keys="k0 = MatMul(x, k_weight) open = MatMul(x, gate) k = Mul(k0, open)", constants="float[8, 1] gate"
    ),
    "a low rank branch": grouped_attention(
        keys="k0 = MatMul(x, k_weight) ka = MatMul(x, down) kb = MatMul(ka, up) k = Add(k0, kb)",
        constants="float[8, 2] down, float[2, 6] up",
    ),
    "another product that reads the keys": grouped_attention(constants="float[6, 9] more").replace(
        "logits = MatMul(joined, out)", "a = MatMul(joined, out) b = MatMul(k, more) logits = Add(a, b)"
    ),
}  # fmt: skip
REJECTED = {
    "values that are the keys": (grouped_attention(values="v = Identity(k)"), "the same weight columns"),
    "queries that are added to the result": (
        grouped_attention().replace("logits = MatMul(joined, out)", "b = Add(joined, q) logits = MatMul(b, out)"),
        "depends on the token",
    ),
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "ids.txt"
    path.write_text(" ".join(map(str, np.random.default_rng(0).integers(0, 9, 240))))
    return path


def merged(model: str, text: Path, count: int = 2) -> tuple[Subject, Subject, tuple[str, ...]]:
    """Return a model with each KV head twice, the same with `count` heads again, and the notes."""
    before = Subject.of(read(model))
    ReplicateKvHeads(kv_heads=4).apply(before)
    after = Subject.of(io.to_proto(before.model))
    after.text = text
    outcome = MergeKvHeads(kv_heads=count).apply(after)
    assert isinstance(outcome, Changed)
    return before, after, outcome.notes


@pytest.mark.parametrize("case", EXACT)
def test_copies_of_heads_are_merged_exactly(case: str, text: Path) -> None:
    before, after, notes = merged(EXACT[case], text)
    assert kv_heads(after) == [2]
    assert difference(logits(after), logits(before)) < 1e-4
    assert not notes


@pytest.mark.parametrize("case", ["halves", "neighbors", "a part of the features"])
def test_keys_in_a_space_that_one_head_holds_are_merged_exactly(case: str, text: Path) -> None:
    """A second head whose pairs are those of the first, each times a complex number, needs no head of its own."""
    model = read(EXACT[case])
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    size = 6 if case == "a part of the features" else 4
    array = np.random.default_rng(1).standard_normal((8, 2 * size)).astype(np.float32)
    pairs = {"halves": [(0, 2), (1, 3)], "neighbors": [(0, 1), (2, 3)], "a part of the features": [(0, 2), (1, 3)]}[
        case
    ]
    for place, (x, y) in enumerate(pairs):
        turned = (array[:, x] + 1j * array[:, y]) * (1.5 + place * 1j)
        array[:, size + x], array[:, size + y] = turned.real, turned.imag
    for place in range(4, size):
        array[:, size + place] = array[:, place] * 2
    weights["k_weight"].ClearField("float_data")
    weights["k_weight"].raw_data = array.tobytes()
    weights["v_weight"].ClearField("float_data")
    weights["v_weight"].raw_data = np.tile(array[:, :size] * 0.5, 2).tobytes()
    before, after = Subject.of(model), Subject.of(model)
    after.text = text
    MergeKvHeads(kv_heads=1).apply(after)
    assert kv_heads(after) == [1]
    assert difference(logits(after), logits(before)) < 1e-4


@pytest.mark.parametrize("config", [{"position_ids": True}, {"static": (1, 24)}], ids=["positions", "fixed shapes"])
def test_rotary_embeddings_of_exports_are_recognized(config: dict[str, Any], text: Path) -> None:
    subject = Subject.of(Decoder(Config(vocabulary=9, layers=1, windowed=(), **config)).model())
    subject.text = text
    outcome = MergeKvHeads(kv_heads=1).apply(subject)
    assert isinstance(outcome, Changed)
    assert not outcome.notes


SLOPES = "slopes = Reshape(slope, per_head) sloped = Add(scores, slopes) masked = Add(sloped, mask)"


@pytest.mark.parametrize("slopes", [False, True], ids=["a shared mask", "a bias for each head"])
def test_heads_that_are_alike_are_merged_wherever_they_are(slopes: bool, text: Path) -> None:
    """Heads 0 and 2 are equal, and so are 1 and 3; they become neighbors unless query heads differ otherwise."""
    constants = "float[4] slope = {0, 1, 2, 3}, int64[4] per_head = {1, 4, 1, 1}" if slopes else ""
    written = grouped_attention(constants=constants)
    model = read(written.replace("masked = Add(scores, mask)", SLOPES) if slopes else written)
    before = Subject.of(model)
    ReplicateKvHeads(kv_heads=4).apply(before)
    for name in ("q_weight", "k_weight", "v_weight", "out"):
        value = before.model.graph.initializers[name]
        array = value.const_value.numpy()  # type: ignore[union-attr]
        axis = 0 if name == "out" else 1
        parts = np.split(array, 4, axis=axis)
        value.const_value = ir.Tensor(np.concatenate([parts[head] for head in (0, 2, 1, 3)], axis=axis), name=name)
    after = Subject.of(io.to_proto(before.model))
    after.text = text
    MergeKvHeads(kv_heads=2).apply(after)
    assert kv_heads(after) == [2]
    assert (difference(logits(after), logits(before)) < 1e-4) is not slopes


@pytest.mark.parametrize("case", AVERAGED)
def test_keys_that_are_not_linear_in_their_projection_are_averaged(case: str, text: Path) -> None:
    before, after, (note,) = merged(AVERAGED[case], text)
    assert note.startswith(f"keys are merged by method={'first' if 'all heads' in case else 'mean'}: ")
    assert difference(logits(after), logits(before)) < 1e-4  # of copies the mean is exact too


@pytest.mark.parametrize("case", KEPT)
def test_keys_whose_weights_cannot_be_changed_are_those_of_the_first_head(case: str, text: Path) -> None:
    subject = Subject.of(read(KEPT[case]))
    subject.text = text
    outcome = MergeKvHeads(kv_heads=1).apply(subject)
    assert isinstance(outcome, Changed)
    assert outcome.notes[0].startswith("keys are merged by method=first: ")


@pytest.mark.parametrize("case", REJECTED)
def test_features_with_another_purpose_are_rejected(case: str, text: Path) -> None:
    model, reason = REJECTED[case]
    subject = Subject.of(read(model))
    subject.text = text
    with pytest.raises(UnsupportedError, match=reason):
        MergeKvHeads(kv_heads=1).apply(subject)


def test_quantized_weights_are_rejected(text: Path) -> None:
    model = grouped_attention(
        keys="kw = DequantizeLinear(stored, step) k = MatMul(x, kw)", constants="int8[8, 6] stored, float step = {0.1}"
    )
    with pytest.raises(UnsupportedError, match="method=first"):
        merged(model, text)


def test_components_need_a_text() -> None:
    with pytest.raises(UsageError, match="--text FILE"):
        MergeKvHeads(kv_heads=1, method="pca").apply(Subject.of(read(grouped_attention())))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_components_lose_less_than_means(dtype: str, text: Path) -> None:
    config = Config(dtype=dtype, vocabulary=9, layers=1, windowed=())
    model = Decoder(config).model()
    feeds = texts(model)
    expected = in_onnxruntime(model)(feeds)["logits"].astype(np.float64)
    errors = []
    for method in ("pca", "mean"):
        subject = Subject.of(model)
        subject.text = text
        MergeKvHeads(kv_heads=1, method=method).apply(subject)
        found = in_onnxruntime(io.to_proto(subject.model))(feeds)["logits"].astype(np.float64)
        errors.append(float(np.square(found - expected).mean()))
    assert errors[0] < 0.7 * errors[1]


def test_bfloat16_is_calibrated_in_float32(text: Path) -> None:
    subject = Subject.of(in_bfloat16(Decoder(Config(vocabulary=9, layers=1, windowed=())).model()))
    subject.text = text
    assert isinstance(MergeKvHeads(kv_heads=1, method="pca").apply(subject), Changed)
