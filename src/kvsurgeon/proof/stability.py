"""Prefix stability: the values of context at a position do not depend on the number of later tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.mask_patterns import (
    first_half,
    is_close,
    learned_rows_first,
    left_padded,
    sequence_last,
    unmasked,
    with_gaps,
)
from kvsurgeon.analysis.probe_inputs import Rows, batch_axis
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.query import downstream, producer_of, producers, through, upstream
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.proof.causality import other_reductions
from kvsurgeon.proof.context_scan import changing_lengths
from kvsurgeon.proof.first_call import check_readers
from kvsurgeon.proof.length_sweep import MIN_USEFUL_LENGTH, LengthSweep, check_prefix_stable, first_tokens
from kvsurgeon.proof.other_inputs import Inputs, masked_inputs, other_inputs
from kvsurgeon.proof.row_checks import affordable, longest_passing, spans
from kvsurgeon.proof.row_runner import RowRunner
from kvsurgeon.symbolic.sequence_axes import Axes

_LENGTH_OF_SEQUENCES = 40  # tokens of two sequences that are compared with each other

Arrays = list[np.ndarray]  # for each value of context, in order; its learned rows, if it has any, are behind all others


def find_limit(sweep: LengthSweep) -> int | None:
    """Compare every value of context that token data reads outside attention scores at several lengths.

    All rows are compared at short lengths. Values that may depend on the length by value are compared row by row up to
    the longest text. The rows of constant tables that are read by position bound the length; these bounds are added to
    the sweep.

    Returns:
        The longest total length up to which all values are stable; None if none changes at any length.

    Raises:
        UnsupportedError: A value changes below the minimum useful length.
    """
    check_readers(sweep, _attention_nodes(sweep))
    values, rows, unproved = _context_values(sweep)
    if not values:
        return None
    runner = sweep.runner(list(values))
    compared = _Compared(values)
    others = other_inputs(sweep, runner.masks, (max(sweep.lengths),)) if unproved else []
    for inputs in [*others, *masked_inputs(runner.masks, runner.maskable_sequences)]:
        results = _results(sweep, runner, compared, inputs)
        if inputs not in others:
            sweep.bounds |= _table_bounds([rows.get(value) for value in values], results)
        for previous, length in pairwise(results):
            try:
                compared.check(results[length], results[previous], previous)
            except UnsupportedError as error:
                if previous < MIN_USEFUL_LENGTH:
                    raise _with_cause(error, inputs) from error
                sweep.add_failure(previous, error)
                return previous
    _check_sequences(runner, list(values), min(max(results), _LENGTH_OF_SEQUENCES))
    if sweep.fixed is not None:
        if runner.masks:
            whole, half = Rows.of_text(sweep.fixed), sweep.fixed // 2
            arrays = [compared.arrays(runner.run(sweep.fixed, mask), whole) for mask in (unmasked, first_half)]
            compared.check(arrays[0], arrays[1], half)
        return None
    return _check_rows(sweep, {value: values[value] for value in unproved}, max(results))


def _results(
    sweep: LengthSweep, runner: SubgraphRunner, compared: _Compared, inputs: Inputs
) -> dict[int, list[np.ndarray]]:
    """Return the arrays to compare at each length at which the values run."""

    def run(length: int) -> list[np.ndarray]:
        arrays = runner.run(
            length, inputs.mask, batch=inputs.batch, only_sequence=inputs.sequence, number=inputs.number
        )
        return compared.arrays(arrays, Rows(0, length, length, inputs.batch))

    lengths = [one for one in sweep.context_lengths(list(compared.values)) if _has_tokens(inputs, one)]
    if inputs.number is None:
        return sweep.run(lengths, run)
    results = {}
    for length in lengths:
        with suppress(UnsupportedError):  # no row of a table has this index
            results[length] = run(length)
    return results


def _with_cause(error: UnsupportedError, inputs: Inputs) -> UnsupportedError:
    """Return an error that names the masked tokens, if values do not change without such that follow others."""
    if inputs.mask is not with_gaps:
        return error
    return UnsupportedError(
        "values of context change if a later token is masked, so cached keys would become invalid", code=error.code,
        at=error.at, expected="the same value for a position whichever later tokens are masked", found=error.found,
        hint="count the tokens up to each one, as attention_mask.cumsum(1) does, not the masked tokens of the text",
    )  # fmt: skip


def _check_sequences(runner: SubgraphRunner, values: Sequence[ir.Value], length: int) -> None:
    """Check that what a value holds for a sequence does not depend on whether the other one has masked tokens.

    Raises:
        UnsupportedError: It does.
    """
    masked = runner.maskable_sequences
    if not masked:
        return
    none, both = runner.run(length), runner.run(length, left_padded)
    first, second = (runner.run(length, left_padded, only_sequence=sequence) for sequence in masked)
    for value, *arrays in zip(values, none, first, second, both, strict=True):
        axis = batch_axis(runner.flow.shapes[value].shape)
        halves = [[one, one] if axis is None else np.array_split(one, 2, axis) for one in arrays]
        (none0, none1), (first0, first1), (second0, second1), (both0, both1) = halves
        pairs = [(none0, second0), (first0, both0), (none1, first1), (second1, both1)]
        if not all(is_close(one, other) for one, other in pairs):
            raise UnsupportedError(
                "the mask of one sequence changes another sequence of the batch", code=Code.BATCH_LEAK, at=value.name,
                expected="the same values next to a padded sequence", hint="export with a batch of 1",
            )  # fmt: skip


def _has_tokens(inputs: Inputs, length: int) -> bool:
    return length == 1 or int(inputs.mask(length).sum()) > 1


def _check_rows(sweep: LengthSweep, values: dict[ir.Value, Axes], passed: int) -> int | None:
    """Compare rows of values that may depend on the length, up to the longest text.

    Returns:
        The longest length up to which they are stable; None if there are no such values.
    """
    if not values:
        return None
    whole, compared = sweep.runner(list(values)), _Compared(values)
    try:
        runner = RowRunner(sweep.analysis, whole, list(values.values()))
    except UnsupportedError:
        return passed
    thresholds = sorted({*sweep.thresholds(values), *changing_lengths(sweep, values)})
    totals = affordable(sweep.totals(passed, thresholds, proved=False), runner.elements)

    def check(total: int) -> None:
        for rows in spans(total, thresholds, runner.elements, len(totals)):
            masked = masked_inputs(whole.masks, whole.maskable_sequences)
            for inputs in [*masked, *other_inputs(sweep, whole.masks, (rows.start, total))]:
                found = [_rows_of(runner, compared, end, rows, inputs) for end in (total, rows.stop)]
                if found[0] is not None and found[1] is not None:
                    compared.check(found[0], found[1], rows.stop, keys_only=True)

    longest, failed = longest_passing(check, totals, passed)
    sweep.add_failure(longest, failed)
    return longest


def _rows_of(runner: RowRunner, compared: _Compared, total: int, rows: Rows, inputs: Inputs) -> Arrays | None:
    """Return rows of the arrays to compare in a text of a total length; None if no table has a row for a number."""
    of_text = Rows(rows.start, rows.stop, total, inputs.batch)
    try:
        arrays = runner.run(of_text, inputs.mask, only_sequence=inputs.sequence, number=inputs.number)
        return compared.arrays(arrays, of_text)
    except UnsupportedError:
        if inputs.number is None:
            raise
        return None


class _Compared:
    """Values of context with their sequence axes last; learned rows of a value are compared apart."""

    def __init__(self, values: Mapping[ir.Value, Axes]) -> None:
        self.values = values
        self.learned = [value for value, axes in values.items() if any(axis.learned_rows for axis in axes)]
        self.compared = list(values.items())
        for value in self.learned:
            self.compared.append((value, tuple(axis for axis in values[value] if not axis.learned_rows)))

    def arrays(self, arrays: Arrays, rows: Rows) -> Arrays:
        """Return the arrays to compare."""
        found = dict(zip(self.values, arrays, strict=True))
        tokens = [sequence_last(array, self.values[value], rows) for value, array in found.items()]
        return tokens + [learned_rows_first(found[value], self.values[value], rows) for value in self.learned]

    def check(self, longer: Arrays, shorter: Arrays, length: int, *, keys_only: bool = False) -> None:
        """Check that the first tokens, or the first keys of the same queries, are the same at two lengths.

        Raises:
            UnsupportedError: They differ.
        """
        for (value, axes), long, short in zip(self.compared, longer, shorter, strict=True):
            first = [first_tokens(array, axes, length, keys_only=keys_only) for array in (long, short)]
            check_prefix_stable(_name_of(value), first[0], first[1], at=value)


def _name_of(value: ir.Value) -> str:
    """Return what a value of context is, in the plural: cosines or sines that a product reads are rotary tables."""
    rotary = any(node.op_type == "Mul" or has_trait(node, Trait.ROTARY) for node, _ in value.uses())
    rotary &= any(has_trait(node, Trait.ROTARY) for node in producers(upstream([value])))
    return "rotary frequencies" if rotary else "values of context"


def _table_bounds(rows: list[int | None], results: Mapping[int, Arrays]) -> set[int]:
    """Return the number of tokens that each table has rows for, if its positions rise by one with every token."""
    if len(results) < 2:
        return set()
    (short, before), (long, after) = sorted(results.items())[-2:]
    return {
        count - (int(more.max()) - (long - 1))
        for count, fewer, more in zip(rows, before, after, strict=False)
        if count is not None and int(more.max()) - int(fewer.max()) == long - short
    }


def _context_values(sweep: LengthSweep) -> tuple[dict[ir.Value, Axes], dict[ir.Value, int], set[ir.Value]]:
    """Return the values of context that token data reads outside attention scores, and their sequence axes.

    Also return the number of rows of the smallest table, for positions that are looked up in constant tables, and
    those of the values that are not proved to be stable.
    """
    unproved: set[ir.Value] = set()
    flow, attention = sweep.flow, _attention_nodes(sweep)
    values: dict[ir.Value, Axes] = {}
    rows: dict[ir.Value, int] = {}
    for node in flow.order:
        if (
            node in attention
            or node in flow.routed_regions
            or node in flow.state_nodes
            or not any(is_token(flow, value) for value in node.outputs)
        ):
            continue
        for index, read in enumerate(node.inputs):
            if read is None or flow.kinds.get(read) is not ValueKind.CONTEXT or read in flow.fixed:
                continue
            place = (node, index)
            if flow.targets.get(node) == index or place in flow.parameters or place in flow.addresses:
                continue
            axes = flow.demands.get(place, ())
            value, count = _positions(sweep, sweep.analysis.same.get(read, read), axes)
            if axes or not _is_constant(sweep, value):
                values.setdefault(value, axes)
                if place in sweep.unproved:
                    unproved.add(value)
                if count is not None:
                    rows[value] = min(count, rows.get(value, count))
    return values, rows, unproved


def _is_constant(sweep: LengthSweep, value: ir.Value) -> bool:
    numbers = sweep.flow.shapes[value].value
    return numbers is not None and not any(getattr(number, "free_symbols", ()) for number in numbers.reshape(-1))


def _positions(sweep: LengthSweep, value: ir.Value, axes: Axes) -> tuple[ir.Value, int | None]:
    """Return the positions that a value of context is looked up by, and the number of rows of the constant table.

    The rows are as stable as the positions. Without such a table, return the value.
    """
    kinds, shapes = sweep.flow.kinds, sweep.flow.shapes

    def is_cast(node: ir.Node) -> bool:
        read = node.inputs[0] if has_trait(node, Trait.IDENTITY) else None
        return read is not None and kinds.get(read) is ValueKind.CONTEXT

    source = through(value, is_cast)
    lookup = producer_of(source, "Gather")
    if lookup is None or lookup.attributes.get_int("axis", 0) != 0:
        return source, None
    table, positions = constant_tensor(lookup.inputs[0]), lookup.inputs[1]
    if table is None or positions is None or kinds.get(positions) is not ValueKind.CONTEXT:
        return source, None
    if any(axis.axis >= (shapes[positions].rank or 0) for axis in axes):
        return source, None
    return sweep.analysis.same.get(positions, positions), int(table.shape.numpy()[0])


def _attention_nodes(sweep: LengthSweep) -> set[ir.Node]:
    """Return the nodes between the scores of each attention and its weights or other reductions."""
    nodes: set[ir.Node] = set()
    for site in sweep.analysis.sites:
        below = producers(downstream(site.weight_sources, stop=site.ends.__contains__)).keys()
        others = other_reductions(sweep, site)
        nodes |= below & (site.upstream_of_weights | (site.upstream_of(others) if others else frozenset()))
    return nodes
