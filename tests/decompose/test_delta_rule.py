"""The gated delta rule in chunks of tokens becomes one `Scan` over tokens; whatever computes something else stays."""

import numpy as np
import onnx
import pytest
from chunked import chunked
from exports import injected
from laws import in_onnxruntime
from onnxruntime.transformers.float16 import convert_float_to_float16

from kvsurgeon import io
from kvsurgeon.decompose.simplify import simplify_model
from kvsurgeon.errors import UnsupportedError

IDS = np.array([[3, 1, 4, 1, 5, 9]])
RIGHT = {
    "the rule": [],
    "decays of each key": [
        ("float[4, 2] wg", "float[4, 6] wg"),
        ("g2 = Neg(g1) g3 = Transpose<perm = [0, 2, 1]>(g2)",
         "g2 = Neg(g1) g4 = Reshape(g2, narrow) g3 = Transpose<perm = [0, 2, 1, 3]>(g4)"),
        ("gp = Pad(g3, pads3)", "gp = Pad(g3, pads)"),
        ("ga = Reshape(gp, ones)", "ga = Reshape(gp, keys)"),
        ("gaps = Sub(sums, sumst) decays = Exp(gaps) ", "grown = Exp(sums) falling = Neg(sums) shrunk = Exp(falling) "),
        ("kt = Transpose<perm = [0, 1, 2, 4, 3]>(k)", "ks = Mul(k, shrunk) kt = Transpose<perm = [0, 1, 2, 4, 3]>(ks)"),
        ("kk0 = MatMul(kb, kt) kk1 = Mul(kk0, decays) kk2 = Mul(kk1, strict)",
         "kbd = Mul(kb, grown) kk0 = MatMul(kbd, kt) kk2 = Mul(kk0, strict)"),
        ("grown = Exp(sums) kbd = Mul(kb, grown) read", "read"),
        ("qk0 = MatMul(q, kt) qk1 = Mul(qk0, decays) qk = Mul(qk1, seen)",
         "qd = Mul(q, grown) qk0 = MatMul(qd, kt) qk = Mul(qk0, seen)"),
        (" qd = Mul(q, grown)\n new0", "\n new0"),
    ],
    "queries that are scaled in chunks": [("q = Reshape(qp, keys)", "qu = Reshape(qp, keys) q = Mul(qu, half)")],
    "copies": [("kb = Mul(k, b)", "ki = Identity(k) bd = Cast<to = 11>(b) bi = Cast<to = 1>(bd) kb = Mul(ki, bi)")],
    "a state of zeros in 8 bits": [
        ("float half", "int8[1, 2, 1, 3, 2] nothing = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, float half"),
        ("out0 = MatMul(qk0c, new0)",
         "qd0 = Slice(qd, zero, one, two) u, us, up = DynamicQuantizeLinear(qd0) i = MatMulInteger(u, nothing, up) "
         "f = Cast<to = 1>(i) both = Mul(us, half) old = Mul(f, both) this = MatMul(qk0c, new0) out0 = Add(old, this)"),
    ],
}  # fmt: skip
WRONG = {
    "a state that is not decayed": [("kd = Mul(k, left)", "kd = Identity(k)")],
    "another sign of decays": [("gaps = Sub(sums, sumst)", "gaps = Sub(sumst, sums)")],
    "what the state predicts is not taken off": [("missing = Sub(new1, known)", "missing = Identity(new1)")],
    "what the state predicts is added": [("missing = Sub(new1, known)", "missing = Add(new1, known)")],
    "the state is not read": [("out1 = Add(within, between)", "out1 = Identity(within)")],
    "the first chunk twice": [("Concat<axis = 2>(out0, out1)", "Concat<axis = 2>(out0, out0)")],
    "chunks in another order": [("Concat<axis = 2>(out0, out1)", "Concat<axis = 2>(out1, out0)")],
    "another power of the triangle": [("n3 = MatMul(n2, n)", "n3 = MatMul(n2, n2)")],
    "a token sees the next one": [("{1, 0, 0, 0, 1, 1, 0, 0,", "{1, 1, 0, 0, 1, 1, 0, 0,")],
    "padding that counts as tokens": [("end = {6}", "end = {7}"), ("zero, end", "one, end")],
    "decays that have a floor": [("sums = CumSum(ga, along)", "gm = Max(ga, low) sums = CumSum(gm, along)")],
    "a row that is replaced": [("cut = Slice", "whole = Identity(rows) rowz = Sub(whole, whole) cut = Slice"),
                               ("(rows, zero, end", "(rowz, zero, end")],
}  # fmt: skip


def rewritten(model):
    return io.to_proto(simplify_model(io.load(model)))


def has_scan(model):
    return any(node.op_type == "Scan" for node in model.graph.node)


def test_sums_along_an_axis_that_does_not_exist_stay():
    assert not has_scan(rewritten(chunked(("along = {3}", "along = {7}"))))


@pytest.mark.parametrize("changes", RIGHT.values(), ids=RIGHT)
def test_the_rule_in_chunks_becomes_one_scan(changes):
    original = chunked(*changes)
    model = rewritten(original)
    assert has_scan(model)
    (expected,), (found,) = (in_onnxruntime(one)({"input_ids": IDS}).values() for one in (original, model))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_a_text_of_whole_chunks_is_not_padded():
    unpadded = [(f"Pad({one})", f"Identity({one.split(',')[0]})")
                for one in ("q3, pads", "k3, pads", "v2, pads", "g3, pads3", "b2, pads3")]  # fmt: skip
    original = chunked(*unpadded, ("Slice(rows, zero, end, two)", "Identity(rows)"), tokens=8)
    model, ids = rewritten(original), np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    assert has_scan(model)
    (expected,), (found,) = (in_onnxruntime(one)({"input_ids": ids}).values() for one in (original, model))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_the_rule_in_16_bits_is_computed_in_float32():
    original = convert_float_to_float16(chunked(), keep_io_types=True)
    model = rewritten(original)
    scan = next(node for node in model.graph.node if node.op_type == "Scan")
    (body,) = (one.g for one in scan.attribute if one.name == "body")
    assert {value.type.tensor_type.elem_type for value in body.input} == {onnx.TensorProto.FLOAT}
    (expected,), (found,) = (in_onnxruntime(one)({"input_ids": IDS}).values() for one in (original, model))
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3 * np.ptp(expected))


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_what_computes_something_else_stays(changes):
    original = chunked(*changes)
    in_onnxruntime(original)({"input_ids": IDS})
    assert not has_scan(rewritten(original))
    with pytest.raises(UnsupportedError):
        injected(original)


@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1, 1), (4, 2), (3, 2, 1), (5, 1), (6,)])
def test_a_text_in_pieces_gives_what_the_export_gives(cuts):
    original = chunked()
    model = in_onnxruntime(injected(original))
    (expected,) = in_onnxruntime(original)({"input_ids": IDS}).values()
    state, rows, first = np.zeros((1, 2, 3, 2), np.float32), [], 0
    for count in cuts:
        found = model({"input_ids": IDS[:, first : first + count], "past_key_values.0.recurrent_state": state})
        rows.append(found["logits"])
        state, first = found["present.0.recurrent_state"], first + count
    np.testing.assert_allclose(np.concatenate(rows, 1), expected, rtol=0, atol=1e-5 * np.ptp(expected))
