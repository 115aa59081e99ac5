"""States of a fixed size in a model that has a cache: inputs that are zeros in a first call, and their outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from kvsurgeon.cache.pairs import LAST_ROWS, find_cache_pairs
from kvsurgeon.errors import Code, UnsupportedError

_NUMBER = "kvsurgeon.recurrent_state"  # metadata of the input and of the output, with the number of the state


@dataclass(frozen=True, kw_only=True)
class FixedState:
    """An input that is a state of fixed size, and the output that feeds it in the next call.

    Attributes:
        kind: Whether it holds the last rows of a window, or what a recurrence passes on.
        past: The input.
        present: The output.
        axis: Axis of the rows; None for a recurrent state.
    """

    kind: Literal["conv_state", "recurrent_state"]
    past: ir.Value
    present: ir.Value
    axis: int | None = None


def find_states(graph: ir.Graph) -> tuple[FixedState, ...]:
    """Return the conv_states, and then the recurrent states, each in the order of the graph inputs.

    Raises:
        UnsupportedError: An input is marked as a recurrent state, and no output is.
    """
    is_marked = any(LAST_ROWS in value.metadata_props for value in graph.inputs)
    windows = (pair for pair in find_cache_pairs(graph) if pair.cache_mode == "last-rows") if is_marked else ()
    found = (FixedState(kind="conv_state", past=one.past, present=one.present, axis=one.axis) for one in windows)
    return (*found, *find_recurrent_states(graph))


def find_recurrent_states(graph: ir.Graph) -> tuple[FixedState, ...]:
    """Return the recurrent states, in the order of the graph inputs.

    Raises:
        UnsupportedError: An input is marked as a state, and no output is.
    """
    pasts, presents = _marked(graph.inputs), _marked(graph.outputs)
    for number, past in pasts.items():
        if number not in presents:
            raise UnsupportedError(
                "no output returns the recurrent state", code=Code.UNKNOWN_CACHE, at=past.name,
                expected="an output with the same metadata", hint="use the model without a cache",
            )  # fmt: skip
    return tuple(
        FixedState(kind="recurrent_state", past=past, present=presents[number]) for number, past in pasts.items()
    )


def mark_recurrent_state(past: ir.Value, present: ir.Value, number: int) -> None:
    """Mark an input and an output as a recurrent state: no operator appends to it, so nothing else shows the pair."""
    for value in (past, present):
        value.metadata_props[_NUMBER] = str(number)


def _marked(values: Iterable[ir.Value]) -> dict[str, ir.Value]:
    return {value.metadata_props[_NUMBER]: value for value in values if _NUMBER in value.metadata_props}
