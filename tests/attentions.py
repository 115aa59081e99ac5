"""The smallest decoder as text, with a place for each part that a test wants to write differently."""

from __future__ import annotations

import random

import onnx
from exports import injected
from laws import assert_law
from written import read

CAUSAL = "allowed = LessOrEqual(row, column)"
MASKED = "masked_scores = Where(allowed, s, low)"


def attention(
    *, key: str = "", value: str = "", query: str = "", scores: str = "", allowed: str = CAUSAL, masked: str = MASKED,
    after: str = "logits = Identity(c)", inputs: str = "", constants: str = "", hidden: str = "",
) -> str:  # fmt: skip
    """Return the text of one attention, `x [b, n, 8]` in, `logits` out.

    Args:
        key: From `k0 [b, n, 8]`, the projected key, to `k [b, n, 8]`.
        value: From `v0` to `v`.
        query: From `q0` to `q`.
        scores: From `s0 [b, n, n]` to `s`.
        allowed: From `row [1, n]` and `column [n, 1]`, the places of keys and queries, to `allowed`.
        masked: From `s` and `allowed` to `masked_scores`.
        after: From `c [b, n, 8]` to `logits`.
        inputs: Further inputs.
        constants: Further constants and weights.
        hidden: From `x` to `h`, what is projected.
    """
    return f"""case (float[b, n, 8] x{inputs and ", " + inputs}) => (float[b, n, 8] logits)
<float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, int64 nought = {{0}}, int64 one = {{1}}, int64[1] first = {{0}},
 int64[1] second = {{1}}, int64[1] third = {{2}}, float low = {{-10000.0}},
 float half = {{0.5}}{constants and ", " + constants}>
{{
  sizes = Shape(x)
  length = Gather(sizes, one)
  at = Range(nought, length, one)
  row = Unsqueeze(at, first)
  column = Unsqueeze(at, second)
  {hidden or "h = Identity(x)"}
  q0 = MatMul(h, wq)
  k0 = MatMul(h, wk)
  v0 = MatMul(h, wv)
  {query or "q = Identity(q0)"}
  {key or "k = Identity(k0)"}
  {value or "v = Identity(v0)"}
  kt = Transpose<perm = [0, 2, 1]>(k)
  s0 = MatMul(q, kt)
  {scores or "s = Identity(s0)"}
  {allowed}
  {masked}
  w = Softmax<axis = -1>(masked_scores)
  c = MatMul(w, v)
  {after}
}}"""


def assert_law_of(text: str, opset: int = 18) -> None:
    """The model that a text describes can be given a cache; the text may name a value before the line that makes it."""
    original = in_order(read(text, opset))
    assert_law(original, injected(original))


def shuffled(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """Put the nodes in another execution order, which is random."""
    nodes = list(model.graph.node)
    random.Random(seed).shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return in_order(model)


def in_order(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put every node behind those that make what it reads."""
    waiting = list(model.graph.node)
    produced = {name for node in waiting for name in node.output}
    made: set[str] = set()
    del model.graph.node[:]
    while waiting:
        ready = next(node for node in waiting if all(name in made or name not in produced for name in node.input))
        waiting.remove(ready)
        made.update(ready.output)
        model.graph.node.append(ready)
    return model


def of_six_tokens() -> onnx.ModelProto:
    """A decoder of a fixed length, which its mask has too."""
    table = ", ".join(str(int(key <= query)) for query in range(6) for key in range(6))
    text = attention(allowed="allowed = Cast<to = 9>(table)", constants=f"int64[6, 6] table = {{{table}}}")
    return read(text.replace("b, n", "b, 6"))


def switched_beyond(length: int) -> str:
    """Return an attention whose rotary angles are others where a text has more tokens than that."""
    return attention(
        constants=f"float[8] near, float[8] far, int64 switch = {{{length}}}",
        key="place = Cast<to = 1>(column)\n beyond = Greater(length, switch)\n f = Where(beyond, far, near)\n"
        "angle = Mul(place, f)\n wave = Cos(angle)\n k = Mul(k0, wave)",
    )
