"""Recurrent states of a model that has a cache: inputs of fixed size, each with the output that feeds it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError

_NUMBER = "kvsurgeon.recurrent_state"  # metadata of the input and of the output, with the number of the state


@dataclass(frozen=True, kw_only=True)
class RecurrentPair:
    """An input that is a recurrent state, and the output that feeds it in the next call.

    Attributes:
        past: The input.
        present: The output.
    """

    past: ir.Value
    present: ir.Value


def mark_recurrent_state(past: ir.Value, present: ir.Value, number: int) -> None:
    """Mark an input and an output as a recurrent state: no operator appends to it, so nothing else shows the pair."""
    for value in (past, present):
        value.metadata_props[_NUMBER] = str(number)


def find_recurrent_states(graph: ir.Graph) -> tuple[RecurrentPair, ...]:
    """Return the recurrent states, in the order of the graph inputs.

    Raises:
        UnsupportedError: An input is marked as a state, and no output is.
    """
    presents = _marked(graph.outputs)
    for number, past in _marked(graph.inputs).items():
        if number not in presents:
            raise UnsupportedError(
                "no output returns the recurrent state", code=Code.UNKNOWN_CACHE, at=past.name,
                expected="an output with the same metadata", hint="use the model without a cache",
            )  # fmt: skip
    return tuple(RecurrentPair(past=past, present=presents[number]) for number, past in _marked(graph.inputs).items())


def _marked(values: Iterable[ir.Value]) -> dict[str, ir.Value]:
    return {value.metadata_props[_NUMBER]: value for value in values if _NUMBER in value.metadata_props}
