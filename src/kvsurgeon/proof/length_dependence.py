"""Length dependence: where the total length enters context as an extent, and where as a value.

As an extent (limit of a `Range`, shape of an `Expand`, end of a `Slice`) it says how many positions there are, and
changes nothing at a position. As a value it is compared, divided by or counted back from. Context that it enters only
as an extent is prefix stable at every length: the element at a position is computed from elements at that position and
from numbers that do not depend on the length. This is decided by the links of the operator table alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.token_flow import Place
from kvsurgeon.dataflow.element_expressions import ElementExpressions
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.query import all_inputs
from kvsurgeon.ops.operator import AxisLinks, Label, Operator, Trait, UntraceableAxesError
from kvsurgeon.ops.table import axis_links, has_trait, operator_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import LENGTH, Dimension
from kvsurgeon.symbolic.fact import OperatorCall
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis, reshape_axes

_TOKENS = LengthVariable(Length.TOTAL)


class _DependsError(Exception):
    """The output of a node depends on the length by value."""

    def __init__(self, cause: ir.Value | None = None) -> None:
        self.cause = cause


class LengthDependence:
    """Decides for each value of context whether it depends on the total length by value.

    Attributes:
        causes: For each value that may depend on it: the value at which the length enters.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.flow = analysis.flow
        self.causes: dict[ir.Value, ir.Value] = {}
        self._same = analysis.same
        self._axes: dict[ir.Value, Axes] = {}  # of each stable value: the axes that have an element for each position
        self._elements = ElementExpressions(self.flow.shapes)
        for given in analysis.inputs:
            self._axes[given.value] = tuple(SequenceAxis(axis, _TOKENS) for axis in given.lengths)
        for node in self.flow.order:
            if any(self.flow.kinds.get(value) is ValueKind.CONTEXT for value in node.outputs):
                self._visit(node)

    def is_stable(self, value: ir.Value, axes: Axes) -> bool:
        """Return whether a value is prefix stable along these sequence axes at every length."""
        if value in self.causes or any(axis.learned_rows for axis in axes):
            return False
        found = {(axis.axis, axis.outer, axis.inner) for axis in self._axes.get(value, ())}
        return found <= {(axis.axis, axis.outer, axis.inner) for axis in axes}

    def unproved(self) -> dict[Place, ir.Value]:
        """Return the inputs at which token data reads context that may depend on the length, each with the cause."""
        flow, found, states = self.flow, {}, self.flow.state_nodes
        for node in flow.order:
            if node in flow.routed_regions or node in states:
                continue  # checked by running them
            if not any(flow.kinds.get(value) is ValueKind.TOKEN for value in node.outputs):
                continue
            for index, value in enumerate(node.inputs):
                place = node, index
                if value is None or flow.kinds.get(value) is not ValueKind.CONTEXT:
                    continue
                if flow.targets.get(node) == index or place in flow.parameters or place in flow.addresses:
                    continue
                if not self.is_stable(value, flow.demands.get(place, ())):
                    found[place] = self.causes.get(value, value)
        return found

    def _visit(self, node: ir.Node) -> None:
        operator, call = operator_of(node), self.flow.shapes.call(node)
        for index, output in enumerate(node.outputs):
            if (first := self._same.get(output)) is not None:
                self._repeat(output, first)
                continue
            fact = self.flow.shapes.facts.get(output)
            try:
                if fact is not None and fact.value is not None:
                    self._require(not _holds_length(fact.value.reshape(-1)))
                    axes: Axes = ()
                else:
                    axes = self._output_axes(node, operator, call, index)
            except _DependsError as error:
                self.causes[output] = error.cause or output
            except UntraceableAxesError:
                self.causes[output] = self._first_cause(all_inputs(node)) or output
            else:
                self._axes[output] = axes

    def _repeat(self, value: ir.Value, first: ir.Value) -> None:
        """Take for a value what was found of an earlier one that is computed alike."""
        if first in self.causes:
            self.causes[value] = self.causes[first]
        else:
            self._axes[value] = self._axes.get(first, ())

    def _output_axes(self, node: ir.Node, operator: Operator | None, call: OperatorCall, index: int) -> Axes:
        """Return the axes of an output that have an element for each position.

        Raises:
            _DependsError: The output depends on the length by value.
        """
        shape = call.results[index].shape if index < len(call.results) else None
        links = None if operator is None else axis_links(call)
        read = self._read_by_value(node, operator, links)
        values = [value for i in read if (value := node.inputs[i]) is not None]
        captured = [value for value in all_inputs(node) if value not in node.inputs]
        if (cause := self._first_cause([*values, *captured])) is not None:
            raise _DependsError(cause)
        if shape is None or any(self._grows(value) for value in captured):
            raise _DependsError
        if links is None:
            self._require(not any(self._grows(value) for value in values))
            self._require((operator is not None and operator.extent_inputs) or not _holds_length(shape))
            return self._introduced(shape, (), uniform=not read)
        if links.row_major:
            return self._reshaped(call, shape)
        return self._linked(node, call, links, index, shape, read)

    def _read_by_value(self, node: ir.Node, operator: Operator | None, links: AxisLinks | None) -> list[int]:
        """Return the inputs of a node whose numbers decide its elements, and not how many there are."""
        others: set[int] = set()
        if operator is not None:
            others |= operator.extent_inputs | operator.type_only
        if links is not None:
            others |= {place for place, _ in links.length_inputs} if links.selected else set()
            others |= set() if links.target is None else {links.target}
            if links.addressing == "rows" and self._elements.address_tokens(node.inputs[1]):
                others.add(1)
        return [index for index in range(len(node.inputs)) if index not in others]

    def _linked(
        self, node: ir.Node, call: OperatorCall, links: AxisLinks, index: int, shape: Sequence[Dimension],
        read: Iterable[int],
    ) -> Axes:  # fmt: skip
        labels = links.outputs[index]
        found: dict[Label, SequenceAxis] = {}
        for place in read:
            source, names = node.inputs[place], links.inputs[place] if place < len(links.inputs) else None
            for axis in self._axes.get(source, ()) if source is not None else ():
                label = None if names is None else names[axis.axis]
                if label is None or label not in labels or (links.addressing == "elements" and label in links.mixed):
                    by_index = place == 1 and not has_trait(node, Trait.SCATTER)  # an element for each index
                    self._require(links.addressing is not None)
                    self._require(by_index or (place == 0 and self._addresses(node.inputs[1], axis)))
                    if place == 0 or label is None:
                        continue
                else:
                    self._check_label(call, links, label, axis, place)
                if _holds_length([shape[labels.index(label)]]):
                    self._require(label not in found or _same_tokens(found[label], axis))
                    found[label] = axis
        self._require(not (links.dynamic_range and found))
        for label, times in links.repeated.items():  # a single element is repeated, or nothing is
            size = (call.fact(0).shape or ())[(links.inputs[0] or ()).index(label)]
            self._require(size == 1 or not _holds_length([times]))
        for label, (start, _, step) in links.selected.items():
            self._require(not _holds_length([start]) and step > 0)
            if label in found:  # a negative start counts from the end
                self._require(isinstance(start, int) and start >= 0)
        kept = tuple(axis.at(labels.index(label)) for label, axis in found.items())
        return self._introduced(shape, kept, uniform=links.target is not None)

    def _check_label(self, call: OperatorCall, links: AxisLinks, label: Label, axis: SequenceAxis, place: int) -> None:
        """Check that a node keeps the element of a position at its position."""
        mixed = {one for one in links.mixed if one not in links.windows or links.windows[one][1] > 0}
        special = label in mixed or label in links.blocked or label in (links.summed or ())
        if label in links.padded:
            before, after = links.padded[label]
            special = _holds_length([before]) or not (isinstance(after, int) and after <= 0)
        self._require(not special)
        if label == links.joined:  # no element may follow the tokens
            later = [i for i, names in enumerate(links.inputs) if names is not None and i > place]
            self._require(not later)
            sizes = [(call.fact(i).shape or ())[axis.axis] for i, names in enumerate(links.inputs) if names is not None]
            self._require(not _holds_length(sizes[:-1]))
        self._require(links.repeated.get(label, 1) == 1)
        if label in (links.diagonal or ()):
            given = call.numbers(1) if call.given(1) is not None else (0,)
            self._require(given is not None and not _holds_length(given))
        acts = label in links.selected or label == links.joined or label in (links.diagonal or ()) or links.addressing
        self._require(axis.is_plain or not acts)

    def _reshaped(self, call: OperatorCall, shape: Sequence[Dimension]) -> Axes:
        before, source = call.fact(0).shape, call.node.inputs[0]
        axes = self._axes.get(source, ()) if source is not None else ()
        result = None if before is None else reshape_axes(axes, tuple(before), tuple(shape), LENGTH)
        if result is None:
            raise _DependsError
        grown = {axis.axis for axis in result}
        self._require(all(place in grown or not _holds_length([size]) for place, size in enumerate(shape)))
        return result

    def _introduced(self, shape: Sequence[Dimension], kept: Axes, *, uniform: bool) -> Axes:
        """Return the axes with those that an extent adds to the result, along which elements may be uniform."""
        places, added = {axis.axis for axis in kept}, []
        for place, size in enumerate(shape):
            if place not in places and _holds_length([size]):
                most = dim.bound_below(size, LENGTH) if uniform else None
                plain = isinstance(dim.subtract(size, LENGTH), int) or most is not None
                outer = 1 if plain or not uniform else dim.exact_quotient(size, LENGTH)
                self._require(outer is not None and (plain or uniform))
                added.append(SequenceAxis(place, _TOKENS, outer=1 if outer is None else outer, most=most))
        return tuple(sorted((*kept, *added), key=lambda axis: axis.axis))

    def _addresses(self, indices: ir.Value | None, axis: SequenceAxis) -> bool:
        """Return whether indices into a growing axis are the same positions at every length."""
        if axis.is_plain and indices not in self.causes and self._elements.count_from_the_front(indices):
            return True
        return axis.inner == 1 and self._elements.address_tokens(indices)

    def _first_cause(self, values: Iterable[ir.Value]) -> ir.Value | None:
        return next((self.causes[value] for value in values if value in self.causes), None)

    def _grows(self, value: ir.Value | None) -> bool:
        return value is not None and bool(self._axes.get(value))

    @staticmethod
    def _require(condition: object) -> None:
        if not condition:
            raise _DependsError


def _same_tokens(one: SequenceAxis, other: SequenceAxis) -> bool:
    return bool(dim.is_equal(one.outer, other.outer) and dim.is_equal(one.inner, other.inner))


def _holds_length(numbers: Iterable[Dimension]) -> bool:
    """Return whether a number depends on the length, or is not known."""
    return any(
        LENGTH in getattr(number, "free_symbols", ()) or not dim.is_known(number)
        for number in numbers
        if not isinstance(number, (int, float, bool, np.generic))
    )
