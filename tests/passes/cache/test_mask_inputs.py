"""Masks of queries against keys as inputs: the application decides which tokens attend to each other."""

import numpy as np
import pytest
from attentions import attention
from exports import injected
from laws import assert_law
from written import read

BLOCK = slice(1, 5)  # of tokens that attend to each other both ways


def model_and_text():
    model = read(attention(inputs="float[b, n, n] z", allowed="", masked="masked_scores = Add(s, z)"))
    attends = np.tril(np.ones((9, 9), dtype=bool))
    attends[BLOCK, BLOCK] = True
    mask = np.where(attends, 0, -1e4).astype(np.float32)
    return model, {
        "x": np.random.default_rng(5).standard_normal((2, 9, 8)).astype(np.float32),
        "z": np.stack([mask, mask]),
    }


def test_a_block_that_attends_both_ways_is_right_in_the_first_call():
    model, text = model_and_text()
    assert_law(model, injected(model), text, cuts=(BLOCK.stop, 6, 8))


def test_a_block_that_attends_both_ways_must_not_be_divided():
    model, text = model_and_text()
    with pytest.raises(AssertionError, match="of the range"):
        assert_law(model, injected(model), text, cuts=(BLOCK.stop - 1, 6, 8))
