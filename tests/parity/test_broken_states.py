"""The verifier finds states that are wrong: each is a common mistake in one state of a decoder with four of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import pytest
from exports import injected
from onnx import numpy_helper
from recurrences import CONVOLUTION, hybrid, layers, scan
from written import read

from kvsurgeon.workflow import verification

Break = Callable[["Broken"], None]
CONV, RECURRENT = (f"0.{kind}_state" for kind in ("conv", "recurrent"))


DECAYING = scan(**{"a0 = Mul(la,": "lb = Abs(la)\n lc = Neg(lb)\n a0 = Mul(lc,"})


@cache
def original() -> onnx.ModelProto:
    return read(hybrid(layers(CONVOLUTION, DECAYING, "h = Tanh(x)", CONVOLUTION, DECAYING)))


@cache
def correct() -> bytes:
    return injected(original()).SerializeToString()


class Broken:
    """A copy of the correct model that is being broken."""

    def __init__(self) -> None:
        self.model = onnx.ModelProto.FromString(correct())
        self.graph = self.model.graph

    def op(self, operator: str, *inputs: str | object, **attributes: object) -> str:
        """Add a node in front of all others that it does not need, and return its output."""
        names = [one if isinstance(one, str) else self.constant(one) for one in inputs]
        output = f"broken_{len(self.graph.node)}"
        self.graph.node.append(onnx.helper.make_node(operator, names, [output], **attributes))
        return output

    def constant(self, value: object) -> str:
        array = np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
        name = f"constant_{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def returned(self, state: str, change: Callable[[str], str]) -> None:
        """Change what is returned of a state."""
        name = f"present.{state}"
        for node in self.graph.node:
            for values in (node.input, node.output):
                values[:] = [f"{name}.right" if value == name else value for value in values]
        self.graph.node.append(onnx.helper.make_node("Identity", [change(f"{name}.right")], [name]))

    def given(self, state: str, change: Callable[[str], str]) -> None:
        """Change what is read of a state."""
        name, before = f"past_key_values.{state}", list(self.graph.node)
        wrong = change(name)
        for node in before:
            node.input[:] = [wrong if value == name else value for value in node.input]
        added = self.graph.node[len(before) :]
        del self.graph.node[:]
        self.graph.node.extend([*added, *before])

    def swapped(self, kind: str) -> None:
        """Return the states of two layers in the place of each other."""
        names = {f"present.{layer}.{kind}_state": f"present.{1 - layer}.{kind}_state" for layer in (0, 1)}
        for node in self.graph.node:
            node.output[:] = [names.get(value, value) for value in node.output]

    def replaced(self, operator: str, index: int, old: object, new: object) -> None:
        """Replace a constant that is an input of all operators of one kind."""
        constants = {one.name: numpy_helper.to_array(one) for one in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == operator and np.array_equal(constants.get(node.input[index], np.nan), old):
                node.input[index] = self.constant(new)


def first_call(b: Broken, past: str, other: str) -> str:
    """Return a value in the first call, and the past afterwards."""
    is_first = b.op("Equal", b.op("ReduceMax", b.op("Abs", past), keepdims=0), 0.0)
    return b.op("Where", is_first, other, past)


BREAKS: dict[str, Break] = {
    "the state before the last chunk": lambda b: b.replaced("Gather", 1, -1, -2),
    "the state before the first chunk": lambda b: b.replaced("Gather", 1, -1, 0),
    "no recurrent state": lambda b: b.given(RECURRENT, lambda past: b.op("Mul", past, 0.0)),
    "no last rows": lambda b: b.given(CONV, lambda past: b.op("Mul", past, 0.0)),
    "a recurrent state that is not updated": lambda b: b.returned(
        RECURRENT, lambda right: first_call(b, f"past_key_values.{RECURRENT}", right)
    ),
    "last rows that are not updated": lambda b: b.returned(
        CONV, lambda right: first_call(b, f"past_key_values.{CONV}", right)
    ),
    "a decay too much": lambda b: b.returned(RECURRENT, lambda right: b.op("Mul", right, 0.95)),
    "a decay too little": lambda b: b.returned(RECURRENT, lambda right: b.op("Mul", right, 1.05)),
    "a state of another sign": lambda b: b.given(RECURRENT, lambda past: b.op("Neg", past)),
    "past and present state added": lambda b: b.returned(
        RECURRENT, lambda right: b.op("Add", right, f"past_key_values.{RECURRENT}")
    ),
    "a bounded state": lambda b: b.returned(RECURRENT, lambda right: b.op("Clip", right, -0.5, 0.5)),
    "a state in bfloat16": lambda b: b.returned(
        RECURRENT, lambda right: b.op("Cast", b.op("Cast", right, to=16), to=1)
    ),
    "padding that counts as tokens": lambda b: b.replaced("Pad", 2, np.float32(0), 1.0),
    "recurrent states of another layer": lambda b: b.swapped("recurrent"),
    "last rows of another layer": lambda b: b.swapped("conv"),
    "states of another sequence": lambda b: b.returned(
        RECURRENT, lambda right: b.op("Slice", right, [-1], [-99], [0], [-1])
    ),
    "last rows of another sequence": lambda b: b.returned(
        CONV, lambda right: b.op("Slice", right, [-1], [-99], [0], [-1])
    ),
    "last rows in reverse order": lambda b: b.returned(
        CONV, lambda right: b.op("Slice", right, [-1], [-99], [2], [-1])
    ),
    "rows and channels swapped": lambda b: b.returned(
        CONV, lambda right: b.op("Reshape", b.op("Transpose", right, perm=[0, 1, 3, 2]), [0, 1, 2, 8])
    ),
    "channels in another order": lambda b: b.given(RECURRENT, lambda past: b.op("Slice", past, [-1], [-99], [1], [-1])),
    "the oldest row missing": lambda b: b.given(
        CONV, lambda past: b.op("Pad", b.op("Slice", past, [1], [2], [2]), [0, 0, 1, 0, 0, 0, 0, 0])
    ),
    "rows of a token too early": lambda b: b.replaced("Slice", 1, [-2], [-3]),
}


def test_the_correct_model_is_the_same():
    model = onnx.ModelProto.FromString(correct())
    assert sum("state" in value.name for value in model.graph.input) == 4
    assert verification.verify_models(original(), model, effort="quick").verdict == "same"


@pytest.mark.parametrize("wrong", BREAKS.values(), ids=BREAKS.keys())
def test_a_wrong_state_is_found(wrong):
    broken = Broken()
    wrong(broken)
    assert broken.model.SerializeToString() != correct()
    assert verification.verify_models(original(), broken.model, effort="quick").verdict == "different"
