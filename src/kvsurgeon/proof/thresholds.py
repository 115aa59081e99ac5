"""Thresholds: the positions and lengths near which context may change, as the constants that it reads tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.constants import constant_tensor, small_constant
from kvsurgeon.graph.query import producers, upstream
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait

MAX_LENGTH = 1 << 17  # tokens: the longest text of which rows are computed; larger numbers in context are no lengths
MAX_NUMBERS = 64  # distinct numbers of one constant; a table of more is no list of thresholds
MAX_ROWS = 32  # irregular rows of one table
MAX_TABLE = 1 << 28  # elements of a table whose rows are compared
SMALLEST_TABLE = 64  # rows and columns


def find_thresholds(flow: TokenFlow, values: Iterable[ir.Value | None]) -> tuple[int, ...]:
    """Return the numbers that context may compare a length or a position with.

    Args:
        flow: The token flow of the graph.
        values: Values that are computed from the context.
    """
    numbers: set[float] = set()
    values = list(values)
    for node in producers(upstream(values, inputs=content_inputs)):
        if has_trait(node, Trait.LENGTH_SENSITIVE) and flow.kinds.get(node.outputs[0]) is ValueKind.CONTEXT:
            for value in node.inputs:
                numbers |= _numbers(small_constant(value))
    for table in _tables(values):
        numbers |= set(irregular_rows(table))
    return tuple(sorted({round(number) for number in numbers}))


def lengths_near(thresholds: Iterable[int]) -> tuple[int, ...]:
    """Return the lengths at either side of thresholds."""
    return tuple(sorted({threshold + offset for threshold in thresholds for offset in (-1, 0, 1, 3)}))


def _numbers(constant: np.ndarray | None) -> set[float]:
    """Return the numbers of a constant that may be thresholds, and the reciprocal of a single one."""
    if constant is None or constant.dtype.kind not in "iuf":
        return set()
    numbers = np.unique(constant.astype(np.float64))
    if constant.dtype.kind == "f":
        numbers = numbers[numbers > 0]  # a negative one masks scores, and is compared with no length
    numbers = np.abs(numbers[(numbers != 0) & np.isfinite(numbers)])
    if constant.size == 1:
        numbers = np.append(numbers, 1 / numbers)
    return {float(number) for number in numbers if 1 <= number < MAX_LENGTH} if len(numbers) <= MAX_NUMBERS else set()


def _tables(values: Iterable[ir.Value | None]) -> Iterator[np.ndarray]:
    """Yield the constant tables of which context reads a square part, such as a mask."""
    for value in upstream(values, inputs=content_inputs):
        tensor = constant_tensor(value)
        shape = () if tensor is None else tuple(int(size) for size in tensor.shape.numpy())
        if tensor is None or len(shape) < 2 or min(shape[-2:]) < SMALLEST_TABLE or tensor.size > MAX_TABLE:
            continue
        if tensor.dtype.is_string():
            continue
        try:
            yield np.asarray(tensor.numpy())
        except (OSError, ValueError):  # its file is missing
            continue


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
    found = [row for row, one in enumerate(ranges) if one != usual]
    return found if len(found) <= MAX_ROWS else [found[place * len(found) // MAX_ROWS] for place in range(MAX_ROWS)]
