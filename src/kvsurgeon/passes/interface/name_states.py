"""Give the states of a model the names and the shape that a runtime expects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.cache.layout import declared_shape
from kvsurgeon.cache.pairs import find_cache_pairs
from kvsurgeon.cache.states import FixedState, find_states
from kvsurgeon.errors import Code, UnsupportedError, UsageError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class NameStates:
    """Name the states as a runtime expects, with the rows of a conv_state last.

    Before: `past_key_values.{i}.conv_state [batch_size, 1, rows, channels]` and `past_key_values.{i}.recurrent_state`.
    After: `past.{i}.conv [batch_size, channels, rows]` and `past.{i}.recurrent`; the outputs are called `present`
    instead of `past`.

    Not handled: a conv_state of several heads, or of another layout than the default.

    Attributes:
        conv: Names of the inputs that are conv_states, such as past.{layer}.conv.
        recurrent: Names of the inputs that are recurrent_states.
        after_attention: Whether the numbers of states follow those of the attention layers, so that each is unique.
    """

    name: ClassVar[str] = "name-states"

    conv: str = "past.{layer}.conv"
    recurrent: str = "past.{layer}.recurrent"
    after_attention: bool = False

    def __post_init__(self) -> None:
        for template in (self.conv, self.recurrent):
            if "{layer}" not in template or "past" not in template:
                raise UsageError(f"expected a name such as past.{{layer}}.conv, found {template!r}")

    def apply(self, subject: Subject) -> Outcome:
        """Rename the states of `subject.model`.

        Raises:
            UnsupportedError: A conv_state has another layout than the default, or a name is taken.
        """
        graph = subject.model.graph
        states = find_states(graph)
        if not states:
            return Unchanged(reason="the model has no state of a fixed size")
        windows = [state for state in states if state.kind == "conv_state"]
        for state in windows:
            _check_layout(state)
        first = _attention_layers(graph, states) if self.after_attention else 0
        editor = Editor(subject.model)
        _rename(editor, [_with_rows_last(editor, state) for state in windows], self.conv, first)
        _rename(editor, [state for state in states if state.kind == "recurrent_state"], self.recurrent, first)
        editor.finish()
        subject.changed()
        return Changed(edits=editor.edits)


def _attention_layers(graph: ir.Graph, states: Sequence[FixedState]) -> int:
    """Return the number of attention layers, by the numbers in the names of their caches."""
    pasts = {pair.past for pair in find_cache_pairs(graph)} - {state.past for state in states}
    return len({tuple(re.findall(r"\d+", past.name or "")) for past in pasts})


def _has_rows_last(state: FixedState) -> bool:
    return len(state.past.shape or ()) == 3 and state.axis == 2


def _check_layout(state: FixedState) -> None:
    """Check that a conv_state is `[batch_size, 1, rows, channels]`, or has its rows last.

    Raises:
        UnsupportedError: It is not.
    """
    shape = declared_shape(state.past)
    if not _has_rows_last(state) and (len(shape) != 4 or shape[1] != 1 or state.axis != 2):
        raise UnsupportedError(
            "a conv_state has several heads or another layout", code=Code.PASS_PRECONDITION, at=state.past.name,
            expected="[batch_size, 1, rows, channels]", found=str(list(shape)), hint="inject with the default layouts",
        )  # fmt: skip


def _with_rows_last(editor: Editor, state: FixedState) -> FixedState:
    """Return a state `[batch, channels, rows]` in place of one `[batch, 1, rows, channels]`."""
    if _has_rows_last(state):
        return state
    graph, past, present, dtype = editor.graph, state.past, state.present, state.past.dtype
    batch, _, rows, channels = declared_shape(past)
    given = ir.Value(name=past.name, type=past.type, shape=ir.Shape([batch, channels, rows]))
    given.metadata_props.update(past.metadata_props)
    in_attribute = editor.opset < 13
    heads = [] if in_attribute else [editor.constant([1], name="heads_axis")]
    axes = {"axes": [1]} if in_attribute else {}
    swap, swapped = {"perm": [0, 2, 1]}, [batch, rows, channels]
    read = editor.node("Transpose", [given], swap, name=f"{past.name}.rows", dtype=dtype, shape=swapped)
    read = editor.node("Unsqueeze", [read, *heads], axes, name=f"{past.name}.heads", dtype=dtype, shape=past.shape)
    past.replace_all_uses_with(read)
    graph.inputs[graph.inputs.index(past)] = given
    written = editor.node("Squeeze", [present, *heads], axes, name=f"{present.name}.rows", dtype=dtype, shape=swapped)
    written = editor.node("Transpose", [written], swap, name=f"{present.name}.last", dtype=dtype, shape=given.shape)
    return replace(state, past=given, present=editor.replace_output(present, written))


def _rename(editor: Editor, states: Sequence[FixedState], template: str, first: int) -> None:
    """Name inputs and outputs by a template.

    Raises:
        UnsupportedError: Another input or output has one of the names.
    """
    for layer, state in enumerate(states, start=first):
        name = template.format(layer=layer)
        for value, new in ((state.past, name), (state.present, name.replace("past", "present", 1))):
            if new != value.name:
                editor.take_name(new)
            value.name = new
            editor.edits += 1
