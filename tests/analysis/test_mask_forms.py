"""Masks that the caller gives, in every form; and inputs that hold a number, whatever number it is."""

from __future__ import annotations

import numpy as np
import pytest
from attentions import attention
from exports import injected
from laws import assert_law
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.contract import Subject
from kvsurgeon.proof.attention.attention_inputs import HAS_A_KEY

CAUSAL = np.tril(np.ones((9, 9), bool))[None]
LOW = np.float32(-1e9)
MATRICES = {
    "1 for keys to attend to": ("float[b, n, n] m", "allowed = Greater(m, half)", CAUSAL.astype(np.float32)),
    "0 for keys to attend to": ("float[b, n, n] m", "allowed = Less(m, half)", 1 - CAUSAL.astype(np.float32)),
    "true for keys to attend to": ("bool[b, n, n] m", "allowed = Identity(m)", CAUSAL),
    "true for hidden keys": ("bool[b, n, n] m", "allowed = Not(m)", ~CAUSAL),
    "integers": ("int64[b, n, n] m", "allowed = Cast<to = 9>(m)", CAUSAL.astype(np.int64)),
    "names of queries and keys": ("float[b, q, k] m", "allowed = Greater(m, half)", CAUSAL.astype(np.float32)),
}


def texts() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(5).standard_normal((2, 9, 8)).astype(np.float32)}


@pytest.mark.parametrize(("inputs", "allowed", "mask"), MATRICES.values(), ids=MATRICES)
def test_a_mask_of_queries_and_keys(inputs, allowed, mask):
    model = read(attention(inputs=inputs, allowed=allowed))
    result = injected(model)
    assert [size.dim_param for size in result.graph.input[1].type.tensor_type.shape.dim][1:] == [
        "sequence_length", "total_sequence_length",
    ]  # fmt: skip
    assert_law(model, result, texts() | {"m": np.repeat(mask, 2, axis=0)})


def test_a_mask_that_is_added():
    masked = "masked_scores = Add(s, m)"
    model = read(attention(inputs="float[b, n, n] m", masked=masked))
    assert_law(model, injected(model), texts() | {"m": np.repeat(np.where(CAUSAL, 0, LOW), 2, axis=0)})


PADDED = np.array([[1] * 9, [0, 0, *[1] * 7]])
PADDING = {
    "1 for padding": ("int64[b, n] m", "p = Cast<to = 9>(m)\n p3 = Unsqueeze(p, second)\n", 1 - PADDED),
    "true for padding": ("bool[b, k] m", "p3 = Unsqueeze(m, second)\n", PADDED == 0),
}


@pytest.mark.parametrize(("inputs", "padding", "mask"), PADDING.values(), ids=PADDING)
def test_a_padding_mask(inputs, padding, mask):
    allowed = f"causal = LessOrEqual(row, column)\n {padding} kept = Not(p3)\n allowed = And(causal, kept)"
    model = read(attention(inputs=inputs, allowed=allowed))
    result = injected(model)
    assert result.graph.input[1].type.tensor_type.shape.dim[1].dim_param == "total_sequence_length"
    expected = texts() | {"m": mask}
    assert_law(model, result, {name: array[:1] for name, array in expected.items()})  # without padded rows


NOT_CAUSAL = {
    "a prefix length": ("int64 z", "p = Less(row, z)"),
    "a prefix length of each sequence": ("int64[b] z", "z3 = Unsqueeze(z, both)\n p = Less(row, z3)"),
    "a switch": ("bool z", "p = Identity(z)"),
    "a threshold": ("float z", "five = Constant<value_float = 5.0>()\n p = Greater(z, five)"),
    "one number": ("int64 z", "five = Constant<value_int = 5>()\n p = Equal(z, five)"),
    "a vector of switches": ("bool[w] z", "z1 = Cast<to = 6>(z)\n z2 = ReduceSum(z1, first)\n p = Cast<to = 9>(z2)"),
}


@pytest.mark.parametrize(("inputs", "prefix"), NOT_CAUSAL.values(), ids=NOT_CAUSAL)
def test_a_number_that_shows_later_keys_is_refused(inputs, prefix):
    allowed = f"causal = LessOrEqual(row, column)\n {prefix}\n allowed = Or(causal, p)"
    with pytest.raises(UnsupportedError, match=r"not causal|compared with positions"):
        injected(read(attention(inputs=inputs, allowed=allowed, constants="int64[2] both = {1, 2}")))


def test_a_number_of_tokens_of_each_sequence():
    allowed = (
        "causal = LessOrEqual(row, column)\n z3 = Unsqueeze(z, both)\n p = Less(row, z3)\n allowed = And(causal, p)"
    )
    text = attention(inputs="int64[b] z", allowed=allowed, constants="int64[2] both = {1, 2}, float lowest = {-1e30}",
                     masked="masked_scores = Where(allowed, s, lowest)")  # fmt: skip
    model = read(text)
    assert_law(model, injected(model), texts() | {"z": np.array([9, 6])})


def test_positions_that_are_compared_in_two_layers():
    allowed = "p = Unsqueeze(position, second)\n allowed = LessOrEqual(row, p)"
    after = (
        "q2 = MatMul(c, wq)\n k2 = MatMul(c, wk)\n k2t = Transpose<perm = [0, 2, 1]>(k2)\n s2 = MatMul(q2, k2t)\n"
        "m2 = Where(allowed, s2, low)\n w2 = Softmax<axis = -1>(m2)\n logits = MatMul(w2, c)"
    )
    model = read(attention(inputs="int64[n] position", allowed=allowed, after=after))
    assert_law(model, injected(model), texts() | {"position": np.arange(9)})


COUNT = (
    "allowed0 = LessOrEqual(row, column)\n c3 = Unsqueeze(count, both)\n counted = Less(row, c3)\n"
    "allowed = And(allowed0, counted)"
)


@pytest.mark.parametrize(
    ("written", "assumed"),
    [
        ({"inputs": "int64[b] count", "allowed": COUNT}, "count"),
        ({"inputs": "float factor", "scores": "s = Mul(s0, factor)"}, None),
    ],
    ids=["a count that may hide every key", "a factor of the scores"],
)
def test_that_a_number_leaves_each_query_a_key_is_assumed_where_it_may_not(written, assumed):
    proof = Subject.of(read(attention(constants="int64[2] both = {1, 2}", **written))).proof()
    assert proof.assumptions.get(HAS_A_KEY) == assumed
