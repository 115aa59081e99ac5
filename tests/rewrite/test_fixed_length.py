"""Exports of a fixed length whose context reads a mask at the indices of all tokens."""

from __future__ import annotations

import onnx
import pytest
from attentions import attention
from exports import injected
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.parity import verify

LENGTH = 24
GUARDED = """visible = Cast<to = TYPE>(allowed)
  count = ReduceSum(visible, last)
  none = Less(count, least)
  logits = Where(none, zeros, c)"""
ALLOWED = """causal = LessOrEqual(row, column)
  keys = Unsqueeze(row, first)
  three = Concat<axis = 0>(batch, alone, width)
  keys_of_all = Expand(keys, three)
  rows = Range(nought, rows_in_all, one)
  batch_row = Unsqueeze(rows, later_axes)
  rows_of_all = Expand(batch_row, three)
  places = Unsqueeze(keys_of_all, last)
  row_places = Unsqueeze(rows_of_all, last)
  pairs = Concat<axis = -1>(row_places, places)
  given = Cast<to = MASK>(attention_mask)
  gathered = GatherND(given, pairs)
  marked = Cast<to = 9>(gathered)
  allowed = And(causal, marked)"""


def guarded(*, mask: int = 9, counted: int = 1) -> onnx.ModelProto:
    """Return a decoder of 24 tokens whose results are 0 at queries without a key, which it counts."""
    text = attention(
        inputs="int64[b, n] attention_mask",
        constants="int64[1] alone = {1}, int64[2] later_axes = {1, 2}, int64[1] last = {-1}, int64[1] width = {24}, "
        "int64 rows_in_all = {1}, int64[1] batch = {1}, float least = {0.5}, float zeros = {0.0}",
        allowed=ALLOWED.replace("MASK", str(mask)), after=GUARDED.replace("TYPE", str(counted)),
    )  # fmt: skip
    return read(text.replace("b, n", f"1, {LENGTH}"))


@pytest.mark.parametrize("cache", ["dynamic", "new-tokens"])
@pytest.mark.parametrize("mask", [onnx.TensorProto.BOOL, onnx.TensorProto.INT64])
def test_tokens_that_are_counted_are_those_so_far(mask, cache):
    original = guarded(mask=mask)
    report = verify(original, injected(original, cache=cache), threads=1)
    assert (report.verdict, report.problems) == ("same", ())


def test_an_additive_mask_is_refused():
    with pytest.raises(UnsupportedError, match="right for the exported length only"):
        injected(guarded(mask=onnx.TensorProto.FLOAT))


def test_the_last_key_of_a_fixed_length_is_refused():
    masked = (
        "bias = Where(allowed, half, low)\n final = Slice(bias, ending, open, second)\n both = Add(bias, final)\n"
        "masked_scores = Add(s, both)"
    )
    text = attention(masked=masked, constants="int64[1] ending = {-1}, int64[1] open = {9000}")
    with pytest.raises(UnsupportedError, match="the fixed length of the export"):
        injected(read(text.replace("b, n", f"1, {LENGTH}")))


TABLE = ", ".join("1" if key <= query else "0" for query in range(6) for key in range(6))
WRITTEN_FOR_SIX_TOKENS = {
    "target": ("h = Identity(x)", "h = Reshape(x, form)", "int64[3] form = {-1, 6, 8}"),
    "mask": ("allowed = LessOrEqual(row, column)", "allowed = Cast<to = 9>(table)", f"int64[6, 6] table = {{{TABLE}}}"),
    "range": ("at = Range(nought, length, one)", "at = Range(nought, six, one)", "int64 six = {6}"),
    "expand": ("h = Identity(x)", "h = Expand(x, form)", "int64[3] form = {1, 6, 8}"),
    "positions": ("h = Identity(x)", "h = Add(x, table)", "float[1, 6, 8] table"),
}


@pytest.mark.parametrize("part", WRITTEN_FOR_SIX_TOKENS)
def test_a_length_that_is_fixed_in_the_graph_is_to_be_declared(part):
    old, new, constant = WRITTEN_FOR_SIX_TOKENS[part]
    text = attention(constants=constant).replace(old, new)
    with pytest.raises(UnsupportedError, match="6 tokens declare that length, as rename-dims does"):
        injected(read(text))
    model = read(text.replace("float[b, n, 8]", "float[b, 6, 8]"))
    assert verify(model, injected(model)).verdict == "same"


def test_an_output_with_features_before_tokens_is_refused():
    """Its first axis is 8 features, cut in two by a reshape that takes them for tokens."""
    after = "t = Transpose<perm = [0, 2, 1]>(c)\n  logits = Reshape(t, wrong)"
    text = attention(after=after, constants="int64[3] wrong = {1, 4, 8}").replace("[b, n, 8]", "[1, 4, 8]")
    with pytest.raises(UnsupportedError, match="several features before the tokens on one axis"):
        injected(read(text))
