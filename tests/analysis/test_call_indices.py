"""Assignment to some features of all tokens, as `q[..., :4] = y` is exported: the indices address a block."""

import pytest
from attentions import assert_law_of, attention
from exports import injected
from laws import assert_law
from written import read

from kvsurgeon.errors import UnsupportedError

# From x [b, n, 8] to h, with indices of three columns, each expanded to [b, n, 4].
WRITTEN = """y = MatMul(x, narrow)
 batch = Gather(sizes, nought)
 rows = Range(nought, batch, one)
 row3 = Reshape(rows, down3)
 TOKENS
 token3 = Reshape(tokens, down2)
 all8 = Range(nought, eight, one)
 four_of_8 = Slice(all8, first, four, first)
 bn = Slice(sizes, first, third)
 block = Concat<axis = 0>(bn, four)
 e0 = Expand(row3, block)
 e1 = Expand(token3, block)
 e2 = Expand(four_of_8, block)
 u0 = Unsqueeze(e0, last)
 u1 = Unsqueeze(e1, last)
 u2 = Unsqueeze(e2, last)
 addresses = Concat<axis = -1>(u0, u1, u2)
 DATA
 h = ScatterND(data, addresses, y)"""
CONSTANTS = """float[8, 4] narrow, int64 eight = {8}, int64[1] four = {4}, int64[1] last = {3},
 int64[3] down3 = {-1, 1, 1}, int64[2] down2 = {-1, 1}"""
MASK = "int64[b, n] attention_mask"
IN_ORDER = "tokens = Range(nought, length, one)"


def text(tokens: str = IN_ORDER, data: str = "data = Abs(x)", inputs: str = "") -> str:
    hidden = WRITTEN.replace("TOKENS", tokens).replace("DATA", data)
    return attention(hidden=hidden, constants=CONSTANTS, inputs=inputs)


@pytest.mark.parametrize("data", ["data = Abs(x)", "data = Expand(half, sizes)"], ids=["tokens", "context"])
def test_a_block_of_features(data):
    assert_law_of(text(data=data))


def test_a_block_of_features_of_keys():
    hidden = WRITTEN.replace("TOKENS", IN_ORDER).replace("DATA", "data = Abs(k0)").replace("h = Scatter", "k = Scatter")
    assert_law_of(attention(key=hidden, constants=CONSTANTS))


@pytest.mark.parametrize(
    ("tokens", "inputs"),
    [("t1 = Range(nought, length, one)\n t2 = Add(t1, one)\n tokens = Mod(t2, length)", ""),
     ("t1 = Range(nought, length, one)\n l1 = Sub(length, one)\n tokens = Sub(l1, t1)", ""),
     ("t1 = Range(nought, length, one)\n t2 = Sub(t1, one)\n tokens = Max(t2, nought)", "")],
    ids=["next token", "reversed", "previous token"],
)  # fmt: skip
def test_other_indices_are_rejected(tokens, inputs):
    with pytest.raises(UnsupportedError, match="by their position"):
        injected(read(text(tokens, inputs=inputs)))


def test_indices_of_the_total_length_make_a_sequence_state():
    tokens = "ms = Shape(attention_mask)\n m1 = Gather(ms, one)\n tokens = Range(nought, m1, one)"
    original = read(text(tokens, inputs=MASK))
    assert_law(original, injected(original))


def test_a_block_of_scores_of_all_keys_is_rejected():
    """The indices count the tokens of a call, along the axis of keys too."""
    masked = """allowed_scores = Where(allowed, s, low)
 batch = Gather(sizes, nought)
 sequences = Range(nought, batch, one)
 sequence3 = Reshape(sequences, down3)
 b1 = Slice(sizes, first, second)
 n1 = Slice(sizes, second, third)
 block = Concat<axis = 0>(b1, n1, n1)
 e0 = Expand(sequence3, block)
 e1 = Expand(column, block)
 e2 = Expand(row, block)
 u0 = Unsqueeze(e0, last)
 u1 = Unsqueeze(e1, last)
 u2 = Unsqueeze(e2, last)
 addresses = Concat<axis = -1>(u0, u1, u2)
 data = Expand(low, block)
 masked_scores = ScatterND(data, addresses, allowed_scores)"""
    with pytest.raises(UnsupportedError, match="an index for each token of a call, and writes to all tokens so far"):
        injected(read(attention(masked=masked, constants="int64[1] last = {3}, int64[3] down3 = {-1, 1, 1}")))
