"""What an input is given for, as the user states it."""

import numpy as np
import onnx
import pytest
from attentions import attention
from exports import injected
from laws import assert_law
from written import read

from kvsurgeon.errors import Code, UnsupportedError, UsageError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject

NUMBER = "causal = LessOrEqual(row, column)\n p = Less(row, z)\n allowed = And(causal, p)"
FACTOR = "z3 = Unsqueeze(z, third)\n logits = Mul(c, z3)"


def dims(model, index):
    return [size.dim_param for size in model.graph.input[index].type.tensor_type.shape.dim]


def texts():
    return {"x": np.random.default_rng(5).standard_normal((2, 9, 8)).astype(np.float32)}


@pytest.mark.parametrize(("role", "length"), [("new", "sequence_length"), ("total", "total_sequence_length")])
def test_an_input_of_the_length_of_the_text(role, length):
    model = read(attention(inputs="float[b, n] z", after=FACTOR))
    result = injected(model, input=(f"z={role}",))
    assert dims(result, 1) == ["batch_size", length]
    assert_law(model, result, texts() | {"z": np.random.default_rng(1).random((2, 9)).astype(np.float32)})


def test_a_number_that_is_compared_with_positions_must_be_stated():
    model = read(attention(inputs="int64 z", allowed=NUMBER))
    with pytest.raises(UnsupportedError, match="may count the tokens of a call") as refusal:
        injected(model)
    assert refusal.value.code is Code.INPUT_ROLE
    assert_law(model, injected(model, input=("z=fixed",)), texts() | {"z": np.array(7)})


def test_what_the_application_must_give_is_noted():
    outcome = Inject().apply(Subject.of(read(attention(inputs="float z", after="logits = Mul(c, z)"))))
    assert outcome.notes == ("`z` has no axis of tokens: it must be the same in every call of a text",)


def test_inputs_with_default_values_are_noted_and_kept():
    model = read(attention())
    for name in ("half", "low"):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, []))
    subject = Subject.of(model)
    outcome = Inject().apply(subject)
    noted = "the default of `half` is taken as constant (2 inputs have one): give the result no other value"
    assert outcome.notes == (noted,)
    assert "low" in [value.name for value in subject.model.graph.inputs]


@pytest.mark.parametrize(
    ("keeps", "notes"), [("m", ()), ("Not(m)", ("`m` hides the tokens that it marks with 1, and keeps those with 0",))]
)
def test_a_mask_that_hides_what_it_marks_is_noted(keeps, notes):
    """Such a mask is fine, and filled by the usual convention it hides the whole text."""
    kept = keeps if keeps == "m" else "unmarked"
    lines = f"causal = LessOrEqual(row, column)\n key = Unsqueeze({kept}, second)\n allowed = And(causal, key)"
    before = "" if keeps == "m" else f"unmarked = {keeps}\n "
    outcome = Inject().apply(Subject.of(read(attention(inputs="bool[b, n] m", allowed=before + lines))))
    assert outcome.notes == notes


def test_an_input_that_meets_the_tokens_is_not_the_same_in_every_call():
    subject = Subject.of(read(attention(inputs="float[b, n] z", after=FACTOR)))
    with pytest.raises(UnsupportedError, match="is as long as the text"):
        Inject(input=("z=fixed",)).apply(subject)
    assert not any(value.metadata_props for value in subject.model.graph.inputs)


def test_a_number_has_no_axis_of_tokens():
    with pytest.raises(UnsupportedError, match="has no axis of tokens"):
        injected(read(attention(inputs="float z", after="logits = Mul(c, z)")), input=("z=total",))


@pytest.mark.parametrize("statement", ["z", "z=old", "y=new"])
def test_statements_name_an_input_and_what_it_is_given_for(statement):
    with pytest.raises(UsageError, match="expected NAME=new"):
        injected(read(attention(inputs="float z", after="logits = Mul(c, z)")), input=(statement,))
