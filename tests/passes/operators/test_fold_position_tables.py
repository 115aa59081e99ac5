"""fold-position-tables looks up the same rows, and folds nothing that depends on more than positions."""

from __future__ import annotations

import numpy as np
import pytest
from laws import in_onnxruntime
from written import read

from kvsurgeon import io
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.operators.fold_position_tables import FoldPositionTables

TEXT = """case (float[batch_size, sequence_length, 2] x, int64[batch_size, sequence_length] position_ids,
 int64[batch_size, total_sequence_length] attention_mask, float[batch_size, 1, past_sequence_length, 2] past)
 => (float[batch_size, sequence_length, 2] y, float[batch_size, 1, past_sequence_length, 2] present)
<float[1, 1, 40, 2] table = {{{numbers}}}, float[40, 2] weights = {{{numbers}}}, int64[3] flat = {{0, -1, 2}},
 int64[3] one_row = {{0, 1, -1}}, int64 two = {{2}}, int64[1] first = {{0}}, float[1, 2] speed = {{1.0, 0.5}},
 float[2, 2] types = {{0.5, 1.5, 2.5, 3.5}}, int64[1, 1] nought = {{0}}>
{{
  present = Identity(past)
  {rows}
  y = Add(x, rows)
}}"""
NUMBERS = ", ".join(f"{number}.0" for number in range(80))
FOLDED = {
    "a table with axes of size 1": "g = Gather<axis = 2>(table, position_ids) t = Transpose<perm = [2, 0, 1, 3, 4]>(g) "
    "rows = Reshape(t, flat)",
    "positions with an axis of size 1": "p = Reshape(position_ids, one_row) g = Gather(weights, p) "
    "rows = Reshape(g, flat)",
    "a lookup that is reshaped": "g = Gather(weights, position_ids) rows = Reshape(g, flat)",
    "a row and a constant row of a smaller table": "g = Gather(weights, position_ids) t = Gather(types, nought) "
    "rows = Add(g, t)",
    "angles of a row": "g = Gather(weights, position_ids) rows = Sin(g)",
}
UNCHANGED = {
    "a table of fewer rows than a call has tokens": "g = Gather(types, position_ids) rows = Sin(g)",
    "a lookup by the positions": "rows = Gather(weights, position_ids)",
    "angles without a table": "f = Cast<to = 1>(position_ids) a = Constant<value_ints = [-1]>() u = Unsqueeze(f, a) "
    "rows = Mul(u, speed)",
    "rows and the mask": "g = Gather(weights, position_ids) m = ReduceSum<keepdims = 0>(attention_mask) "
    "c = Cast<to = 1>(m) rows = Mul(g, c)",
    "rows and the number of tokens": "g = Gather(weights, position_ids) n = Size(attention_mask) c = Cast<to = 1>(n) "
    "rows = Mul(g, c)",
}


def case(rows):
    return read(TEXT.format(rows=rows, numbers=NUMBERS), 17)


@pytest.mark.parametrize("rows", FOLDED.values(), ids=FOLDED)
def test_one_lookup_by_the_positions_gives_the_same_rows(rows):
    subject = Subject.of(case(rows))
    assert isinstance(FoldPositionTables().apply(subject), Changed)
    result = io.to_proto(subject.model)
    assert [node.op_type for node in result.graph.node] == ["Identity", "Gather", "Add"]
    for positions in ([[0, 1, 2]], [[39, 4, 4], [0, 0, 17]]):
        feeds = {"x": np.ones((len(positions), 3, 2), np.float32), "position_ids": np.array(positions),
                 "attention_mask": np.ones((len(positions), 5), np.int64),
                 "past": np.zeros((len(positions), 1, 2, 2), np.float32)}  # fmt: skip
        expected, found = (in_onnxruntime(one)(feeds)["y"] for one in (case(rows), result))
        np.testing.assert_array_equal(found, expected)
    assert isinstance(FoldPositionTables().apply(subject), Unchanged)


@pytest.mark.parametrize("rows", UNCHANGED.values(), ids=UNCHANGED)
def test_what_depends_on_more_than_a_table_and_positions_is_unchanged(rows):
    assert isinstance(FoldPositionTables().apply(Subject.of(case(rows))), Unchanged)
