"""The facts of an attention: heads, scale, softcap, mask, rotary embedding, weights."""

# ruff: noqa: E501  # one case on one line

import math

import pytest
from attentions import attention
from decoders import Config, Decoder
from exports import FILES, export, injected
from written import read

from kvsurgeon.anatomy.facts import Attention
from kvsurgeon.passes.contract import Subject


def single_attention(text: str, opset: int = 18) -> Attention:
    (found,) = Subject.of(read(text, opset)).decoder().attentions
    return found


SCALES = [
    ("none", {}, 1.0),
    ("on the scores", {"scores": "s = Mul(s0, half)"}, 0.5),
    ("on the scores, divided", {"scores": "s = Div(s0, half)"}, 2.0),
    ("on the query", {"query": "q = Mul(half, q0)"}, 0.5),
    ("on the key", {"key": "k = Div(k0, half)"}, 2.0),
    ("a root in both", {"query": "q = Mul(q0, half)", "key": "k = Mul(k0, half)"}, 0.25),
    ("computed from the head's size", {"scores": "f = Cast<to = 1>(w8)\n w8 = Gather(sizes, two)\n"
     "two = Constant<value_int = 2>()\n r = Sqrt(f)\n s = Div(s0, r)"}, 1 / math.sqrt(8)),
    ("a number for each feature is not a scale", {"query": "q = Mul(q0, eight)", "constants": "float[8] eight"}, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "expected"), [pytest.param(*case[1:], id=case[0]) for case in SCALES])
def test_scale(parts, expected):
    subject = Subject.of(read(attention(**parts)))
    subject.model.graph.sort()
    (found,) = subject.decoder().attentions
    assert found.scale == pytest.approx(expected)
    assert found.softcap is None


@pytest.mark.parametrize(
    ("options", "cache", "rows"),
    [({}, "dynamic", "past_sequence_length"), ({"cache": "static"}, "static", "max_length"),
     ({"cache": "new-tokens"}, "new-tokens", "past_sequence_length")],
)  # fmt: skip
def test_a_model_with_a_cache_has_the_same_attention_and_lists_its_cached_tensors(options, cache, rows):
    text = attention()
    before, after = Subject.of(read(text)).decoder(), Subject.of(injected(read(text), **options)).decoder()
    assert before.cache == ()
    assert [(one.past, one.present, one.layer, one.kind, one.cache_mode) for one in after.cache] == [
        (f"past_key_values.0.{kind}", f"present.0.{kind}", 0, kind, cache) for kind in ("key", "value")
    ]
    assert after.cache[0].shape == ("batch_size", after.attentions[0].kv_heads, rows, after.attentions[0].head_dim)
    for was, now in zip(before.attentions, after.attentions, strict=True):
        assert (was.query_heads, was.kv_heads, was.scale, was.mask) == (
            now.query_heads,
            now.kv_heads,
            now.scale,
            now.mask,
        )


def test_softcap():
    found = single_attention(
        attention(
            constants="float cap = {20.0}", scores="z = Mul(s0, half)\n d = Div(z, cap)\n t = Tanh(d)\n s = Mul(t, cap)"
        )
    )
    assert found.softcap == pytest.approx(20.0)
    assert found.scale == pytest.approx(0.5)


MASKS = [
    ("causal", {}, {"kind": "causal"}),
    ("a window of three", {"allowed": "d = Sub(column, row)\n near = Less(d, three)\n past = GreaterOrEqual(d, nought)\n"
                           "allowed = And(near, past)", "constants": "int64 three = {3}"}, {"kind": "sliding-window", "window": 3}),
    ("chunks of four", {"allowed": "a = Div(column, four)\n b = Div(row, four)\n same = Equal(a, b)\n"
                        "past = LessOrEqual(row, column)\n allowed = And(same, past)", "constants": "int64 four = {4}"},
     {"kind": "chunked", "chunk": 4}),
    ("every second key", {"allowed": "d = Sub(column, row)\n m = Mod(d, two)\n even = Equal(m, nought)\n"
                          "past = LessOrEqual(row, column)\n allowed = And(even, past)", "constants": "int64 two = {2}"},
     {"kind": "other"}),
    ("a window that is wider in long texts", {
        "allowed": "d = Sub(column, row)\n late = Greater(column, far)\n width = Where(late, eight, four)\n"
        "near = Less(d, width)\n past = LessOrEqual(row, column)\n allowed = And(near, past)",
        "constants": "int64 far = {200}, int64 four = {4}, int64 eight = {8}"}, {"kind": "other"}),
    ("few keys for some queries of long texts", {
        "allowed": "d = Sub(column, row)\n near = Less(d, four)\n late = Greater(column, start)\n"
        "before = Less(column, stop)\n some = And(late, before)\n others = Not(some)\n open = Or(near, others)\n"
        "past = LessOrEqual(row, column)\n allowed = And(open, past)",
        "constants": "int64 start = {200}, int64 stop = {210}, int64 four = {4}"}, {"kind": "other"}),
    ("a window of tokens that are not masked", {
        "inputs": "int64[b, n] mask", "allowed": "numbers = CumSum(mask, one)\n queries = Unsqueeze(numbers, third)\n"
        "keys = Unsqueeze(numbers, second)\n d = Sub(queries, keys)\n near = Less(d, three)\n"
        "kept = Greater(mask, nought)\n real = Unsqueeze(kept, second)\n past = LessOrEqual(row, column)\n"
        "both = And(near, past)\n allowed = And(both, real)", "constants": "int64 three = {3}"},
     {"kind": "other", "padding": True}),
    ("a slope", {"scores": "p = Cast<to = 1>(row)\n z = Mul(p, slope)\n s = Add(s0, z)", "constants": "float slope = {0.01}"}, {"kind": "causal", "bias": True}),
    ("padding", {"inputs": "int64[b, n] mask", "allowed": "kept = Greater(mask, nought)\n keys = Unsqueeze(kept, second)\n"
                 "past = LessOrEqual(row, column)\n allowed = And(keys, past)"}, {"kind": "causal", "padding": True}),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "expected"), [pytest.param(*case[1:], id=case[0]) for case in MASKS])
def test_mask(parts, expected):
    found = single_attention(attention(**parts)).mask
    blank = {"window": None, "chunk": None, "padding": False, "bias": False}
    assert {name: getattr(found, name) for name in (*blank, "kind")} == blank | expected


def test_projections_are_the_weights_behind_each_operand():
    found = single_attention(attention(constants="float[8] bias", query="q = Add(q0, bias)"))
    assert found.query.initializers == ("wq", "bias")
    assert found.key.initializers == ("wk",)
    assert (found.query.output, found.value.output) == ("q0", "v0")
    assert not found.query.fused


def test_a_fused_projection_is_marked():
    text = attention(constants="float[8, 24] wqkv", hidden="h = Identity(x)\n all = MatMul(x, wqkv)\n"
                     "qa, ka, va = Split<axis = -1, num_outputs = 3>(all)",
                     query="q = Identity(qa)", key="k = Identity(ka)", value="v = Identity(va)")  # fmt: skip
    found = single_attention(text)
    assert found.query.fused
    assert found.key.fused
    assert found.query.output == found.value.output == "all"
    assert found.query.initializers == ("wqkv",)


def test_no_projection_where_the_hidden_state_itself_is_the_value():
    assert single_attention(attention(value="v = Identity(x)")).value is None


def test_a_fused_operator_states_its_facts():
    text = """case (float[b, n, 8] x) => (float[b, n, 8] logits)
    <float[8, 8] wq, float[8, 4] wk, float[8, 4] wv>
    {
      q = MatMul(x, wq)
      k = MatMul(x, wk)
      v = MatMul(x, wv)
      logits = Attention<q_num_heads = 4, kv_num_heads = 2, is_causal = 1, scale = 0.25, softcap = 9.0>(q, k, v)
    }"""
    found = single_attention(text, 23)
    assert (found.query_heads, found.kv_heads, found.head_dim, found.value_head_dim) == (4, 2, 2, 2)
    assert (found.scale, found.softcap, found.mask.kind) == (0.25, 9.0, "causal")
    assert found.output == found.scores == "logits"


@pytest.mark.parametrize("positions", [False, True])
def test_a_whole_decoder(positions):
    decoder = Subject.of(Decoder(Config(position_ids=positions)).model()).decoder()
    assert [a.layer for a in decoder.attentions] == [0, 1, 2]
    for attention_ in decoder.attentions:
        assert (attention_.query_heads, attention_.kv_heads, attention_.head_dim) == (4, 2, 8)
        assert attention_.scale == pytest.approx(8**-0.5)
        assert attention_.mask.padding
        assert (attention_.rotary_dim, attention_.head_dim) == (8, 8)
        assert len(attention_.head_repetition) == 2
        assert attention_.key_cache.bytes_per_token == 2 * 8 * 4
    assert [a.mask.kind for a in decoder.attentions] == ["causal", "sliding-window", "causal"]
    assert decoder.attentions[1].mask.window == 4
    assert decoder.cache_entries == 3
    assert decoder.cache_bytes_per_token == 3 * 2 * 2 * 8 * 4
    given = {one.name: one.decode_shape for one in decoder.inputs}
    assert given["input_ids"] == ("batch_size", "sequence_length")
    assert given["attention_mask"] == ("batch_size", "total_sequence_length")
    assert given.get("position_ids", given["input_ids"]) == given["input_ids"]


HALVES = "x1 = Slice(k0, first, middle, last)\n x2 = Slice(k0, middle, end, last)\n"
ROTATED = [
    ("the whole head", "wave = Expand(wide, table_shape)\n k = Mul(k0, wave)", 8),
    ("two halves by tables of half the width",
     f"{HALVES} a = Mul(x1, turn)\n b = Mul(x2, turn)\n k = Concat<axis = -1>(a, b)", 8),
    ("the first half", f"{HALVES} a = Mul(x1, turn)\n k = Concat<axis = -1>(a, x2)", 4),
    ("the first half, written into the head",
     f"{HALVES} a0 = Mul(x1, turn)\n a = Transpose<perm = [2, 0, 1]>(a0)\n t = Transpose<perm = [2, 0, 1]>(k0)\n"
     "put = ScatterND(t, places, a)\n k = Transpose<perm = [1, 2, 0]>(put)", 4),
    ("a scale for each token", "n1 = Cast<to = 1>(column)\n k = Mul(k0, n1)", None),
]  # fmt: skip


@pytest.mark.parametrize(("key", "features"), [pytest.param(*case[1:], id=case[0]) for case in ROTATED])
def test_rotated_features_are_counted(key, features):
    constants = (
        "float[4] f, float[8] f8, int64[1] middle = {4}, int64[1] end = {8}, int64[1] last = {2}, "
        "int64[4, 1] places = {0, 1, 2, 3}"
    )
    tables = (
        "place = Cast<to = 1>(column)\n angle = Mul(place, f)\n turn = Cos(angle)\n angle8 = Mul(place, f8)\n"
        "wide = Cos(angle8)\n table_shape = Shape(wide)\n"
    )
    assert single_attention(attention(constants=constants, key=tables + key)).rotary_dim == features


def test_types_have_the_names_of_numpy():
    assert single_attention(attention()).key_cache.dtype == "float32"
    assert Subject.of(Decoder(Config(dtype="float16")).model()).decoder().attentions[0].key_cache.dtype == "float16"


def test_layers_that_share_a_cache_name_its_owner():
    text = attention(after="q2 = MatMul(c, wq)\n s2 = MatMul(q2, kt)\n m2 = Where(allowed, s2, low)\n"
                     "w2 = Softmax<axis = -1>(m2)\n logits = MatMul(w2, v)")  # fmt: skip
    decoder = Subject.of(read(text)).decoder()
    assert [a.shares_cache_with for a in decoder.attentions] == [None, 0]
    assert decoder.cache_entries == 1


FAMILIES = {
    # query heads, kv heads, head_dim, scale, softcap, masks, rotary_dim, ALiBi bias
    "llama": (4, 2, 8, 8**-0.5, None, ["causal", "causal"], 8, False),
    "gpt2": (4, 4, 4, 0.5, None, ["causal", "causal"], None, False),
    "gemma2": (4, 2, 8, 0.25, 5.0, ["sliding-window", "causal"], 8, False),
    "neox": (4, 4, 4, 0.5, None, ["causal", "causal"], 2, False),
    "bloom": (4, 4, 4, 0.5, None, ["causal", "causal"], None, True),
}


@pytest.mark.parametrize("name", FILES)
def test_exports_of_one_family_have_the_same_facts(name):
    heads, kv_heads, head_dim, scale, softcap, masks, rotary, biased = FAMILIES[name.split("_")[0]]
    decoder = Subject.of(export(name)).decoder()
    assert [a.mask.kind for a in decoder.attentions] == masks
    for found in decoder.attentions:
        assert (found.query_heads, found.kv_heads, found.head_dim) == (heads, kv_heads, head_dim)
        assert found.scale == pytest.approx(scale)
        assert (found.softcap or 0) == pytest.approx(softcap or 0)
        assert found.rotary_dim == rotary
        assert found.mask.bias == biased
        assert found.mask.padding
        assert found.query.fused == (name.split("_")[0] in ("gpt2", "neox", "bloom"))
    assert [a.mask.window for a in decoder.attentions] == [4 if kind == "sliding-window" else None for kind in masks]


GATED = """
gated (float[batch, length, 8] x) => (float[batch, length, 8] logits)
<float[8, 8] wk, float[8, 8] wv, float[8, 4] wf, float[8, 4] wg, int64[1] second = {1}, int64[1] two = {2},
 int64 one = {1}, float masked = {-10000.0}>
{
  k = MatMul(x, wk)  kt = Transpose<perm = [0, 2, 1]>(k)  v = MatMul(x, wv)  s = MatMul(x, kt)
  f = MatMul(x, wf)  g = MatMul(x, wg)  gt = Transpose<perm = [0, 2, 1]>(g)  fg = MatMul(f, gt)  gate = Sigmoid(fg)
  gated = Mul(s, gate)
  sizes = Shape(x)  n = Slice(sizes, second, two)  square = Concat<axis = 0>(n, n)
  full = Expand(masked, square)  bias = Trilu<upper = 1>(full, one)
  biased = Add(gated, bias)  w = Softmax<axis = -1>(biased)  logits = MatMul(w, v)
}
"""


def test_keys_of_gates_are_part_of_the_cache_size():
    """They are a third cached tensor: 4 numbers for each token besides 8 of the key and 8 of the value."""
    original = read(GATED)
    decoder = Subject.of(original).decoder()
    assert [state.head_dim for state in decoder.states] == [4]
    assert decoder.cache_bytes_per_token == (8 + 8 + 4) * 4
    cached = [value for value in injected(original).graph.input if value.name.startswith("past_key_values")]
    assert sum(value.type.tensor_type.shape.dim[3].dim_value for value in cached) == 8 + 8 + 4
