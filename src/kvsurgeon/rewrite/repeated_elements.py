"""Repeated elements: which dimensions of token data hold copies, as of heads that were repeated before a rotation.

An operator that computes each index along an axis alone gives equal results for equal operands. So what is computed
from copies are copies, as long as no other operand differs between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.ops.operator import AxisLinks, Label, Trait
from kvsurgeon.ops.table import find_links, has_trait
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import OperatorCall

Part = tuple[Dimension, bool]  # a dimension, and whether all its elements are equal
Parts = tuple[tuple[Part, ...], ...]  # the dimensions on each axis, outermost first

_TRACED = (
    Trait.RESHAPE, Trait.TRANSPOSE, Trait.REPEAT, Trait.IDENTITY, Trait.ELEMENTWISE, Trait.BROADCAST, Trait.SELECT,
    Trait.QUANTIZATION, Trait.MOVE,
)  # fmt: skip


class RepeatedElements:
    """The dimensions of token data, and which of them hold copies."""

    def __init__(self, flow: TokenFlow) -> None:
        self.flow = flow
        self._found: dict[ir.Value, Parts] = {}

    def of(self, value: ir.Value) -> Parts:
        """Return the dimensions of a value whose shape is known."""
        if value not in self._found:
            self._found[value] = _plain(self.flow.shapes[value].shape or ())
            node = value.producer()
            if node is not None and is_token(self.flow, value) and has_trait(node, *_TRACED):
                self._found[value] = self._computed(node, value)
        return self._found[value]

    def _computed(self, node: ir.Node, value: ir.Value) -> Parts:
        call, shape = self.flow.shapes.call(node), self.flow.shapes[value].shape
        plain = _plain(shape or ())
        links = find_links(call)
        if links is None or shape is None or links.addressing is not None or not _are_single(links, node, call):
            return plain
        if links.row_major:
            source = node.inputs[0]
            parts = () if source is None else self.of(source)
            found = dim.distribute(((part, part[0]) for axis in parts for part in axis), shape)
            return plain if found is None else tuple(tuple(axis) or ((1, False),) for axis in found)
        mixed = {links.joined, *links.mixed, *links.blocked, *links.selected, *links.padded, *(links.diagonal or ())}
        labels = links.outputs[value.index() or 0]
        return tuple(
            (one,) if label is None or label in mixed else self._along(node, call, links, label, one[0])
            for label, (one,) in zip(labels, plain, strict=True)
        )

    def _along(
        self, node: ir.Node, call: OperatorCall, links: AxisLinks, label: Label, size: Dimension
    ) -> tuple[Part, ...]:
        """Return the dimensions on the axis of a label in an output."""
        found: set[tuple[Part, ...]] = set()
        for index, places in enumerate(links.inputs):
            source, shape = node.inputs[index], call.fact(index).shape
            if places is None or label not in places or source is None:
                continue
            if shape is None:
                return ((size, False),)
            axis = places.index(label)
            if shape[axis] != 1 or size == 1:
                found.add(self.of(source)[axis])
        times = links.repeated.get(label, 1)
        if not found and isinstance(size, int):
            return ((size, True),)
        if len(found) != 1 or not isinstance(times, int):
            return ((size, False),)
        return (*(((times, True),) if times != 1 else ()), *found.pop())


def _plain(shape: Sequence[Dimension]) -> Parts:
    return tuple(((size, False),) for size in shape)


def _are_single(links: AxisLinks, node: ir.Node, call: OperatorCall) -> bool:
    """Return whether inputs that correspond to no axis are single numbers, or say which elements and how many."""
    if has_trait(node, Trait.PARAMETERIZED):
        return True
    given = [call.given(index) for index, places in enumerate(links.inputs) if places is None]
    shapes = [fact.shape for fact in given if fact is not None]
    return all(shape is not None and dim.product(shape) == 1 for shape in shapes)
