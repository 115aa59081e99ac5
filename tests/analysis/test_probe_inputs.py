"""Synthetic token data: the same for the same token at every length."""

import numpy as np
import onnx_ir as ir
import pytest

from kvsurgeon.analysis.probe_inputs import synthetic_values
from kvsurgeon.symbolic.sequence_axes import Length, LengthVariable, SequenceAxis

STREAM = LengthVariable(Length.NEW)
SHORT, LONG = 7, 40


@pytest.mark.parametrize(
    ("outer", "inner"), [(1, 1), (1, 3), (2, 1), (2, 3)], ids=["plain", "heads inside", "batch outside", "both"]
)
def test_a_prefix_has_the_same_values(outer, inner):
    axes = (SequenceAxis(0, STREAM, outer, inner),)
    short, long = (
        synthetic_values((outer * length * inner, 4), axes, np.arange(length), ir.DataType.FLOAT).reshape(
            outer, length, inner, 4
        )
        for length in (SHORT, LONG)
    )
    np.testing.assert_array_equal(long[:, :SHORT], short)


def test_no_two_tokens_have_the_same_values():
    made = synthetic_values((LONG, 4), (SequenceAxis(0, STREAM),), np.arange(LONG), ir.DataType.FLOAT)
    assert len(np.unique(made.round(4), axis=0)) == LONG


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(ir.DataType.FLOAT16, np.float16), (ir.DataType.BFLOAT16, np.float32), (ir.DataType.BOOL, np.bool_),
     (ir.DataType.UINT8, np.uint8), (ir.DataType.INT8, np.int8), (None, np.float32)],
)  # fmt: skip
def test_values_have_a_type_that_runs_and_vary(dtype, kind):
    made = synthetic_values((LONG,), (SequenceAxis(0, STREAM),), np.arange(LONG), dtype)
    assert made.dtype == kind
    assert len(np.unique(made)) > 1
    if made.dtype.kind == "f":
        assert np.abs(made).max() <= 3
