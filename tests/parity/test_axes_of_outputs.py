"""Outputs whose first axes are not batch and tokens are compared token by token: blocks, and books of codes."""

from __future__ import annotations

import onnx
import pytest
from attentions import attention
from written import read

from kvsurgeon import io
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject

SWAP = "Transpose<perm = [1, 0, 2]>"
TOKENS_FIRST = (
    attention(hidden=f"h = {SWAP}(x)", after=f"logits = {SWAP}(c)")
    .replace("float[b, n, 8]", "float[n, b, 8]")
    .replace("Gather(sizes, one)", "Gather(sizes, nought)")
)
CODES = (
    attention(
        hidden="e = Gather(table, codes)\n h = ReduceSum<keepdims = 0>(e, second)",
        constants="float[9, 8] table, int64[4] books = {0, 0, 4, 2}",
        after="c4 = Reshape(c, books)\n logits = Transpose<perm = [0, 2, 1, 3]>(c4)",
    )
    .replace("float[b, n, 8] x", "int64[b, 4, n] codes")
    .replace("Shape(x)", "Shape(codes)")
    .replace("Gather(sizes, one)", "Gather(sizes, two)")
    .replace("float half", "int64 two = {2}, float half")
    .replace("(float[b, n, 8] logits)", "(float[b, 4, n, 2] logits)")
)


@pytest.mark.parametrize("text", [TOKENS_FIRST, CODES], ids=["tokens first", "codes"])
def test_a_right_cache_is_the_same_and_a_wrong_one_different(text):
    original = read(text)
    subject = Subject.of(original)
    Inject().apply(subject)
    injected = io.to_proto(subject.model)
    assert verify(original, injected, effort="quick", seed=1).verdict == "same"
    wrong = onnx.ModelProto.FromString(injected.SerializeToString())
    softmax = next(node for node in wrong.graph.node if node.op_type == "Softmax")
    mask = next(node for node in wrong.graph.node if softmax.input[0] in node.output)
    softmax.input[0] = mask.input[1]  # the scores before the mask
    assert verify(original, wrong, effort="quick", seed=1).verdict == "different"
