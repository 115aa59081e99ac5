"""Convolutions of a fixed length that are padded at the end as well, and whose last rows a `Slice` drops."""

import numpy as np
import pytest
from laws import in_onnxruntime
from written import read

from kvsurgeon import io
from kvsurgeon.decompose.simplify import simplify_model


def decoder(between: str) -> str:
    return f"""decoder (int64[1, 6] input_ids) => (float[1, 6, 8] logits)
<float[11, 8] table, float[8, 1, 3] kernel, int8[8, 1, 3] kernel8, float[1, 8, 1] bias, float[1, 1, 8] rows,
 float half = {{0.5}}, int64[1] none = {{0}}, int64[1] end = {{6}}, int64[1] axis = {{2}}>
{{
 x = Gather(table, input_ids) xt = Transpose<perm = [0, 2, 1]>(x)
 {between}
 z = Slice(y, none, end, axis) logits = Transpose<perm = [0, 2, 1]>(z)
}}"""


CONV = "c = Conv<group = 8, kernel_shape = [3], pads = [2, 2]>(xt, kernel)"
INTEGER = """u, us, up = DynamicQuantizeLinear(xt)
 i = ConvInteger<group = 8, kernel_shape = [3], pads = [2, 2]>(u, kernel8, up) f = Cast<to = 1>(i)
 both = Mul(us, half) c = Mul(f, both)"""


@pytest.mark.parametrize(
    "between", [f"{CONV} y = Identity(c)", f"{CONV} d = Mul(c, half) y = Add(d, bias)", f"{INTEGER} y = Add(c, bias)"]
)
def test_less_padding_replaces_the_slice(between):
    original = read(decoder(between))
    model = io.to_proto(simplify_model(io.load(original)))
    (convolution,) = (node for node in model.graph.node if node.op_type.startswith("Conv"))
    assert next(list(one.ints) for one in convolution.attribute if one.name == "pads") == [2, 0]
    assert not any(node.op_type == "Slice" for node in model.graph.node)
    ids = np.array([[3, 1, 4, 1, 5, 9]])
    (expected,), (found,) = (in_onnxruntime(one)({"input_ids": ids}).values() for one in (original, model))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("between", [f"{CONV} y = Mul(c, rows)", f"{CONV} y = CumSum(c, axis)"])
def test_what_is_not_computed_row_by_row_keeps_the_slice(between):
    model = io.to_proto(simplify_model(io.load(read(decoder(between)))))
    assert any(node.op_type == "Slice" for node in model.graph.node)
