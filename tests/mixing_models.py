"""Decoders that mix tokens or sequences outside attention, and twins that do not: kind, place and spelling by a seed.

Each kind is a few nodes from `{x}` [b, n, 8] to `{y}` [b, n, 8]. Names of other values begin with `m_`.
"""

# ruff: noqa: E501  # a kind is read best on one line

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from attentions import attention, in_order
from laws import in_onnxruntime
from written import read

PLACES = ("hidden", "key", "value", "query", "after")
SCORES = ("scores", "masked")
_FROM_TO = {"hidden": ("x", "h"), "key": ("k0", "k"), "value": ("v0", "v"), "query": ("q0", "q"),
            "after": ("c", "logits"), "scores": ("s0", "s"), "masked": ("s", "masked_scores")}  # fmt: skip

CONSTANTS = """float[8, 1, 3] m_kernel, float[8, 1, 2] m_pair, int64[1] m_end = {4611686018427387904},
 int64[1] m_minus = {-1}, int64[1] m_minus2 = {-2}, int64[2] m_both = {1, 2}, int64[2] m_swap = {1, 0}, float m_tenth = {0.1},
 int64 m_two = {2}, float m_127 = {127.0}, int8 m_zero = {0}, float m_nil = {0.0}, float[8, 8] m_w, int64[1] m_100 = {100},
 int64[6] m_before = {0, 1, 0, 0, 0, 0}, int64[6] m_shift = {0, 1, 0, 0, -1, 0}, int64[6] m_ahead = {0, -1, 0, 0, 1, 0},
 int64[6] m_past = {0, 3, 0, 0, 0, 0}, float[1, 1, 8] m_row, int64[1] m_two1 = {2}, float m_big = {50.0},
 int64[6] m_far_ahead = {0, -90, 0, 0, 90, 0}, int64 m_far = {90},
 int64[1] m_100n = {-1000000000}, float m_huge = {5000.0}, int64[1] m_pairs = {2}, int64[1] m_four = {4}"""

# what a reduction over tokens is used for: {x} and {r} to {y}
USES = [
    "{y} = Div({x}, {r})", "{y} = Sub({x}, {r})", "m_bound = Mul({r}, half)\n {y} = Min({x}, m_bound)",
    "m_g = Sigmoid({r})\n {y} = Mul({x}, m_g)", "m_big1 = Greater({r}, m_big)\n {y} = Where(m_big1, m_nil, {x})",
    "m_s = Div({r}, m_127)\n m_r = Max(m_s, m_tenth)\n m_q = Div({x}, m_r)\n m_i = Round(m_q)\n {y} = Mul(m_i, m_r)",
    "m_n = Div({x}, {r})\n m_c = Clip(m_n, m_nil, half)\n {y} = Add({x}, m_c)",
]  # fmt: skip
REDUCTIONS = [
    f"{{r}} = {name}({{a}}, {axes})" if axes else f"{{r}} = {name}({{a}})"
    for name in ("ReduceMax", "ReduceMean", "ReduceL2", "ReduceLogSumExp", "ReduceSumSquare")
    for axes in ("second", "m_both", "")
]
QDQ = "m_m = ReduceMax<keepdims = 0>(m_a)\n m_s = Div(m_m, m_127)\n m_q = QuantizeLinear({x}, m_s, m_zero)\n {y} = DequantizeLinear(m_q, m_s, m_zero)"
TURNED = "m_t = Transpose<perm = [0, 2, 1]>({x})\n {0}\n {y} = Transpose<perm = [0, 2, 1]>(m_u)"
# heads in front of the batch, both on one axis, and split again
SPLIT = """m_bb = Slice(sizes, first, second)
 m_nn = Slice(sizes, second, third)
 m_2b = Mul(m_bb, m_pairs)
 m_t1 = Concat<axis = 0>(m_bb, m_nn, m_pairs, m_four)
 m_r = Reshape({x}, m_t1)
 m_h = Transpose<perm = [2, 0, 1, 3]>(m_r)
 m_t2 = Concat<axis = 0>(m_2b, m_nn, m_four)
 m_f = Reshape(m_h, m_t2)
 m_a = Abs(m_f)
 m_t3 = Concat<axis = 0>({sizes}, m_nn, m_four)
 m_g = Reshape(m_a, m_t3)
 m_u = Transpose<perm = [{order}]>(m_g)
 {y} = Reshape(m_u, sizes)"""


def _turned(body: str) -> str:
    return TURNED.replace("{0}", body)


MIXING = {
    "QDQ with the range of all tokens": ["m_a = Abs({x})\n " + QDQ],
    "softmax along tokens": ["{y} = Softmax<axis = 1>({x})", _turned("m_u = Softmax<axis = -1>(m_t)")],
    "normalization along tokens": ["{y} = LpNormalization<axis = 1, p = 2>({x})",
                                   _turned("m_u = LayerNormalization<axis = -1>(m_t, m_tenth)")],
    "pool of all tokens": [_turned("m_p = GlobalMaxPool(m_t)\n m_u = Sub(m_t, m_p)")],
    "sum of later tokens": ["{y} = CumSum<reverse = 1>({x}, one)", "{y} = CumSum<reverse = 1, exclusive = 1>({x}, one)"],
    "convolution that looks ahead": [
        _turned("m_u = Conv<group = 8, kernel_shape = [3], pads = [1, 1]>(m_t, m_kernel)"),
        _turned("m_u = Conv<group = 8, kernel_shape = [2], dilations = [90], pads = [0, 90]>(m_t, m_pair)"),
        _turned("m_v = Conv<group = 8, kernel_shape = [3], pads = [0, 2]>(m_t, m_kernel)\n m_u = Sigmoid(m_v)"),
    ],
    "pool that looks ahead": [_turned("m_u = AveragePool<kernel_shape = [3], pads = [1, 1]>(m_t)"),
                              _turned("m_u = MaxPool<kernel_shape = [2], pads = [0, 1]>(m_t)")],
    "next token": [
        "{y} = Pad({x}, m_ahead)", "m_n = Pad({x}, m_far_ahead)\n {y} = Add({x}, m_n)",
        "m_n = Slice({x}, second, m_end, second)\n m_l = Slice({x}, m_minus, m_end, second)\n {y} = Concat<axis = 1>(m_n, m_l)",
    ],
    "last token": ["m_l = Slice({x}, m_minus, m_end, second)\n {y} = Add({x}, m_l)",
                   "m_l = Gather<axis = 1>({x}, m_minus)\n {y} = Add({x}, m_l)"],
    "roll of tokens": [
        "m_l = Slice({x}, m_minus, m_end, second)\n m_r = Slice({x}, first, m_minus, second)\n {y} = Concat<axis = 1>(m_l, m_r)"],
    "third token": ["m_3 = Slice({x}, m_two1, m_end, second)\n m_o = Slice(m_3, first, second, second)\n {y} = Add({x}, m_o)"],
    "state summed over all tokens": [
        "m_t = Transpose<perm = [0, 2, 1]>({x})\n m_g = MatMul(m_t, {x})\n {y} = MatMul({x}, m_g)",
        "m_g = Einsum<equation = \"bnd,bne->bde\">({x}, {x})\n {y} = MatMul({x}, m_g)"],
    "roll of sequences": [
        "m_n = Slice({x}, second, m_end, first)\n m_l = Slice({x}, first, second, first)\n m_o = Concat<axis = 0>(m_n, m_l)\n {y} = Add({x}, m_o)"],
    "order of sequences": ["m_o = Gather<axis = 0>({x}, m_swap)\n {y} = Add({x}, m_o)",
                           "m_o = Slice({x}, m_minus, m_100n, first, m_minus)\n {y} = Add({x}, m_o)"],
    "reduction over sequences": ["m_r = ReduceMax({x}, first)\n {y} = Sub({x}, m_r)", "{y} = Softmax<axis = 0>({x})",
                                 "m_z = Cast<to = 7>(nought)\n {y} = CumSum({x}, m_z)"],
    "product of sequences": [
        "m_t = Transpose<perm = [1, 0, 2]>({x})\n m_s = Transpose<perm = [1, 2, 0]>({x})\n m_g = MatMul(m_t, m_s)\n m_o = MatMul(m_g, m_t)\n {y} = Transpose<perm = [1, 0, 2]>(m_o)"],
    "heads of other sequences": [SPLIT.replace("{sizes}", "m_bb, m_pairs").replace("{order}", "0, 2, 1, 3")],
    "Squeeze without axes": ["m_u = Unsqueeze({x}, second)\n m_s = Squeeze(m_u)\n {y} = Add({x}, m_s)"],
}  # fmt: skip
CAUSAL = {
    "features": ["m_r = ReduceMax({x}, third)\n {y} = Sub({x}, m_r)", "{y} = Softmax<axis = 2>({x})",
                 "m_a = Abs({x})\n m_m = ReduceMax(m_a, third)\n {y} = Div({x}, m_m)"],
    "sum of earlier tokens": ["m_c = CumSum({x}, one)\n {y} = Mul(m_c, m_tenth)",
                              "m_c = CumSum<exclusive = 1>({x}, one)\n {y} = Mul(m_c, m_tenth)"],
    "causal convolution": [
        _turned("m_u = Conv<group = 8, kernel_shape = [3], pads = [2, 0]>(m_t, m_kernel)"),
        "m_p = Pad({x}, m_past)\n " + _turned("m_u = Conv<group = 8, kernel_shape = [2], dilations = [3]>(m_t, m_pair)").replace("({x})", "(m_p)"),
    ],
    "causal pool": [_turned("m_u = AveragePool<kernel_shape = [3], pads = [2, 0]>(m_t)")],
    "previous token": [
        "m_s = Pad({x}, m_shift)\n {y} = Sub({x}, m_s)", "m_p = Pad({x}, m_before)\n {y} = Slice(m_p, first, m_minus, second)",
        "m_f = Slice({x}, first, second, second)\n m_r = Slice({x}, first, m_minus, second)\n {y} = Concat<axis = 1>(m_f, m_r)",
    ],
    "first token": ["m_f = Slice({x}, first, second, second)\n {y} = Sub({x}, m_f)"],
    "heads of all sequences": [SPLIT.replace("{sizes}", "m_pairs, m_bb").replace("{order}", "1, 2, 0, 3")],
    "whole batch": ["m_s = Slice({x}, first, m_end, first)\n {y} = Add({x}, m_s)"],
    "Squeeze with axes": ["m_u = Unsqueeze({x}, second)\n m_s = Squeeze(m_u, second)\n {y} = Add({x}, m_s)"],
}  # fmt: skip

MASKED = "m_w = Where(allowed, {x}, low)\n "
WHERE = "m_g = Greater(m_m, {limit})\n {y} = Where(m_g, m_nil, {x})"
MIXING_SCORES = {  # of `scores`: before the mask
    "bound of scores": ["m_a = Abs({x})\n m_m = ReduceMax(m_a, m_minus)\n {y} = Div({x}, m_m)",
                        "m_m = ReduceMax({x}, m_minus)\n m_b = Mul(m_m, half)\n {y} = Min({x}, m_b)"],
    "large scores": ["m_m = ReduceMax({x}, m_minus)\n " + WHERE.replace("{limit}", "m_big"),
                    "m_m = ReduceMax({x}, m_minus)\n " + WHERE.replace("{limit}", "m_huge"),
                    "m_m = ReduceMax({x}, m_minus)\n m_d = Div(m_m, m_huge)\n m_e = Max(m_d, half)\n {y} = Div({x}, m_e)"],
    "softmax of scores": ["{y} = Softmax<axis = -1>({x})"],
    "reversed scores": ["m_r = Slice({x}, m_minus, m_100n, third, m_minus)\n {y} = Add({x}, m_r)"],
    "scores of other queries": ["m_m = ReduceMax({x}, second)\n {y} = Sub({x}, m_m)", "{y} = Softmax<axis = 1>({x})"],
    "scores of other sequences": ["m_m = ReduceMax({x}, first)\n {y} = Mul({x}, m_m)"],
}  # fmt: skip
CAUSAL_SCORES = {  # of `masked`: with the mask
    "maximum of masked scores": [MASKED + "m_m = ReduceMax(m_w, m_minus)\n {y} = Sub(m_w, m_m)"],
    "bound of masked scores": [
        MASKED + "m_0 = Where(allowed, {x}, m_nil)\n m_a = Abs(m_0)\n m_m = ReduceMax(m_a, m_minus)\n {y} = Div(m_w, m_m)"],
    "softmax of masked scores": [MASKED + "m_s = Softmax<axis = -1>(m_w)\n {y} = Where(allowed, m_s, low)"],
}  # fmt: skip
MIXING_CONTEXT = {  # a matrix of queries and keys that context gives
    "matrix that looks ahead": [
        "m_d = Sub(row, column)\n m_ok = Equal(m_d, m_far)\n m_f = Cast<to = 1>(m_ok)\n m_o = MatMul(m_f, {x})\n {y} = Add({x}, m_o)",
        "m_c = Add(column, one)\n m_ok = LessOrEqual(row, m_c)\n m_f = Cast<to = 1>(m_ok)\n {y} = MatMul(m_f, {x})",
        "m_a = LessOrEqual(row, column)\n m_b = GreaterOrEqual(row, m_far)\n m_c = GreaterOrEqual(column, m_far)\n m_e = And(m_b, m_c)\n m_ok = Or(m_a, m_e)\n m_f = Cast<to = 1>(m_ok)\n {y} = MatMul(m_f, {x})"],
    "share of all tokens": [
        "m_ok = LessOrEqual(row, column)\n m_f = Cast<to = 1>(m_ok)\n m_o = MatMul(m_f, {x})\n m_n = Cast<to = 1>(length)\n {y} = Div(m_o, m_n)"],
}  # fmt: skip
CAUSAL_CONTEXT = {
    "matrix of earlier tokens": [
        "m_ok = LessOrEqual(row, column)\n m_f = Cast<to = 1>(m_ok)\n {y} = MatMul(m_f, {x})",
        "m_ok = LessOrEqual(row, column)\n m_d = Sub(row, column)\n m_df = Cast<to = 1>(m_d)\n m_e = Exp(m_df)\n m_f = Where(m_ok, m_e, m_nil)\n {y} = MatMul(m_f, {x})"],
}  # fmt: skip
_SPELLINGS = {**MIXING, **CAUSAL, **MIXING_SCORES, **CAUSAL_SCORES, **MIXING_CONTEXT, **CAUSAL_CONTEXT}


def mixing_model(kind: str, place: str, seed: int) -> onnx.ModelProto:
    """Return a decoder in which nodes of a kind stand at a place, in a spelling that the seed draws."""
    random = np.random.default_rng([seed, *kind.encode(), *place.encode()])
    before, after = _FROM_TO[place]
    if kind == "reduction over tokens":
        reduction = random.choice(REDUCTIONS).format(a="m_a", r="m_m")
        body = f"m_a = Abs({{x}})\n {reduction}\n {random.choice(USES)}".replace("{r}", "m_m")
    else:
        body = random.choice(_SPELLINGS[kind])
    body = body.replace("{x}", before).replace("{y}", "m_y") + f"\n {after} = Identity(m_y)"
    return in_order(read(attention(**{place: body}, constants=CONSTANTS)))


def kinds() -> list[tuple[str, str, bool]]:
    """Return each kind with each of its places, and whether it keeps tokens and sequences apart."""
    anywhere = {**dict.fromkeys(["reduction over tokens", *MIXING, *MIXING_CONTEXT], False),
                **dict.fromkeys([*CAUSAL, *CAUSAL_CONTEXT], True)}  # fmt: skip
    return [
        *((kind, place, right) for kind, right in anywhere.items() for place in PLACES),
        *((kind, "scores", False) for kind in MIXING_SCORES),
        *((kind, "masked", True) for kind in CAUSAL_SCORES),
    ]


def keeps_apart(model: onnx.ModelProto, seed: int) -> bool:
    """Return whether no result depends on a later token or another sequence, which are large."""
    x = np.random.default_rng(seed).standard_normal((2, 120, 8)).astype(np.float32)
    run_model = in_onnxruntime(model)

    def run(text: np.ndarray) -> np.ndarray:
        try:
            return run_model({"x": text})["logits"]
        except onnxruntime.capi.onnxruntime_pybind11_state.Fail:  # shapes that cannot be broadcast
            return np.zeros(0)

    whole = run(x)
    for prefix in (1, 2, 7, 60, 118):
        larger = x.copy()
        larger[:, prefix:] *= 400
        for other in (larger, x[:, :prefix]):
            found = run(other)
            if found.shape != other.shape or not _same(found[:, :prefix], whole[:, :prefix]):
                return False
    return all(
        _same(run(np.stack([400 * x[0], x[1]]))[1:], whole[1:])
        and _same(run(np.stack([x[0], 400 * x[1]]))[:1], whole[:1])
        and _same(run(x[row : row + 1]), whole[row : row + 1])
        for row in (0, 1)
    )


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and np.allclose(left, right, rtol=1e-3, atol=1e-4)
