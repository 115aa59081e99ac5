"""Element expressions: each element of an index tensor as an expression of its index.

The indices of a `Gather` from a flattened mask are `index0 * length + index3`. Those of a `ScatterND` that writes a
whole mask are the four indices of the element that it writes. The arithmetic is that of the shape rules of the operator
table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import sympy

from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.ops.operator import AxisLinks, Labels, Trait
from kvsurgeon.ops.table import find_links, has_trait, operator_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import LENGTH, Dimension
from kvsurgeon.symbolic.fact import Fact, OperatorCall

Expressions = tuple[Dimension, ...]  # one for each place on the last axis, or a single one for all

_MAX_PLACES = 8  # on the last axis of an index tensor


def index(axis: int) -> sympy.Symbol:
    """Return the index of an element along an axis."""
    return sympy.Symbol(f"index{axis}", integer=True, nonnegative=True)


class ElementExpressions:
    """Expressions of the elements of whole-number tensors, each computed on first use."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self._found: dict[ir.Value, Expressions | None] = {}

    def of(self, value: ir.Value | None) -> Expressions | None:
        """Return the expressions of a value; None if they are not known."""
        if value is None:
            return None
        if value not in self._found:
            self._found[value] = None
            self._found[value] = self._computed(value)
        return self._found[value]

    def count_from_the_front(self, value: ir.Value | None) -> bool:
        """Return whether no element is negative."""
        expressions = self.of(value)
        return expressions is not None and all(dim.is_less(one, 0) is False for one in expressions)

    def address_tokens(self, value: ir.Value | None) -> bool:
        """Return whether indices into `[outer * length]` are `row * length + position`, for any length.

        Row -1 counts back from the end.
        """
        expressions, shape = self.of(value), self.shapes[value].shape if value is not None else None
        if expressions is None or shape is None or len(expressions) != 1 or isinstance(expressions[0], int):
            return False
        rows = expressions[0].coeff(LENGTH, 1)
        rest = dim.subtract(expressions[0], dim.multiply(rows, LENGTH))
        places = [axis for axis, size in enumerate(shape) if size == LENGTH]
        return LENGTH not in rows.free_symbols and (rest == 0 or any(rest == index(axis) for axis in places))

    def copied(self, value: ir.Value) -> ir.Value | None:
        """Return the updates of a `ScatterND` that writes each of them to its own place, so that its result is a copy.

        Return None if it writes them to other places, or if some element of its data remains.
        """
        node = value.producer()
        if node is None or not has_trait(node, Trait.SCATTER) or len(node.inputs) != 3:
            return None
        links = find_links(self.shapes.call(node))
        if links is None or links.addressing != "scatter_nd":
            return None
        if node.attributes.get_string("reduction", "none") != "none":  # the data remains in the result
            return None
        places, updates = node.inputs[1:]
        expressions = self.of(places)
        if updates is None or expressions is None:
            return None
        shape, size_written = self.shapes[value].shape, self.shapes[updates].shape
        if shape is None or shape != size_written or len(expressions) != len(shape):
            return None
        in_place = all(
            expression == index(axis) or (size == 1 and expression == 0)
            for axis, (expression, size) in enumerate(zip(expressions, shape, strict=True))
        )
        return updates if in_place else None

    def _computed(self, value: ir.Value) -> Expressions | None:
        fact, node = self.shapes.facts.get(value), value.producer()
        if fact is None or fact.shape is None or (fact.dtype is not None and fact.dtype.is_floating_point()):
            return None
        if fact.value is not None:
            flat = fact.value.reshape(-1)
            if len(flat) == 1:
                return (_whole(flat[0]),)
            return tuple(map(_whole, flat)) if fact.value.ndim == 1 and len(flat) <= _MAX_PLACES else None
        operator = None if node is None else operator_of(node)
        if node is None or operator is None:
            return None
        call = self.shapes.call(node)
        if operator.extent_inputs and Trait.MOVE in operator.traits:
            start, step = call.numbers(0), call.numbers(2)
            return None if start is None or step is None else (dim.add(start[0], dim.multiply(index(0), step[0])),)
        return self._through(node, call)

    def _through(self, node: ir.Node, call: OperatorCall) -> Expressions | None:
        operator, links = operator_of(node), find_links(call)
        if operator is None or links is None:
            return None
        if links.joined is not None:
            return self._joined(node, call, links.joined)
        if (
            operator.traits & {Trait.IDENTITY, Trait.TRANSPOSE, Trait.RESHAPE, Trait.REPEAT, Trait.SELECT}
            and not links.repeated
        ):
            labels = _row_major_labels(call) if links.row_major else (links.inputs[0] or (), links.outputs[0])
            found = _selected(self.of(node.inputs[0]), links)
            return None if labels is None else _reindexed(found, *labels)
        if Trait.BROADCAST not in operator.traits or not (operator.traits & {Trait.ADD, Trait.SCALE}):
            return None
        operands = [
            None
            if (found := self.of(source)) is None
            else _reindexed(found, links.inputs[place] or (), links.outputs[0])
            for place, source in enumerate(node.inputs)
        ]
        if any(operand is None or len(operand) != 1 for operand in operands):
            return None
        facts = tuple(
            Fact((), fact.dtype, np.array(operand[0], dtype=object))
            for fact, operand in zip(call.inputs, operands, strict=True)
            if fact is not None and operand is not None
        )
        result = operator.shape(OperatorCall(node, facts, call.opset, lambda _bound: None))
        numbers = result.value if isinstance(result, Fact) else None
        return None if numbers is None else (_whole(numbers.item()),)

    def _joined(self, node: ir.Node, call: OperatorCall, axis: object) -> Expressions | None:
        """Return the expressions of single columns that are concatenated on the last axis."""
        shape = call.result.shape or ()
        columns = [self.of(value) for value in node.inputs]
        sizes = [(fact.shape or (None,))[-1] for fact in call.inputs if fact is not None]
        if axis != len(shape) - 1 or any(size != 1 for size in sizes) or len(columns) > _MAX_PLACES:
            return None
        if any(column is None or len(column) != 1 for column in columns):
            return None
        return tuple(column[0] for column in columns if column is not None)


def _whole(number: object) -> Dimension:
    return number if isinstance(number, sympy.Expr) else int(number)  # type: ignore[call-overload]


def _selected(expressions: Expressions | None, links: AxisLinks) -> Expressions | None:
    """Return expressions of the elements that a `Slice` keeps, before their axes are linked."""
    moves: dict[sympy.Symbol, sympy.Expr] = {}
    for label, (start, _, step) in links.selected.items():
        axis = (links.inputs[0] or ()).index(label)
        if not isinstance(start, int) or start < 0 or (expressions is not None and len(expressions) > 1):
            return None
        moves[index(axis)] = index(axis) * step + start
    return None if expressions is None else _replaced(expressions, moves)


def _replaced(expressions: Expressions, moves: Mapping[sympy.Symbol, sympy.Expr]) -> Expressions:
    return tuple(dim.plain(one.xreplace(moves)) if isinstance(one, sympy.Expr) else one for one in expressions)


def _row_major_labels(call: OperatorCall) -> tuple[Labels, Labels] | None:
    """Return labels of the axes before and after a reshape that moves no element to another axis."""
    before, after = call.fact(0).shape, call.result.shape
    if before is None or after is None:
        return None
    places = [[place for place, size in enumerate(shape) if size != 1] for shape in (before, after)]
    if [before[place] for place in places[0]] != [after[place] for place in places[1]]:
        return None
    return _labels(before, places[0]), _labels(after, places[1])


def _labels(shape: Sequence[Dimension], places: Sequence[int]) -> Labels:
    return tuple(places.index(place) if place in places else None for place in range(len(shape)))


def _reindexed(expressions: Expressions | None, before: Labels, after: Labels) -> Expressions | None:
    """Return expressions with the index of each axis replaced by that of the linked axis."""
    if expressions is None:
        return None
    if len(expressions) > 1 and (before[-1] is None or before[-1] != after[-1]):
        return None
    used = {symbol for one in expressions for symbol in getattr(one, "free_symbols", ())}
    moves: dict[sympy.Symbol, sympy.Expr] = {}
    for axis, label in enumerate(before):
        if index(axis) in used:
            if label is None or label not in after:
                return None
            moves[index(axis)] = index(after.index(label))
    return _replaced(expressions, moves)
