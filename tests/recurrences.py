"""Decoders with a linear recurrence over chunks of tokens, as text, with a place for each part to write differently."""

from __future__ import annotations

import re

from attentions import attention

CONSTANTS = """float[8, 1] wa, float nil = {0.0}, float unit = {1.0}, int64 four = {4}, int64[1] none = {0},
 int64[1] last = {-1}, int64[1] third_axis = {3}, int64[2] row8 = {1, 8},
 int64[6] one_before = {0, 1, 0, 0, 0, 0}, int64[4] chunks = {0, -1, 4, 8}, int64[4] logs = {0, -1, 4, 1},
 int64[3] flat = {0, -1, 8}, int64[3] per_chunk = {0, -1, 1}, float tenth = {0.1}, int64 two = {2},
 int64[1] far = {999999999}, float[8, 8] wz, int64 prime = {19}, int64 twice_prime = {38}"""
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
# Mamba-2: two heads with values of 4 features, keys of 3, and a decay of their own; chunks of 4.
KEYED_CONSTANTS = """float[8, 2] wd, float[8, 6] wb, float[8, 6] wr, float[2, 1] scales = {1.5, 0.5},
 float[2] rates = {-0.1, -0.05}, int64[4] of_values = {0, 0, 2, 4}, int64[4] of_keys = {0, 0, 2, 3},
 int64[5] value_chunks = {0, -1, 4, 2, 4}, int64[5] key_chunks = {0, -1, 4, 2, 3}, int64[4] log_chunks = {0, -1, 4, 2},
 int64[1] fourth = {3}, int64[1] fifth = {4}, int64 three = {3}, int64[4] state_sizes = {1, 2, 3, 4},
 int64[3] per_head = {0, -1, 2}, int64[4] joined_rows = {0, 0, -1, 12}, int64[5] state_rows = {0, 0, -1, 3, 4},
 int64[5] fronts5 = {0, 0, 0, 0, 0}, int64[2] no_heads = {0, 0}, int64[4] fronts4 = {0, 0, 0, 0},
 int64[4] all_values = {0, -1, 2, 4}, int64[3] flat_heads = {0, 0, -1}"""
KEYED = """xv = Reshape(x, of_values)
 dt0 = MatMul(x, wd)
 dt = Softplus(dt0)
 kb0 = MatMul(x, wb)
 kr0 = MatMul(x, wr)
 kb = Mul(kb0, tenth)
 kr = Mul(kr0, tenth)
 key4 = Reshape(kb, of_keys)
 query4 = Reshape(kr, of_keys)
 dt4 = Unsqueeze(dt, fourth)
 vals = Mul(xv, dt4)
 decay = Mul(rates, dt)
 r0 = Mod(length, four)
 r1 = Sub(four, r0)
 r2 = Mod(r1, four)
 r3 = Unsqueeze(r2, first)
 pads4 = Concat<axis = 0>(fronts5, r3, no_heads)
 pads3 = Concat<axis = 0>(fronts4, r3, none)
 xp = Pad(xv, pads4, nil)
 vp = Pad(vals, pads4, nil)
 kp = Pad(key4, pads4, nil)
 qp = Pad(query4, pads4, nil)
 ap = Pad(decay, pads3, nil)
 skip = Mul(scales, xp)
 v5 = Reshape(vp, value_chunks)
 k5 = Reshape(kp, key_chunks)
 q5 = Reshape(qp, key_chunks)
 a4 = Reshape(ap, log_chunks)
 vc = Transpose<perm = [0, 1, 3, 2, 4]>(v5)
 kt5 = Transpose<perm = [0, 1, 3, 4, 2]>(k5)
 qc = Transpose<perm = [0, 1, 3, 2, 4]>(q5)
 at4 = Transpose<perm = [0, 1, 3, 2]>(a4)
 ac = Unsqueeze(at4, fifth)
 ca = CumSum(ac, three)
 cat = Transpose<perm = [0, 1, 2, 4, 3]>(ca)
 gaps = Sub(ca, cat)
 four_at = Range(nought, four, one)
 four_row = Unsqueeze(four_at, first)
 four_column = Unsqueeze(four_at, second)
 earlier = LessOrEqual(four_row, four_column)
 decays0 = Exp(gaps)
 decays = Where(earlier, decays0, nil)
 products = MatMul(qc, kt5)
 weighted = Mul(products, decays)
 within = MatMul(weighted, vc)
 total = Slice(ca, last, far, fourth)
 rest = Sub(total, cat)
 weights = Exp(rest)
 kw = Mul(kt5, weights)
 states = MatMul(kw, vc)
 b1 = Slice(sizes, first, second)
 b1234 = Concat<axis = 0>(b1, state_sizes)
 zeros = Expand(nil, b1234)
 joined = Concat<axis = 1>(zeros, states)
 totals = Reshape(total, per_head)
 later = Pad(totals, one_before, nil)
 cc = CumSum(later, one)
 cct = Transpose<perm = [0, 2, 1]>(cc)
 far_column = Unsqueeze(cct, fourth)
 far_row = Unsqueeze(cct, third)
 far_gaps = Sub(far_column, far_row)
 far_sizes = Shape(joined)
 count = Gather(far_sizes, one)
 chunk_at = Range(nought, count, one)
 chunk_row = Unsqueeze(chunk_at, first)
 chunk_column = Unsqueeze(chunk_at, second)
 chunk_earlier = LessOrEqual(chunk_row, chunk_column)
 far_decays0 = Exp(far_gaps)
 far_decays = Where(chunk_earlier, far_decays0, nil)
 joined_heads = Transpose<perm = [0, 2, 1, 3, 4]>(joined)
 joined_flat = Reshape(joined_heads, joined_rows)
 between0 = MatMul(far_decays, joined_flat)
 between1 = Reshape(between0, state_rows)
 between = Transpose<perm = [0, 2, 1, 3, 4]>(between1)
 previous = Slice(between, first, last, second)
 growth = Exp(ca)
 read = MatMul(qc, previous)
 across = Mul(growth, read)
 y0 = Add(within, across)
 y1 = Transpose<perm = [0, 1, 3, 2, 4]>(y0)
 y2 = Reshape(y1, all_values)
 y3 = ADDED
 n1 = Unsqueeze(length, first)
 y4 = Slice(y3, first, n1, second)
 h = Reshape(y4, flat_heads)"""
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


def keyed_scan(*, added: str = "Add(y2, skip)", **changes: str) -> str:
    """Return a Mamba-2 layer with keys and queries, with some parts written differently."""
    text = KEYED.replace("ADDED", added)
    for before, after in changes.items():
        text = text.replace(before, after)
    return text


def keyed_hybrid(text: str) -> str:
    return attention(hidden=text, constants=f"{CONSTANTS}, {KEYED_CONSTANTS}")


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
