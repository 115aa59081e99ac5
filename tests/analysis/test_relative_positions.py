"""Learned relative positions: a row for each pair of tokens is context, a score for each distance is not followed."""

import numpy as np
import pytest
from attentions import attention
from exports import injected
from laws import assert_law
from written import read

from kvsurgeon.errors import UnsupportedError

TABLE = "int64 middle = {64}, float[129, 8] table"
OF_PAIRS = """distance = Sub(row, column)
 place = Add(distance, middle)
 relative = Gather(table, place)
 turned = Transpose<perm = [0, 2, 1]>(relative)
 q_4 = Unsqueeze(q, third)
 products = MatMul(q_4, turned)
 extra = Squeeze(products, third)
 s = Add(s0, extra)"""
OF_DISTANCES = """count = Add(length, length)
 distances = Range(nought, count, one)
 relative = Gather(table, distances)
 turned = Transpose<perm = [1, 0]>(relative)
 products = MatMul(q, turned)
 s = Add(s0, products)"""


def test_a_row_for_each_query_and_key():
    model = read(attention(scores=OF_PAIRS, constants=TABLE))
    x = np.random.default_rng(5).standard_normal((2, 9, 8)).astype(np.float32)
    assert_law(model, injected(model), {"x": x})


def test_a_score_for_each_distance_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"axis of another length, found 2\*length.* as in Transformer-XL"):
        injected(read(attention(scores=OF_DISTANCES, constants=TABLE)))
