"""What is known of a tensor before anything runs: its type, its dimensions and, for shape arithmetic, its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.symbolic.dimension import Dimension, unknown

Numbers = np.ndarray  # dtype=object: int, float, bool or sympy expression in each place

WIDEST_VALUE = 512  # elements of a tensor whose numbers are followed


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known of one value."""

    shape: tuple[Dimension, ...] | None  # None: not even the rank is known
    dtype: ir.DataType | None = None
    value: Numbers | None = None  # None: depends on more than lengths, or too large to follow

    @property
    def rank(self) -> int | None:
        """Number of axes."""
        return None if self.shape is None else len(self.shape)


NOTHING = Fact(None)


def numbers(value: Any) -> Numbers:
    """Return an array of Python numbers or sympy expressions, one object in each place."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return value
    return np.asarray(value).astype(object)


def known(value: Any, dtype: ir.DataType | None) -> Fact:
    """Return the fact of a tensor whose numbers are all known, symbolically or not."""
    array = numbers(value)
    return Fact(array.shape, dtype, array if array.size <= WIDEST_VALUE else None)


@dataclass(slots=True)
class OperatorCall:
    """One node as a rule sees it: facts in, attributes, and a place to note what had to be assumed."""

    node: ir.Node
    inputs: tuple[Fact | None, ...]
    opset: int
    bound: Callable[[int], None]  # notes that the length is assumed to be at most so much
    results: tuple[Fact, ...] = ()  # of the outputs, once they are inferred
    _attributes: Mapping[str, ir.Attr] = field(init=False)

    def __post_init__(self) -> None:
        self._attributes = self.node.attributes

    def given(self, index: int) -> Fact | None:
        """The fact of an input, None where the input is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def fact(self, index: int) -> Fact:
        """The fact of an input, `NOTHING` where it is left out."""
        return self.given(index) or NOTHING

    @property
    def result(self) -> Fact:
        """The fact of the first output."""
        return self.results[0] if self.results else NOTHING

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        attribute = self._attributes.get(name)
        return default if attribute is None else int(attribute.value)

    def text(self, name: str, default: str = "") -> str:
        """A string attribute."""
        attribute = self._attributes.get(name)
        return default if attribute is None else str(attribute.value)

    def attribute(self, name: str) -> Any:
        """The value of an attribute, None where it is left out."""
        attribute = self._attributes.get(name)
        return None if attribute is None else attribute.value

    def integers(self, name: str, index: int | None = None) -> tuple[Dimension, ...] | None:
        """Integers given by an attribute or, since a later opset, by an input; None where neither is known."""
        if (given := self.attribute(name)) is not None:
            return tuple(given) if isinstance(given, Sequence) else (given,)
        return None if index is None else self.numbers(index)

    def numbers(self, index: int) -> tuple[Dimension, ...] | None:
        """The followed numbers of an input, flat."""
        fact = self.given(index)
        return None if fact is None or fact.value is None else tuple(fact.value.reshape(-1))

    def unknown(self, what: str = "size") -> Dimension:
        """A dimension that nothing is known about, named after the value it stands at."""
        return unknown(f"{what} after {self.node.op_type} at `{self.node.outputs[0].name}`")


def axis_of(axis: int, rank: int) -> int:
    """Return the axis counted from the front."""
    return axis + rank if axis < 0 else axis
