"""Inputs that let tokens of the first call attend to each other both ways, as the user states."""

from __future__ import annotations

import numpy as np
import pytest
from attentions import attention
from exports import injected
from laws import assert_law
from written import read

import kvsurgeon
from kvsurgeon import io
from kvsurgeon.errors import Code, UnsupportedError, UsageError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.contract import Subject
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

STATED = ("z=first-call",)
TYPES = "int64[b, n] z"
CAUSAL = "causal = LessOrEqual(row, column)\n"
OR_OPEN = "\n allowed = Or(causal, open)"
PREFIX = f"{CAUSAL} open = Less(row, z){OR_OPEN}"  # z: number of tokens
OF_KEYS = f"{CAUSAL} keys = Unsqueeze(z, second)\n queries = Unsqueeze(z, third)\n"
SAME_TYPE = (
    f"{OF_KEYS} same = Equal(keys, queries)\n is_open = Greater(keys, nought)\n open = And(same, is_open){OR_OPEN}"
)
PREFIX_IS_0 = f"{OF_KEYS} open = Equal(keys, nought){OR_OPEN}"  # and 1 is what follows the prefix
ENDS_AT_5 = np.array([[1, 1, 0, 2, 2, 0, 0, 0, 0], [0, 2, 2, 2, 2, 0, 0, 0, 0]])


def text(z):
    return {"x": np.random.default_rng(5).standard_normal((2, 9, 8)).astype(np.float32), "z": z}


@pytest.mark.parametrize(
    ("inputs", "allowed", "z"),
    [
        ("int64 z", PREFIX, np.array(5)),
        (TYPES, SAME_TYPE, ENDS_AT_5),
        (TYPES, PREFIX_IS_0, np.array([[0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1]])),
    ],
)
def test_a_block_in_the_first_call(inputs, allowed, z):
    model = read(attention(inputs=inputs, allowed=allowed))
    result = injected(model, input=STATED)
    for cuts in ((5, 6, 8), (7,)):
        assert_law(model, result, text(z), cuts=cuts)
    with pytest.raises(AssertionError, match="of the range"):
        assert_law(model, result, text(z), cuts=(4, 6, 8))


def test_it_must_be_stated():
    with pytest.raises(UnsupportedError) as refusal:
        injected(read(attention(inputs=TYPES, allowed=SAME_TYPE)))
    assert refusal.value.code is Code.NOT_CAUSAL


REFUSED = {
    "a prefix of one token more": ("int64 z", PREFIX.replace("Less(", "LessOrEqual(")),
    "queries that attend to all keys": (TYPES, f"{OF_KEYS} open = Greater(queries, nought){OR_OPEN}"),
    "later queries that attend to a later key": (
        TYPES,
        f"{CAUSAL} sum = ReduceSum(z, second)\n sum_3 = Unsqueeze(sum, second)\n is_open = Greater(sum_3, nought)\n"
        f" next = Add(column, one)\n is_next = Equal(row, next)\n open = And(is_next, is_open){OR_OPEN}",
    ),
    "a number that opens all": (
        TYPES,
        f"{OF_KEYS} same = Equal(keys, queries)\n is_open = Greater(keys, nought)\n own = And(same, is_open)\n"
        f" is_41 = Equal(queries, forty_one)\n open = Or(own, is_41){OR_OPEN}",
    ),
    "an open block that hides its own first token": (
        TYPES,
        f"{SAME_TYPE.removesuffix(OR_OPEN)}\n either = Or(causal, open)\n length_1 = Sub(length, one)\n"
        f" few = Less(length_1, forty_one)\n is_many = Not(few)\n closed = Not(is_open)\n ends = Or(few, closed)\n"
        f" allowed = And(either, ends)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_block_that_other_calls_would_change_is_refused(case):
    inputs, allowed = REFUSED[case]
    model = read(attention(inputs=inputs, allowed=allowed, constants="int64 forty_one = {41}"))
    with pytest.raises(UnsupportedError):
        injected(model, input=STATED)


def test_it_must_be_read_by_masks_alone():
    scaled = "z_3 = Unsqueeze(z, third)\n factor = Cast<to = 1>(z_3)\n h = Mul(x, factor)"
    with pytest.raises(UnsupportedError, match="read outside attention masks"):
        injected(read(attention(inputs=TYPES, allowed=SAME_TYPE, hidden=scaled)), input=STATED)


def test_it_is_verified_with_a_block_and_said_by_the_result():
    model = read(attention(inputs=TYPES, allowed=SAME_TYPE))
    done = run_and_save(model, Pipeline((Inject(input=STATED),)), effort="quick", seed=0)
    assert done.verification.verdict == "same"
    assert any("must all be in the first call: it is 0 for later tokens" in note for note in done.notes)
    result = io.to_proto(done.model)
    (layer,) = Subject.of(result).decoder().attentions
    assert layer.mask.block
    for node in result.graph.node:  # a block that is never open
        node.op_type = "Less" if node.op_type == "Greater" else node.op_type
    assert kvsurgeon.verify(model, result, effort="quick", seed=0).verdict == "different"


def test_passes_that_would_lose_the_block_refuse_it():
    result = injected(read(attention(inputs=TYPES, allowed=SAME_TYPE)), input=STATED)
    with pytest.raises(UnsupportedError, match="always causal"):
        FuseAttention().apply(Subject.of(result))
    with pytest.raises(UsageError, match="expected a dynamic cache"):
        Retarget(cache="static").apply(Subject.of(result))
