"""Positions that later tokens change at masked tokens only are accepted, if no other token depends on masked tokens."""

import numpy as np
import pytest
from attentions import attention, in_order
from exports import injected
from laws import assert_law
from written import read

import kvsurgeon
from kvsurgeon.errors import UnsupportedError

MASK = "int64[b, n] attention_mask"
HIDDEN = """real = Cast<to = 9>(attention_mask)
 keys = Unsqueeze(real, second)
 causal = LessOrEqual(row, column)
 allowed = And(causal, keys)"""
TABLE = "float[900, 8] table"
CLIPPED = "away = Sub(row, start)\n places = Max(away, nought)"
WRAPPED = "places = Sub(row, start)"  # a negative index counts from the end of the table
FIRST = "start = ArgMax<axis = 1>(attention_mask)"
LEADING = """counts = CumSum(attention_mask, one)
 before = Equal(counts, nought)
 numbers = Cast<to = 7>(before)
 start = ReduceSum<keepdims = 1>(numbers, second)"""
MASKED = """none = Equal(attention_mask, nought)
 pads = Cast<to = 7>(none)
 start = ReduceSum<keepdims = 1>(pads, second)"""
MASKED_IF_THE_FIRST_IS = f"""{MASKED.replace("start", "all")}
 first_pad = Slice(pads, first, second, second)
 start = Mul(all, first_pad)"""
OF_ANY = f"{FIRST.replace('start', 'own')}\n start = ReduceMax<keepdims = 1>(own, first)"


def decoder(start: str, places: str = CLIPPED, *, hidden: str = "", allowed: str = HIDDEN, inputs: str = MASK,
            constants: str = TABLE) -> str:  # fmt: skip
    """Return the text of a decoder that adds the rows of a table at `places`, which are counted from `start`."""
    return attention(
        inputs=inputs, constants=constants, allowed=allowed,
        hidden=f"{start}\n {places}\n p = Gather(table, places)\n e = Add(x, p)\n {hidden or 'h = Identity(e)'}",
    )  # fmt: skip


def padded() -> dict[str, np.ndarray]:
    """Return four texts: without padding, with some, with a first chunk of padding alone, and with holes as well."""
    mask = np.ones((4, 9), dtype=np.int64)
    mask[1, :2] = mask[2, :6] = mask[3, :2] = mask[3, 5:7] = 0
    return {"x": np.random.default_rng(0).standard_normal((4, 9, 8)).astype(np.float32), "attention_mask": mask}


@pytest.mark.parametrize(("start", "places"), [(FIRST, CLIPPED), (FIRST, WRAPPED), (LEADING, CLIPPED)])
def test_positions_from_the_first_token_that_is_not_masked(start, places):
    original = in_order(read(decoder(start, places)))
    cached = injected(original)
    for cuts in [(4, 5, 6), (1, 2, 3), (6, 7), ()]:
        assert_law(original, cached, padded(), cuts)


def test_angles_from_the_first_token_that_is_not_masked():
    angles = f"{FIRST}\n {WRAPPED}\n numbers = Cast<to = 1>(places)\n angle = Unsqueeze(numbers, third)"
    turned = "wave = Cos(angle)\n k = Mul(k0, wave)"
    original = in_order(read(attention(inputs=MASK, allowed=HIDDEN, key=f"{angles}\n {turned}")))
    assert_law(original, injected(original), padded())


@pytest.mark.parametrize("start", [MASKED, MASKED_IF_THE_FIRST_IS])
def test_positions_that_a_later_hole_shifts_are_refused(start):
    with pytest.raises(UnsupportedError, match="context change if a later token is masked"):
        injected(in_order(read(decoder(start))))


def test_positions_from_the_last_token_are_refused():
    with pytest.raises(UnsupportedError, match="context"):
        injected(in_order(read(decoder(FIRST.replace("axis = 1", "axis = 1, select_last_index = 1"), WRAPPED))))


IN_BLOCKS = f"{CLIPPED.replace('places', 'each')}\n places = Div(each, four)"  # of padding that is longer than one


@pytest.mark.parametrize("places", [CLIPPED, WRAPPED, IN_BLOCKS])
def test_attention_that_does_not_hide_masked_keys_is_refused(places):
    text = decoder(
        FIRST, places, allowed="allowed = LessOrEqual(row, column)", constants=f"{TABLE}, int64 four = {{4}}"
    )
    with pytest.raises(UnsupportedError, match="masked tokens change with later tokens") as refused:
        injected(in_order(read(text)))
    assert refused.value.layer == 0


def test_attention_that_does_not_hide_masked_keys_of_a_model_with_a_limit_is_refused():
    """Nothing is compared beyond the limit, but what is masked up to it."""
    longer = "int64 limit = {100}, float twice = {2.0}, float once = {1.0}"
    scaled = "beyond = Greater(length, limit)\n scale = Where(beyond, twice, once)\n h = Mul(e, scale)"
    text = decoder(FIRST, hidden=scaled, constants=f"{TABLE}, {longer}", allowed="allowed = LessOrEqual(row, column)")
    with pytest.raises(UnsupportedError, match="masked tokens change with later tokens"):
        injected(in_order(read(text)))
    with pytest.raises(UnsupportedError, match="context change if a later token is masked"):
        injected(in_order(read(decoder(MASKED, hidden=scaled, constants=f"{TABLE}, {longer}"))))


def test_a_shift_that_reads_masked_tokens_is_refused():
    shifted = "before = Pad(e, shift)\n h = Add(e, before)"
    text = decoder(FIRST, hidden=shifted, constants=f"{TABLE}, int64[6] shift = {{0, 1, 0, 0, -1, 0}}")
    with pytest.raises(UnsupportedError, match="masked tokens change with later tokens"):
        injected(in_order(read(text)))


def test_another_mask_for_positions_than_for_attention_is_refused():
    text = decoder(FIRST.replace("attention_mask", "other"), inputs=f"{MASK}, int64[b, n] other")
    with pytest.raises(UnsupportedError, match="context depend on the total length"):
        injected(in_order(read(text)))


def test_positions_from_the_padding_of_any_sequence_are_refused():
    with pytest.raises(UnsupportedError, match="sequence"):
        injected(in_order(read(decoder(OF_ANY))))


def test_positions_are_counted_in_exports_of_a_fixed_length_beyond_40_tokens():
    hidden = "count = CumSum(m, one)\n learned = Gather(table, count)\n h = Add(x, learned)"
    text = attention(inputs="int64[b, n] m", hidden=hidden, constants="float[64, 8] table")
    assert len(kvsurgeon.inspect(read(text.replace("b, n", "b, 48"))).attentions) == 1
