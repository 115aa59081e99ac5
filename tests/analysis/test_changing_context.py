"""States and masks are run where context that they read changes, and for batches larger than two."""

# ruff: noqa: E501  # a case is read best on one line

import numpy as np
import onnx
import pytest
from attentions import attention, in_order
from onnx import numpy_helper
from written import read

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.passes.contract import Subject

SHIFTED = (
    "p0 = Pad(x, pads)\n before = Sub(length, one)\n f = Gather(table, before)\n p = Mul(p0, f)\n"
    "moved = Slice(p, first, end, second)\n h = Add(x, moved)"
)
GATHERED = "at0 = Gather(table, at)\n last = Sub(length, one)\n place = Min(at0, last)\n moved = Gather<axis = 1>(x, place)\n h = Add(x, moved)"
LENGTHS = np.ones(4200, np.float32)
PLACES = np.maximum(np.arange(4200) - 1, 0)


def decoder(hidden: str, table: np.ndarray) -> onnx.ModelProto:
    model = read(attention(hidden=hidden, constants="int64[6] pads = {0, 1, 0, 0, 0, 0}, int64[1] end = {-1}"))
    model.graph.initializer.append(numpy_helper.from_array(table, "table"))
    return model


def changed(table: np.ndarray, more: float) -> np.ndarray:
    table = table.copy()
    table[1549:1579] += more
    return table


@pytest.mark.parametrize(
    ("hidden", "table"), [pytest.param(SHIFTED, LENGTHS, id="shifted"), pytest.param(GATHERED, PLACES, id="gathered")]
)
def test_a_state_that_reads_earlier_tokens_at_every_length_is_supported(hidden, table):
    assert Subject.of(decoder(hidden, table)).proof()


@pytest.mark.parametrize(
    ("hidden", "table"),
    [
        pytest.param(SHIFTED, changed(LENGTHS, -0.5), id="a band of lengths"),
        pytest.param(GATHERED, changed(PLACES, 2), id="places ahead"),
    ],
)
def test_a_state_that_a_table_changes_is_rejected(hidden, table):
    with pytest.raises(UnsupportedError):
        Subject.of(decoder(hidden, table)).proof()


@pytest.mark.parametrize(
    "late",
    [
        "numbers = Range(nought, batch, one)\n late0 = Greater(numbers, one)\n late = Unsqueeze(late0, others)",
        "late = Greater(batch, two)",
    ],
)
def test_a_mask_that_opens_for_the_third_sequence_is_rejected(late):
    allowed = (
        f"causal = LessOrEqual(row, column)\n batch = Gather(sizes, nought)\n {late}\n end = Add(column, two)\n near = Less(row, end)\n"
        "open = And(late, near)\n allowed = Or(causal, open)"
    )
    model = read(attention(constants="int64 two = {2}, int64[2] others = {1, 2}", allowed=allowed))
    with pytest.raises(UnsupportedError, match="not causal") as caught:
        Subject.of(model).proof()
    assert caught.value.code is Code.NOT_CAUSAL


@pytest.mark.parametrize("result", ["Neg(places)", "Constant<value_float = 3.0>()"], ids=["captured", "constant"])
def test_biases_that_a_branch_computes_are_rejected(result):
    branches = f"then_branch = a () => (float c) {{ c = {result} }}, else_branch = b () => (float d) {{ d = Identity(places) }}"
    biased = (
        f"places = Cast<to = 1>(row)\n short = Less(length, many)\n bias = If(short)<{branches}>\n s = Add(s0, bias)"
    )
    with pytest.raises(UnsupportedError, match="the context contains control flow") as error:
        Subject.of(in_order(read(attention(scores=biased, constants="int64 many = {777}")))).proof()
    assert (error.value.code, error.value.at) == (Code.CONTROL_FLOW, "bias")
