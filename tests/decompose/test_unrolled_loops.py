"""Recurrences that are written out token by token: N equal bodies become one `Scan`, unequal ones stay."""

import numpy as np
import pytest
from exports import injected
from laws import in_onnxruntime
from unrolled import BODY, MEAN, merge_first, unrolled

from kvsurgeon import io
from kvsurgeon.decompose.simplify import simplify_model
from kvsurgeon.errors import UnsupportedError


def in_body(number, before, after):
    """Return a change of one body."""

    def change(body, text):
        assert body != number or before in text
        return text.replace(before, after) if body == number else text

    return change


def in_all(before, after):
    return lambda body, text: text.replace(before.format(i=body), after.format(i=body, last=7 - body))


ROWS = "y0, y1, y2, y3, y4, y5, y6, y7"
WRITES = "\n ".join(f"joined{i + 1} = ScatterElements<axis = 1>(joined{i}, all{i}, y{i})" for i in range(8)).replace(
    "joined8", "joined"
)
# One of the states is kept in 16 bits, as converters to float16 may leave them.
MIXED = (
    MEAN.replace("Mul(old{i}, w{i})", "Mul(old16{i}, u{i})")
    .replace("w{n} = Add(wd{i}, new{i})", "u{n} = Add(wd{i}, new16{i})")
    .replace(" wd{i}", " old16{i} = Cast<to = 10>(old{i})\n new16{i} = Cast<to = 10>(new{i})\n wd{i}")
    .replace(" p{i}", " w{n} = Cast<to = 1>(u{n})\n p{i}")
)
COPIES = "i5 = Identity(d5)\n s5 = Cast<to = 11>(x5)\n n5 = Cast<to = 1>(s5)\n h6 = Sub(i5, n5)"
RIGHT = {
    "one state that starts with zeros": {},
    "three states, one of which starts far below zero": {"body": MEAN},
    "states that are merged in the first body": {"body": MEAN, "change": merge_first},
    "states of two types": {"body": MIXED, "before": "x = Identity(e)\n u0 = Cast<to = 10>(nil)"},
    "states of two types and rows in 16 bits": {
        "body": MIXED.replace("Unsqueeze(p{i}", "Unsqueeze(p16{i}").replace(
            " y{i}", " p16{i} = Cast<to = 10>(p{i})\n y{i}"
        ),
        "before": "x = Identity(e)\n u0 = Cast<to = 10>(nil)",
        "rows": f"joined16 = Concat<axis = 1>({ROWS})\n joined = Cast<to = 1>(joined16)",
    },
    "copies in one body": {"change": in_body(5, "h6 = Sub(d5, x5)", COPIES)},
    "a start that is not zero": {"start": "far"},
    "rows that are written into a tensor": {
        "rows": f"joined0 = Concat<axis = 1>(blank, blank, blank, blank, blank, blank, blank, blank)\n {WRITES}"
    },
    "elements that are slices": {
        "body": BODY.replace("x{i} = Gather<axis = 1>(x, at{i})", "x{i} = Squeeze(s{i}, second)"),
        "before": "x = Identity(e)\n " + ", ".join(f"s{i}" for i in range(8)) + " = Split<axis = 1>(x)",
    },
}
WRONG = {
    "another weight": {"change": in_body(5, "scale", "scale2")},
    "another weight in the first body": {"change": in_body(0, "scale", "scale2")},
    "another weight in the last body": {"change": in_body(7, "scale", "scale2")},
    "a number that is rounded": {"change": in_body(5, "h6 = Sub(d5, x5)", COPIES.replace("11", "10"))},
    "another operator": {"change": in_body(5, "Sub(", "Add(")},
    "another order of inputs": {"change": in_body(5, "Sub(d5, x5)", "Sub(x5, d5)")},
    "another attribute": {
        "body": BODY.replace("Sub(d{i}, x{i})", "Sub(d{i}, r{i})").replace(
            " d{i}", " r{i} = Elu<alpha = 1.0>(x{i})\n d{i}"
        ),
        "change": in_body(5, "alpha = 1.0", "alpha = 1.5"),
    },
    "the state before the last one": {"change": in_body(5, "h5)", "h4)")},
    "the first state again": {"change": in_body(5, "h5)", "h0)")},
    "the result in place of the state": {"change": in_body(5, "h5)", "p4)")},
    "another state": {"body": MEAN, "change": in_body(5, "Mul(old5, w5)", "Mul(old5, h5)")},
    "the element of another token": {"change": in_body(5, "(x, at5)", "(x, at4)")},
    "a later token in all bodies": {"change": in_all("(x, at{i})", "(x, at{last})")},
    "the first token in all bodies": {"change": in_all("(x, at{i})", "(x, at0)")},
    "time that runs backwards": {"change": in_all("at{i})", "at{last})")},
    "another tensor": {"change": in_body(5, "(x, at5)", "(b, at5)")},
    "another axis": {
        "before": "x = Identity(e)\n xt = Transpose<perm = [0, 2, 1]>(x)",
        "change": in_body(3, "<axis = 1>(x, at3)", "<axis = 2>(xt, at3)"),
    },
    "rows in another order": {"rows": "joined = Concat<axis = 1>(y0, y1, y2, y4, y3, y5, y6, y7)"},
    "a write of no row": {
        "rows": f"""joined0 = Concat<axis = 1>(blank, blank, blank, blank, blank, blank, blank, blank)
 nowhere = Constant<value = int64[0, 2] {{}}>()
 no_row = Constant<value = float[0, 4] {{}}>()
 {WRITES.replace("ScatterElements<axis = 1>(joined3, all3, y3)", "ScatterND(joined3, nowhere, no_row)")}"""
    },
    "one row twice": {"rows": "joined = Concat<axis = 1>(y0, y1, y2, y3, y3, y5, y6, y7)"},
    "a start that is a token": {"start": "first", "before": "x = Identity(e)\n first = Gather<axis = 1>(x, at7)"},
    "more tokens than bodies": {"tokens": 9, "rows": f"joined = Concat<axis = 1>({ROWS}, blank)"},
    "a value of all tokens": {
        "before": "x = Identity(e)\n mean = ReduceMean<axes = [1], keepdims = 0>(x)",
        "change": lambda _, text: text.replace("scale", "mean"),
    },
}


def rolled(model):
    return io.to_proto(simplify_model(io.load(model)))


def scans(model):
    return [node for node in model.graph.node if node.op_type == "Scan"]


@pytest.mark.parametrize("parts", RIGHT.values(), ids=RIGHT)
def test_equal_bodies_become_one_scan(parts):
    original = unrolled(**parts)
    model = rolled(original)
    assert len(scans(model)) == 1
    feeds = {"input_ids": np.array([[3, 1, 4, 1, 5, 9, 2, 6]])}
    (expected,), (found,) = (in_onnxruntime(one)(feeds).values() for one in (original, model))
    assert np.array_equal(expected, found)


@pytest.mark.parametrize("parts", WRONG.values(), ids=WRONG)
def test_unequal_bodies_stay(parts):
    original = unrolled(**parts)
    assert not scans(rolled(original))
    with pytest.raises(UnsupportedError):
        injected(original)
