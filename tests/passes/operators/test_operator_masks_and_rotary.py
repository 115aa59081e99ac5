"""Fused attention applies causal masks, windows and rotary embeddings that the operator has."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from attentions import attention
from decoders import Config, Decoder
from exports import after
from laws import difference, in_onnxruntime
from written import read

from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.workflow.verification import verify_models

BIAS, COS = 10, 7  # inputs of GroupQueryAttention


def fused_operators(model: onnx.ModelProto) -> list[tuple[dict[str, object], set[int]]]:
    """Return attributes and given inputs of each fused operator."""
    return [
        (
            {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute},
            {place for place, name in enumerate(node.input) if name},
        )
        for node in model.graph.node
        if node.op_type == "GroupQueryAttention"
    ]


def decoder(**options: object) -> onnx.ModelProto:
    return Decoder(Config(layers=2, head_dim=16, **options)).model()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("given", [{}, {"attention_mask": False}, {"position_ids": True}, {"dtype": "float16"}])
def test_lengths_in_place_of_masks_and_positions(given, cache):
    model = decoder(**given)
    result = after(model, Inject(cache=cache), FuseAttention(padding="lengths", max_length=128))
    (causal, inputs), (windowed, others) = fused_operators(result)
    assert BIAS not in inputs | others
    assert COS in inputs & others
    assert (causal["do_rotary"], windowed["do_rotary"]) == (1, 1)
    assert "local_window_size" not in causal
    assert windowed["local_window_size"] == Config().window
    report = verify(model, result, threads=1)
    assert report.verdict == "same", report


def test_a_mask_may_hide_any_token_unless_lengths_are_asked_for():
    result = after(decoder(), Inject(), FuseAttention(max_length=128))
    assert all(BIAS in inputs for _, inputs in fused_operators(result))
    assert verify(decoder(), result, threads=1).verdict == "same"
    without = after(decoder(attention_mask=False), Inject(), FuseAttention())
    windows = [attributes.get("local_window_size") for attributes, _ in fused_operators(without)]
    assert windows == [None, Config().window]
    assert not any(BIAS in inputs for _, inputs in fused_operators(without))


def test_rows_of_different_lengths_continue_as_each_alone():
    model = after(
        decoder(), Inject(cache="static", past_length="mask"), FuseAttention(padding="lengths", max_length=128)
    )
    run, capacity, lengths = in_onnxruntime(model), 32, (3, 9)
    random = np.random.default_rng(0)
    tokens, steps = random.integers(0, 61, (2, max(lengths))), random.integers(0, 61, (2, 3))

    def start(rows: int) -> dict[str, np.ndarray]:
        return {
            value.name: np.zeros((rows, 2, capacity, 16), np.float32)
            for value in model.graph.input
            if value.name.startswith("past_key_values.")
        }

    def step(ids: np.ndarray, mask: np.ndarray, cache: dict[str, np.ndarray]) -> np.ndarray:
        found = run({"input_ids": ids, "attention_mask": mask, **cache})
        cache |= {name: found[name.replace("past_key_values", "present")] for name in cache}
        return found["logits"][:, -1]

    cache, counts = start(2), np.array(lengths)
    mask = (np.arange(max(lengths)) < counts[:, None]).astype(np.int64)
    step(tokens, mask, cache)
    together = []
    for number in range(3):
        total = int(counts.max()) + number + 1
        mask = (np.arange(total) < counts[:, None] + number + 1).astype(np.int64)
        together.append(step(steps[:, number : number + 1], mask, cache))
    for row, length in enumerate(lengths):
        whole = np.concatenate([tokens[row, :length], steps[row]])[None]
        alone = start(1)
        step(whole[:, :length], np.ones((1, length), np.int64), alone)
        for number in range(3):
            count = length + number + 1
            expected = step(whole[:, count - 1 : count], np.ones((1, count), np.int64), alone)
            assert difference(together[number][row], expected[0]) < 1e-5


# Spellings of a rotary embedding

ANGLES = """steps = Cast<to = 1>(at) long = Unsqueeze(steps, second) angle = Mul(long, rates)
  cos = Cos(angle) sin = Sin(angle)"""
HALVES = """NAME1, NAME2 = Split<axis = 2, num_outputs = 2>(NAME0)
  a_NAME = Mul(NAME1, cos) b_NAME = Mul(NAME2, sin) c_NAME = Mul(NAME2, cos) d_NAME = Mul(NAME1, sin)
  e_NAME = Sub(a_NAME, b_NAME) f_NAME = Add(c_NAME, d_NAME) NAME = Concat<axis = 2>(e_NAME, f_NAME)"""
PAIRS = """p_NAME = Reshape(NAME0, apart) NAME1, NAME2 = Split<axis = 3, num_outputs = 2>(p_NAME)
  x_NAME = Squeeze(NAME1, fourth) y_NAME = Squeeze(NAME2, fourth)
  a_NAME = Mul(x_NAME, cos) b_NAME = Mul(y_NAME, sin) c_NAME = Mul(y_NAME, cos) d_NAME = Mul(x_NAME, sin)
  e_NAME = Sub(a_NAME, b_NAME) f_NAME = Add(c_NAME, d_NAME)
  g_NAME = Unsqueeze(e_NAME, fourth) h_NAME = Unsqueeze(f_NAME, fourth)
  o_NAME = Concat<axis = 3>(g_NAME, h_NAME) NAME = Reshape(o_NAME, joined)"""
PART = """r_NAME, s_NAME = Split<axis = 2, num_outputs = 2>(NAME0)
  NAME1, NAME2 = Split<axis = 2, num_outputs = 2>(r_NAME)
  a_NAME = Mul(NAME1, cos) b_NAME = Mul(NAME2, sin) c_NAME = Mul(NAME2, cos) d_NAME = Mul(NAME1, sin)
  e_NAME = Sub(a_NAME, b_NAME) f_NAME = Add(c_NAME, d_NAME) NAME = Concat<axis = 2>(e_NAME, f_NAME, s_NAME)"""
SCALED = ANGLES.replace("cos = Cos(angle)", "cos0 = Cos(angle) cos = Mul(cos0, half)").replace(
    "sin = Sin(angle)", "sin0 = Sin(angle) sin = Mul(sin0, half)"
)
BY_TOKEN = "steps0 = ReduceSum<keepdims = 1>(x, third) angle = Mul(steps0, rates) cos = Cos(angle) sin = Sin(angle)"


def rotated(spelling: str, angles: str = ANGLES, rates: int = 16, query: str | None = None) -> onnx.ModelProto:
    text = attention(
        hidden=f"h = Identity(x) {angles}",
        key=spelling.replace("NAME", "k"),
        query=(query or spelling).replace("NAME", "q"),
        constants=f"float[1, {rates}] rates, int64[4] apart = {{0, 0, 16, 2}}, int64[3] joined = {{0, 0, 32}},"
        " int64[1] fourth = {3}",
    )
    return read(text.replace("[b, n, 8]", "[b, n, 32]").replace("[8, 8]", "[32, 32]"), 18)


@pytest.mark.parametrize(
    ("model", "interleaved", "width"),
    [
        pytest.param(rotated(HALVES), 0, 16, id="halves"),
        pytest.param(rotated(PAIRS), 1, 16, id="pairs"),
        pytest.param(rotated(PART, rates=8), 0, 8, id="a part of the features"),
        pytest.param(rotated(HALVES, SCALED), 0, 16, id="scaled"),
        pytest.param(rotated(HALVES.replace("Add(c", "Sub(c").replace("Sub(a", "Add(a")), 0, 16, id="backwards"),
    ],
)
def test_rotary_embeddings_become_the_operators_own(model, interleaved, width):
    result = after(model, Inject(), FuseAttention(max_length=300))
    ((attributes, _),) = fused_operators(result)
    assert (attributes["do_rotary"], attributes["rotary_interleaved"]) == (1, interleaved)
    shapes = {tuple(one.dims) for one in result.graph.initializer if one.name.startswith("rotary_")}
    assert shapes == {(300, width)}
    assert not {"Cos", "Sin", "Split"} & {node.op_type for node in result.graph.node}
    report = verify_models(model, result)
    assert report.verdict == "same", report


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(rotated(HALVES, BY_TOKEN), id="angles of the tokens"),
        pytest.param(rotated(HALVES, query=HALVES.replace("cos", "sin")), id="other angles of queries"),
        pytest.param(rotated(HALVES.replace("Sub(a", "Add(a")), id="a reflection"),
    ],
)
def test_other_changes_of_keys_stay_in_the_graph(model):
    result = after(model, Inject(), FuseAttention(max_length=300))
    assert [attributes.get("do_rotary") for attributes, _ in fused_operators(result)] == [None]
    assert verify_models(model, result).verdict == "same"


def test_windows_of_some_heads_stay_in_the_graph():
    """Two heads, of which one sees three keys: the operator has one window for all."""
    text = attention(
        query="q1 = Reshape(q0, heads) q = Transpose<perm = [0, 2, 1, 3]>(q1)",
        key="k1 = Reshape(k0, heads) k = Transpose<perm = [0, 2, 1, 3]>(k1)",
        value="v1 = Reshape(v0, heads) v = Transpose<perm = [0, 2, 1, 3]>(v1)",
        allowed="past = LessOrEqual(row, column) far = Sub(column, row) near = Less(far, reach)\n"
        "  allowed = And(past, near)",
        after="m = Transpose<perm = [0, 2, 1, 3]>(c) logits = Reshape(m, joined)",
        constants="int64[4] heads = {0, 0, 2, 16}, int64[3] joined = {0, 0, 32}, int64[2, 1, 1] reach = {1000, 3}",
    )
    text = text.replace("kt = Transpose<perm = [0, 2, 1]>(k)", "kt = Transpose<perm = [0, 1, 3, 2]>(k)")
    model = read(text.replace("[b, n, 8]", "[b, n, 32]").replace("[8, 8]", "[32, 32]"), 18)
    result = after(model, Inject(), FuseAttention())
    ((attributes, inputs),) = fused_operators(result)
    assert BIAS in inputs
    assert "local_window_size" not in attributes
    assert verify_models(model, result).verdict == "same"
