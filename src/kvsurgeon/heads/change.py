"""One node on the way from the weights to the heads, as a rule sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import onnx_ir as ir

from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.heads.head_axis import HeadAxis
from kvsurgeon.heads.index_trace import Labels
from kvsurgeon.heads.selection import Selection
from kvsurgeon.rewrite.lengths import LengthValues
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import OperatorCall

Values = tuple[ir.Value, ...]  # the same place in several layers that are made alike; the first gives the structure


class Carries(Protocol):
    """What computes a value anew with other heads."""

    flow: TokenFlow
    labels: Labels
    lengths: LengthValues
    lossy: bool
    region: frozenset[ir.Node]  # the nodes that only the heads that are changed now need

    def carried(self, values: Values, axis: HeadAxis, selection: Selection) -> ir.Value:
        """The value with other heads."""
        ...

    def beside(self, value: ir.Value) -> ir.Value:
        """A value without a head axis, computed anew where it depends on values that have one."""
        ...


@dataclass(frozen=True, kw_only=True)
class Made:
    """What the twin of a node reads, and in what else it differs."""

    inputs: Sequence[ir.Value | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    without: frozenset[str] = frozenset()  # attributes that are left out
    replaced: tuple[int, ...] = ()  # outputs without heads that everybody must read from the twin


@dataclass(frozen=True, kw_only=True)
class Change:
    """One node whose output is to have other heads."""

    carrier: Carries
    nodes: tuple[ir.Node, ...]
    call: OperatorCall
    result: tuple[Dimension, ...]  # shape of the output with the heads
    output: int  # index of that output
    axis: HeadAxis  # of that output
    selection: Selection

    @property
    def node(self) -> ir.Node:
        """The node itself."""
        return self.nodes[0]

    @property
    def inputs(self) -> list[ir.Value | None]:
        """What it reads now."""
        return list(self.node.inputs)

    def given(self, index: int) -> bool:
        """Whether an input is there."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def shape(self, index: int) -> tuple[Dimension, ...]:
        """The shape of an input."""
        shape = self.call.fact(index).shape
        if shape is None:
            raise self.refusal("the rank of a tensor is unknown")
        return shape

    def is_token(self, index: int) -> bool:
        """Whether an input is token data."""
        value = self.node.inputs[index]
        return value is not None and self.carrier.flow.kinds.get(value) is ValueKind.TOKEN

    def is_projected(self, index: int) -> bool:
        """Whether an input is token data that a product with weights made."""
        value = self.node.inputs[index]
        return value is not None and self.is_token(index) and self.carrier.labels.is_projected(value)

    def carried(self, index: int, axis: HeadAxis) -> ir.Value:
        """An input with other heads."""
        values = tuple(value for node in self.nodes if (value := node.inputs[index]) is not None)
        return self.carrier.carried(values, axis, self.selection)

    def beside(self, index: int) -> ir.Value | None:
        """An input that has no heads."""
        value = self.node.inputs[index]
        return None if value is None else self.carrier.beside(value)

    def scaled(self, shape: Sequence[Dimension], axis: HeadAxis) -> list[Dimension]:
        """A shape with the new heads."""
        sizes = list(shape)
        sizes[axis.axis] = axis.sized(self.selection.size)
        return sizes

    @property
    def takes_apart(self) -> bool:
        """Whether others need what is left of the input, as queries do where keys are taken out of one product."""
        first = self.node.inputs[0]
        readers = {user for value in (first, *self.node.outputs) if value is not None for user, _ in value.uses()}
        kinds = self.carrier.flow.kinds
        telling = {user for user in readers if any(kinds.get(value) is ValueKind.TOKEN for value in user.outputs)}
        return self.is_token(0) and not telling <= self.carrier.region

    def check_even(self) -> None:
        """Leave quietly if what is taken over all heads, such as their mean square, stays what it is.

        Raises:
            UnsupportedError: It would change, and the pass is to be exact.
        """
        if not self.selection.is_even and not self.carrier.lossy:
            raise self.refusal("it works on all heads at once, and would see some of them more often than others")

    def refusal(self, reason: str, hint: str | None = None) -> UnsupportedError:
        """An error about this node."""
        return UnsupportedError(f"{self.node.op_type}: {reason}", at=self.node.outputs[0].name, hint=hint)
