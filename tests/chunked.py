"""Decoders of a fixed length with the gated delta rule in chunks of tokens, as text."""

from __future__ import annotations

import onnx
from written import read


def chunked(*changes: tuple[str, str], tokens: int = 6) -> onnx.ModelProto:
    """Return a decoder of six to eight tokens in two chunks of four, with changes of its text.

    The triangle is inverted by its powers, and the first chunk does not read the state of zeros.
    """
    more = 8 - tokens
    text = f"""decoder (int64[1, {tokens}] input_ids) => (float[1, {tokens}, 11] logits)
<float[11, 4] embeddings, float[4, 6] wq, float[4, 6] wk, float[4, 4] wv, float[4, 2] wg, float[4, 2] wb,
 float[4, 11] wo, int64[4] narrow = {{1, {tokens}, 2, 3}}, int64[4] wide = {{1, {tokens}, 2, 2}},
 int64[8] pads = {{0, 0, 0, 0, 0, 0, {more}, 0}}, int64[6] pads3 = {{0, 0, 0, 0, 0, {more}}},
 int64[5] keys = {{1, 2, 2, 4, 3}}, int64[5] values = {{1, 2, 2, 4, 2}}, int64[5] ones = {{1, 2, 2, 4, 1}},
 int64 along = {{3}}, float half = {{0.5}},
 float nil = {{0}}, float low = {{-0.3}}, float[4, 4] eye = {{1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}},
 float[4, 4] seen = {{1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1}}, int64[1] zero = {{0}}, int64[1] one = {{1}},
 float[4, 4] strict = {{0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0}}, int64[1] two = {{2}}, int64[1] three = {{3}},
 int64[1] four = {{4}}, int64[1] end = {{{tokens}}}, int64[4] joined = {{1, 2, 8, 2}},
 int64[3] flat = {{1, {tokens}, 4}}>
{{
 x = Gather(embeddings, input_ids)
 q0 = MatMul(x, wq) q1 = Reshape(q0, narrow) q2 = Transpose<perm = [0, 2, 1, 3]>(q1) q3 = Mul(q2, half)
 k0 = MatMul(x, wk) k1 = Reshape(k0, narrow) k2 = Transpose<perm = [0, 2, 1, 3]>(k1) k3 = Mul(k2, half)
 v0 = MatMul(x, wv) v1 = Reshape(v0, wide) v2 = Transpose<perm = [0, 2, 1, 3]>(v1)
 g0 = MatMul(x, wg) g1 = Sigmoid(g0) g2 = Neg(g1) g3 = Transpose<perm = [0, 2, 1]>(g2)
 b0 = MatMul(x, wb) b1 = Sigmoid(b0) b2 = Transpose<perm = [0, 2, 1]>(b1)
 qp = Pad(q3, pads) kp = Pad(k3, pads) vp = Pad(v2, pads) gp = Pad(g3, pads3) bp = Pad(b2, pads3)
 q = Reshape(qp, keys) k = Reshape(kp, keys) v = Reshape(vp, values) ga = Reshape(gp, ones) b = Reshape(bp, ones)
 kb = Mul(k, b) vb = Mul(v, b)
 sums = CumSum(ga, along)
 sumst = Transpose<perm = [0, 1, 2, 4, 3]>(sums)
 gaps = Sub(sums, sumst) decays = Exp(gaps) kt = Transpose<perm = [0, 1, 2, 4, 3]>(k)
 kk0 = MatMul(kb, kt) kk1 = Mul(kk0, decays) kk2 = Mul(kk1, strict) n = Neg(kk2)
 n2 = MatMul(n, n) n3 = MatMul(n2, n) i1 = Add(eye, n) i2 = Add(i1, n2) inverse = Add(i2, n3)
 new = MatMul(inverse, vb) grown = Exp(sums) kbd = Mul(kb, grown) read = MatMul(inverse, kbd)
 qk0 = MatMul(q, kt) qk1 = Mul(qk0, decays) qk = Mul(qk1, seen)
 last = Slice(sums, three, four, three) rest = Sub(last, sums) left = Exp(rest) kd = Mul(k, left) qd = Mul(q, grown)
 new0 = Slice(new, zero, one, two) new1 = Slice(new, one, two, two) qk0c = Slice(qk, zero, one, two)
 qk1c = Slice(qk, one, two, two) kd0 = Slice(kd, zero, one, two) read1 = Slice(read, one, two, two)
 qd1 = Slice(qd, one, two, two)
 out0 = MatMul(qk0c, new0) kd0t = Transpose<perm = [0, 1, 2, 4, 3]>(kd0) state = MatMul(kd0t, new0)
 known = MatMul(read1, state) missing = Sub(new1, known) within = MatMul(qk1c, missing) between = MatMul(qd1, state)
 out1 = Add(within, between)
 out = Concat<axis = 2>(out0, out1) rows = Reshape(out, joined) cut = Slice(rows, zero, end, two)
 turned = Transpose<perm = [0, 2, 1, 3]>(cut) y = Reshape(turned, flat) logits = MatMul(y, wo)
}}"""
    for before, after in changes:
        assert before in text, before
        text = text.replace(before, after)
    return read(text, opset=18)
