"""Lengths as values of the graph: the numbers that a decoder with a cache computes with.

The query length S is the size of an axis of the token input. The past length P is the size of the sequence axis of a
cache input, or a number that an input gives. Context is computed for the total length: T = P + S, or the capacity of
the cache if that is larger.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import sympy

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, NEW, PAST, TOTAL, Dimension
from kvsurgeon.symbolic.sequence_axes import Length

INT64 = ir.DataType.INT64

# Source of a length at run time: the size of an axis of a value, or the value itself if the axis is None.
LengthSource: TypeAlias = tuple[ir.Value, int | None]


def sources_of(dimensions: Mapping[ir.Value, Sequence[Dimension]]) -> dict[sympy.Symbol, LengthSource]:
    """Return the first value and axis of each symbolic dimension."""
    sources: dict[sympy.Symbol, LengthSource] = {}
    for value, sizes in dimensions.items():
        for axis, size in enumerate(sizes):
            if not isinstance(size, int):
                sources.setdefault(size, (value, axis))
    return sources


class LengthValues:
    """Symbolic numbers as values of the graph, each added once.

    Attributes:
        editor: The editor of the graph.
        sources: Source of each symbol.
        total: Length for which context is computed: that of past and new tokens, or the capacity of the cache.
        past: Number of tokens before the new ones.
        rows: Length of the inputs of context.
        limit: Largest such length that the model supports, if there is one.
    """

    def __init__(
        self,
        editor: Editor,
        sources: Mapping[sympy.Symbol, LengthSource],
        *,
        total: Dimension = TOTAL,
        past: Dimension = PAST,
        limit: int | None = None,
    ) -> None:
        self.editor = editor
        self.sources = sources
        self.total = total
        self.past = past
        self.rows = total
        self.limit = limit
        self._made: dict[Hashable, ir.Value] = {}
        self._shapes: dict[ir.Value, ir.Value] = {}  # by the value whose shape it is

    def so_far(self) -> LengthValues:
        """Return the lengths for context of the tokens so far alone, without unfilled rows of the cache."""
        if self.total == TOTAL:
            return self
        lengths = self._others(self.sources, limit=self.limit)
        lengths.rows = self.rows
        return lengths

    def of_new(self) -> LengthValues:
        """Return the lengths of the new tokens alone, as if they were the whole text."""
        return self._others(self.sources, total=NEW, past=0)

    def after(self, rows: sympy.Symbol, source: LengthSource) -> LengthValues:
        """Return the lengths of a number of rows and the new tokens after them."""
        return self._others({**self.sources, rows: source}, total=dim.add(rows, NEW), past=rows)

    def _others(self, sources: Mapping[sympy.Symbol, LengthSource], **lengths: Any) -> LengthValues:
        """Return other lengths, which read the same shapes."""
        others = LengthValues(self.editor, sources, **lengths)
        others._shapes = self._shapes
        return others

    def once(self, key: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        """Return the value of a key, added to the graph on first use."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def at(self, number: Dimension, length: Length) -> Dimension:
        """Return a number of the export, with its one length replaced by one of the two."""
        return dim.substitute(number, ((LENGTH, NEW if length is Length.NEW else self.total),))

    def span(self, length: Length) -> tuple[Dimension, Dimension]:
        """Return the first index and the end of the tokens of a length in the context."""
        return (self.past, dim.add(self.past, NEW)) if length is Length.NEW else (0, self.total)

    def scalar(self, number: Dimension) -> ir.Value:
        """Return a number as an int64 scalar."""
        return self._value(number, flat=False)

    def flat(self, number: Dimension) -> ir.Value:
        """Return a number as an int64 tensor of shape [1]."""
        return self._value(number, flat=True)

    def vector(self, numbers: Sequence[Dimension]) -> ir.Value:
        """Return numbers as an int64 vector."""
        _check_int64(numbers)
        if all(isinstance(number, int) for number in numbers):
            return self.editor.constant(list(numbers), name="shape")
        if len(numbers) == 1:
            return self.flat(numbers[0])
        return self.once(("vector", *numbers), lambda: self._concatenated(numbers))

    def _concatenated(self, numbers: Sequence[Dimension]) -> ir.Value:
        """Concatenate numbers, with adjacent constants as one."""
        pieces: list[ir.Value] = []
        constants: list[int] = []
        for number in [*numbers, None]:
            if isinstance(number, int):
                constants.append(number)
                continue
            if constants:
                pieces.append(self.editor.constant(constants, name="shape"))
                constants = []
            if number is not None:
                pieces.append(self.flat(number))
        return self.editor.node("Concat", pieces, {"axis": 0}, name="shape", dtype=INT64, shape=[len(numbers)])

    def array(self, numbers: np.ndarray) -> ir.Value:
        """Return an array of numbers as an int64 tensor."""
        _check_int64(numbers.reshape(-1))
        if all(isinstance(number, (int, bool)) for number in numbers.reshape(-1)):
            return self.editor.constant(numbers.astype(np.int64), name="numbers")
        if numbers.ndim == 0:
            return self.scalar(numbers.item())
        flat = self.vector(list(numbers.reshape(-1)))
        if numbers.ndim == 1:
            return flat
        target = self.editor.constant(list(numbers.shape), name="shape")
        return self.editor.node("Reshape", [flat, target], name="numbers", dtype=INT64, shape=numbers.shape)

    def reshape_target(self, after: Sequence[Dimension], before: Sequence[Dimension] = ()) -> ir.Value:
        """Return the target of a `Reshape`, with as few computed numbers as possible.

        Args:
            after: Shape of the result.
            before: Shape of the operand, whose dimensions the target copies if they stay in place; empty if unknown.
        """
        numbers: list[Dimension] = []
        for place, size in enumerate(after):
            is_copied = not isinstance(size, int) and place < len(before) and before[place] == size
            numbers.append(0 if is_copied else size)
        dynamic = [place for place, size in enumerate(numbers) if not isinstance(size, int)]
        if dynamic:
            numbers[max(dynamic, key=lambda place: after[place] is not BATCH)] = -1
        return self.vector(numbers)

    def expand_target(self, after: Sequence[Dimension], kept: Sequence[bool]) -> ir.Value:
        """Return the target of an `Expand` to a shape; `kept` are the axes that the operand has in this size."""
        return self.vector([1 if same else size for same, size in zip(kept, after, strict=True)])

    def repeated(self, number: Dimension, times: Dimension) -> ir.Value:
        """Return a number repeated so many times, as an int64 vector."""
        if times == 1:
            return self.flat(number)
        return self.once(
            ("repeated", number, times),
            lambda: self.editor.node("Expand", [self.flat(number), self.flat(times)], name="rows", dtype=INT64),
        )

    def indices(self, start: Dimension, sizes: Sequence[Dimension], axis: int) -> ir.Value:
        """Return indices that count up from a start along an axis, as an int64 tensor of these sizes."""

        def make() -> ir.Value:
            ends = [self.scalar(start), self.scalar(dim.add(start, sizes[axis])), self.scalar(1)]
            row = self.editor.node("Range", ends, name="rows", dtype=INT64)
            column = self.vector([-1 if place == axis else 1 for place in range(len(sizes))])
            row = self.editor.node("Reshape", [row, column], name="rows.column", dtype=INT64)
            target = self.vector([1 if place == axis else size for place, size in enumerate(sizes)])
            return self.editor.node("Expand", [row, target], name="rows.places", dtype=INT64)

        return self.once(("indices", start, tuple(sizes), axis), make)

    def typed(self, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """Return an int64 value as another type."""
        if dtype is None or dtype is INT64:
            return value
        name = f"{value.name}.{dtype.name.lower()}"
        return self.once(
            ("typed", value, dtype),
            lambda: self.editor.node("Cast", [value], {"to": int(dtype)}, name=name, dtype=dtype),
        )

    def _value(self, number: Dimension, *, flat: bool) -> ir.Value:
        _check_int64([number])
        return self.once(("number", number, flat), lambda: self._computed(number, flat))

    def _computed(self, number: Dimension, flat: bool) -> ir.Value:
        if isinstance(number, int):
            return self.editor.constant([number] if flat else number, name="number")
        value = self._expression(number, flat)
        return value if self.limit is None or number != self.total else self._checked(value, self.limit, flat)

    def _expression(self, number: sympy.Expr, flat: bool) -> ir.Value:
        if number.is_Symbol:
            return self._read(number, flat)
        if number.is_Add:
            return self._fold("Add", number.as_ordered_terms(), flat)
        if number.is_Mul:
            return self._fold("Mul", number.as_ordered_factors(), flat)
        if number.is_Pow and number.exp.is_Integer and number.exp > 0:
            return self._fold("Mul", [number.base] * int(number.exp), flat)
        if isinstance(number, (sympy.Min, sympy.Max)):
            return self._fold("Min" if isinstance(number, sympy.Min) else "Max", number.args, flat)
        if isinstance(number, sympy.floor):
            dividend, divisor = (dim.plain(part) for part in sympy.fraction(sympy.together(number.args[0])))
            if isinstance(divisor, int) and not isinstance(dividend, int) and dividend.is_nonnegative:
                operands = [self._value(dividend, flat=flat), self._value(divisor, flat=flat)]
                return self._node("Div", operands, name="length", flat=flat)
        raise UnsupportedError(
            "a length is no integer expression", code=Code.UNTRACEABLE_SEQUENCE, found=str(number)
        )  # fmt: skip

    def _fold(self, operator: str, expressions: Sequence[sympy.Expr], flat: bool) -> ir.Value:
        terms = [dim.plain(expression) for expression in expressions]
        first, *others = sorted(terms, key=lambda term: (isinstance(term, int), str(term)))
        name = "total_length" if set(terms) == {PAST, NEW} else "length"
        result = self._value(first, flat=flat)
        for term in others:
            result = self._node(operator, [result, self._value(term, flat=flat)], name=name, flat=flat)
        return result

    def _checked(self, total: ir.Value, limit: int, flat: bool) -> ir.Value:
        """Return the total length; beyond the limit the run ends with an error: a table of one row is read at row 1.

        onnxruntime's message contains the name of the node, which therefore says what happened.
        """
        bound = self.editor.constant([limit] if flat else limit, name="max_length")
        beyond = self._node("Greater", [total, bound], name="beyond_limit", flat=flat, dtype=ir.DataType.BOOL)
        row = self._node("Cast", [beyond], {"to": int(INT64)}, name="beyond_limit_row", flat=flat)
        table = self.editor.constant([0], name="row_within_limit")
        zero = ir.Value(name=self.editor.unique_name("within_limit"), type=ir.TensorType(INT64), shape=total.shape)
        message = self.editor.unique_name(f"total_length_exceeds_the_maximum_of_{limit}_tokens")
        self.editor.operator("", "Gather", [table, row], {"axis": 0}, [zero], name=message)
        return self._node("Add", [total, zero], name="total_length_within_limit", flat=flat)

    def _read(self, symbol: sympy.Symbol, flat: bool) -> ir.Value:
        if symbol not in self.sources:
            is_past = symbol is PAST
            raise UnsupportedError(
                "no input gives a length", code=Code.UNTRACEABLE_SEQUENCE, found=str(symbol),
                expected="one number for all sequences of a batch" if is_past else None,
                hint="use past-length=input" if is_past else None,
            )  # fmt: skip
        value, axis = self.sources[symbol]
        if axis is None:
            return self._given(value, flat)
        rank = [len(value.shape)] if value.shape is not None else [None]
        if value not in self._shapes:
            self._shapes[value] = self.editor.node(
                "Shape", [value], name=f"{value.name}_shape", dtype=INT64, shape=rank
            )
        index = self.editor.constant([axis] if flat else axis, name="axis")
        name = {PAST: "past_length", NEW: "new_length"}.get(symbol, "length")
        return self._node("Gather", [self._shapes[value], index], {"axis": 0}, name=name, flat=flat)

    def _given(self, value: ir.Value, flat: bool) -> ir.Value:
        """Return a number of any type and rank as int64."""
        number = value
        if value.dtype is not INT64:
            number = self.editor.node("Cast", [value], {"to": int(INT64)}, name=f"{value.name}.int64", dtype=INT64)
        shape = [1] if flat else []
        if value.shape is not None and list(value.shape) == shape:
            return number
        target = self.editor.constant(shape, name="shape")
        return self._node("Reshape", [number, target], name="past_length", flat=flat)

    def _node(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, Any] | None = None,
        *,
        name: str,
        flat: bool,
        dtype: ir.DataType = INT64,
    ) -> ir.Value:
        """Add a node that computes a number, of shape [1] or a scalar."""
        return self.editor.node(operator, inputs, attributes, name=name, dtype=dtype, shape=[1] if flat else [])


def _check_int64(numbers: Iterable[Dimension]) -> None:
    """Check that int64 holds numbers at every length: beyond, the model would compute with others.

    Raises:
        UnsupportedError: It does not.
    """
    wrong = [number for number in numbers if not dim.is_within(number, int(INT64.min), int(INT64.max))]
    if wrong:
        raise UnsupportedError(
            "a number that is computed from a length does not fit int64", code=Code.UNTRACEABLE_SEQUENCE,
            found=str(wrong[0]),
        )  # fmt: skip
