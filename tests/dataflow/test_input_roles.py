"""Roles of inputs, for the new tokens or for all: decided by their use, never by their names."""

# ruff: noqa: E501  # a case is read best on one line

import onnx_ir as ir
import pytest
from written import read

from kvsurgeon.dataflow.input_dimensions import read_inputs
from kvsurgeon.dataflow.input_roles import classify_inputs
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, extent
from kvsurgeon.symbolic.sequence_axes import Length

FRAME = "case ({inputs}) => (float[] y) <float[9, 4] table, int64[1] last = {{2}}, int64[1] zero = {{0}}, int64[1] two = {{2}}, int64[3] thrice = {{1, 1, 1}}, float half = {{0.5}}> {{ {body} }}"


def kinds(inputs: str, body: str) -> dict[str, dict[int, Length]]:
    graph = ir.from_proto(read(FRAME.format(inputs=inputs, body=body))).graph
    given = read_inputs(graph)
    return {one.value.name: one.lengths for one in classify_inputs(given.dimensions, given.length)}


NEW, TOTAL = Length.NEW, Length.TOTAL
TOKENS = "e = Gather(table, p9)"

CASES = [
    ("what indexes a table", "int64[b, n] p9", TOKENS, {"p9": {1: NEW}}),
    ("behind a cast and a shift", "int32[b, n] p9", "c = Cast<to=7>(p9) d = Add(c, c) e = Gather(table, c)", {"p9": {1: NEW}}),
    ("ids below 0, counted from the end of the table, next to positions", "int64[b, n] p9, int64[b, n] q7",
     "w = Constant<value_ints=[0]>() l = Less(p9, w) k = Not(l) c = Cast<to=7>(k) m = Mul(p9, c) d = Cast<to=7>(l) "
     "v = Constant<value_ints=[9]>() a = Add(p9, v) b = Mul(d, a) t = Add(b, m) e = Gather(table, t) "
     "f = Cast<to=1>(q7) g = Mul(f, half) y = Cos(g)", {"p9": {1: NEW}, "q7": {1: NEW}}),
    ("negative ids, chosen by a condition", "int64[b, n] p9, int64[b, n] q7",
     "w = Constant<value_ints=[0]>() l = Greater(w, p9) v = Constant<value_ints=[9]>() a = Add(p9, v) t = Where(l, a, p9) "
     "e = Gather(table, t) m = Cast<to=1>(q7)", {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("ids of images that are replaced", "int64[b, n] p9, int64[b, n] q7",
     "w = Constant<value_ints=[7]>() x = Constant<value_ints=[8]>() a = Equal(p9, w) b = Equal(p9, x) c = Or(a, b) "
     "t = Where(c, zero, p9) e = Gather(table, t) m = Cast<to=1>(q7)", {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("a mask that chooses what is looked up", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} w = Constant<value_ints=[0]>() l = Equal(q7, w) t = Where(l, zero, p9) f = Gather(table, t)",
     {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("a mask that is compared with 0", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} w = Constant<value_ints=[0]>() g = Greater(q7, w) c = Cast<to=1>(g) y = MatMul(c, table)",
     {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("numbers that are compared with one that no mask holds", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} f = Cast<to=1>(q7) w = Constant<value_float=300.0>() y = Greater(f, w)", {"p9": {1: NEW}, "q7": {1: NEW}}),
    ("numbers that may be larger than 1", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} o = Constant<value_ints=[1]>() y = Less(o, q7)", {"p9": {1: NEW}, "q7": {1: NEW}}),
    ("numbers whose largest is compared with one", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} m = ReduceMax(q7, zero) w = Constant<value_ints=[300]>() y = Greater(m, w)", {"p9": {1: NEW}, "q7": {1: NEW}}),
    ("floats whose largest is read", "int64[b, n] p9, float[b, n] q7",
     f"{TOKENS} m = ReduceMax(q7, zero) y = Mul(m, half)", {"p9": {1: NEW}, "q7": {1: NEW}}),
    ("a mask of which all tokens may be hidden", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} t = Cast<to=9>(q7) i = Cast<to=6>(t) m = ReduceMin(i, zero) y = Cast<to=9>(m)", {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("numbers of which the last is read", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} w = Constant<value_ints=[-1]>() e1 = Constant<value_ints=[9223372036854775807]>() o = Constant<value_ints=[1]>() "
     "l = Slice(q7, w, e1, o) f = Cast<to=1>(l) y = Log(f)", {"p9": {1: NEW}, "q7": {1: NEW}}),
    ("numbers of which the last is compared with one that no mask holds", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} w = Constant<value_ints=[-1]>() e1 = Constant<value_ints=[9223372036854775807]>() o = Constant<value_ints=[1]>() "
     "l = Slice(q7, w, e1, o) t = Constant<value_ints=[60]>() d = Sub(l, t) y = Greater(d, zero)", {"p9": {1: NEW}, "q7": {1: NEW}}),
    ("a mask of which the first is compared with 0", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} o = Constant<value_ints=[1]>() l = Slice(q7, zero, o, o) u = Unsqueeze(l, two) y = Equal(u, zero)",
     {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("a mask of which the first is cast", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} w = Constant<value_int=0>() l = Gather<axis=1>(q7, w) f = Cast<to=9>(l) y = Not(f)",
     {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("a mask next to itself without the last", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} w = Constant<value_ints=[-1]>() o = Constant<value_ints=[1]>() l = Slice(q7, zero, w, o) f = Cast<to=1>(l) y = Mul(f, half)",
     {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("a mask in reverse", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} w = Constant<value_ints=[-1]>() e1 = Constant<value_ints=[-9223372036854775807]>() o = Constant<value_ints=[1]>() "
     "l = Slice(q7, w, e1, o, w) y = Cast<to=1>(l)", {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("a mask whose smallest is compared with 1", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} m = ReduceMin(q7, zero) o = Constant<value_ints=[1]>() y = Equal(m, o)", {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("a mask that is cut to the length", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} s = Shape<start=1>(p9) o = Constant<value_ints=[1]>() l = Slice(q7, zero, s, o) y = Cast<to=1>(l)",
     {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("numbers that one is subtracted from", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} w = Constant<value_ints=[60]>() d = Sub(q7, w) y = Greater(q7, d)", {"p9": {1: NEW}, "q7": {1: NEW}}),
    ("a mask whose sum is compared with a number", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} m = ReduceSum(q7, zero) w = Constant<value_ints=[300]>() y = Greater(m, w)", {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("a mask that becomes a bias", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} f = Cast<to=1>(q7) o = Constant<value_float=1.0>() i = Sub(o, f) w = Constant<value_float=-10000.0>() d = Mul(i, w) "
     "l = Constant<value_float=-5000.0>() y = Greater(d, l)", {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("embeddings", "float[b, n, 4] p9", "e = MatMul(p9, table)", {"p9": {1: NEW}}),
    ("a padding mask", "int64[b, n] p9, int64[b, n] q7", f"{TOKENS} m = Cast<to=1>(q7) y = Mul(m, half)",
     {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("positions that index a second table", "int64[b, n] p9, int64[b, n] q7", f"{TOKENS} f = Gather(table, q7)",
     {"p9": {1: NEW}, "q7": {1: NEW}}),
    ("positions that become angles", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} f = Cast<to=1>(q7) g = Mul(f, half) y = Cos(g)", {"p9": {1: NEW}, "q7": {1: NEW}}),
    ("a mask of queries against keys", "int64[b, n] p9, float[b, 1, n, n] q7", f"{TOKENS} y = Add(q7, half)",
     {"p9": {1: NEW}, "q7": {2: NEW, 3: TOTAL}}),
    ("positions that index a table repeated for the batch", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} r = Unsqueeze(table, zero) t = Tile(r, thrice) u = Unsqueeze(q7, two) v = Tile(u, thrice) "
     "y = GatherElements<axis=1>(t, v)", {"p9": {1: NEW}, "q7": {1: NEW}}),
    ("positions that index rows cut to the length", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} s = Shape<start=1>(p9) r = Slice(table, zero, s) y = Gather(r, q7)", {"p9": {1: NEW}, "q7": {1: NEW}}),
    ("a padding mask that indexes two numbers", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} w = Constant<value_floats=[-9.0, 0.0]>() y = Gather(w, q7)", {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("what is looked for in a vocabulary", "int64[b, n] p9, int64[b, n] q7",
     "w = Constant<value_ints=[0, 1, 2, 3]>() u = Unsqueeze(p9, two) y = Equal(u, w) z = Cast<to=1>(q7)",
     {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("what is compared with one number", "int64[b, n] p9, int64[b, n] q7",
     f"{TOKENS} w = Constant<value_ints=[1]>() y = Equal(q7, w)", {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("no batch axis", "int64[n] p9", TOKENS, {"p9": {0: NEW}}),
    ("a flag without tokens", "int64[b, n] p9, float[1] q7", f"{TOKENS} y = Mul(e, q7)", {"p9": {1: NEW}, "q7": {}}),
    ("fixed sizes", "int64[1, 6] p9, int64[1, 6] q7", f"{TOKENS} m = Cast<to=1>(q7) y = Mul(m, half)",
     {"p9": {1: NEW}, "q7": {1: TOTAL}}),
    ("an only input is the tokens', whatever is done to it", "int64[b, n] p9", "y = Cast<to=1>(p9)", {"p9": {1: NEW}}),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "body", "expected"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_classified(inputs, body, expected):
    assert kinds(inputs, body) == expected


@pytest.mark.parametrize(("text", "holds_positions"), [("p9", set()), ("r8", {"p9"})])
def test_the_text_holds_no_positions_whatever_it_is_compared_with(text, holds_positions):
    compared = "s = Shape(p9) n = ReduceProd<keepdims=0>(s) w = Constant<value_int=0>() v = Constant<value_int=1>() at = Range(w, n, v)"
    body = f"{compared} y = LessOrEqual(at, p9) e = Gather(table, {text})"
    graph = ir.from_proto(read(FRAME.format(inputs="int64[b, n] p9, int64[b, n] r8", body=body))).graph
    given = read_inputs(graph)
    found = classify_inputs(given.dimensions, given.length)
    assert {one.value.name for one in found if one.holds_positions} == holds_positions


def test_dimensions_are_named_by_axis_and_name():
    graph = ir.from_proto(read(FRAME.format(inputs="int64[a, c] p, int64[a, c] q, float[c, w] r", body=""))).graph
    inputs = read_inputs(graph)
    dimensions, length = inputs.dimensions, inputs.length
    p, q, r = graph.inputs
    assert length is LENGTH
    assert dimensions[p] == dimensions[q] == (BATCH, LENGTH)
    assert dimensions[r][0] is LENGTH


EQUAL = [
    ("two tensors that are added", "float[c, m, 4] q", "y = Add(e, q)"),
    ("two tensors that are concatenated along another axis", "float[c, m, 4] q", "y = Concat<axis=2>(e, q)"),
    ("a product that sums over both", "float[c, 4, m] q", "y = MatMul(q, e)"),
    ("a choice between two", "bool[c, m, 4] q", "y = Where(q, e, half)"),
    ("a tensor that is expanded to the sizes of another", "float[c, m, 1] q",
     "s = Shape(e) y = Expand(q, s)"),
    ("a tensor that is reshaped to the sizes of another", "float[c, m, 4] q", "s = Shape(e) y = Reshape(q, s)"),
    ("heads that are split with the length of another", "float[c, m, 8] q",
     "s = Shape<end=2>(e) w = Constant<value_ints=[-1, 4]>() t = Concat<axis=0>(s, w) y = Reshape(q, t)"),
    ("a mask that is cut to the length of another", "float[c, m] q",
     "s = Shape<start=1, end=2>(e) z = Constant<value_ints=[0]>() o = Constant<value_ints=[1]>() "
     "r = Slice(q, z, s, o) u = Unsqueeze(r, two) y = Add(e, u)"),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "body"), [pytest.param(*case[1:], id=case[0]) for case in EQUAL])
def test_sizes_that_must_be_equal_are_one_size(inputs, body):
    graph = ir.from_proto(read(FRAME.format(inputs=f"int64[b, n] p, {inputs}", body=f"e = Gather(table, p) {body}")))
    given = read_inputs(graph.graph)
    sizes = given.dimensions[graph.graph.inputs[1]]
    assert BATCH in sizes
    assert LENGTH in sizes


APART = [
    ("a product with each other's rows", "float[b, m, 4] q", "t = Transpose<perm=[0, 2, 1]>(q) y = MatMul(e, t)"),
    ("a sum over its own axis", "float[b, m, 4] q", "s = ReduceSum(q, two) y = Add(e, half)"),
    ("rows that are looked up", "float[m, 4] q", "r = Gather(q, p) y = Add(e, r)"),
    ("positions that are compared", "int64[m] q",
     "s = Shape<start=1>(p) u = Unsqueeze(q, zero) w = Unsqueeze(p, two) y = Less(u, w)"),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "body"), [pytest.param(*case[1:], id=case[0]) for case in APART])
def test_a_size_of_another_name_is_another_size(inputs, body):
    graph = ir.from_proto(read(FRAME.format(inputs=f"int64[b, n] p, {inputs}", body=f"e = Gather(table, p) {body}")))
    assert extent("m") in read_inputs(graph.graph).dimensions[graph.graph.inputs[1]]


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [("float[] x", "an input has no shape"), ("float[b, c, h, w] image", "no input has a sequence axis"),
     ("int64[b, n] q7, int64[b, n] q8", "no input is given for the new tokens only"),
     ("int64[b, n] q, int64[b, b] mask", "an input names two axes like the batch.*`mask`")],
)  # fmt: skip
def test_refused(inputs, reason):
    with pytest.raises(UnsupportedError, match=reason):
        kinds(inputs, "")
