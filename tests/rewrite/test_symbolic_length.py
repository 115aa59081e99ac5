"""Exports that declare the length as a number: a symbol afterwards, unless something in the graph depends on it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from attentions import attention
from exports import injected
from written import read

from kvsurgeon.parity import verify

TABLE = ", ".join("1" if key <= query else "0" for query in range(6) for key in range(6))
TABLE_OF_SIX = {"allowed": "allowed = Cast<to = 9>(table)", "constants": f"int64[6, 6] table = {{{TABLE}}}"}


def declared(length: str, **parts: str) -> onnx.ModelProto:
    """Return a decoder that declares a length, as a number or a name."""
    return read(attention(**parts).replace("b, n", f"b, {length}"))


def test_a_number_that_nothing_depends_on_is_a_symbol():
    result = injected(declared("6"))
    assert result.graph.input[0].type.tensor_type.shape.dim[1].dim_param == "sequence_length"
    assert verify(declared("n"), result, threads=1).verdict == "same"  # at lengths beyond 6 too


@pytest.mark.parametrize("cache", ["dynamic", "new-tokens", "static"])
def test_such_an_export_has_every_cache_mode(cache):
    options = {"cache": cache} | ({"max_length": 12} if cache == "static" else {})
    assert verify(declared("6"), injected(declared("6"), **options), threads=1).verdict == "same"


def test_a_number_that_a_table_has_too_stays_the_most_tokens():
    original = declared("6", **TABLE_OF_SIX)
    result = injected(original)
    assert verify(original, result, threads=1).verdict == "same"
    session = onnxruntime.InferenceSession(result.SerializeToString())
    feeds = {given.name: np.zeros([1, 1, 0, 8], np.float32) for given in session.get_inputs()}
    session.run(None, feeds | {"x": np.zeros([1, 6, 8], np.float32)})
    with pytest.raises(Exception, match="ONNXRuntime"):
        session.run(None, feeds | {"x": np.zeros([1, 7, 8], np.float32)})
