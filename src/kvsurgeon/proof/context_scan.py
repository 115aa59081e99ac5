"""Context scan: the positions and the lengths at which context changes, found by computing it at each of them.

A threshold need not be a constant that something is compared with: it may be hidden in a table, a rounding or an
overflow. What is found says only where to look closely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.mask_patterns import sequence_last
from kvsurgeon.analysis.probe_inputs import Rows
from kvsurgeon.analysis.thresholds import SCANNED, changes, lengths_of_change, longest_running
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import SMALL
from kvsurgeon.graph.query import upstream
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.proof.length_sweep import MAX_ATTENTION_LENGTH, LengthSweep
from kvsurgeon.proof.row_checks import MAX_RUN
from kvsurgeon.proof.row_runner import RowRunner
from kvsurgeon.symbolic.dimension import BATCH, Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length

MAX_ELEMENTS = 34 << 20  # of a value, of which every row is computed: masks of 4,097 tokens for two sequences
MAX_BLOCK = 1 << 22  # elements of a block of rows
MAX_ELEMENTS_OF_LENGTHS = 1 << 31  # of the numbers at all lengths: if they are sums over a whole mask, of 1,024 tokens


def changing_positions(sweep: LengthSweep, values: Mapping[ir.Value, Axes]) -> tuple[list[int], np.ndarray]:
    """Return the positions near which context may change, and the queries of which all weights should be computed.

    The positions at which this begins or ends are added to the changes of the sweep.

    Args:
        sweep: The length sweep of the decoder.
        values: Values of context with their sequence axes, of which one is that of the queries.

    Returns:
        The positions at which context of a query begins or ceases to be what it is for the query before, one token
        later, and [query] of bool: where it is not. A value without keys that differs at most positions is a table of
        positions, and says nothing about a query.
    """
    places: set[int] = set()
    found = np.zeros(SCANNED + 1, dtype=bool)
    for value, axes in values.items():
        differs = _differing_queries(sweep, value, axes)
        places |= set(changes(differs))
        if _has_keys(axes) or 2 * differs.sum() < len(differs):
            found[: len(differs)] |= differs
    sweep.changes |= places
    return sorted(places), found


def _differing_queries(sweep: LengthSweep, value: ir.Value, axes: Axes) -> np.ndarray:
    """Return [query] of bool for one value; see `changing_positions`."""
    try:
        runner = RowRunner(sweep.analysis, sweep.runner([value]), [axes])
        longest = min(sweep.longest, SCANNED)
        while longest > 1 and _is_too_large(runner, longest):
            longest //= 2
        return _differing_rows(runner, axes, longest_running(_first_row(runner), longest))
    except UnsupportedError:  # it is computed with the weights, or not at all
        return np.zeros(1, dtype=bool)


def changing_lengths(sweep: LengthSweep, values: Iterable[ir.Value]) -> set[int]:
    """Return the total lengths at either side of which a number of context begins or ceases to change.

    They are added to the changes of the sweep, which ends at the longest length that is looked at if that is too
    expensive for longer ones.

    Args:
        sweep: The length sweep of the decoder.
        values: Values of context.
    """
    numbers = _numbers_of_length(sweep, values)
    if not numbers:
        return set()
    try:
        runner = RowRunner(sweep.analysis, sweep.runner(numbers), [()] * len(numbers))
        run, longest = _first_row(runner), min(sweep.longest, SCANNED)
        while (
            longest > 2 * MAX_ATTENTION_LENGTH
            and longest * runner.elements(Rows(0, 1, longest)) > MAX_ELEMENTS_OF_LENGTHS
        ):
            longest //= 2
            sweep.end_at(longest)
        runs = [run(length) for length in range(1, longest_running(run, longest) + 1)]
    except UnsupportedError:
        return set()
    lengths: set[int] = set().union(*(lengths_of_change(arrays) for arrays in zip(*runs, strict=True)))
    sweep.changes |= lengths
    return lengths


def _first_row(runner: RowRunner) -> Callable[[int], list[np.ndarray]]:
    """Return a function that computes the first row at a total length."""
    return lambda total: runner.run(Rows(0, 1, total))


def _numbers_of_length(sweep: LengthSweep, values: Iterable[ir.Value]) -> list[ir.Value]:
    """Return the numbers that depend on the length, and that values with a sequence axis are computed from."""
    flow, wanted = sweep.flow, dict.fromkeys(values)
    for value in list(upstream(wanted, inputs=content_inputs)):
        node = value.producer()
        if node is not None and flow.kinds.get(value) is ValueKind.CONTEXT and not _is_small(flow.shapes[value].shape):
            wanted |= dict.fromkeys(content_inputs(node))
    return [value for value in wanted if sweep.depends_on_length(value) and _is_small(flow.shapes[value].shape)]


def _is_small(shape: Sequence[Dimension] | None) -> bool:
    """Return whether a tensor has the same few elements at every length."""
    sizes = [1 if size is BATCH else size for size in shape or ()]
    return shape is not None and math.prod(size if isinstance(size, int) else SMALL for size in sizes) < SMALL


def _is_too_large(runner: RowRunner, total: int) -> bool:
    largest = MAX_ELEMENTS if _is_sliced(runner, total) else MAX_RUN
    return runner.elements(Rows.of_text(total)) > largest


def _is_sliced(runner: RowRunner, total: int) -> bool:
    """Return whether a run of a row costs less than one of all rows: else all are computed, whichever are wanted."""
    return runner.elements(Rows(0, 1, total)) * 8 < runner.elements(Rows.of_text(total))


def _has_keys(axes: Axes) -> bool:
    return any(axis.variable.resolved() is not Length.NEW for axis in axes)


def _differing_rows(runner: RowRunner, axes: Axes, total: int) -> np.ndarray:
    """Return [total] of bool: whether a query's later keys are not those of the query before, moved by one token."""
    differs = np.zeros(total, dtype=bool)
    row = runner.elements(Rows(0, 1, total))
    count = max(2, min(total, MAX_BLOCK // max(1, row))) if _is_sliced(runner, total) else total
    for start in range(0, total - 1, max(1, count - 1)):
        rows = Rows(start, min(start + count, total), total)
        array = sequence_last(runner.run(rows)[0], axes, rows)
        if _has_keys(axes):
            later = array[..., start + 1 :]  # than the first query
            unequal = later[..., 1:, 1:] != later[..., :-1, :-1]
            unequal = np.triu(unequal.any(axis=tuple(range(unequal.ndim - 2)))).any(axis=-1)
        else:
            unequal = array[..., 1:] != array[..., :-1]
            unequal = unequal.any(axis=tuple(range(unequal.ndim - 1)))
        differs[start + 1 : rows.stop] = unequal
    return differs
