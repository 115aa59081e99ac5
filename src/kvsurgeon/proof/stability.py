"""Prefix stability: the values of context at a position do not depend on the number of later tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.mask_patterns import (
    MaskPattern,
    first_half,
    is_close,
    learned_rows_first,
    left_padded,
    padded_with_gaps,
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
from kvsurgeon.symbolic.sequence_axes import Axes, Length

_LENGTH_OF_SEQUENCES = 40  # tokens of two sequences that are compared with each other
_USUAL = Inputs()

Run = Callable[..., list[np.ndarray]]  # text, mask and sequence -> values
Arrays = list[np.ndarray]  # for each value of context, in order; its learned rows, if it has any, are behind all others


def find_limit(sweep: LengthSweep) -> int | None:
    """Compare every value of context that token data reads outside attention scores at several lengths.

    All rows are compared at short lengths. Values that may depend on the length by value are compared row by row up to
    the longest text. If values change at masked tokens only, that is recorded in the sweep. The rows of constant tables
    that are read by position bound the length; these bounds are added to the sweep.

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
    compared = _Compared(sweep, values)
    others = other_inputs(sweep, runner.masks, (max(sweep.lengths),)) if unproved else []
    limits: list[int] = []
    for inputs in [*others, *masked_inputs(runner.masks, runner.maskable_sequences)]:
        results = _results(sweep, runner, compared, inputs)
        if inputs not in others:
            sweep.bounds |= _table_bounds([rows.get(value) for value in values], results)
        limits += _limit_of(sweep, runner, compared, inputs, results)
    length = sweep.fixed or min(max(results), _LENGTH_OF_SEQUENCES)
    _check_sequences(runner, runner.run, [length])
    if limits:
        return min(limits)
    if sweep.fixed is not None:
        if runner.masks:
            whole = Rows.of_text(sweep.fixed)
            arrays = [compared.arrays(runner.run(sweep.fixed, mask), whole) for mask in (unmasked, first_half)]
            compared.check(arrays[0], arrays[1], Rows(0, sweep.fixed // 2, sweep.fixed))
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

    lengths = sweep.context_lengths(list(compared.values))
    if not compared.has_one_mask:  # else values of padding alone may differ
        lengths = [one for one in lengths if one == 1 or int(inputs.mask(one).sum()) > 1]
    if inputs.number is None:
        return sweep.run(lengths, run)
    results = {}
    for length in lengths:
        with suppress(UnsupportedError):  # no row of a table has this index
            results[length] = run(length)
    return results


def _limit_of(
    sweep: LengthSweep, runner: SubgraphRunner, compared: _Compared, inputs: Inputs, results: Mapping[int, Arrays]
) -> list[int]:
    """Return the longest of some lengths up to which the values are stable; [] if they are at all of them.

    Raises:
        UnsupportedError: A value changes below the minimum useful length.
    """
    for previous, length in pairwise(results):
        try:
            if compared.check(results[length], results[previous], Rows(0, previous, length), inputs):
                _check_sequences(runner, runner.run, [length, previous])
        except UnsupportedError as error:
            if previous < MIN_USEFUL_LENGTH:
                raise _with_cause(error, inputs) from error
            sweep.add_failure(previous, error)
            return [previous]
    return []


def _with_cause(error: UnsupportedError, inputs: Inputs) -> UnsupportedError:
    """Return an error that names the masked tokens, if values do not change without such that follow others."""
    if inputs.mask not in (with_gaps, padded_with_gaps):
        return error
    return UnsupportedError(
        "values of context change if a later token is masked, so cached keys would become invalid", code=error.code,
        at=error.at, expected="the same value for a position whichever later tokens are masked", found=error.found,
        hint="count the tokens up to each one, as attention_mask.cumsum(1) does, not the masked tokens of the text",
    )  # fmt: skip


def _check_sequences(whole: SubgraphRunner, run: Run, texts: Iterable[int | Rows]) -> None:
    """Check that what a value holds for a sequence does not depend on whether the other one has masked tokens.

    Args:
        whole: Runner of the values at all rows.
        run: Returns the values in one text, for a mask.
        texts: The texts.

    Raises:
        UnsupportedError: It does.
    """
    masked = whole.maskable_sequences
    for text in texts if masked else ():
        none, both = run(text), run(text, left_padded)
        first, second = (run(text, left_padded, only_sequence=sequence) for sequence in masked)
        for value, *arrays in zip(whole.outputs, none, first, second, both, strict=True):
            axis = batch_axis(whole.flow.shapes[value].shape)
            halves = [[one, one] if axis is None else np.array_split(one, 2, axis) for one in arrays]
            (none0, none1), (first0, first1), (second0, second1), (both0, both1) = halves
            pairs = [(none0, second0), (first0, both0), (none1, first1), (second1, both1)]
            if not all(is_close(one, other) for one, other in pairs):
                raise UnsupportedError(
                    "the mask of one sequence changes another sequence of the batch",
                    code=Code.BATCH_LEAK, at=value.name,
                    expected="the same values next to a padded sequence", hint="export with a batch of 1",
                )  # fmt: skip


def _check_rows(sweep: LengthSweep, values: dict[ir.Value, Axes], passed: int) -> int | None:
    """Compare rows of values that may depend on the length, up to the longest text.

    Returns:
        The longest length up to which they are stable; None if there are no such values.
    """
    if not values:
        return None
    whole, compared = sweep.runner(list(values)), _Compared(sweep, values)
    try:
        runner = RowRunner(sweep.analysis, whole, list(values.values()))
    except UnsupportedError:
        return passed
    thresholds = sorted({*sweep.thresholds(values), *changing_lengths(sweep, values)})
    totals = affordable(sweep.totals(passed, thresholds, proved=False), runner.elements)

    def check(total: int) -> None:
        for rows in spans(total, thresholds, runner.elements, len(totals)):
            masked = masked_inputs(whole.masks, whole.maskable_sequences, padding=rows.start)
            for inputs in [*masked, *other_inputs(sweep, whole.masks, (rows.start, total))]:
                texts = [Rows(rows.start, rows.stop, end, inputs.batch) for end in (total, rows.stop)]
                found = [arrays for one in texts if (arrays := _rows_of(runner, compared, one, inputs)) is not None]
                if len(found) == 2 and compared.check(found[0], found[1], texts[0], inputs):
                    _check_sequences(whole, runner.run, texts)

    longest, failed = longest_passing(check, totals, passed)
    sweep.add_failure(longest, failed)
    return longest


def _rows_of(runner: RowRunner, compared: _Compared, rows: Rows, inputs: Inputs) -> Arrays | None:
    """Return rows of the arrays to compare in a text; None if no table has a row for a number."""
    try:
        arrays = runner.run(rows, inputs.mask, only_sequence=inputs.sequence, number=inputs.number)
        return compared.arrays(arrays, rows)
    except UnsupportedError:
        if inputs.number is None:
            raise
        return None


class _Compared:
    """Values of context with their sequence axes last; learned rows of a value are compared apart."""

    def __init__(self, sweep: LengthSweep, values: Mapping[ir.Value, Axes]) -> None:
        self.values = values
        self._sweep = sweep
        masks = [given.lengths for given in sweep.flow.inputs if given.lengths and not given.is_token]
        self.has_one_mask = len(masks) == 1 and len(masks[0]) == 1  # attention masks the tokens that others mask
        self.learned = [value for value, axes in values.items() if any(axis.learned_rows for axis in axes)]
        self.compared = list(values.items())
        for value in self.learned:
            self.compared.append((value, tuple(axis for axis in values[value] if not axis.learned_rows)))

    def arrays(self, arrays: Arrays, rows: Rows) -> Arrays:
        """Return the arrays to compare."""
        found = dict(zip(self.values, arrays, strict=True))
        tokens = [sequence_last(array, self.values[value], rows) for value, array in found.items()]
        return tokens + [learned_rows_first(found[value], self.values[value], rows) for value in self.learned]

    def check(self, longer: Arrays, shorter: Arrays, rows: Rows, inputs: Inputs = _USUAL) -> bool:
        """Check that tokens are the same in a longer text and in one that ends after them.

        If one input masks tokens, those that it masks may differ, which is recorded in the sweep.

        Args:
            longer: The arrays in the longer text.
            shorter: The arrays in the shorter text.
            rows: The tokens that both have, and the length of the longer text.
            inputs: Contents of the inputs.

        Returns:
            Whether tokens differ that are masked in one sequence: the other one must be checked.

        Raises:
            UnsupportedError: Others differ.
        """
        changed, mask = None, inputs.mask if self.has_one_mask else unmasked
        for (value, axes), long, short in zip(self.compared, longer, shorter, strict=True):
            first = [first_tokens(array, axes, rows.stop) for array in (long, short)]
            visible = [_visible(array, axes, rows, mask) for array in first]
            check_prefix_stable(_name_of(value), visible[0], visible[1], at=value)
            changed = changed if is_close(first[0], first[1]) else value.name
        self._sweep.changed_at_masked = self._sweep.changed_at_masked or changed
        return changed is not None and inputs.sequence is not None


def _visible(array: np.ndarray, axes: Axes, rows: Rows, mask: MaskPattern) -> np.ndarray:
    """Return the tokens of an array that are not masked; all if the array does not have one element for each token."""
    if len(axes) != 1 or axes[0].most is not None:
        return array
    start = rows.start if axes[0].variable.resolved() is Length.NEW else 0
    visible = mask(rows.total)[start : rows.stop]
    return array[..., visible] if array.shape[-1] == len(visible) else array


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
