"""Memory tokens: a prefix of the model itself before the text, whose rows are queries too."""

import re

import pytest
from attentions import assert_law_of, attention, in_order
from exports import injected
from laws import assert_law, texts
from written import read

import kvsurgeon
from kvsurgeon.errors import Code, UnsupportedError

CONSTANTS = """float[1, 3, 8] memory, int64 three = {3}, int64[1] rows = {3}, int64[1] eight = {8},
 int64[1] end = {4611686018427387904}"""
JOINED = """bn = Slice(sizes, first, second)
 to = Concat<axis = 0>(bn, rows, eight)
 memories = Expand(memory, to)
 h = Concat<axis = 1>(memories, x)"""
WIDE = """far = Add(length, three)
 wide = Range(nought, far, one)
 keys = Unsqueeze(wide, first)
 queries = Unsqueeze(wide, second)
"""
CAUSAL = f"{WIDE} allowed = LessOrEqual(keys, queries)"
CUT = "logits = Slice(c, rows, end, second)"


def text(**parts: str) -> str:
    return attention(**{"constants": CONSTANTS, "hidden": JOINED, "allowed": CAUSAL, "after": CUT, **parts})


def test_they_become_learned_rows_of_keys_and_values():
    assert_law_of(text())


def test_the_cache_holds_the_text_alone():
    model = injected(in_order(read(text())))
    names = [value.name for value in model.graph.input]
    assert names == ["x", "past_key_values.0.key", "past_key_values.0.value"]
    (layer,) = kvsurgeon.inspect(in_order(read(text()))).attentions
    assert (layer.query_heads, layer.kv_heads, layer.head_dim) == (1, 1, 8)


# Two layers of two heads with rotary positions that count from the first memory token, and a padding mask.
LAYER = """
  q{0} = MatMul(h{0}, wq{0})
  k{0} = MatMul(h{0}, wk{0})
  v{0} = MatMul(h{0}, wv{0})
  hs{0} = Shape(h{0})
  hb{0} = Slice(hs{0}, first, second)
  hn{0} = Slice(hs{0}, second, third)
  apart{0} = Concat<axis = 0>(hb{0}, hn{0}, heads)
  together{0} = Concat<axis = 0>(hb{0}, hn{0}, eight)
  q1{0} = Reshape(q{0}, apart{0})
  k1{0} = Reshape(k{0}, apart{0})
  v1{0} = Reshape(v{0}, apart{0})
  q2{0} = Transpose<perm = [0, 2, 1, 3]>(q1{0})
  k2{0} = Transpose<perm = [0, 2, 1, 3]>(k1{0})
  v2{0} = Transpose<perm = [0, 2, 1, 3]>(v1{0})
  qr{0} = Mul(q2{0}, wave)
  kr{0} = Mul(k2{0}, wave)
  kt{0} = Transpose<perm = [0, 1, 3, 2]>(kr{0})
  s{0} = MatMul(qr{0}, kt{0})
  m{0} = Where(allowed, s{0}, low)
  w{0} = Softmax<axis = -1>(m{0})
  c{0} = MatMul(w{0}, v2{0})
  c1{0} = Transpose<perm = [0, 2, 1, 3]>(c{0})
  c2{0} = Reshape(c1{0}, together{0})
  a{0} = Tanh(c2{0})
  h{1} = Add(h{0}, a{0})"""
TWO_LAYERS = """case (float[b, n, 8] x, int64[b, n] attention_mask) => (float[b, n, 8] logits)
<float[8, 8] wq0, float[8, 8] wk0, float[8, 8] wv0, float[8, 8] wq1, float[8, 8] wk1, float[8, 8] wv1,
 float[1, 3, 8] memory, float[4] frequencies, int64 nought = {0}, int64 one = {1}, int64[1] first = {0},
 int64[1] second = {1}, int64[1] third = {2}, int64[1] rows = {3}, int64[1] eight = {8}, int64[2] heads = {2, 4},
 int64[4] before = {0, 3, 0, 0}, int64[2] inner = {1, 2}, int64[1] end = {4611686018427387904}, float low = {-10000.0}>
{
  sizes = Shape(x)
  bn = Slice(sizes, first, second)
  to = Concat<axis = 0>(bn, rows, eight)
  memories = Expand(memory, to)
  h0 = Concat<axis = 1>(memories, x)
  sizes0 = Shape(h0)
  length = Gather(sizes0, one)
  at = Range(nought, length, one)
  row = Unsqueeze(at, first)
  column = Unsqueeze(at, second)
  causal = LessOrEqual(row, column)
  padded = Pad(attention_mask, before, one)
  seen = Cast<to = 9>(padded)
  seen4 = Unsqueeze(seen, inner)
  allowed = And(causal, seen4)
  place = Cast<to = 1>(column)
  angle = Mul(place, frequencies)
  wave = Cos(angle)""" + LAYER.format(0, 1) + LAYER.format(1, 2) + """
  logits = Slice(h2, rows, end, second)
}"""  # fmt: skip
H0 = "h0 = Concat<axis = 1>(memories, x)"
JOINED_MASK = """ones = Expand(one, ms)
  padded = Concat<axis = 1>(ones, attention_mask)"""


@pytest.mark.parametrize(("batch", "length"), [(1, 9), (3, 9), (2, 40)])
@pytest.mark.parametrize("joined", [False, True], ids=["padded mask", "joined mask"])
def test_several_layers_with_positions_and_left_padding(joined, batch, length):
    written = TWO_LAYERS
    if joined:
        written = written.replace("padded = Pad(attention_mask, before, one)", JOINED_MASK)
        written = written.replace("  ones =", "  ms = Concat<axis = 0>(bn, rows)\n  ones =")
    original = in_order(read(written))
    assert_law(original, injected(original), texts(original, batch, length))


def test_keys_and_values_of_memory_tokens_are_computed_from_weights_alone():
    model = injected(in_order(read(TWO_LAYERS)))
    fed = {value.name for value in model.graph.input}
    computed = {
        name for node in model.graph.node if node.op_type != "Expand" for name in node.output if ".memory" in name
    }
    reads = {name: set(node.input) for node in model.graph.node for name in node.output}
    assert computed
    for name in computed:
        pending, found = [name], set()
        while pending:
            one = pending.pop()
            if one not in found:
                found.add(one)
                pending += reads.get(one, ())
        assert fed.isdisjoint(found), name


@pytest.mark.parametrize(
    ("parts", "code", "reason"),
    [
        ({"allowed": f"{WIDE} is_memory = Less(queries, three)\n seen = LessOrEqual(keys, queries)\n"
          " allowed = Or(seen, is_memory)"}, Code.NOT_CAUSAL, "query 0 attends to key"),
        ({"allowed": f"{WIDE} later = Add(queries, one)\n allowed = LessOrEqual(keys, later)"},
         Code.NOT_CAUSAL, "query 0 attends to key 1"),
        ({"hidden": f"{JOINED.replace(' h =', ' h1 =')}\n back = Sub(far, queries)\n f = Cast<to = 1>(back)\n"
          " h = Mul(h1, f)"}, Code.LENGTH_DEPENDENT, "depend on the total length"),
        ({"after": "logits = Identity(c)"}, Code.MIXES_TOKENS, "are queries too"),
        ({"after": "logits = Slice(c, second, end, second)"}, Code.MIXES_TOKENS, "are queries too"),
        ({"hidden": JOINED.replace("h = Concat", "g = Concat") +
          "\n mean = ReduceMean<keepdims = 1>(g, second)\n h = Add(g, mean)"}, Code.MIXES_TOKENS, "are queries too"),
        ({"hidden": JOINED.replace("(memories, x)", "(x, memories)"),
          "after": "stop = Unsqueeze(length, first)\n logits = Slice(c, first, stop, second)"},
         Code.MIXES_TOKENS, "are queries too"),
        ({"hidden": f"{JOINED.replace(' h =', ' h1 =')}\n n = Constant<value_ints = [1, 9, 1]>()\n"
          " fixed = ConstantOfShape(n)\n h = Add(h1, fixed)", "after": "logits = Slice(c, second, end, second)"},
         Code.FIXED_LENGTH, "Add: it runs at a length of 6 only"),
        ({"hidden": f"mean = ReduceMean<keepdims = 1>(x, second)\n{JOINED.replace('(memory, to)', '(said, to)')}\n"
          " said = Add(memory, mean)"}, Code.MIXES_TOKENS, "ReduceMean mixes"),
    ],
    ids=["they see the text", "the text looks ahead", "positions from the end", "left in the output",
         "cut at another row", "mean over both", "after the text", "of a fixed length", "made of the text"],
)  # fmt: skip
def test_memory_that_changes_with_the_text_is_rejected(parts, code, reason):
    with pytest.raises(UnsupportedError, match=re.escape(reason)) as refused:
        injected(in_order(read(text(**parts))))
    assert refused.value.code is code


def test_a_token_before_the_text_is_one_too():
    written = TWO_LAYERS.replace("float[b, n, 8] x,", "int64[b, n] ids,").replace("Shape(x)", "Shape(ids)")
    written = written.replace("{1, 3, 8} memory", "").replace(
        "float[1, 3, 8] memory", "float[7, 8] table, int64[1, 3] start = {4, 2, 6}"
    )
    written = written.replace("Concat<axis = 0>(bn, rows, eight)", "Concat<axis = 0>(bn, rows)")
    written = written.replace("Expand(memory, to)", "Expand(start, to)")
    written = written.replace(
        "h0 = Concat<axis = 1>(memories, x)", "all = Concat<axis = 1>(memories, ids)\n  h0 = Gather(table, all)"
    )
    original = in_order(read(written))
    assert_law(original, injected(original))


def test_inputs_that_all_rows_read_are_rejected():
    added = TWO_LAYERS.replace("int64[b, n] attention_mask)", "int64[b, n] attention_mask, float[b, 1, 8] speaker)")
    added = added.replace(
        "h0 = Concat<axis = 1>(memories, x)", "h9 = Concat<axis = 1>(memories, x)\n  h0 = Add(h9, speaker)"
    )
    with pytest.raises(UnsupportedError, match="are queries too"):
        injected(in_order(read(added)))


@pytest.mark.parametrize(
    "scale", ["mean = ReduceMean<keepdims = 1>(f, second)", "mean = ReduceMax<keepdims = 1>(f, second)"]
)
def test_a_scale_that_counts_the_text_is_rejected(scale):
    counted = TWO_LAYERS.replace(
        "  seen = Cast", f"  f = Cast<to = 1>(padded)\n  {scale}\n  scale = Unsqueeze(mean, second)\n  seen = Cast"
    )
    counted = counted.replace(
        "h0 = Concat<axis = 1>(memories, x)", "h9 = Concat<axis = 1>(memories, x)\n  h0 = Mul(h9, scale)"
    )
    with pytest.raises(UnsupportedError):
        injected(in_order(read(counted)))


def test_the_text_may_hide_them():
    hidden = f"{WIDE} seen = LessOrEqual(keys, queries)\n own = GreaterOrEqual(keys, three)"
    hidden += "\n is_memory = Less(queries, three)\n kept = Or(own, is_memory)\n allowed = And(seen, kept)"
    assert_law_of(text(allowed=hidden))


def test_a_window_counts_them():
    window = f"{WIDE} seen = LessOrEqual(keys, queries)\n gap = Sub(queries, keys)\n near = Less(gap, three)"
    assert_law_of(text(allowed=window + "\n allowed = And(seen, near)"))
