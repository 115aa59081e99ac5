"""Learned scores that take weight and have no value become an input of GroupQueryAttention."""

from __future__ import annotations

import onnx
import pytest
from attentions import attention
from exports import after
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.workflow.verification import verify_models

SINK = 11  # input of GroupQueryAttention
BY_HEAD = "Reshape(NAME0, heads) NAME = Transpose<perm = [0, 2, 1, 3]>(NAME1)"
SIZES = """four = Shape(masked_scores) batch = Slice(four, first, second) tokens = Slice(four, third, last)
  one_row = Concat<axis = 0>(batch, group, tokens, second) two_rows = Concat<axis = 0>(batch, group, tokens, pair)
  five = Concat<axis = 0>(batch, pair, pair, tokens, second)"""
COLUMN = "column_of_sinks = Expand(SINK, one_row)"
JOINED = "all = Concat<axis = -1>(masked_scores, column_of_sinks) all_weights = Softmax<axis = -1>(all)"
SHIFTED = """all = Concat<axis = -1>(masked_scores, column_of_sinks) largest = ReduceMax<axes = [-1]>(all)
  below = Sub(all, largest) all_weights = Softmax<axis = -1>(below)"""
FRONT = "all = Concat<axis = -1>(column_of_sinks, masked_scores) all_weights = Softmax<axis = -1>(all)"
SCALED = "some = Mul(all, half) all_weights = Softmax<axis = -1>(some)"
BUT_LAST = "w = Slice(all_weights, first, minus, last)"
BUT_TWO = "w = Slice(all_weights, first, minus_two, last)"
BUT_FIRST = "w = Slice(all_weights, second, end, last)"
SHAPED = """h = Identity(x) other = Transpose<perm = [0, 2, 1, 3, 4]>(square) shaped = Reshape(other, apart)"""
CONSTANTS = """float[1, 4, 1, 1] sinks = {-1.0, 0.5, 1.0, 3.0}, float[1, 1, 1, 1] same = {0.7},
 float[1, 2, 2, 1, 1] square = {-1.0, 0.5, 1.0, 3.0}, float[1, 4, 1, 2] two = {1, 2, 3, 4, 5, 6, 7, 8},
 int64[4] heads = {0, 0, 4, 8}, int64[3] together = {0, 0, 32}, int64[4] apart = {1, 4, 1, 1}, int64[1] group = {4},
 int64[1] pair = {2}, int64[1] last = {3}, int64[1] minus = {-1}, int64[1] minus_two = {-2},
 int64[1] end = {9223372036854775807}"""


def decoder(
    *, joined: str = JOINED, sink: str = "sinks", column: str = COLUMN, weights: str = BUT_LAST, hidden: str = ""
) -> onnx.ModelProto:
    """Return an attention of four heads with sinks."""
    text = attention(
        hidden=hidden,
        query="q1 = " + BY_HEAD.replace("NAME", "q"),
        key="k1 = " + BY_HEAD.replace("NAME", "k"),
        value="v1 = " + BY_HEAD.replace("NAME", "v"),
        after="m = Transpose<perm = [0, 2, 1, 3]>(c) logits = Reshape(m, together)",
        constants=CONSTANTS,
    )
    text = text.replace("kt = Transpose<perm = [0, 2, 1]>(k)", "kt = Transpose<perm = [0, 1, 3, 2]>(k)")
    softmax = f"{SIZES}\n  {column.replace('SINK', sink)}\n  {joined}\n  {weights}"
    text = text.replace("w = Softmax<axis = -1>(masked_scores)", softmax)
    return read(text.replace("[b, n, 8]", "[b, n, 32]").replace("[8, 8]", "[32, 32]"), 17)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(decoder(), id="behind the keys"),
        pytest.param(decoder(joined=SHIFTED), id="less their maximum"),
        pytest.param(decoder(joined=FRONT, weights=BUT_FIRST), id="before the keys"),
        pytest.param(decoder(sink="same"), id="the same for all heads"),
        pytest.param(decoder(hidden=SHAPED, sink="shaped"), id="reshaped"),
    ],
)
def test_sinks_become_an_input_of_the_operator(model, cache):
    result = after(model, Inject(cache=cache), FuseAttention())
    (node,) = (node for node in result.graph.node if node.op_type == "GroupQueryAttention")
    assert node.input[SINK]
    assert "Softmax" not in {node.op_type for node in result.graph.node}
    report = verify_models(model, result)
    assert report.verdict == "same", report


SWAPPED = """all_rows = Expand(SINK, five) swapped = Transpose<perm = [0, 2, 1, 3, 4]>(all_rows)
  column_of_sinks = Reshape(swapped, one_row)"""


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        pytest.param(decoder(column=SWAPPED, sink="square"), "differs from what", id="heads in another order"),
        pytest.param(
            decoder(weights="half_w = Slice(all_weights, first, minus, last) w = Mul(half_w, half)"),
            "changed between softmax", id="weights scaled afterwards",
        ),
        pytest.param(
            decoder(joined=JOINED.replace("all_weights = Softmax<axis = -1>(all)", SCALED)),
            "no fused attention operator has", id="scaled with the scores",
        ),
        pytest.param(
            decoder(sink="two", column="column_of_sinks = Expand(SINK, two_rows)", weights=BUT_TWO),
            "more than one learned score", id="two sinks",
        ),
    ],
)  # fmt: skip
def test_other_learned_scores_are_rejected(model, reason):
    with pytest.raises(UnsupportedError, match=reason):
        after(model, Inject(), FuseAttention())


def test_onnx_attention_has_no_sinks():
    model = decoder()
    model.opset_import[0].version = 23
    with pytest.raises(UnsupportedError, match="no attention sinks"):
        after(model, FuseAttention(operator="attention"))
