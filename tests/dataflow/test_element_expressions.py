"""A mask that `ScatterND` writes whole is the mask itself; one of which another element is written is not."""

# ruff: noqa: E501  # a case is read best on one line

import pytest
from attentions import assert_law_of, attention
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.contract import Subject

CONSTANTS = "bool[1, 1] no = {0}, int64[1] last = {-1}, int64[2] column_axis = {1, 2}, int64 wide = {3}"
GRID = (
    "causal = LessOrEqual(row, column)\n n1 = Unsqueeze(length, first)\n shape = Concat<axis = 0>(n1, n1)\n"
    "empty = Expand(no, shape)\n i0 = Expand(column, shape)\n j0 = Expand(row, shape)\n i = Unsqueeze(i0, third)\n j = Unsqueeze(j0, third)\n"
)
WRITTEN = f"{GRID} places = Concat<axis = -1>(i, j)\n allowed = ScatterND(empty, places, causal)"
NOT_COPIED = [
    ("transposed", "places = Concat<axis = -1>(j, i)\n allowed = ScatterND(empty, places, causal)"),
    ("one row later", "i1 = Add(i, one)\n i2 = Mod(i1, length)\n places = Concat<axis = -1>(i2, j)\n allowed = ScatterND(empty, places, causal)"),
    ("added to what was there", "all = Not(empty)\n a = Cast<to = 6>(all)\n u = Cast<to = 6>(causal)\n places = Concat<axis = -1>(i, j)\n"
     "sum = ScatterND<reduction = \"add\">(a, places, u)\n allowed = Cast<to = 9>(sum)"),
]  # fmt: skip


def test_a_mask_that_is_written_whole_is_a_copy():
    analysis = Subject.of(read(attention(constants=CONSTANTS, allowed=WRITTEN))).analysis()
    values = {value.name: value for node in analysis.model.graph for value in node.outputs}
    assert analysis.same[values["allowed"]] is values["causal"]


def test_a_mask_that_is_written_whole_is_computed_for_the_new_rows_alone():
    assert_law_of(attention(constants=CONSTANTS, allowed=WRITTEN))


@pytest.mark.parametrize("written", [pytest.param(text, id=name) for name, text in NOT_COPIED])
def test_a_mask_with_elements_in_other_places_is_not_a_copy(written):
    with pytest.raises(UnsupportedError, match=r"attention is not causal|depend on the total length"):
        Subject.of(read(attention(constants=CONSTANTS, allowed=GRID + written))).proof()
