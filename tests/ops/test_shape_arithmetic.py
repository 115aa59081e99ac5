"""What is inferred of random shape arithmetic is what onnxruntime computes, from one token to thousands."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import onnx_ir as ir
import pytest
from laws import in_onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException
from random_arithmetic import RandomArithmetic

from kvsurgeon.dataflow.shape_inference import Shapes, infer_shapes
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH

SIZES = ((1, 1), (1, 2), (2, 3), (3, 5), (2, 64), (1, 299), (1, 301), (1, 4097))
NOT_RUN = (Fail, InvalidArgument, RuntimeException)  # sizes that cannot be broadcast, for example


@pytest.mark.parametrize("seed", range(60))
def test_inferred_numbers_are_those_that_are_computed(seed):
    model = RandomArithmetic(seed).model()
    computed = {}
    with suppress(*NOT_RUN):
        run = in_onnxruntime(model)
        for size in SIZES:
            with suppress(*NOT_RUN):
                computed[size] = run({"x": np.zeros((*size, 8), np.float32)})
    if not computed:  # inference may reject what onnxruntime does
        return
    graph = ir.from_proto(model).graph
    shapes = infer_shapes(list(graph), {graph.inputs[0]: (BATCH, LENGTH, 8)}, 18)
    for node in graph:
        for (batch, length), arrays in computed.items():
            for value in node.outputs:
                if value.name in arrays:
                    assert_inferred(shapes, value, arrays[value.name], ((BATCH, batch), (LENGTH, length)))


def assert_inferred(shapes: Shapes, value: ir.Value, array: np.ndarray, at) -> None:
    """What is known of a value is what was computed."""
    fact = shapes[value]
    sizes = [dim.substitute(size, at) for size in fact.shape]
    assert all(size == real for size, real in zip(sizes, array.shape, strict=True) if isinstance(size, int)), fact
    if fact.value is None:
        return
    numbers = [dim.substitute(one, at) if hasattr(one, "subs") else one for one in fact.value.reshape(-1)]
    assert len(numbers) == array.size, fact
    for claimed, real in zip(numbers, array.reshape(-1).tolist(), strict=True):
        if isinstance(claimed, (int, float)) and not np.isnan(real):
            assert claimed == pytest.approx(real, rel=1e-6), fact
