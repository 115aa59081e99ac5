"""Decoders of a fixed length with `Scan`, convolutions and shifts: states of fixed size, for texts of any length."""

import numpy as np
import onnx
import pytest
from exports import after, injected
from laws import assert_law, dims_of
from onnx import helper
from unrolled import MEAN, merge_first, unrolled

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.remove_cache import RemoveCache
from kvsurgeon.workflow import verification

CONV = """et = Transpose<perm = [0, 2, 1]>(e)
 c = Conv<group = 4, kernel_shape = [3], pads = [PADS]>(et, kernel)
 ct = KEPT(c)
 x = Transpose<perm = [0, 2, 1]>(ct)"""
SHIFT = """k = Slice(e, FROM)
 x = Concat<axis = 1>(ORDER)"""
BEFORE = {
    "one token after another": "x = Identity(e)",
    "a convolution": CONV.replace("PADS", "2, 0").replace("KEPT(c)", "Identity(c)"),
    "a convolution whose last rows are dropped": CONV.replace("PADS", "2, 2").replace(
        "KEPT(c)", "Slice(c, none, whole, third)"
    ),
    "a shift": "x = Pad(e, shift, zero)",
}
MIXES = {
    "a convolution of later tokens": CONV.replace("PADS", "1, 1").replace("KEPT(c)", "Identity(c)"),
    "a convolution whose first row is dropped": CONV.replace("PADS", "2, 1").replace(
        "KEPT(c)", "Slice(c, second, far_end, third)"
    ),
    "a last token that is replaced": SHIFT.replace("FROM", "none, last, second").replace("ORDER", "k, blank"),
    "a shift to the left": SHIFT.replace("FROM", "second, far_end, second").replace("ORDER", "k, blank"),
}
BODIES = {"one state": {}, "three states": {"body": MEAN, "change": merge_first}, "a start": {"start": "far"}}


def tokens(count):
    return {"input_ids": np.random.default_rng(count).integers(0, 11, (1, count))}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_an_export_of_fixed_length_takes_any_length(before):
    model = injected(unrolled(8, before=before))
    rows = [dims_of(value) for value in model.graph.input if value.name.endswith("_state")]
    assert all(isinstance(size, int) for shape in rows for size in shape)
    for length, cuts in ((8, range(1, 8)), (21, (1, 2, 9)), (3, ())):
        assert_law(unrolled(length, before=before), model, whole=tokens(length), cuts=list(cuts))


@pytest.mark.parametrize("before", MIXES.values(), ids=MIXES)
def test_states_that_depend_on_later_tokens_are_rejected(before):
    with pytest.raises(UnsupportedError, match=r"mixes tokens|keeps only some|selects tokens|cannot trace"):
        injected(unrolled(8, before=before))


@pytest.mark.parametrize("parts", BODIES.values(), ids=BODIES)
def test_states_of_a_loop_are_one_tensor(parts):
    original = unrolled(8, **parts)
    model = injected(original)
    assert [value.name for value in model.graph.input] == ["input_ids", "past_key_values.0.recurrent_state"]
    for length, cuts in ((8, range(1, 8)), (21, (1, 2, 9))):
        assert_law(unrolled(length, **parts), model, whole=tokens(length), cuts=list(cuts))
    assert verification.verify_models(original, model).verdict == "same"
    restored = injected(after(model, RemoveCache()))
    assert_law(original, restored, whole=tokens(8), cuts=[3, 4])


def scan(*, start="nil", attributes=None, captured="scale", **graph) -> onnx.ModelProto:
    """Return a decoder with a `Scan` that multiplies the state by a half, and adds a token."""
    body = onnx.parser.parse_graph(
        f"""body (float[1, 4] before, float[1, 4] element) => (float[1, 4] state, float[1, 4] row) {{
 half = Mul(before, {captured})
 state = Add(half, element)
 row = Identity(state) }}"""
    )
    model = unrolled(8, rows="joined = Identity(x)", **graph)
    values = {"num_scan_inputs": 1, "scan_input_axes": [1], "scan_output_axes": [1], "body": body}
    node = helper.make_node("Scan", [start, "x"], ["last_state", "scanned"], **{**values, **(attributes or {})})
    kept = [one for one in model.graph.node if one.output[0] in ("e", "x", "b", "a", "logits", "mean", "first_state")]
    for one in kept:
        one.input[:] = ["scanned" if name == "joined" else name for name in one.input]
    del model.graph.node[:]
    model.graph.node.extend([*kept[:-1], node, kept[-1]])
    return model


SCANS = {
    "time that runs backwards": {"attributes": {"scan_input_directions": [1]}},
    "rows in reverse order": {"attributes": {"scan_output_directions": [1]}},
    "a start that is not zero": {"start": "far"},
    "a value of all tokens": {
        "captured": "mean", "before": "x = Identity(e)\n mean = ReduceMean<axes = [1], keepdims = 0>(x)",
    },
    "a start that is a token": {
        "start": "first_state", "before": "x = Identity(e)\n first_state = Gather<axis = 1>(x, at0)",
    },
}  # fmt: skip


def test_the_state_of_a_scan_is_passed_from_call_to_call():
    original = scan()
    model = injected(original)
    assert_law(original, model, whole=tokens(8), cuts=[1, 2, 5])
    assert verification.verify_models(original, model).verdict == "same"


@pytest.mark.parametrize("changes", SCANS.values(), ids=SCANS)
def test_other_scans_are_rejected(changes):
    with pytest.raises(UnsupportedError):
        injected(scan(**changes))
