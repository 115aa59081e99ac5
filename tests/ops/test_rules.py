"""A line or a few of ONNX text in, dimensions out: every operator's rule, and the subgraphs of exporters."""

# ruff: noqa: E501  # a case is read best on one line

import numpy as np
import onnx_ir as ir
import pytest
import sympy
from written import read

from kvsurgeon.dataflow.shape_inference import Shapes, infer_shapes
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH

WORDS = {"b": BATCH, "n": LENGTH, "Min": sympy.Min, "Max": sympy.Max, "floor": sympy.floor}
UNKNOWN = "?"

# What every case is given: x [b, n, 8], ids [b, n], weights, and small constants.
FRAME = """case (float[b, n, 8] x, int64[b, n] ids) => (float[] y)
<float[8, 12] weight, float[12, 8] weight_t, float[80, 8] table, float[1, 1, 20, 20] square, int64 zero = {{0}},
 int64 one = {{1}}, int64 two = {{2}}, int64[1] zeros = {{0}}, int64[1] ones = {{1}}, int64[1] twos = {{2}},
 int64[1] threes = {{3}}, int64[1] rest = {{-1}}, int64[1] end = {{9223372036854775807}}, float half = {{0.5}},
 int64[3] pattern = {{-1, 4, -1}}, int64[3] minus = {{-1, -1, -1}}, uint8 point = {{0}}>
{{
  shape = Shape(x)
  n1 = Slice(shape, ones, twos)
  n = Squeeze(n1)
  b1 = Slice(shape, zeros, ones)
  {body}
}}"""


def inferred(body: str, opset: int = 18) -> tuple[Shapes, dict[str, ir.Value]]:
    # the text is read as a graph, and never checked: what a rule makes of it is all that counts
    graph = ir.from_proto(read(FRAME.format(body=body), opset)).graph
    graph.sort()
    x, ids = graph.inputs
    shapes = infer_shapes(list(graph), {x: (BATCH, LENGTH, 8), ids: (BATCH, LENGTH)}, opset)
    return shapes, {value.name: value for node in graph for value in node.outputs}


def meant(text: str) -> list:
    return [part if part == UNKNOWN else sympy.sympify(part, WORDS) for part in _split(text)]


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def assert_dims(found, expected: str) -> None:
    assert found is not None
    assert len(found) == len(meant(expected)), found
    for size, wanted in zip(found, meant(expected), strict=True):
        if wanted == UNKNOWN:
            assert not dim.is_known(size)
        else:
            assert dim.is_equal(size, dim.plain(wanted)), (found, expected)


SHAPES = [
    # moving
    ("Reshape: 0 keeps, -1 takes the rest", "y = Reshape(x, t)\n t = Constant<value_ints=[0, 0, 2, -1]>()", "b, n, 2, 4"),
    ("Reshape: -1 over a product", "y = Reshape(x, t)\n t = Constant<value_ints=[-1, 4]>()", "2*b*n, 4"),
    ("Reshape: allowzero", "y = Reshape<allowzero=1>(x, t)\n t = Constant<value_ints=[0, 8]>()", "0, 8"),
    ("Reshape: target computed", "t = Concat<axis=0>(b1, n1, twos, rest)\n y = Reshape(x, t)", "b, n, 2, 4"),
    ("Reshape: target unknown", "t = Cast<to=7>(r)\n r = ReduceMax<keepdims=0>(ids, zeros)\n y = Reshape(x, t)", None),
    ("Flatten", "y = Flatten<axis=2>(x)", "b*n, 8"),
    ("Flatten: axis from the back", "y = Flatten<axis=-1>(x)", "b*n, 8"),
    ("Transpose", "y = Transpose<perm=[2, 0, 1]>(x)", "8, b, n"),
    ("Transpose without perm", "y = Transpose(x)", "8, n, b"),
    ("Unsqueeze from the back", "y = Unsqueeze(x, rest)", "b, n, 8, 1"),
    ("Squeeze all of size 1", "u = Unsqueeze(x, ones)\n y = Squeeze(u)", "b, n, 8"),
    ("Squeeze one", "u = Unsqueeze(x, ones)\n y = Squeeze(u, ones)", "b, n, 8"),
    ("Expand against ones", "t = Constant<value_ints=[3, 1, 1, 8]>()\n y = Expand(x, t)", "3, b, n, 8"),
    ("Expand to lengths", "t = Concat<axis=0>(b1, ones, n1, n1)\n y = Expand(half, t)", "b, 1, n, n"),
    ("Tile", "t = Constant<value_ints=[1, 2, 3]>()\n y = Tile(x, t)", "b, 2*n, 24"),
    ("Concat", "y = Concat<axis=1>(x, x, x)", "b, 3*n, 8"),
    ("Split in equal parts", "y, z = Split<axis=-1, num_outputs=2>(x)", "b, n, 4"),
    ("Split, the last part smaller", "p, q, y = Split<axis=-1, num_outputs=3>(x)", "b, n, 2"),
    ("Split by sizes", "t = Constant<value_ints=[3, 5]>()\n z, y = Split<axis=2>(x, t)", "b, n, 5"),
    ("Slice to the end", "y = Slice(x, ones, end, ones)", "b, n - 1, 8"),
    ("Slice from the back", "y = Slice(x, rest, end, twos)", "b, n, 1"),
    ("Slice every second", "y = Slice(x, zeros, end, twos, twos)", "b, n, 4"),
    ("Slice reversed", "s = Constant<value_ints=[-9223372036854775807]>()\n y = Slice(x, rest, s, twos, rest)", "b, n, 8"),
    ("Slice of a table by length", "y = Slice(table, zeros, n1, zeros)", "n, 8"),
    ("Slice of both axes of a table", "t = Slice(square, zeros, n1, twos)\n y = Slice(t, zeros, n1, threes)", "1, 1, n, n"),
    ("Slice between lengths", "m = Sub(n1, ones)\n y = Slice(x, m, n1, ones)", "b, 1, 8"),
    ("Gather of a table", "y = Gather(table, ids)", "b, n, 8"),
    ("Gather one place away", "y = Gather<axis=2>(x, one)", "b, n"),
    ("GatherElements", "u = Unsqueeze(ids, rest)\n y = GatherElements<axis=2>(x, u)", "b, n, 1"),
    ("GatherND", "u = Unsqueeze(ids, rest)\n y = GatherND(table, u)", "b, n, 8"),
    ("Pad", "t = Constant<value_ints=[0, 1, 0, 0, 2, 0]>()\n y = Pad(x, t)", "b, n + 3, 8"),
    ("Pad of named axes", "t = Constant<value_ints=[1, 1]>()\n y = Pad(x, t, half, twos)", "b, n, 10"),
    ("ScatterND", "u = Unsqueeze(ids, rest)\n y = ScatterND(x, u, x)", "b, n, 8"),
    # making
    ("Shape from start to end", "s = Shape<start=1, end=2>(x)\n y = ConstantOfShape(s)", "n"),
    ("Size", "s = Size(ids)\n y = Range(zero, s, one)", "b*n"),
    ("ConstantOfShape", "t = Concat<axis=0>(n1, n1)\n y = ConstantOfShape(t)", "n, n"),
    ("Range to length", "y = Range(zero, n, one)", "n"),
    ("Range backwards", "m = Neg(one)\n y = Range(n, zero, m)", "n"),
    ("Range in steps of two", "d = Mul(n, two)\n y = Range(zero, d, two)", "n"),
    ("Range of numbers", "y = Range(zero, two, one)", "2"),
    ("Range backwards in steps of two", "m = Neg(two)\n y = Range(n, zero, m)", "floor((n + 1)/2)"),
    ("Range of halves", "f = Cast<to=1>(n)\n z = Cast<to=1>(zero)\n h = Constant<value_float=0.5>()\n y = Range(z, f, h)", "?"),
    ("Range from a half", "f = Cast<to=1>(n)\n o = Cast<to=1>(one)\n h = Constant<value_float=0.5>()\n y = Range(h, f, o)", "?"),
    ("Range of floats", "f = Cast<to=1>(n)\n z = Cast<to=1>(zero)\n o = Cast<to=1>(one)\n y = Range(z, f, o)", "n"),
    ("OneHot", "v = Constant<value_floats=[0.0, 1.0]>()\n d = Constant<value_int=5>()\n y = OneHot(ids, d, v)", "b, n, 5"),
    ("EyeLike", "t = Concat<axis=0>(n1, n1)\n c = ConstantOfShape(t)\n y = EyeLike(c)", "n, n"),
    ("NonZero has an unknown count", "y = NonZero(x)", "3, ?"),
    ("RandomNormalLike", "y = RandomNormalLike(x)", "b, n, 8"),
    # computing
    ("Add broadcasts", "y = Add(x, half)", "b, n, 8"),
    ("Add of a row and a column", "u = Unsqueeze(ids, ones)\n w = Unsqueeze(ids, twos)\n y = Add(u, w)", "b, n, n"),
    ("Where broadcasts three", "c = Greater(ids, zero)\n u = Unsqueeze(c, twos)\n y = Where(u, x, half)", "b, n, 8"),
    ("Cast", "y = Cast<to=10>(x)", "b, n, 8"),
    ("CastLike", "y = CastLike(ids, half)", "b, n"),
    ("QuantizeLinear", "y = QuantizeLinear(x, half, point)", "b, n, 8"),
    ("DequantizeLinear", "q = QuantizeLinear(x, half, point)\n y = DequantizeLinear(q, half, point)", "b, n, 8"),
    ("DynamicQuantizeLinear", "y, s, p = DynamicQuantizeLinear(x)", "b, n, 8"),
    ("its scale", "q, y, p = DynamicQuantizeLinear(x)", ""),
    ("Softmax", "y = Softmax(x)", "b, n, 8"),
    ("Trilu", "t = Concat<axis=0>(n1, n1)\n c = ConstantOfShape(t)\n y = Trilu(c, one)", "n, n"),
    # reducing
    ("ReduceMean", "y = ReduceMean(x, rest)", "b, n, 1"),
    ("ReduceSum without keepdims", "y = ReduceSum<keepdims=0>(x, ones)", "b, 8"),
    ("ReduceMax of all", "y = ReduceMax<keepdims=0>(x)", ""),
    ("ArgMax", "y = ArgMax<axis=-1, keepdims=0>(x)", "b, n"),
    ("TopK", "y, i = TopK(x, threes)", "b, n, 3"),
    ("CumSum", "y = CumSum(ids, one)", "b, n"),
    ("LayerNormalization", "s = ReduceMean<keepdims=0>(table, zeros)\n y = LayerNormalization(x, s)", "b, n, 8"),
    ("its mean", "s = ReduceMean<keepdims=0>(table, zeros)\n z, y = LayerNormalization(x, s)", "b, n, 1"),
    # products
    ("MatMul with weights", "y = MatMul(x, weight)", "b, n, 12"),
    ("MatMul of two", "t = Transpose<perm=[0, 2, 1]>(x)\n y = MatMul(x, t)", "b, n, n"),
    ("MatMul broadcasts", "t = Transpose<perm=[0, 2, 1]>(x)\n u = Unsqueeze(t, zeros)\n y = MatMul(x, u)", "1, b, n, n"),
    ("Gemm", "f = Flatten<axis=2>(x)\n y = Gemm(f, weight)", "b*n, 12"),
    ("Gemm with transB", "f = Flatten<axis=2>(x)\n y = Gemm<transB=1>(f, weight_t)", "b*n, 12"),
    ("Gemm with transA", "f = Flatten<axis=2>(x)\n y = Gemm<transA=1>(f, f)", "8, 8"),
    ("Einsum", 'y = Einsum<equation="bqd,bkd->bqk">(x, x)', "b, n, n"),
    ("Einsum with an ellipsis", 'y = Einsum<equation="...d,de->...e">(x, weight)', "b, n, 12"),
    ("Einsum with spaces", 'y = Einsum<equation="b q d, d e -> b q e">(x, weight)', "b, n, 12"),
    ("MatMulNBits", "y = com.microsoft.MatMulNBits<K=8, N=12, bits=4, block_size=16>(x, weight, weight)", "b, n, 12"),
    ("FusedMatMul", "y = com.microsoft.FusedMatMul<transB=1>(x, x)", "b, n, n"),
    # no rule here: ONNX's own
    ("by ONNX's own inference", "t = Transpose<perm=[0, 2, 1]>(x)\n y = GlobalAveragePool(t)", "b, 8, 1"),
    ("a custom operator", "y = somebodys.Mixer(x)", None),
    # subgraphs of exporters
    ("TorchScript's expand: -1 means as it is",
     "s = Constant<value_ints=[-1, -1, 4]>()\n c = Equal(s, minus)\n k = Shape(s)\n o = ConstantOfShape<value = int64[1] {1}>(k)\n"
     " w = Where(c, o, s)\n u = Unsqueeze(ids, rest)\n y = Expand(u, w)", "b, n, 4"),
    ("TorchScript's expand: lengths in the target",
     "s = Concat<axis=0>(b1, n1, n1)\n c = Equal(s, minus)\n k = Shape(s)\n o = ConstantOfShape<value = int64[1] {1}>(k)\n"
     " w = Where(c, o, s)\n u = Unsqueeze(ids, rest)\n y = Expand(u, w)", "b, n, n"),
    ("a length divided exactly", "h = Div(p, two)\n p = Mul(n, two)\n h1 = Unsqueeze(h, zeros)\n y = ConstantOfShape(h1)", "n"),
    ("a length halved", "h = Div(n, two)\n h1 = Unsqueeze(h, zeros)\n y = ConstantOfShape(h1)", "floor(n/2)"),
    ("the smaller of two", "k = Constant<value_int=128>()\n m = Min(n, k)\n m1 = Unsqueeze(m, zeros)\n y = ConstantOfShape(m1)",
     "Min(128, n)"),
    ("a length cast to float and back", "f = Cast<to=1>(n)\n i = Cast<to=7>(f)\n i1 = Unsqueeze(i, zeros)\n y = ConstantOfShape(i1)",
     "n"),
    ("repeat_interleave as OneHot", "v = Constant<value_ints=[1, 2]>()\n d = Constant<value_int=3>()\n t = OneHot(one, d, v)\n"
     " y = Tile(x, t)", "b, 2*n, 8"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), [pytest.param(body, dims, id=title) for title, body, dims in SHAPES])
def test_shape(body, expected):
    shapes, values = inferred(body)
    found = shapes[values["y"]].shape
    if expected is None:
        assert found is None or not all(dim.is_known(size) for size in found)
    else:
        assert_dims(found, expected)


NUMBERS = [
    ("lengths joined", "y = Concat<axis=0>(b1, n1, twos)", "b, n, 2"),
    ("sums and products", "s = Add(n1, ones)\n y = Mul(s, twos)", "2*n + 2"),
    ("a difference", "y = Sub(n1, b1)", "n - b"),
    ("rounded down", "y = Div(n1, twos)", "floor(n/2)"),
    ("not rounded as numbers of floating point", "m = Add(n1, ones)\n f = Cast<to=1>(n1)\n g = Cast<to=1>(m)\n y = Div(f, g)", None),
    ("a remainder", "y = Mod(n1, twos)", "n - 2*floor(n/2)"),
    ("the larger", "y = Max(n1, ones)", "n"),
    ("of three", "y = Min(n1, ones, twos)", "1"),
    ("Neg", "y = Neg(n1)", "-n"),
    ("compared and chosen", "c = Less(zeros, n1)\n y = Where(c, n1, zeros)", "n"),
    ("equal to itself", "c = Equal(n1, n1)\n i = Cast<to=7>(c)\n y = Unsqueeze(i, zeros)", "1"),
    ("Gather of a shape from the back", "m = Constant<value_int=-2>()\n g = Gather(shape, m)\n y = Unsqueeze(g, zeros)", "n"),
    ("ScatterND into a shape",
     "u = Unsqueeze(ones, ones)\n y = ScatterND(shape, u, twos)", "b, 2, 8"),
    ("Split of a shape", "p = Constant<value_ints=[1, 2]>()\n z, y = Split(shape, p)", "n, 8"),
    ("Pad of a shape", "p = Constant<value_ints=[1, 0]>()\n y = Pad(shape, p, one)", "1, b, n, 8"),
    ("a shape reversed", "e = Constant<value_ints=[-9223372036854775807]>()\n y = Slice(shape, rest, e, zeros, rest)", "8, n, b"),
    ("tiled", "y = Tile(n1, twos)", "n, n"),
    ("expanded", "y = Expand(n1, threes)", "n, n, n"),
    ("reshaped", "r = Reshape(shape, t)\n t = Constant<value_ints=[1, 3]>()\n y = Squeeze(r, zeros)", "b, n, 8"),
    ("transposed", "u = Unsqueeze(shape, zeros)\n t = Transpose(u)\n y = Flatten<axis=0>(t)", "b, n, 8"),
    ("a part of a shape reversed", "e = Constant<value_ints=[0]>()\n y = Slice(shape, twos, e, zeros, rest)", "8, n"),
    ("GatherND of a shape", "k = Constant<value_ints=[2]>()\n y = GatherND(shape, k)", "8"),
    ("Range of numbers", "k = Constant<value_int=3>()\n y = Range(zero, k, one)", "0, 1, 2"),
    ("OneHot", "v = Constant<value_ints=[7, 9]>()\n d = Constant<value_int=3>()\n y = OneHot(one, d, v)", "7, 9, 7"),
    ("Size", "s = Size(x)\n y = Unsqueeze(s, zeros)", "8*b*n"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), [pytest.param(body, text, id=title) for title, body, text in NUMBERS])
def test_numbers_of_shape_arithmetic(body, expected):
    shapes, values = inferred(body)
    found = shapes[values["y"]].value
    if expected is None:
        assert found is None
    else:
        assert_dims(list(found.reshape(-1)), expected)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Equal(n1, twos)", "two lengths that may be equal are not distinguished"),
        ("y = Less(n1, twos)", "nor ordered"),
        ("f = Cast<to=1>(n1)\n y = Sqrt(f)", "a root of a length is no length"),
        ("y = Div(n1, zeros)", "nothing is divided by zero"),
        ("m = Neg(n1)\n y = Div(m, twos)", "a negative is rounded towards zero, a positive down"),
        ("y = Gather(table, one)", "large tables are not followed"),
        ("y = Mul(n1, end)", "a product that wraps around at some length"),
        ("y = Add(ones, end)", "a sum that wraps around"),
        ("i = Cast<to=6>(n1)\n k = Constant<value=int32[1] {20000}>()\n y = Mul(i, k)", "one that does in a long text"),
        ("l = Neg(end)\n s = Sub(l, ones)\n m = Neg(ones)\n y = Div(s, m)", "the smallest integer has no opposite"),
        ("k = Constant<value_floats=[1.5]>()\n y = Mul(ones, k)", "a float that is no integer"),
        ("y = Pow(twos, end)", "a power that no integer holds"),
        (
            "y = Pow(m, k)\n m = Constant<value_floats=[-15.0]>()\n k = Constant<value_floats=[0.25]>()",
            "a root of a negative number",
        ),
        ("m = Neg(twos)\n y = Div(n1, m)", "a negative quotient is rounded up"),
        ("f = Cast<to=1>(n1)\n k = Constant<value_floats=[0.7]>()\n y = Mul(f, k)", "a product that is rounded"),
        ("f = Cast<to=1>(n1)\n y = Reciprocal(f)", "so is a quotient"),
        ("f = Cast<to=1>(n1)\n k = Constant<value_floats=[16777216.0]>()\n y = Mul(f, k)", "so is a large one"),
        ("f = Cast<to=10>(n1)\n y = Identity(f)", "half precision holds few lengths"),
        ("z = Cast<to=1>(zeros)\n y = Cast<to=1>(k)\n k = Constant<value=double[1] {nan}>()", "NaN is no number"),
    ],
)
def test_what_depends_is_not_claimed(body, expected):
    shapes, values = inferred(body)
    assert shapes[values["y"]].value is None, expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Div(k, twos)\n k = Constant<value_ints=[-9007199254740993]>()", -4503599627370496),
        ("y = Mod(k, threes)\n k = Constant<value_ints=[-5]>()", 1),
        ("y = Mod<fmod=1>(k, threes)\n k = Constant<value_ints=[-5]>()", -2),
        ("y = Mod<fmod=1>(k, m)\n k = Constant<value_floats=[-5.5]>()\n m = Constant<value_floats=[2.0]>()", -1.5),
        ("y = Add(k, o)\n k = Constant<value_floats=[16777216.0]>()\n o = Constant<value_floats=[1.0]>()", 16777216.0),
        ("y = Mul(k, k)\n k = Constant<value_floats=[1e30]>()", float("inf")),
    ],
)
def test_numbers_are_those_that_the_type_holds(body, expected):
    shapes, values = inferred(body)
    (found,) = shapes[values["y"]].value
    assert found == expected


@pytest.mark.parametrize(
    "body", ["y = Concat<axis=0>(x, n1)", "y, z = TopK<axis=-3>(ids, ones)", "y = Concat<axis=1>(n1, n1)"]
)
def test_axes_that_a_tensor_does_not_have_are_refused(body):
    with pytest.raises(UnsupportedError, match="its inputs are inconsistent"):
        inferred(body)


@pytest.mark.parametrize("length", [1, 2, 7, 300, 1 << 17])
@pytest.mark.parametrize(
    "size", [LENGTH, LENGTH * BATCH, sympy.floor(LENGTH / 3), sympy.Max(LENGTH - 3, 0), 1 / (LENGTH - 1), LENGTH / 2]
)
def test_a_dimension_at_a_length_is_the_expression_with_its_symbols_replaced(size, length):
    assert dim.at(size, length, 2) == dim.substitute(size, ((LENGTH, length), (BATCH, 2)))


@pytest.mark.parametrize("number", [1 / (LENGTH - 1), LENGTH / (LENGTH - LENGTH.subs(LENGTH, 1)), sympy.nan * LENGTH])
def test_a_number_that_is_none_at_some_length_fits_no_type(number):
    assert not dim.is_within(number, -10, 10)


def test_a_table_cut_by_length_bounds_the_length():
    shapes, _ = inferred("y = Slice(table, zeros, n1, zeros)")
    assert shapes.bounds == {80}


def test_what_is_unknown_says_where_knowledge_ended():
    shapes, values = inferred("y = NonZero(x)")
    assert "NonZero at `y`" in str(shapes[values["y"]].shape[1])


def test_stored_shapes_are_not_believed():
    graph = ir.from_proto(read(FRAME.format(body="y = MatMul(x, weight)"))).graph
    y = graph.outputs[0]
    y.shape = ir.Shape([3, 3])
    x, ids = graph.inputs
    shapes = infer_shapes(list(graph), {x: (BATCH, LENGTH, 8), ids: (BATCH, LENGTH)}, 18)
    assert shapes[y].shape == (BATCH, LENGTH, 12)


def test_a_declared_rank_serves_where_no_rule_reaches():
    graph = ir.from_proto(read(FRAME.format(body="y = somebodys.Mixer(x)"))).graph
    y = graph.outputs[0]
    y.shape = ir.Shape(["any", 5])
    x, ids = graph.inputs
    shapes = infer_shapes(list(graph), {x: (BATCH, LENGTH, 8), ids: (BATCH, LENGTH)}, 18)
    assert_dims(shapes[y].shape, "?, 5")


@pytest.mark.parametrize(
    ("numerator", "denominator", "expected"),
    [(12, 4, 3), (12, 5, None), (12, 0, None), (BATCH * LENGTH * 4, LENGTH, 4 * BATCH), (LENGTH, 2, None),
     (LENGTH * LENGTH + LENGTH, LENGTH, LENGTH + 1), (LENGTH, BATCH, None), (8, LENGTH, None)],
)  # fmt: skip
def test_exact_quotients(numerator, denominator, expected):
    found = dim.exact_quotient(numerator, denominator)
    assert found == expected


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [(1, LENGTH, LENGTH), (LENGTH, 1, LENGTH), (LENGTH, 7, 7), (7, LENGTH, 7), (LENGTH, LENGTH, LENGTH)],
)
def test_broadcast_takes_the_plainer(left, right, expected):
    assert dim.broadcast(left, right) == expected


def test_the_known_wins_over_the_unknown():
    lost = dim.unknown("somewhere")
    assert dim.broadcast(lost, LENGTH) is LENGTH
    assert dim.broadcast(LENGTH, lost) is LENGTH


def test_comparisons_of_dimensions():
    assert dim.is_less(LENGTH, LENGTH + 1) is True
    assert dim.is_less(LENGTH + 1, LENGTH) is False
    assert dim.is_less(LENGTH, BATCH) is None
    assert dim.is_equal(LENGTH * 2, LENGTH + LENGTH) is True
    assert dim.is_equal(LENGTH, LENGTH + 1) is False
    assert dim.is_equal(LENGTH, BATCH) is None


def test_a_dimension_at_numbers():
    assert dim.substitute(3 * BATCH * LENGTH, ((BATCH, 2), (LENGTH, 5))) == 30
    assert dim.substitute(7, ((BATCH, 2),)) == 7
    assert isinstance(dim.product([BATCH, 2, 3]), sympy.Expr)
    assert dim.product([]) == 1
    assert isinstance(dim.multiply(2, np.int64(3)) * 1, int)


def test_what_is_made_of_a_float_is_not_taken_for_a_whole_number():
    length = dim.symbol("length of a test")
    assert dim.multiply(length, 2.0) != dim.multiply(length, 2)
    assert dim.substitute(dim.multiply(length, 2), ((length, 3),)) == 6
    assert isinstance(dim.substitute(dim.multiply(length, 2), ((length, 3),)), int)
