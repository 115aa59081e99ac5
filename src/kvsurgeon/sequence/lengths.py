"""Lengths in the graph itself: the numbers that a decoder with a cache computes with.

The new length S is read from the token input, the past length P from the cache, and T = P + S.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import sympy

from kvsurgeon.errors import Refused
from kvsurgeon.graph.editor import Editor
from kvsurgeon.sequence.axes import Length
from kvsurgeon.shapes import dimension as dim
from kvsurgeon.shapes.dimension import LENGTH, Dimension

PAST = dim.symbol("past_sequence_length")
NEW = dim.symbol("sequence_length")

INT64 = ir.DataType.INT64


class Lengths:
    """Turns symbolic numbers into values of the graph, each made once."""

    def __init__(
        self, editor: Editor, sources: dict[sympy.Symbol, tuple[ir.Value, int]], limit: int | None = None
    ) -> None:
        """Take where each symbol can be read: a value and the axis of it; and the largest total length allowed."""
        self.editor = editor
        self.limit = limit
        self.sources = sources
        self._made: dict[tuple[Dimension, bool], ir.Value] = {}
        self._shapes: dict[ir.Value, ir.Value] = {}
        self._vectors: dict[tuple[Dimension, ...], ir.Value] = {}
        self._typed: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    @staticmethod
    def at(number: Dimension, length: Length) -> Dimension:
        """The number with the one length of the export read as one of the two."""
        meant = NEW if length is Length.NEW else dim.add(PAST, NEW)
        return dim.substitute(number, ((LENGTH, meant),))

    def scalar(self, number: Dimension) -> ir.Value:
        """The number as an int64 scalar."""
        return self._value(number, flat=False)

    def flat(self, number: Dimension) -> ir.Value:
        """The number as an int64 tensor of one element."""
        return self._value(number, flat=True)

    def vector(self, numbers: Sequence[Dimension]) -> ir.Value:
        """Several numbers as an int64 vector."""
        if all(isinstance(number, int) for number in numbers):
            return self.editor.constant(list(numbers), wish="shape")
        if len(numbers) == 1:
            return self.flat(numbers[0])
        if (key := tuple(numbers)) not in self._vectors:
            self._vectors[key] = self._joined(numbers)
        return self._vectors[key]

    def _joined(self, numbers: Sequence[Dimension]) -> ir.Value:
        pieces: list[ir.Value] = []
        run: list[int] = []
        for number in [*numbers, None]:
            if isinstance(number, int):
                run.append(number)
                continue
            if run:
                pieces.append(self.editor.constant(run, wish="shape"))
                run = []
            if number is not None:
                pieces.append(self.flat(number))
        return self.editor.node("Concat", pieces, {"axis": 0}, wish="shape", dtype=INT64, shape=[len(numbers)])

    def array(self, numbers: np.ndarray) -> ir.Value:
        """Numbers of any rank up to one, or constants of any rank."""
        if all(isinstance(number, (int, bool)) for number in numbers.reshape(-1)):
            return self.editor.constant(numbers.astype(np.int64), wish="numbers")
        if numbers.ndim == 0:
            return self.scalar(numbers.item())
        flat = self.vector(list(numbers.reshape(-1)))
        if numbers.ndim == 1:
            return flat
        target = self.editor.constant(list(numbers.shape), wish="shape")
        return self.editor.node("Reshape", [flat, target], wish="numbers", dtype=INT64, shape=numbers.shape)

    def typed(self, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """The int64 value as another type."""
        if dtype is None or dtype is INT64:
            return value
        key = (value, dtype)
        if key not in self._typed:
            wish = f"{value.name}.{dtype.name.lower()}"
            self._typed[key] = self.editor.node("Cast", [value], {"to": int(dtype)}, wish=wish, dtype=dtype)
        return self._typed[key]

    def _value(self, number: Dimension, *, flat: bool) -> ir.Value:
        key = (number, flat)
        if key not in self._made:
            self._made[key] = self._make(number, flat)
        return self._made[key]

    def _make(self, number: Dimension, flat: bool) -> ir.Value:
        if isinstance(number, int):
            return self.editor.constant([number] if flat else number, wish="number")
        if number.is_Symbol:
            return self._read(number, flat)
        if number == dim.add(PAST, NEW) and self.limit is not None:
            return self._guarded(self._fold("Add", [PAST, NEW], flat), flat)
        if number.is_Add:
            return self._fold("Add", [dim.plain(term) for term in number.as_ordered_terms()], flat)
        if number.is_Mul:
            return self._fold("Mul", [dim.plain(factor) for factor in number.as_ordered_factors()], flat)
        if number.is_Pow and number.exp.is_Integer and number.exp > 0:
            return self._fold("Mul", [dim.plain(number.base)] * int(number.exp), flat)
        if isinstance(number, (sympy.Min, sympy.Max)):
            operator = "Min" if isinstance(number, sympy.Min) else "Max"
            return self._fold(operator, [dim.plain(term) for term in number.args], flat)
        raise Refused("a length cannot be written with whole numbers", found=str(number))

    def _fold(self, operator: str, terms: Sequence[Dimension], flat: bool) -> ir.Value:
        ordered = sorted(terms, key=lambda term: (isinstance(term, int), str(term)))
        result = self._value(ordered[0], flat=flat)
        for term in ordered[1:]:
            wish = "total_length" if set(terms) == {PAST, NEW} else "length"
            other = self._value(term, flat=flat)
            result = self.editor.node(operator, [result, other], wish=wish, dtype=INT64, shape=[1] if flat else [])
        return result

    def _guarded(self, total: ir.Value, flat: bool) -> ir.Value:
        """The total length, which ends the run with an error where it is beyond the limit: a table has no such row."""
        assert self.limit is not None
        table = self.editor.constant(np.zeros(self.limit + 1), wish=f"no_more_than_{self.limit}_tokens")
        nothing = self.editor.node("Gather", [table, total], {"axis": 0}, wish="within_limit", dtype=INT64)
        return self.editor.node(
            "Add", [total, nothing], wish="total_length_within_limit", dtype=INT64, shape=[1] if flat else []
        )

    def _read(self, symbol: sympy.Symbol, flat: bool) -> ir.Value:
        if symbol not in self.sources:
            raise Refused("a length cannot be read from any input", found=str(symbol))
        value, axis = self.sources[symbol]
        if value not in self._shapes:
            rank = len(value.shape) if value.shape is not None else None
            self._shapes[value] = self.editor.node(
                "Shape", [value], wish=f"{value.name}_shape", dtype=INT64, shape=[rank]
            )
        index = self.editor.constant([axis] if flat else axis, wish="axis")
        wish = {PAST: "past_length", NEW: "new_length"}.get(symbol, "length")
        return self.editor.node(
            "Gather", [self._shapes[value], index], {"axis": 0}, wish=wish, dtype=INT64, shape=[1] if flat else []
        )
