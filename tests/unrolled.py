"""Decoders of a fixed length with a recurrence that is written out token by token, as text."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from written import read

Rewrite = Callable[[int, str], str]  # the number of a body and its text -> its text

BODY = """ a{i} = Gather<axis = 1>(a, at{i})
 x{i} = Gather<axis = 1>(x, at{i})
 d{i} = Mul(a{i}, h{i})
 h{n} = Sub(d{i}, x{i})
 p{i} = Mul(h{n}, scale)
 y{i} = Unsqueeze(p{i}, second)
"""
# The state is a mean of all tokens, as in RWKV: numerator, denominator and largest weight, which starts far below zero.
MEAN = """ a{i} = Gather<axis = 1>(a, at{i})
 x{i} = Gather<axis = 1>(x, at{i})
 m{n} = Max(m{i}, a{i})
 g{i} = Sub(m{i}, m{n})
 old{i} = Exp(g{i})
 k{i} = Sub(a{i}, m{n})
 new{i} = Exp(k{i})
 hd{i} = Mul(old{i}, h{i})
 hx{i} = Mul(new{i}, x{i})
 h{n} = Add(hd{i}, hx{i})
 wd{i} = Mul(old{i}, w{i})
 w{n} = Add(wd{i}, new{i})
 p{i} = Div(h{n}, w{n})
 y{i} = Unsqueeze(p{i}, second)
"""


def merge_first(number: int, body: str) -> str:
    """Multiply by zero once in the first body, for numerator and denominator, as an optimizer writes it."""
    return body.replace(" wd0 = Mul(old0, w0)\n", "").replace("wd0", "hd0") if number == 0 else body


def concat(count: int) -> str:
    """Return a node that joins the rows in order."""
    return f"joined = Concat<axis = 1>({', '.join(f'y{i}' for i in range(count))})"


def unrolled(
    count: int = 8, body: str = BODY, change: Rewrite = lambda _, text: text, *, before: str = "x = Identity(e)",
    rows: str = "", tokens: int = 0, start: str = "nil",
) -> onnx.ModelProto:  # fmt: skip
    """Return a decoder of `count` bodies.

    Args:
        count: Number of bodies.
        body: Text of a body, with {i} for its number and {n} for the next.
        change: Changes the text of each body.
        before: Nodes in front of the loop.
        rows: Nodes that compute `joined` of the rows, instead of `Concat` in order.
        tokens: Length of the inputs if it is another number.
        start: What the state starts with.
    """
    bodies = "".join(change(i, body.format(i=i, n=i + 1)) for i in range(count))
    indices = ", ".join(f"int64 at{i} = {{{i}}}, int64[1, 1, 4] all{i} = {{{i}, {i}, {i}, {i}}}" for i in range(count))
    size = tokens or count
    return read(
        f"""decoder (int64[1, {size}] input_ids) => (float[1, {size}, 11] logits)
<float[11, 4] embeddings, float[4, 4] wa, float[4, 11] wo, float[4] scale, float[4] scale2, float[4, 1, 3] kernel,
 float[1, 4] nil = {{0, 0, 0, 0}}, float[1, 4] far = {{-1e30, -1e30, -1e30, -1e30}}, int64[1] second = {{1}},
 int64[1] third = {{2}}, int64[1] none = {{0}}, int64[1] whole = {{{size}}}, int64[1] last = {{-1}},
 float[1, 1, 4] blank = {{0, 0, 0, 0}},
 int64[6] shift = {{0, 1, 0, 0, -1, 0}}, float zero = {{0}}, int64[1] far_end = {{999999}}, {indices}>
{{
 e = Gather(embeddings, input_ids)
 {before}
 b = MatMul(e, wa)
 a = Sigmoid(b)
 h0 = Identity({start})
 w0 = Identity(nil)
 m0 = Identity(far)
{bodies} {rows or concat(count)}
 logits = MatMul(joined, wo)
}}""",
        opset=17,
    )
