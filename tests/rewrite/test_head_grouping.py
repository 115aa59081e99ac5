"""Products with keys and values read the cache as it is, however an export repeats, scales and lays them out."""

import onnx
import pytest
from decoders import MASKED, Config, Decoder
from exports import injected
from laws import assert_law
from written import read

TEXT = """
grouped (float[batch, length, 8] x) => (float[batch, length, 8] logits)
<float[8, 8] wq, float[8, 4] wk, float[8, 4] wv, int64 nought = {0}, int64 one = {1}, int64[1] first = {0},
 int64[1] second = {1}, int64[4] split = {0, 0, 4, 2}, int64[4] split_kv = {0, 0, 2, 2}, int64[3] merge = {0, 0, 8},
 int64[1] two = {2}, int64[1] heads = {4}, int64[5] copies = {1, 1, 2, 1, 1}, int64[4] in_turn = {1, 2, 1, 1},
 int64[4] in_turn4 = {1, 1, 2, 1}, int64[5] groups = {0, 2, 2, -1, 2},
 int64[4] four = {0, 4, -1, 2}, float[1, 1, 1, 1, 1] half5 = {0.5},
 int64[3] three = {-1, 0, 2}, int64[1] head_dim = {2}, float half = {0.5},
 float double = {2.0}, int64[1] rest = {-1}, float masked = {-10000.0}>
{
  q = MatMul(x, wq)
  q4 = Reshape(q, split)
  qh = Transpose<perm = [0, 2, 1, 3]>(q4)
  k = MatMul(x, wk)
  k4 = Reshape(k, split_kv)
  kh = Transpose<perm = [0, 2, 1, 3]>(k4)
  v = MatMul(x, wv)
  v4 = Reshape(v, split_kv)
  vh = Transpose<perm = [0, 2, 1, 3]>(v4)
  k5 = Unsqueeze(kh, two)
  v5 = Unsqueeze(vh, two)
  sizes = Shape(x)
  n1 = Slice(sizes, second, two)
  n = Squeeze(n1)
  at = Range(nought, n, one)
  row = Unsqueeze(at, first)
  column = Unsqueeze(at, second)
  visible = LessOrEqual(row, column)
  KEYS
  SCORES
  masked_scores = Where(visible, s, masked)
  w = Softmax<axis = -1>(masked_scores)
  VALUES
  ct = Transpose<perm = [0, 2, 1, 3]>(c)
  logits = Reshape(ct, merge)
}
"""
SCORES = "s = MatMul(qh, kt)"
EXPANDED = """
  k_all = Expand(k5, copies)
  k_heads = Reshape(k_all, four)
"""
VALUES = """
  v_all = Expand(v5, copies)
  v_heads = Reshape(v_all, four)
  c = MatMul(w, v_heads)
"""
VARIANTS = {
    "Expand": (EXPANDED + "kt = Transpose<perm = [0, 1, 3, 2]>(k_heads)", SCORES, VALUES),
    "Tile": (
        "k_all = Tile(k5, copies) k_heads = Reshape(k_all, four) kt = Transpose<perm = [0, 1, 3, 2]>(k_heads)",
        SCORES,
        "v_all = Tile(v5, copies) v_heads = Reshape(v_all, four) c = MatMul(w, v_heads)",
    ),
    "scaled": (
        EXPANDED + "kt1 = Transpose<perm = [0, 1, 3, 2]>(k_heads) kt2 = Mul(kt1, half) kt = Div(kt2, double)",
        SCORES,
        VALUES,
    ),
    "scaled by what comes first": (
        EXPANDED + "kt1 = Transpose<perm = [0, 1, 3, 2]>(k_heads) kt = Mul(half, kt1)",
        SCORES,
        VALUES,
    ),
    "heads next to the batch": (
        EXPANDED
        + """
  k3_shape = Concat<axis = 0>(rest, n1, head_dim)
  k3 = Reshape(k_heads, k3_shape)
  kt = Transpose<perm = [0, 2, 1]>(k3)
  q3 = Reshape(qh, k3_shape)
""",
        """
  s3 = MatMul(q3, kt)
  s_shape = Concat<axis = 0>(rest, heads, n1, n1)
  s = Reshape(s3, s_shape)
""",
        """
  v_all = Expand(v5, copies)
  v3 = Reshape(v_all, k3_shape)
  w_shape = Concat<axis = 0>(rest, n1, n1)
  w3 = Reshape(w, w_shape)
  c3 = MatMul(w3, v3)
  c_shape = Concat<axis = 0>(rest, heads, n1, head_dim)
  c = Reshape(c3, c_shape)
""",
    ),
    "heads in turn": (
        "k_heads = Tile(kh, in_turn) kt = Transpose<perm = [0, 1, 3, 2]>(k_heads)",
        SCORES,
        "v_heads = Tile(vh, in_turn) c = MatMul(w, v_heads)",
    ),
    "Einsum": (
        EXPANDED,
        'half_q = Mul(qh, half) s = Einsum<equation = "bhid, bhjd -> bhij">(half_q, k_heads)',
        VALUES.replace("MatMul(w,", 'Einsum<equation = "b h i j, b h j d -> b h i d">(w,'),
    ),
    "Einsum of tokens first, heads in turn": (
        "k_heads = Tile(k4, in_turn4)",
        's = Einsum<equation = "bihd,bjhd->bhij">(q4, k_heads)',
        'v_heads = Tile(v4, in_turn4) ci = Einsum<equation = "bhij,bjhd->bihd">(w, v_heads) '
        "c = Transpose<perm = [0, 2, 1, 3]>(ci)",
    ),
    "Einsum of keys and values first": (
        "k_all = Expand(k5, copies) k_heads = Reshape(k_all, four)",
        's = Einsum<equation = "bhjd,bhid->bhij">(k_heads, qh)',
        VALUES.replace("MatMul(w, v_heads)", 'Einsum<equation = "bhjd,bhij->bhid">(v_heads, w)'),
    ),
    "Einsum of groups": (
        "q_groups = Reshape(qh, groups)",
        's_groups = Einsum<equation = "bghid,bgjd->bghij">(q_groups, kh) '
        "s_shape = Concat<axis = 0>(rest, heads, n1, n1) s = Reshape(s_groups, s_shape)",
        "w_shape = Concat<axis = 0>(rest, two, two, n1, n1) w_groups = Reshape(w, w_shape) "
        'c_groups = Einsum<equation = "bghij,bgjd->bghid">(w_groups, vh) c = Reshape(c_groups, four)',
    ),
    "matrices of keys first": (
        "k_all = Expand(k5, copies) k_heads = Reshape(k_all, four) qt = Transpose<perm = [0, 1, 3, 2]>(qh)",
        "s_columns = MatMul(k_heads, qt) s = Transpose<perm = [0, 1, 3, 2]>(s_columns)",
        VALUES,
    ),
}


def written(keys: str, scores: str, values: str) -> onnx.ModelProto:
    text = TEXT.replace("KEYS", keys).replace("SCORES", scores).replace("VALUES", values)
    return read("\n".join(text.replace(") ", ")\n").splitlines()))


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_copied_for_past_tokens(name):
    original = written(*VARIANTS[name])
    proto = injected(original)
    assert_law(original, proto)
    assert not {"Expand", "Tile", "Einsum"} & {node.op_type for node in proto.graph.node}


LEFT_ALONE = {
    "values that are scaled": (
        VARIANTS["Expand"][0],
        SCORES,
        "v_all = Expand(v5, copies) v1 = Reshape(v_all, four) v_heads = Mul(v1, half) c = MatMul(w, v_heads)",
    ),
    "a scale with more axes than the product": (
        "k_all = Expand(k5, copies) k_half = Mul(k_all, half5) k_heads = Reshape(k_half, four) "
        "kt = Transpose<perm = [0, 1, 3, 2]>(k_heads)",
        SCORES,
        VALUES,
    ),
    "queries of one head": (
        "q1 = Slice(qh, first, second, second) kt1 = Transpose<perm = [0, 1, 3, 2]>(kh) kt = Mul(kt1, half)",
        "s = MatMul(q1, kt)",
        "w2 = Concat<axis = 1>(w, w) " + VALUES.replace("(w,", "(w2,"),
    ),
    "one times another": (
        EXPANDED + "k_two = Add(k_heads, half) kt = Transpose<perm = [0, 1, 3, 2]>(k_two)",
        SCORES,
        VALUES,
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_products_that_cannot_be_grouped_are_correct(name):
    original = written(*LEFT_ALONE[name])
    assert_law(original, injected(original))


def test_heads_on_two_axes_that_are_swapped_after_repetition():
    keys, values = (
        """
  A_pairs = Reshape(A, pairs)
  A_first = Transpose<perm = [0, 2, 3, 1, 4]>(A_pairs)
  A_open = Unsqueeze(A_first, third)
  A_all = Expand(A_open, pair_copies)
  A_turned = Transpose<perm = [0, 2, 1, 3, 4, 5]>(A_all)
  A_heads = Reshape(A_turned, eight)
""".replace("A", kept)
        for kept in ("k", "v")
    )
    text = TEXT
    for old, new in {
        "[8, 8] wq": "[8, 16] wq",
        "[8, 4] w": "[8, 8] w",
        "8] logits": "16] logits",
        "merge = {0, 0, 8}": "merge = {0, 0, 16}",
        "split = {0, 0, 4, 2}": "split = {0, 0, 8, 2}",
        "int64 nought": "int64[5] pairs = {0, 0, 2, 2, 2}, "
        "int64[1] third = {3}, int64[6] pair_copies = {1, 1, 1, 2, 1, 1}, int64[4] eight = {0, 8, -1, 2}, int64 nought",
    }.items():
        text = text.replace(old, new)
    unread = tuple(f"  {name} =" for name in ("k4", "kh", "k5", "v4", "vh", "v5"))
    text = "\n".join(line for line in text.splitlines() if not line.startswith(unread))
    keys += "  kt = Transpose<perm = [0, 1, 3, 2]>(k_heads)\n"
    text = text.replace("KEYS", keys).replace("SCORES", SCORES).replace("VALUES", values + "  c = MatMul(w, v_heads)")
    original = read(text)
    assert_law(original, injected(original))


class ResidualScores(Decoder):
    """Scores of a layer are added to those of the one before; both queries and keys are scaled."""

    def attention(self, layer, hidden):
        config, graph = self.config, self.graph
        query, key = (
            self.heads(hidden, name, count) for name, count in (("query", config.heads), ("key", config.kv_heads))
        )
        value = self.repeat(layer, self.heads(hidden, "value", config.kv_heads))
        key = graph.op("Transpose", self.repeat(layer, key), perm=[0, 1, 3, 2])
        scores = graph.op("MatMul", *(graph.op("Mul", one, self.number(0.6)) for one in (query, key)))
        self.scores = scores if layer == 0 else graph.op("Add", scores, self.scores)
        bias = graph.op("Where", self.visible(layer), self.number(0.0), self.number(MASKED))
        weights = graph.op("Softmax", graph.op("Add", self.scores, bias), axis=-1)
        context = graph.op("Transpose", graph.op("MatMul", weights, value), perm=[0, 2, 1, 3])
        merged = graph.op("Reshape", context, graph.constant([0, 0, config.heads * config.head_dim]))
        return graph.op("MatMul", merged, self.weight("out", config.heads * config.head_dim, config.hidden))


def test_a_product_that_two_layers_read_is_grouped_once():
    original = ResidualScores(Config(layers=2, windowed=())).model()
    assert_law(original, injected(original))


def test_values_keep_their_names():
    original = written(*VARIANTS["scaled"])
    result = injected(original)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in result.graph.value_info}
    assert [dim.dim_value or dim.dim_param for dim in shapes["s"]][1] == 4
    assert "Reshape" in [node.op_type for node in result.graph.node if node.output[0] == "s"]


FUSED = """
fused (float[batch, length, 8] x) => (float[batch, length, 8] logits)
<float[8, 8] wq, float[8, 4] wk, float[8, 4] wv, int64[4] split = {0, 0, 4, 2}, int64[4] split_kv = {0, 0, 2, 2},
 int64[1] two = {2}, int64[5] copies = {1, 1, 2, 1, 1}, int64[4] four = {0, 4, -1, 2}, int64[3] merge = {0, 0, 8}>
{
  q = MatMul(x, wq)
  q4 = Reshape(q, split)
  qh = Transpose<perm = [0, 2, 1, 3]>(q4)
  k = MatMul(x, wk)
  k4 = Reshape(k, split_kv)
  kh = Transpose<perm = [0, 2, 1, 3]>(k4)
  v = MatMul(x, wv)
  v4 = Reshape(v, split_kv)
  vh = Transpose<perm = [0, 2, 1, 3]>(v4)
  k5 = Unsqueeze(kh, two)
  k_all = Expand(k5, copies)
  k_heads = Reshape(k_all, four)
  VALUES
  c = Attention<is_causal = 1>(qh, k_heads, v_heads)
  ct = Transpose<perm = [0, 2, 1, 3]>(c)
  logits = Reshape(ct, merge)
}
"""
EXPANDED_VALUES = "v5 = Unsqueeze(vh, two) v_all = Expand(v5, copies) v_heads = Reshape(v_all, four)"
SCALED_VALUES = (
    "v5 = Unsqueeze(vh, two) v_all = Expand(v5, copies) v_half = Add(v_all, v_all) v_heads = Reshape(v_half, four)"
)


@pytest.mark.parametrize(("values", "left"), [(EXPANDED_VALUES, 0), (SCALED_VALUES, 2)], ids=["shared", "one is not"])
def test_a_fused_operator_reads_the_heads_before_repetition(values, left):
    original = read(FUSED.replace("VALUES", values), opset=23)
    result = injected(original)
    assert [node.op_type for node in result.graph.node].count("Expand") == left
    assert_law(original, result)
