"""Turns become one operator each, and look-alikes stay."""

from __future__ import annotations

import pytest
from exports import after, export, operators
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject, Unchanged
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.passes.operators.fuse_rotary import FuseRotary
from kvsurgeon.passes.opset.raise_opset import RaiseOpset
from kvsurgeon.workflow.verification import judge

TURNED = [
    "gemma2_dynamo_eager", "gemma2_torchscript_eager", "llama_dynamo_eager", "llama_dynamo_sdpa",
    "llama_torchscript_eager", "llama_torchscript_sdpa", "neox_dynamo_sdpa", "neox_torchscript_eager",
]  # fmt: skip

TEXT = """case (int64[b, n] ids, float[b, n, 16] h) => (float[b, 2, n, 8] y)
<float[4] frequencies, int64[4] apart = {{0, 0, 2, 8}}, int64[1] zero = {{0}}, int64[1] one = {{1}},
 int64[1] four = {{4}}, int64[1] eight = {{8}}, int64[1] three = {{3}}, int64[1] two = {{2}}, float gain = {{1.5}}>
{{
  parts = Reshape(h, apart)
  x = Transpose<perm = [0, 2, 1, 3]>(parts)
  places = Cast<to = 1>(ids)
  column = Unsqueeze(places, two)
  angles = Mul(column, frequencies)
  {tables}
  cosines = Unsqueeze(c, one)
  sines = Unsqueeze(s, one)
  {halves}
  negative = Neg(right)
  swapped = Concat<axis = -1>(negative, left)
  {sum}
}}"""

TABLES = "both = Concat<axis = -1>(angles, angles) c = Cos(both) s0 = Sin(both) s = Mul(s0, gain)"
HALVES = "left = Slice(x, zero, four, three) right = Slice(x, four, eight, three)"
SUM = "straight = Mul(x, cosines) crossed = Mul(swapped, sines) y = Add(straight, crossed)"


def model(*, tables=TABLES, halves=HALVES, sums=SUM):
    return read(TEXT.format(tables=tables, halves=halves, sum=sums), 24)


@pytest.mark.parametrize("name", TURNED)
def test_exports_compute_what_they_did(name):
    result = after(export(name), RaiseOpset(opset=24), FuseRotary())
    assert operators(result).count("RotaryEmbedding") == 4  # queries and keys of two layers
    assert judge(export(name), result).verdict == "same"


@pytest.mark.parametrize("name", ["llama_dynamo_sdpa", "gemma2_torchscript_eager"])
def test_with_a_cache_and_attention_fused_behind_it(name):
    result = after(export(name), RaiseOpset(opset=24), Inject(cache="static"), FuseRotary(), FuseAttention())
    found = operators(result)
    assert found.count("RotaryEmbedding") == 4
    assert found.count("GroupQueryAttention") == 2
    assert "Transpose" not in found
    assert verify(export(name), result, threads=1).verdict == "same"


@pytest.mark.parametrize("name", ["llama_dynamo_sdpa", "neox_torchscript_eager"])
def test_a_cache_comes_after_it_as_well(name):
    result = after(export(name), RaiseOpset(opset=24), FuseRotary(), Inject())
    assert verify(export(name), result, threads=1).verdict == "same"


WAYS = {
    "as it is": {},
    "split": {"halves": "left, right = Split<axis = -1, num_outputs = 2>(x)"},
    "the other way round": {
        "sums": "straight = Mul(cosines, x) crossed = Mul(sines, swapped) y = Add(crossed, straight)",
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_however_it_is_written(way):
    before = model(**WAYS[way])
    result = after(before, FuseRotary())
    assert "RotaryEmbedding" in operators(result)
    assert not {"Neg", "Add"} & set(operators(result))
    assert judge(before, result).verdict == "same"
    assert isinstance(FuseRotary().apply(Subject.of(result)), Unchanged)


OTHERS = {
    "halves of tables that differ": {
        "tables": "more = Mul(angles, gain) both = Concat<axis = -1>(angles, more) c = Cos(both) s = Sin(both)",
    },
    "halves of one table that are scaled apart": {
        "tables": "both = Concat<axis = -1>(angles, angles) c = Cos(both) s0 = Sin(both) s = Mul(s0, both)",
    },
    "the first half negated": {
        "halves": "right = Slice(x, zero, four, three) left = Slice(x, four, eight, three)",
    },
    "another piece": {"halves": "left = Slice(x, zero, four, three) right = Slice(x, zero, four, three)"},
    "a difference": {"sums": "straight = Mul(x, cosines) crossed = Mul(swapped, sines) y = Sub(straight, crossed)"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_look_alikes_stay(other):
    assert isinstance(FuseRotary().apply(Subject.of(model(**OTHERS[other]))), Unchanged)


def test_the_opset_must_have_the_operator():
    with pytest.raises(UnsupportedError, match="raise-opset first"):
        FuseRotary().apply(Subject.of(export("llama_dynamo_sdpa")))
