"""The smallest decoder whose query heads share key heads, as text, with a place for each part that tests vary."""

from __future__ import annotations

from laws import in_onnxruntime, texts

from kvsurgeon import io
from kvsurgeon.analysis.analysis import analyze
from kvsurgeon.heads.counts import counts_of
from kvsurgeon.passes.contract import Subject

PROJECTED_KEYS = "k = MatMul(x, k_weight)"
PROJECTED_VALUES = "v = MatMul(x, v_weight)"


def grouped_attention(
    *, keys: str = PROJECTED_KEYS, values: str = PROJECTED_VALUES, repeated_keys: str = "ky = Identity(kh)",
    repeated_values: str = "vy = Identity(vh)", context: str = "", constants: str = "", hidden: int = 8,
    head_dim: int = 3,
) -> str:  # fmt: skip
    """Return the text of one attention with 4 query heads and 2 key heads, `input_ids [batch, n]` in, `logits` out.

    Args:
        keys: From `x [batch, n, hidden]` to `k [batch, n, 2 * head_dim]`.
        values: From `x` to `v`.
        repeated_keys: From `kh [batch, 4, n, head_dim]`, in which each head occurs twice, to `ky`.
        repeated_values: From `vh` to `vy`.
        context: From `rows [n, 1]`, the places of the tokens, and `x`, to whatever keys and values read.
        constants: Further constants and weights.
        hidden: Features of a token.
        head_dim: Features of a head.
    """
    query, key = 4 * head_dim, 2 * head_dim
    return f"""
g (int64[batch_size, sequence_length] input_ids) => (float[batch_size, sequence_length, 9] logits)
 <float[9, {hidden}] table, float[{hidden}, {query}] q_weight, float[{hidden}, {key}] k_weight,
  float[{hidden}, {key}] v_weight, float[{query}, 9] out, int64[4] q_shape = {{0, 0, 4, {head_dim}}},
  int64[4] k_shape = {{0, 0, 2, {head_dim}}}, int64[3] k_flat = {{0, 0, {key}}}, int64[3] flat = {{0, 0, {query}}},
  int64[1] two = {{2}}, int64[5] times = {{1, 1, 2, 1, 1}}, int64[4] grouped = {{0, 4, -1, {head_dim}}},
  float low = {{-10000}}, float none = {{0}}, float quarter = {{0.25}}, int64 zero = {{0}}, int64 one = {{1}},
  int64[1] last = {{-1}}, int64[2] column = {{-1, 1}}{constants and ", " + constants}>
{{
  x = Gather(table, input_ids)
  shape = Shape(input_ids)
  length = Gather(shape, one)
  row = Range(zero, length, one)
  rows = Reshape(row, column)
  visible = LessOrEqual(row, rows)
  mask = Where(visible, none, low)
  {context}
  q = MatMul(x, q_weight)
  q4 = Reshape(q, q_shape)
  qt = Transpose<perm = [0, 2, 1, 3]>(q4)
  {keys}
  k4 = Reshape(k, k_shape)
  kt = Transpose<perm = [0, 2, 1, 3]>(k4)
  k5 = Unsqueeze(kt, two)
  kr = Expand(k5, times)
  kh = Reshape(kr, grouped)
  {repeated_keys}
  kx = Transpose<perm = [0, 1, 3, 2]>(ky)
  {values}
  v4 = Reshape(v, k_shape)
  vt = Transpose<perm = [0, 2, 1, 3]>(v4)
  v5 = Unsqueeze(vt, two)
  vr = Expand(v5, times)
  vh = Reshape(vr, grouped)
  {repeated_values}
  raw = MatMul(qt, kx)
  scores = Mul(raw, quarter)
  masked = Add(scores, mask)
  weights = Softmax(masked)
  summed = MatMul(weights, vy)
  back = Transpose<perm = [0, 2, 1, 3]>(summed)
  joined = Reshape(back, flat)
  logits = MatMul(joined, out)
}}
"""


def logits(subject: Subject):
    """Return the logits of a model for a text."""
    proto = io.to_proto(subject.model)
    return in_onnxruntime(proto)(texts(proto, length=7))["logits"]


def kv_heads(subject: Subject) -> list[int]:
    """Return the number of KV heads of each layer, from a new analysis."""
    analysis = analyze(subject.model)
    return [counts_of(analysis.flow, head).kv_heads for head in analysis.sites]
