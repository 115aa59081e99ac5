"""Symbolic dimensions: integers, or sympy expressions in a few symbols, with cached arithmetic.

A decoder repeats the same few expressions thousands of times, so every operation is cached: after the first layer, the
arithmetic of a layer is a dictionary lookup.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TypeAlias, TypeVar

import sympy

Dimension: TypeAlias = int | sympy.Expr
_Part = TypeVar("_Part")

BATCH = sympy.Symbol("batch", integer=True, positive=True)
LENGTH = sympy.Symbol("length", integer=True, positive=True)  # the one length that an export without a cache knows

PAST = sympy.Symbol("past_sequence_length", integer=True, positive=True)
NEW = sympy.Symbol("sequence_length", integer=True, positive=True)  # S: the tokens of this call
TOTAL = PAST + NEW  # T: all tokens up to this call
MAX = sympy.Symbol("max_length", integer=True, positive=True)  # rows of a static cache
CAPACITY = sympy.Symbol("cache_length", integer=True, positive=True)  # rows of a past that need not all be filled


class Extent(sympy.Symbol):  # type: ignore[misc]
    """The size of an input axis that is neither the batch nor the length of the text, such as an encoder's length."""

    __slots__ = ()


LONGEST_TEXT = 1 << 17  # tokens
NO_LENGTH = 1 << 31  # tokens that no text has
LONGEST = 40  # operations in an expression

cached = lru_cache(maxsize=None, typed=True)  # 2 and 2.0 are equal, and what is made of them is not

_numbers = itertools.count()


def symbol(name: str) -> sympy.Symbol:
    """Return the positive whole number called `name`; the same name is the same number."""
    return sympy.Symbol(name, integer=True, positive=True)


def extent(name: str) -> Extent:
    """Return the extent called `name`; the same name is the same extent."""
    return Extent(name, integer=True, positive=True)


def unknown(why: str) -> sympy.Symbol:
    """Return a number that nothing is known about, and that says in its name where knowledge ended."""
    return sympy.Dummy(f"?{next(_numbers)}: {why}", integer=True, nonnegative=True)


def is_known(dimension: Dimension) -> bool:
    """Whether the dimension is built from the graph's own symbols only."""
    return isinstance(dimension, int) or not dimension.atoms(sympy.Dummy)


@cached
def contains(dimension: sympy.Expr, symbol: sympy.Symbol) -> bool:
    """Whether the dimension varies with a symbol."""
    return symbol in dimension.free_symbols


def all_known(shape: Iterable[Dimension]) -> bool:
    """Whether every dimension is built from the graph's own symbols only."""
    return all(is_known(size) for size in shape)


def plain(expression: sympy.Expr) -> Dimension:
    """Return a whole number as an `int`, anything else as it is; unknown where it has grown too long to work with."""
    if expression.is_Integer:
        return int(expression)
    return expression if expression.count_ops() <= LONGEST else unknown("too long an expression")


@cached
def add(left: Dimension, right: Dimension) -> Dimension:
    """Left + right."""
    return left + right if isinstance(left, int) and isinstance(right, int) else plain(sympy.expand(left + right))


@cached
def multiply(left: Dimension, right: Dimension) -> Dimension:
    """Left * right."""
    return left * right if isinstance(left, int) and isinstance(right, int) else plain(sympy.expand(left * right))


def subtract(left: Dimension, right: Dimension) -> Dimension:
    """Left - right."""
    return add(left, multiply(-1, right))


def distribute(parts: Iterable[tuple[_Part, Dimension]], shape: Sequence[Dimension]) -> list[list[_Part]] | None:
    """Return which parts each axis of a row-major tensor holds; None if one would be split.

    Args:
        parts: Parts with their sizes, outermost first; those of size 1 are on no axis.
        shape: Shape of the tensor.
    """
    left = [part for part in parts if part[1] != 1]
    axes: list[list[_Part]] = []
    for size in shape:
        count = next((n for n in range(len(left) + 1) if is_equal(product(one for _, one in left[:n]), size)), None)
        if count is None:
            return None
        axes.append([part for part, _ in left[:count]])
        left = left[count:]
    return None if left else axes


@cached
def exact_quotient(numerator: Dimension, denominator: Dimension) -> Dimension | None:
    """Numerator / denominator where that is a whole number whatever the symbols are, else None."""
    if denominator == 0:
        return None
    if isinstance(numerator, int) and isinstance(denominator, int):
        return numerator // denominator if numerator % denominator == 0 else None
    quotient = sympy.cancel(sympy.sympify(numerator) / denominator)
    polynomial, divisor = sympy.fraction(sympy.together(quotient))
    return plain(sympy.expand(polynomial)) if divisor == 1 else None


@cached
def floor_quotient(numerator: Dimension, denominator: Dimension) -> Dimension:
    """Numerator // denominator, rounded down.

    >>> floor_quotient(LENGTH + 2**40 - 1, 2**40)  # such as the size of a range with steps of 2**40
    1
    """
    if isinstance(numerator, int) and isinstance(denominator, int):
        return numerator // denominator
    exact = exact_quotient(numerator, denominator)
    if exact is not None:
        return exact
    quotient = plain(sympy.floor(sympy.sympify(numerator) / denominator))
    if isinstance(denominator, int) and denominator > NO_LENGTH:
        return next((whole for whole in (0, 1) if is_within(quotient, whole, whole)), quotient)
    return quotient


@cached
def remainder(dividend: Dimension, divisor: int) -> Dimension:
    """Dividend modulo a positive number, with the sign of the divisor: what is left of the multiples below.

    >>> remainder(8 - remainder(LENGTH, 8), 8)
    -length + 8*floor(length/8 + 7/8)
    """
    if isinstance(dividend, int):
        return dividend % divisor
    terms = sympy.Add.make_args(sympy.expand(dividend))
    rest = sympy.Add(*(term for term in terms if not (term / divisor).is_integer))
    if (-rest).is_nonnegative:  # (-n) mod c: up to the next multiple
        return subtract(multiply(divisor, floor_quotient(add(-rest, divisor - 1), divisor)), -rest)
    return subtract(plain(rest), multiply(divisor, floor_quotient(plain(rest), divisor)))


@cached
def minimum(left: Dimension, right: Dimension) -> Dimension:
    """The smaller of two."""
    for smaller, larger in ((left, right), (right, left)):
        if is_less(larger, smaller) is False:
            return smaller
    return plain(sympy.Min(left, right))


@cached
def maximum(left: Dimension, right: Dimension) -> Dimension:
    """The larger of two."""
    return plain(sympy.Max(left, right))


def bound_below(dimension: Dimension, size: Dimension) -> int | None:
    """Return the number n of a dimension that is the smaller of n and a size; None of other dimensions."""
    numbers = [] if isinstance(dimension, int) else [one for one in dimension.args if one.is_Integer]
    found = [int(number) for number in numbers if dimension == minimum(int(number), size)]
    return found[0] if found and not isinstance(size, int) else None


@cached
def is_equal(left: Dimension, right: Dimension) -> bool | None:
    """Whether two numbers are equal whatever the symbols are; None where it depends."""
    if left is right:
        return True
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    answer: bool | None = sympy.expand(left - right).is_zero
    return answer


@cached
def is_less(left: Dimension, right: Dimension) -> bool | None:
    """Whether left < right whatever the symbols are; None where it depends."""
    if isinstance(left, int) and isinstance(right, int):
        return left < right
    gap = sympy.expand(right - left)
    if gap.is_positive:
        return True
    if gap.is_nonpositive:
        return False
    lower, upper = _bounds(gap)
    if lower.is_positive:
        return True
    return False if gap.is_integer and (upper - 1).is_negative else None


def _bounds(number: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Return bounds of a sum: the floor of n / c is at least (n - c + 1) / c, and at most n / c."""
    ends = []
    for is_upper in (False, True):
        terms = []
        for term in sympy.Add.make_args(number):
            factor, rest = term.as_coeff_Mul()
            if isinstance(rest, sympy.floor):
                dividend, divisor = sympy.fraction(sympy.together(rest.args[0]))
                is_whole = dividend.is_integer and divisor.is_Integer and divisor > 0
                if is_whole:
                    rest = (dividend if bool(factor > 0) is is_upper else dividend - divisor + 1) / divisor
            terms.append(factor * rest)
        ends.append(sympy.expand(sympy.Add(*terms)))
    return ends[0], ends[1]


def at_least_zero(number: Dimension) -> Dimension:
    """The number, or 0 where it is negative: the size of a range that ends before it starts."""
    return number if is_less(number, 0) is False else maximum(number, 0)


@cached
def is_within(number: Dimension, smallest: int, largest: int) -> bool:
    """Return whether a number is between two others for a single token and for the longest text."""
    if isinstance(number, int):
        return smallest <= number <= largest
    ends = [number.subs({one: 1 if one is BATCH else end for one in number.free_symbols}) for end in (1, LONGEST_TEXT)]
    return all(bool(end.is_finite and end.is_real) and bool(smallest <= end <= largest) for end in ends)


@cached
def is_in_sixteenths(number: Dimension) -> bool:
    """Return whether a number is known to be a multiple of 1/16, so that no digit of a product or a sum is rounded."""
    if isinstance(number, int) or number.is_integer:
        return True
    divided = any(power.exp.is_negative for power in number.atoms(sympy.Pow))
    return not divided and all((16 * constant) % 1 == 0 for constant in number.atoms(sympy.Number))


def product(dimensions: Iterable[Dimension]) -> Dimension:
    """The product of all; 1 of none."""
    result: Dimension = 1
    for dimension in dimensions:
        result = multiply(result, dimension)
    return result


@cached
def substitute(dimension: Dimension, replacements: tuple[tuple[sympy.Symbol, Dimension], ...]) -> Dimension:
    """The dimension with symbols replaced by numbers or other expressions, all at once."""
    if isinstance(dimension, int):
        return dimension
    return plain(sympy.expand(dimension.subs(dict(replacements), simultaneous=True)))


def at(dimension: Dimension, length: int, batch: int) -> Dimension:
    """The dimension for a batch of texts of a length; an expression where it is no whole number."""
    if isinstance(dimension, int):
        return dimension
    function = _function(dimension)
    try:
        number = None if function is None else function(length, batch)
        if number is not None and number == int(number):
            return int(number)
    except (ArithmeticError, ValueError):  # divided by zero
        pass
    return substitute(dimension, ((LENGTH, length), (BATCH, batch)))


@cached
def _function(dimension: sympy.Expr) -> Callable[[int, int], float] | None:
    """The dimension as a function of length and batch, which is called for thousands of lengths."""
    if not dimension.free_symbols <= {LENGTH, BATCH}:
        return None
    function: Callable[[int, int], float] = sympy.lambdify((LENGTH, BATCH), dimension, "math")
    return function


@cached
def broadcast(left: Dimension, right: Dimension) -> Dimension:
    """The dimension of an axis on which two tensors are broadcast against each other.

    Source: ONNX, Multidirectional Broadcasting. Where neither is 1 they must be equal at run time, so the plainer one
    is taken: a whole number before an expression, a known one before an unknown one.
    """
    if left == 1 or left is right:
        return right
    if right == 1 or isinstance(left, int):
        return left
    if isinstance(right, int):
        return right
    return left if is_known(left) or not is_known(right) else right
