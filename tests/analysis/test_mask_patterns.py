"""Arrays of two runs are equal up to the rounding of their type."""

from __future__ import annotations

import numpy as np
import pytest

from kvsurgeon.analysis.mask_patterns import is_close


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.0, 2.1], False),
        ([6e4, 1.0], [6e4 - 64, 1.0], True),  # a relative error
        ([np.nan, 1.0], [np.nan, 1.0], True),
        ([np.nan, 1.0], [0.0, 1.0], False),
        ([np.inf, -np.inf], [np.inf, -np.inf], True),
        ([np.inf, 1.0], [-np.inf, 1.0], False),
        ([np.inf, 1.0], [6e4, 1.0], False),
        ([-6e4], [6e4], False),  # the difference is not a float16
        ([], [], True),
    ],
)
def test_floats_are_close_up_to_rounding(left, right, expected):
    assert is_close(np.array(left, np.float16), np.array(right, np.float16)) is expected
    if 6e4 - 64 not in right:  # within the rounding of float16 only
        assert is_close(np.array(left, np.float32), np.array(right, np.float32)) is expected


def test_whole_numbers_are_close_if_they_are_equal():
    assert is_close(np.array([1, 2]), np.array([1, 2]))
    assert not is_close(np.array([1_000_000]), np.array([1_000_001]))


def test_a_single_number_without_an_axis_is_compared():
    assert is_close(np.float32(1.0), np.float32(1.0))
