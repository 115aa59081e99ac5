"""LengthValues in the graph itself: the numbers that a decoder with a cache computes with.

The new length S is read from the token input. The past length P is the size of the past's sequence axis, or a number
that is given. Context is computed for the total length: T = P + S, or more where the cache has room for more.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import sympy

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import LENGTH, NEW, PAST, TOTAL, Dimension
from kvsurgeon.symbolic.sequence_axes import Length

INT64 = ir.DataType.INT64


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a length can be read at run time: the size of an axis, or the value itself where no axis is named."""

    value: ir.Value
    axis: int | None = None


class LengthValues:
    """Turns symbolic numbers into values of the graph, each made once."""

    def __init__(
        self,
        editor: Editor,
        sources: Mapping[sympy.Symbol, Source],
        *,
        total: Dimension = TOTAL,
        limit: int | None = None,
    ) -> None:
        """Take what numbers are made of.

        Args:
            editor: The one pair of hands.
            sources: Where each symbol can be read.
            total: The length that context is computed for: all tokens so far, or as many as the cache has room for.
            limit: The largest such length that is allowed.
        """
        self.editor = editor
        self.total = total
        self.limit = limit
        self.sources = sources
        self._made: dict[tuple[Dimension, bool], ir.Value] = {}
        self._shapes: dict[ir.Value, ir.Value] = {}
        self._vectors: dict[tuple[Dimension, ...], ir.Value] = {}
        self._grids: dict[tuple[Hashable, ...], ir.Value] = {}
        self._typed: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def at(self, number: Dimension, length: Length) -> Dimension:
        """The number with the one length of the export read as one of the two."""
        meant = NEW if length is Length.NEW else self.total
        return dim.substitute(number, ((LENGTH, meant),))

    def span(self, length: Length) -> tuple[Dimension, Dimension]:
        """Where tokens of a length begin and end among all that context is computed for."""
        return (PAST, TOTAL) if length is Length.NEW else (0, self.total)

    def scalar(self, number: Dimension) -> ir.Value:
        """The number as an int64 scalar."""
        return self._value(number, flat=False)

    def flat(self, number: Dimension) -> ir.Value:
        """The number as an int64 tensor of one element."""
        return self._value(number, flat=True)

    def vector(self, numbers: Sequence[Dimension]) -> ir.Value:
        """Several numbers as an int64 vector."""
        if all(isinstance(number, int) for number in numbers):
            return self.editor.constant(list(numbers), name="shape")
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
                pieces.append(self.editor.constant(run, name="shape"))
                run = []
            if number is not None:
                pieces.append(self.flat(number))
        return self.editor.node("Concat", pieces, {"axis": 0}, name="shape", dtype=INT64, shape=[len(numbers)])

    def array(self, numbers: np.ndarray) -> ir.Value:
        """Numbers of any rank up to one, or constants of any rank."""
        if all(isinstance(number, (int, bool)) for number in numbers.reshape(-1)):
            return self.editor.constant(numbers.astype(np.int64), name="numbers")
        if numbers.ndim == 0:
            return self.scalar(numbers.item())
        flat = self.vector(list(numbers.reshape(-1)))
        if numbers.ndim == 1:
            return flat
        target = self.editor.constant(list(numbers.shape), name="shape")
        return self.editor.node("Reshape", [flat, target], name="numbers", dtype=INT64, shape=numbers.shape)

    def repeated(self, number: Dimension, times: Dimension) -> ir.Value:
        """The number so many times, as an int64 vector."""
        if times == 1:
            return self.flat(number)
        key = ("repeated", number, times)
        if key not in self._grids:
            inputs = [self.flat(number), self.flat(times)]
            self._grids[key] = self.editor.node("Expand", inputs, name="rows", dtype=INT64)
        return self._grids[key]

    def places(self, start: Dimension, sizes: Sequence[Dimension], axis: int) -> ir.Value:
        """Indices of these sizes that count up from a start along an axis."""
        key = ("places", start, tuple(sizes), axis)
        if key not in self._grids:
            ends = [self.scalar(start), self.scalar(dim.add(start, sizes[axis])), self.scalar(1)]
            row = self.editor.node("Range", ends, name="rows", dtype=INT64)
            column = self.vector([-1 if place == axis else 1 for place in range(len(sizes))])
            row = self.editor.node("Reshape", [row, column], name="rows.column", dtype=INT64)
            target = self.vector([1 if place == axis else size for place, size in enumerate(sizes)])
            self._grids[key] = self.editor.node("Expand", [row, target], name="rows.places", dtype=INT64)
        return self._grids[key]

    def typed(self, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """The int64 value as another type."""
        if dtype is None or dtype is INT64:
            return value
        key = (value, dtype)
        if key not in self._typed:
            name = f"{value.name}.{dtype.name.lower()}"
            self._typed[key] = self.editor.node("Cast", [value], {"to": int(dtype)}, name=name, dtype=dtype)
        return self._typed[key]

    def _value(self, number: Dimension, *, flat: bool) -> ir.Value:
        key = (number, flat)
        if key not in self._made:
            self._made[key] = self._make(number, flat)
        return self._made[key]

    def _make(self, number: Dimension, flat: bool) -> ir.Value:
        if isinstance(number, int):
            return self.editor.constant([number] if flat else number, name="number")
        if number == self.total and self.limit is not None:
            return self._guarded(self._unguarded(number, flat), flat)
        return self._unguarded(number, flat)

    def _unguarded(self, number: sympy.Expr, flat: bool) -> ir.Value:
        if number.is_Symbol:
            return self._read(number, flat)
        if number.is_Add:
            return self._fold("Add", [dim.plain(term) for term in number.as_ordered_terms()], flat)
        if number.is_Mul:
            return self._fold("Mul", [dim.plain(factor) for factor in number.as_ordered_factors()], flat)
        if number.is_Pow and number.exp.is_Integer and number.exp > 0:
            return self._fold("Mul", [dim.plain(number.base)] * int(number.exp), flat)
        if isinstance(number, (sympy.Min, sympy.Max)):
            operator = "Min" if isinstance(number, sympy.Min) else "Max"
            return self._fold(operator, [dim.plain(term) for term in number.args], flat)
        raise UnsupportedError("a length cannot be written with whole numbers", found=str(number))

    def _fold(self, operator: str, terms: Sequence[Dimension], flat: bool) -> ir.Value:
        ordered = sorted(terms, key=lambda term: (isinstance(term, int), str(term)))
        result = self._value(ordered[0], flat=flat)
        for term in ordered[1:]:
            name = "total_length" if set(terms) == {PAST, NEW} else "length"
            other = self._value(term, flat=flat)
            result = self.editor.node(operator, [result, other], name=name, dtype=INT64, shape=[1] if flat else [])
        return result

    def _guarded(self, total: ir.Value, flat: bool) -> ir.Value:
        """The total length, which ends the run with an error where it is beyond the limit: a table has no such row."""
        assert self.limit is not None
        table = self.editor.constant(np.zeros(self.limit + 1), name=f"no_more_than_{self.limit}_tokens")
        nothing = self.editor.node("Gather", [table, total], {"axis": 0}, name="within_limit", dtype=INT64)
        return self.editor.node(
            "Add", [total, nothing], name="total_length_within_limit", dtype=INT64, shape=[1] if flat else []
        )

    def _read(self, symbol: sympy.Symbol, flat: bool) -> ir.Value:
        if symbol not in self.sources:
            raise UnsupportedError("a length cannot be read from any input", found=str(symbol))
        value, axis = self.sources[symbol].value, self.sources[symbol].axis
        if axis is None:
            return self._given(value, flat)
        if value not in self._shapes:
            rank = len(value.shape) if value.shape is not None else None
            self._shapes[value] = self.editor.node(
                "Shape", [value], name=f"{value.name}_shape", dtype=INT64, shape=[rank]
            )
        index = self.editor.constant([axis] if flat else axis, name="axis")
        name = {PAST: "past_length", NEW: "new_length"}.get(symbol, "length")
        return self.editor.node(
            "Gather", [self._shapes[value], index], {"axis": 0}, name=name, dtype=INT64, shape=[1] if flat else []
        )

    def _given(self, value: ir.Value, flat: bool) -> ir.Value:
        """A number that is given, whatever its type and rank."""
        wide = value
        if value.dtype is not INT64:
            wide = self.editor.node("Cast", [value], {"to": int(INT64)}, name=f"{value.name}.int64", dtype=INT64)
        shape = [1] if flat else []
        if value.shape is not None and list(value.shape) == shape:
            return wide
        target = self.editor.constant(shape, name="shape")
        return self.editor.node("Reshape", [wide, target], name="past_length", dtype=INT64, shape=shape)
