"""Impossible option values are usage errors, which are raised before the model is read."""

from __future__ import annotations

import pytest
from attentions import of_six_tokens
from written import read

from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.passes.contract import Subject, Unchanged
from kvsurgeon.passes.interface.rename_dims import RenameDims
from kvsurgeon.passes.interface.rename_io import RenameIo
from kvsurgeon.workflow.pipeline import Pipeline

TEXT = "case (float[batch, length] x, float[batch, length] other) => (float[batch, length] y) { y = Add(x, other) }"


@pytest.mark.parametrize(
    "row",
    [
        "inject{cache=static,max-length=0}",
        "inject{cache=static,max-length=-5}",
        "retarget{cache=static,max-length=99999999999999999999}",
        "host-inputs{max-length=0}",
        "raise-opset{opset=-1}",
        "raise-opset{opset=9999}",
        "lower-opset{opset=0}",
        "fix-shapes{tokens=0}",
        "fix-shapes{tokens=4,max-length=3}",
        "float16-mask-range{minimum=nan}",
        "float16-mask-range{minimum=5}",
        "float16-mask-range{minimum=-65520}",
        "rename-dims{dims=batch=0}",
        "rename-dims{dims=batch=-1}",
        "rename-dims{dims=batch=length}",
        'rename-dims{dims="batch=n,length=n"}',
        "rename-io{names=x:a,x:b}",
        "rename-io{names=x:a,y:a}",
    ],
)
def test_invalid_numbers_and_names_are_usage_errors(row):
    with pytest.raises(UsageError, match="expected"):
        Pipeline.parse(row).run(read(TEXT))


def test_the_capacity_is_at_least_the_fixed_length():
    with pytest.raises(UnsupportedError, match="expected max-length 6, found 5"):
        Pipeline.parse("inject{cache=static,max-length=5}").run(of_six_tokens())
    assert Pipeline.parse("inject{cache=static,max-length=6}").run(of_six_tokens()).changed


def test_dimensions_can_swap_names():
    subject = Subject.of(read(TEXT))
    RenameDims(dims=("batch=length", "length=batch")).apply(subject)
    assert [size.value for size in subject.model.graph.inputs[0].shape] == ["length", "batch"]


def test_renaming_to_the_same_name_is_unchanged():
    outcome = RenameIo(names=("x:x",)).apply(Subject.of(read(TEXT)))
    assert outcome == Unchanged(reason="old and new names are equal")
