"""Facts about a value before the model runs: its type, its dimensions and, for shape arithmetic, its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.graph.constants import SMALL
from kvsurgeon.symbolic.dimension import Dimension, is_in_sixteenths, is_within, unknown

Numbers = np.ndarray  # dtype=object: int, float, bool or sympy expression in each place

WIDEST_VALUE = 512  # elements of a tensor whose numbers are computed

_EXACT_UP_TO = {ir.DataType.FLOAT: 1 << 20, ir.DataType.DOUBLE: 1 << 49}  # every multiple of 1/16


@dataclass(frozen=True, slots=True)
class Fact:
    """Type, dimensions and known numbers of a value.

    Attributes:
        shape: Its dimensions; None if not even the rank is known.
        dtype: Its type.
        value: Its numbers; None if they depend on more than lengths, or are too many.
    """

    shape: tuple[Dimension, ...] | None
    dtype: ir.DataType | None = None
    value: Numbers | None = None

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


def as_stored(fact: Fact) -> Fact:
    """Return a fact with its numbers as its type stores them: rounded floats; none if one does not fit, or of too many.

    Python computes with integers of any size and floats of 64 bits; a model wraps around, or rounds.
    """
    if fact.value is None or fact.dtype is None:
        return fact
    if fact.value.size > SMALL:  # tensors that are joined with themselves grow exponentially
        return Fact(fact.shape, fact.dtype)
    flat, dtype = fact.value.reshape(-1), fact.dtype
    if dtype.is_floating_point() and any(isinstance(number, float) for number in flat):
        flat = np.array([_rounded(number, dtype) for number in flat], dtype=object)
    value = flat.reshape(fact.value.shape) if all(_fits(number, dtype) for number in flat) else None
    return Fact(fact.shape, dtype, value)


def _rounded(number: Any, dtype: ir.DataType) -> Any:
    if not isinstance(number, float):
        return number
    with np.errstate(over="ignore"):
        return float(np.asarray(number, np.float64).astype(dtype.numpy()))


def _fits(number: Any, dtype: ir.DataType) -> bool:
    """Return whether a type holds a number exactly, at any length; a float is rounded already, and may be NaN."""
    if isinstance(number, complex):  # a root of a negative number: NaN
        return False
    if isinstance(number, float) and not dtype.is_floating_point():  # of operands of two types
        return False
    if isinstance(number, (bool, float, np.generic)):
        return bool(number == number)
    if dtype.is_floating_point():
        largest = _EXACT_UP_TO.get(dtype, 0)
        return is_within(number, -largest, largest) and is_in_sixteenths(number)
    return not dtype.is_integer() or is_within(number, int(dtype.min), int(dtype.max))


@dataclass(slots=True)
class OperatorCall:
    """One node with the facts of its inputs and outputs, as a rule reads it."""

    node: ir.Node
    inputs: tuple[Fact | None, ...]
    opset: int
    bound: Callable[[int], None]  # notes that the length is assumed to be at most this
    results: tuple[Fact, ...] = ()  # of the outputs, once they are inferred
    widest: int = WIDEST_VALUE  # elements of a tensor whose numbers are computed
    _attributes: Mapping[str, ir.Attr] = field(init=False)

    def __post_init__(self) -> None:
        self._attributes = self.node.attributes

    def given(self, index: int) -> Fact | None:
        """Return the fact of an input, None if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def fact(self, index: int) -> Fact:
        """Return the fact of an input, `NOTHING` if it is left out."""
        return self.given(index) or NOTHING

    @property
    def result(self) -> Fact:
        """The fact of the first output."""
        return self.results[0] if self.results else NOTHING

    def is_small(self, sizes: Sequence[int]) -> bool:
        """Return whether a tensor of these sizes has few enough elements to know their numbers."""
        return max(sizes, default=0) <= self.widest and math.prod(sizes) <= self.widest

    def integer(self, name: str, default: int) -> int:
        """Return an integer attribute."""
        attribute = self._attributes.get(name)
        return default if attribute is None else int(attribute.value)

    def text(self, name: str, default: str = "") -> str:
        """Return a string attribute."""
        attribute = self._attributes.get(name)
        return default if attribute is None else str(attribute.value)

    def attribute(self, name: str) -> Any:
        """Return the value of an attribute, None if it is left out."""
        attribute = self._attributes.get(name)
        return None if attribute is None else attribute.value

    def integers(self, name: str, index: int | None = None) -> tuple[Dimension, ...] | None:
        """Return integers given by an attribute or, since a later opset, by an input; None if neither is known."""
        if (given := self.attribute(name)) is not None:
            return tuple(given) if isinstance(given, Sequence) else (given,)
        return None if index is None else self.numbers(index)

    def numbers(self, index: int) -> tuple[Dimension, ...] | None:
        """Return the known numbers of an input, flat."""
        fact = self.given(index)
        return None if fact is None or fact.value is None else tuple(fact.value.reshape(-1))

    def unknown(self, what: str = "size") -> Dimension:
        """Return an unknown dimension, named after the value that has it."""
        return unknown(f"{what} after {self.node.op_type} at `{self.node.outputs[0].name}`")


def axis_of(axis: int, rank: int) -> int:
    """Return the axis counted from the front.

    Raises:
        ValueError: There is no such axis.
    """
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} of a tensor of rank {rank}")
    return axis + rank if axis < 0 else axis
