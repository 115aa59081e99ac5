"""fuse-rotary replaces rotary embeddings by one operator each, and leaves similar graphs unchanged."""

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
from kvsurgeon.workflow.verification import verify_models

ROTARY = [
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


@pytest.mark.parametrize("name", ROTARY)
def test_fused_exports_pass_verification(name):
    result = after(export(name), RaiseOpset(opset=24), FuseRotary())
    assert operators(result).count("RotaryEmbedding") == 4  # queries and keys of two layers
    assert verify_models(export(name), result).verdict == "same"


@pytest.mark.parametrize("name", ["llama_dynamo_sdpa", "gemma2_torchscript_eager"])
def test_rotary_and_attention_can_be_fused_in_a_model_with_a_cache(name):
    result = after(export(name), RaiseOpset(opset=24), Inject(cache="static"), FuseRotary(), FuseAttention())
    found = operators(result)
    assert found.count("RotaryEmbedding") == 4
    assert found.count("GroupQueryAttention") == 2
    assert "Transpose" not in found
    assert verify(export(name), result, threads=1).verdict == "same"


@pytest.mark.parametrize("name", ["llama_dynamo_sdpa", "neox_torchscript_eager"])
def test_a_cache_can_be_injected_afterwards(name):
    result = after(export(name), RaiseOpset(opset=24), FuseRotary(), Inject())
    assert verify(export(name), result, threads=1).verdict == "same"


FORMS = {
    "as exported": {},
    "split": {"halves": "left, right = Split<axis = -1, num_outputs = 2>(x)"},
    "operands swapped": {
        "sums": "straight = Mul(cosines, x) crossed = Mul(sines, swapped) y = Add(crossed, straight)",
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_equivalent_forms_are_fused(form):
    before = model(**FORMS[form])
    result = after(before, FuseRotary())
    assert "RotaryEmbedding" in operators(result)
    assert not {"Neg", "Add"} & set(operators(result))
    assert verify_models(before, result).verdict == "same"
    assert isinstance(FuseRotary().apply(Subject.of(result)), Unchanged)


OTHERS = {
    "table halves differ": {
        "tables": "more = Mul(angles, gain) both = Concat<axis = -1>(angles, more) c = Cos(both) s = Sin(both)",
    },
    "table halves are scaled differently": {
        "tables": "both = Concat<axis = -1>(angles, angles) c = Cos(both) s0 = Sin(both) s = Mul(s0, both)",
    },
    "the first half is negated": {
        "halves": "right = Slice(x, zero, four, three) left = Slice(x, four, eight, three)",
    },
    "the same half twice": {"halves": "left = Slice(x, zero, four, three) right = Slice(x, zero, four, three)"},
    "a Sub in place of the Add": {
        "sums": "straight = Mul(x, cosines) crossed = Mul(swapped, sines) y = Sub(straight, crossed)"
    },
}


@pytest.mark.parametrize("other", OTHERS)
def test_similar_graphs_are_unchanged(other):
    assert isinstance(FuseRotary().apply(Subject.of(model(**OTHERS[other]))), Unchanged)


def test_opset_23_is_required():
    with pytest.raises(UnsupportedError, match="raise-opset first"):
        FuseRotary().apply(Subject.of(export("llama_dynamo_sdpa")))
