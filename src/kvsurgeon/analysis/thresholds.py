"""Thresholds: the positions and lengths near which context may change, as its constants tell or as running it shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.probe_feeds import computed_table
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor, small_constant
from kvsurgeon.graph.query import upstream
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic.dimension import LONGEST_TEXT
from kvsurgeon.weights.mapped import mapped_elements

MAX_LENGTH = LONGEST_TEXT  # of which rows are computed; larger numbers in context are no lengths
MAX_NUMBERS = 64  # distinct numbers of one constant; a table of more is no list of thresholds
MAX_ROWS = 32  # irregular rows of one table
MAX_TABLE = 1 << 28  # elements of a table whose rows are compared
SMALLEST_TABLE = 64  # rows and columns
SCANNED = 4097  # tokens: every position and every length up to here is looked at
MAX_FOUND = 32  # positions or lengths of one value at which it changes
# Below these numbers, whole ones of a type are exact and in order. Those of smaller types are below SCANNED.
EXACT_BELOW = {ir.DataType.INT16: 2**15, ir.DataType.UINT16: 2**16, ir.DataType.INT32: 2**31,
               ir.DataType.UINT32: 2**32, ir.DataType.INT64: 2**63, ir.DataType.FLOAT: 2**24}  # fmt: skip
FLOAT_KINDS = "fV"  # kinds of numpy types; V is that of bfloat16, which numpy does not know


class Thresholds:
    """Finds the numbers that context may compare a length or a position with, each table read once.

    Args:
        flow: The token flow of the graph.
    """

    def __init__(self, flow: TokenFlow) -> None:
        self.flow = flow
        self._irregular: dict[ir.Value, list[int]] = {}

    def find(self, values: Iterable[ir.Value | None]) -> tuple[int, ...]:
        """Return the numbers for values that are computed from context."""
        numbers: set[float] = set()
        for value in upstream(values, inputs=content_inputs):
            node = value.producer()
            if self.flow.kinds.get(value) is not ValueKind.CONTEXT:
                numbers |= set(self._irregular_rows(value))
            elif node is not None:
                constants = [small_constant(source) for source in node.inputs]
                if has_trait(node, Trait.LENGTH_SENSITIVE):
                    numbers |= {number for constant in constants for number in _lengths(constant)}
                numbers |= set(_inexact_from(node, constants, self.flow.shapes[value].dtype))
        return tuple(sorted({round(number) for number in numbers}))

    def _irregular_rows(self, value: ir.Value) -> list[int]:
        """Return the irregular rows of a constant table of positions, such as a mask, or of a list of them."""
        if value not in self._irregular:
            table = self._table(value)
            find = irregular_steps if table is not None and max(table.shape) == table.size else irregular_rows
            self._irregular[value] = [] if table is None else find(table)
        return self._irregular[value]

    def _table(self, value: ir.Value) -> np.ndarray | None:
        """Return a constant that is large enough to hold positions, or positions by positions; None for others."""
        shape = self.flow.shapes[value].shape or ()
        sizes = [size for size in shape if isinstance(size, int)]
        is_list = max(sizes, default=0) == math.prod(sizes) >= SMALLEST_TABLE
        is_matrix = len(sizes) > 1 and min(sizes[-2:]) >= SMALLEST_TABLE
        if len(sizes) < len(shape) or not (is_list or is_matrix) or math.prod(sizes) > MAX_TABLE:
            return None
        tensor = constant_tensor(value)
        if tensor is None:
            return computed_table(self.flow, value)
        try:
            return None if tensor.dtype.is_string() else np.asarray(mapped_elements(tensor))
        except (OSError, ValueError):  # its file is missing
            return None


def lengths_near(thresholds: Iterable[int]) -> tuple[int, ...]:
    """Return the lengths at either side of thresholds."""
    return tuple(sorted({threshold + offset for threshold in thresholds for offset in (-1, 0, 1, 3)}))


def numbers_of(constant: np.ndarray | None) -> list[float]:
    """Return the distinct numbers of a constant that are not 0, and the reciprocal of a single one."""
    if constant is None or constant.dtype.kind not in f"iu{FLOAT_KINDS}":
        return []
    numbers = {
        number for number in constant.reshape(-1).astype(np.float64).tolist() if number != 0 and math.isfinite(number)
    }
    return sorted(numbers) + [1 / number for number in numbers if constant.size == 1]


def _lengths(constant: np.ndarray | None) -> set[float]:
    """Return the numbers of a constant that may be thresholds."""
    numbers = numbers_of(constant)
    if constant is not None and constant.dtype.kind in FLOAT_KINDS:
        numbers = [number for number in numbers if number > 0]  # others mask scores, not lengths
    return {abs(one) for one in numbers if 1 <= abs(one) < MAX_LENGTH} if len(numbers) <= MAX_NUMBERS else set()


def _inexact_from(node: ir.Node, constants: Sequence[np.ndarray | None], dtype: ir.DataType | None) -> Iterator[float]:
    """Yield the lengths from which the result of a node is rounded or wraps around, if they are looked at no other way.

    The result is a number of its type, a sum with a constant, or a product with a whole one or of two lengths.
    """
    if dtype is None or dtype not in EXACT_BELOW:
        return
    bound = EXACT_BELOW[dtype]
    found = [float(bound)]
    some = [constant.reshape(-1)[:MAX_NUMBERS] for constant in constants if constant is not None]
    numbers = [abs(number) for constant in some for number in numbers_of(constant)]
    if has_trait(node, Trait.ADD):
        found += [bound - number for number in numbers]
    elif has_trait(node, Trait.SCALE) and dtype.is_integer():
        found += [bound / number for number in numbers] or [math.sqrt(bound)]
    yield from (number for number in found if SCANNED < number < MAX_LENGTH)


def irregular_rows(table: np.ndarray) -> list[int]:
    """Return the rows of a mask whose range of values after the diagonal is not that of most rows.

    Args:
        table: [..., queries, keys].
    """
    *_, rows, columns = table.shape
    ranges: list[tuple[float, float]] = []
    for row in range(min(rows, columns - 1)):
        later = table[..., row, row + 1 :]
        ranges.append((float(later.min()), float(later.max())))
    usual, _ = Counter(ranges).most_common(1)[0]
    return _some([row for row, one in enumerate(ranges) if one != usual])


def irregular_steps(table: np.ndarray) -> list[int]:
    """Return the elements of a list of positions that do not differ from the one before as most do.

    A list in which most steps are irregular holds no positions, and none are returned.
    """
    steps = np.diff(table.reshape(-1).astype(np.float64))
    numbers, counts = np.unique(steps, return_counts=True)
    found = np.flatnonzero(steps != numbers[counts.argmax()]) + 1
    return _some(found.tolist()) if 2 * len(found) < len(steps) else []


def _some(rows: list[int]) -> list[int]:
    """Return the rows; if they are many, some of them, evenly spaced."""
    return rows if len(rows) <= MAX_ROWS else [rows[place * len(rows) // MAX_ROWS] for place in range(MAX_ROWS)]


def changes(differs: np.ndarray) -> list[int]:
    """Return the places at which differences begin or end; if they are many, the first ones and some of the others."""
    found = [int(place) for place in np.flatnonzero(differs[1:] != differs[:-1]) + 1]
    first, others = found[: MAX_FOUND // 2], found[MAX_FOUND // 2 :]
    return first + others[:: max(1, 2 * len(others) // MAX_FOUND)]


def lengths_of_change(arrays: Sequence[np.ndarray]) -> set[int]:
    """Return the lengths at either side of which a value begins or ceases to change.

    Args:
        arrays: The value at the lengths 1, 2, 3, ...
    """
    differs = np.array([True, *(not np.array_equal(one, other) for one, other in pairwise(arrays))])
    return {place + offset for place in changes(differs) for offset in (0, 1)}


def longest_running(run: Callable[[int], object], longest: int) -> int:
    """Return the longest length up to a given one at which context runs."""
    try:
        run(longest)
    except UnsupportedError as error:
        return bisect(run, 1, longest, error)[0]
    return longest


def bisect(
    check: Callable[[int], object], passing: int, failing: int, failed: UnsupportedError,
    gap: Callable[[int], int] = lambda _failing: 1,
) -> tuple[int, UnsupportedError]:  # fmt: skip
    """Return the longest length at which a check is found to pass, and the error of the shortest at which it fails.

    Args:
        check: Raises `UnsupportedError` at a length at which it fails.
        passing: A length at which it passes.
        failing: A longer one at which it fails.
        failed: The error there.
        gap: Returns how far the two lengths may be apart at the end, for one at which it fails.
    """
    while failing - passing > gap(failing):
        between = (passing + failing) // 2
        try:
            check(between)
            passing = between
        except UnsupportedError as error:
            failing, failed = between, error
    return passing, failed
