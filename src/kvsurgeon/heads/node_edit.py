"""One node between the weights and the heads, whose output is to have other heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.heads.head_axis import HeadAxis
from kvsurgeon.heads.selection import Selection
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import OperatorCall

if TYPE_CHECKING:
    from kvsurgeon.heads.propagate import HeadPropagation

Values = tuple[
    ir.Value, ...
]  # one value of each of several layers that are computed alike; the first gives the structure


@dataclass(frozen=True, kw_only=True)
class NodeInputs:
    """Inputs of the copy of a node, and its other differences.

    Attributes:
        inputs: Its inputs.
        attributes: Attributes with another value.
        without: Attributes that are removed.
        replaced: Outputs without heads that all nodes must read from the copy.
    """

    inputs: Sequence[ir.Value | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    replaced: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NodeEdit:
    """A node whose output is to have other heads.

    Attributes:
        propagation: The propagation that asks for it.
        nodes: The node, and those of other layers that are averaged with it.
        call: Facts of its inputs.
        result: Shape of the output with the heads.
        output: Index of that output.
        axis: Head axis of that output.
        selection: The heads that it is to have.
    """

    propagation: HeadPropagation
    nodes: tuple[ir.Node, ...]
    call: OperatorCall
    result: tuple[Dimension, ...]
    output: int
    axis: HeadAxis
    selection: Selection

    @property
    def node(self) -> ir.Node:
        """The node of the first layer."""
        return self.nodes[0]

    @property
    def inputs(self) -> list[ir.Value | None]:
        """Its inputs."""
        return list(self.node.inputs)

    def given(self, index: int) -> bool:
        """Return whether an input is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def shape(self, index: int) -> tuple[Dimension, ...]:
        """Return the shape of an input."""
        shape = self.call.fact(index).shape
        if shape is None:
            raise self.refusal("the rank of an input is unknown")
        return shape

    def is_token(self, index: int) -> bool:
        """Return whether an input is token data."""
        value = self.node.inputs[index]
        return value is not None and self.propagation.flow.kinds.get(value) is ValueKind.TOKEN

    def is_projected(self, index: int) -> bool:
        """Return whether an input is token data that a projection computes."""
        value = self.node.inputs[index]
        return value is not None and self.is_token(index) and self.propagation.trace.is_projected(value)

    def propagated(self, index: int, axis: HeadAxis) -> ir.Value:
        """Return an input with other heads."""
        values = tuple(value for node in self.nodes if (value := node.inputs[index]) is not None)
        return self.propagation.propagated(values, axis, self.selection)

    def without_heads(self, index: int) -> ir.Value | None:
        """Return an input that has no head axis."""
        value = self.node.inputs[index]
        return None if value is None else self.propagation.without_heads(value)

    def scaled(self, shape: Sequence[Dimension], axis: HeadAxis) -> list[Dimension]:
        """Return a shape with the new number of heads."""
        sizes = list(shape)
        sizes[axis.axis] = axis.sized(self.selection.size)
        return sizes

    @property
    def separates_projection(self) -> bool:
        """Whether other nodes need the rest of input 0, as queries do if keys are selected from a fused projection."""
        first = self.node.inputs[0]
        readers = {user for value in (first, *self.node.outputs) if value is not None for user, _ in value.uses()}
        kinds = self.propagation.flow.kinds
        token_readers = {user for user in readers if any(kinds.get(value) is ValueKind.TOKEN for value in user.outputs)}
        return self.is_token(0) and not token_readers <= self.propagation.region

    def check_even(self) -> None:
        """Check that a value over all heads, such as their mean square, does not change.

        Raises:
            UnsupportedError: It would change, and the pass must be exact.
        """
        if not self.selection.is_even and not self.propagation.lossy:
            raise self.refusal("it mixes all heads, and they would not be repeated equally often")

    def refusal(self, reason: str, hint: str | None = None) -> UnsupportedError:
        """Return an error about this node."""
        return UnsupportedError(
            f"{self.node.op_type}: {reason}", at=self.node.outputs[0].name, hint=hint, code=Code.UNTRACEABLE_HEADS
        )
