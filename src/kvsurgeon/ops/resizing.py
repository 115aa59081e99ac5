"""The interface of rules that compute a node at other lengths; `resizing/context_slices.py` implements it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import Fact, OperatorCall
from kvsurgeon.symbolic.sequence_axes import Axes, Length

TO_THE_END = 2**31 - 1  # the largest end that an int32 can have
WHOLE_NUMBERS = (ir.DataType.INT64, ir.DataType.INT32)


class Numbers(Protocol):
    """Symbolic numbers as values of the graph."""

    @property
    def total(self) -> Dimension:
        """The length that context is computed for."""

    @property
    def past(self) -> Dimension:
        """The number of tokens before the new ones."""

    def at(self, number: Dimension, length: Length) -> Dimension:
        """Return the number with the length of the export read as one of the two."""

    def span(self, length: Length) -> tuple[Dimension, Dimension]:
        """Return where tokens of a length begin and end among all that context is computed for."""

    def scalar(self, number: Dimension) -> ir.Value:
        """Return the number as an int64 scalar."""

    def vector(self, numbers: Sequence[Dimension]) -> ir.Value:
        """Return several numbers as an int64 vector."""

    def typed(self, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """Return the int64 value as another type."""


class Resizer(Protocol):
    """Computes context at the lengths of its axes."""

    editor: Editor
    fixed: bool  # the export fixed a length that context is not computed for

    @property
    def lengths(self) -> Numbers:
        """Numbers as values."""

    def fact(self, value: ir.Value) -> Fact:
        """Return what is known of a value."""

    def slice_of(self, value: ir.Value, axes: Axes = ()) -> ir.Value:
        """Return the value with each of these axes at the length of its variable."""

    def sliced(self, value: ir.Value, axes: Axes) -> ir.Value:
        """Return the value, computed at the total length, cut to the length of each of these axes."""

    def rebuilt(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """Return the output of the same operator with other inputs."""

    def sizes(self, shape: Sequence[Dimension], axes: Axes) -> list[Dimension]:
        """Return dimensions at the lengths of these axes."""


ResizeRule = Callable[[Resizer, ir.Node, OperatorCall, Axes], Any]  # ir.Value, None if the rule does not apply
