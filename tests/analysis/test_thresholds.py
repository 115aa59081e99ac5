"""Thresholds are found: numbers of constants of any type, and rows of a mask table that are not like the others."""

import ml_dtypes
import numpy as np
import pytest

from kvsurgeon.analysis.thresholds import irregular_rows, irregular_steps, numbers_of


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float32, np.float16])
def test_a_causal_mask_is_regular(dtype):
    assert irregular_rows(np.tril(np.ones((300, 300))).astype(dtype)) == []


@pytest.mark.parametrize(("row", "key"), [(0, 299), (200, 203), (250, 299)])
def test_one_later_key_makes_a_row_irregular(row, key):
    table = np.tril(np.ones((4, 300, 300), dtype=np.float32))
    table[3, row, key] = 2.0
    assert irregular_rows(table) == [row]


def test_many_irregular_rows_are_sampled_evenly():
    found = irregular_rows(np.random.default_rng(0).normal(size=(500, 500)))
    assert len(found) == 32
    assert found[0] < 20
    assert found[-1] > 450


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float16, np.float32, ml_dtypes.bfloat16])
def test_a_number_of_any_type_is_read_with_its_reciprocal(dtype):
    assert numbers_of(np.array([128], dtype=dtype)) == [128, 1 / 128]


def test_several_numbers_have_no_reciprocals():
    assert numbers_of(np.array([0, 5, -3, 5, np.inf])) == [-3, 5]


@pytest.mark.parametrize("shape", [(5000,), (1, 5000), (1, 5000, 1)])
def test_a_list_of_positions_is_irregular_where_its_step_is(shape):
    positions = np.arange(5000)
    assert irregular_steps(positions.reshape(shape)) == []
    positions[4800] -= 5
    assert irregular_steps(positions.reshape(shape)) == [4800, 4801]
    assert irregular_steps(np.random.default_rng(0).normal(size=shape)) == []
