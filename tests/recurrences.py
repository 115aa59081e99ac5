"""Decoders with a linear recurrence over chunks of tokens, as text, with a place for each part to write differently."""

from __future__ import annotations

import re

from attentions import attention

CONSTANTS = """float[8, 1] wa, float nil = {0.0}, float unit = {1.0}, int64 four = {4}, int64[1] none = {0},
 int64[1] last = {-1}, int64[1] third_axis = {3}, int64[2] row8 = {1, 8},
 int64[6] one_before = {0, 1, 0, 0, 0, 0}, int64[4] chunks = {0, -1, 4, 8}, int64[4] logs = {0, -1, 4, 1},
 int64[3] flat = {0, -1, 8}, int64[3] per_chunk = {0, -1, 1}, float tenth = {0.1}, int64 two = {2},
 int64[1] far = {999999999}, float[8, 8] wz"""
# Each token adds itself to the state, which is multiplied by exp(a) of the token before: chunks of 4.
SCAN = """la = MatMul(x, wa)
 a0 = Mul(la, tenth)
 r0 = Mod(length, four)
 r1 = Sub(four, r0)
 r2 = Mod(r1, four)
 r3 = Unsqueeze(r2, first)
 pads = Concat<axis = 0>(fronts, r3, none)
 xp = Pad(x, pads, nil)
 ap = Pad(a0, pads, LOG_PAD)
 xc = Reshape(xp, chunks)
 ac = Reshape(ap, logs)
 ca = CumSum(ac, two)
 cat = Transpose<perm = [0, 1, 3, 2]>(ca)
 gaps = Sub(ca, cat)
 four_at = Range(nought, four, one)
 four_row = Unsqueeze(four_at, first)
 four_column = Unsqueeze(four_at, second)
 earlier = LessOrEqual(four_row, four_column)
 decays0 = Exp(gaps)
 decays = Where(earlier, decays0, nil)
 within = MatMul(decays, xc)
 total = Slice(ca, last, far, third)
 rest = Sub(total, cat)
 weights = Exp(rest)
 states = MatMul(weights, xc)
 rows = Reshape(states, flat)
 b1 = Slice(sizes, first, second)
 b18 = Concat<axis = 0>(b1, row8)
 zeros = Expand(START, b18)
 joined = Concat<axis = 1>(zeros, rows)
 totals = Reshape(total, per_chunk)
 later = Pad(totals, one_before, nil)
 cc = CumSum(later, one)
 cct = Transpose<perm = [0, 2, 1]>(cc)
 far_gaps = Sub(cc, cct)
 far_sizes = Shape(joined)
 count = Gather(far_sizes, one)
 chunk_at = Range(nought, count, one)
 chunk_row = Unsqueeze(chunk_at, first)
 chunk_column = Unsqueeze(chunk_at, second)
 chunk_earlier = ORDER(chunk_row, chunk_column)
 far_decays0 = Exp(far_gaps)
 far_decays = Where(chunk_earlier, far_decays0, nil)
 between = MatMul(far_decays, joined)
 previous = Slice(between, PREVIOUS, second)
 previous1 = Unsqueeze(previous, third)
 growth = Exp(ca)
 across = Mul(growth, previous1)
 y0 = Add(within, across)
 y1 = NORM(y0)
 y2 = Reshape(y1, flat)
 n1 = Unsqueeze(length, first)
 h = Slice(y2, first, n1, second)"""
CONVOLUTION = """xt = Transpose<perm = [0, 2, 1]>(x)
 y = Conv<group = 8, kernel_shape = [3], pads = [2, 0]>(xt, kernel)
 h = Transpose<perm = [0, 2, 1]>(y)"""
USUAL = {
    "LOG_PAD": "nil",
    "START": "nil",
    "ORDER": "LessOrEqual",
    "PREVIOUS": "first, last",
    "NORM(y0)": "Identity(y0)",
}


def scan(**changes: str) -> str:
    text = SCAN
    for before, after in (*changes.items(), *USUAL.items()):
        text = text.replace(before, after)
    return text


def hybrid(text: str) -> str:
    return attention(hidden=text, constants=f"{CONSTANTS}, float[8, 1, 3] kernel, int64[4] fronts = {{0, 0, 0, 0}}")


def layers(*texts: str) -> str:
    """Return texts one after the other, each from the result `h` of the one before it in place of `x`."""
    found, source = [], "x"
    for number, text in enumerate(texts):
        names = dict.fromkeys(re.findall(r"^ ?(\w+) =", text, re.MULTILINE))
        for name in names:
            is_result = name == "h" and number == len(texts) - 1
            text = re.sub(rf"\b{name}\b", name if is_result else f"{name}_{number}", text)
        found.append(re.sub(r"\bx\b", source, text))
        source = f"h_{number}"
    return "\n ".join(found)
