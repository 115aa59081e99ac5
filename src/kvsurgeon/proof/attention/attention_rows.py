"""Rows of attention weights, at lengths that are too long to compute them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.probe_inputs import Rows
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.proof.attention.attention_inputs import check_rows_with_other_inputs
from kvsurgeon.proof.attention.attention_masks import check_content_masks_in_rows, check_masked_rows
from kvsurgeon.proof.attention.attention_probe import AttentionProbe
from kvsurgeon.proof.context_scan import changing_lengths, changing_positions
from kvsurgeon.proof.first_call import check_first_call_rows
from kvsurgeon.proof.length_sweep import check_prefix_stable, first_tokens
from kvsurgeon.proof.row_checks import affordable, blocks, longest_passing, spans
from kvsurgeon.proof.row_runner import RowRunner
from kvsurgeon.symbolic.sequence_axes import Axes, Length, SequenceAxis

FEW_TOKENS = 8  # near a threshold of fewer tokens, the masks of short texts already leave and hide as many
MIN_PROVED_LENGTH = 1024  # tokens: rows of a shorter text, if longer ones are too large to run, prove nothing beyond it


@dataclass(kw_only=True)
class RowResults:
    """Results of checking rows of the weights of long texts.

    Attributes:
        checked: The longest length in tokens at which rows were checked.
        limit: The longest length at which they are right, if that is a limit.
        weights: The weights that some queries give to equal scores at that length, [..., key], by query.
        leak: Whether a masked query without a key attends to later keys.
        attend: Whether masked keys are attended to.
    """

    checked: int
    limit: int | None = None
    weights: dict[int, np.ndarray] = field(default_factory=dict)
    leak: bool = False
    attend: bool = False


def check_rows(probe: AttentionProbe, passed: int) -> RowResults:
    """Check rows of the weights at the lengths that are too long to compute all rows.

    Args:
        probe: The probe of the attention.
        passed: The longest length at which all rows were checked.
    """
    nodes = probe.site.upstream_of_weights | probe.site.upstream_of(value for value, _ in probe.others)
    if probe.site.fused is not None:
        nodes |= {probe.site.fused.node}
    proved = not any(node in nodes for node, _ in probe.sweep.unproved)
    thresholds, changing = _thresholds(probe, nodes, proved=proved) if probe.sweep.longest > passed else ([], [])
    totals = probe.sweep.totals(passed, thresholds, proved=proved)
    try:
        runner = RowRunner(probe.sweep.analysis, probe.runner, probe.axes, probe.site)
    except UnsupportedError:
        return RowResults(checked=passed, limit=passed)
    results = RowResults(checked=passed)
    if not totals:
        return results
    totals = affordable(totals, runner.elements, any_length=proved)
    needed = min(probe.sweep.longest, max([MIN_PROVED_LENGTH, *(length + 1 for length in thresholds)]))
    scales = sorted({0.0, 1.0, probe.largest_scale(passed), *probe.scales_of_compared})
    reach = min((total for total in totals if changing and total > changing[-1]), default=max(totals, default=0))

    def check(total: int) -> None:
        for rows in spans(total, thresholds, runner.elements, len(totals)):
            weights = _check_span(probe, runner, rows, scales, stable=proved and not probe.others)
            if proved and (rows.start not in thresholds or rows.start < FEW_TOKENS):
                continue
            check_rows_with_other_inputs(probe, runner, rows)
            check_content_masks_in_rows(probe, runner, rows)
            if probe.runner.masks:
                leak, attend = check_masked_rows(probe, runner, rows, weights, stable=proved)
                results.leak, results.attend = results.leak or leak, results.attend or attend
        check_first_call_rows(probe, runner, list(spans(total, thresholds, runner.elements, len(totals))), scales)
        for rows in blocks(changing if total <= reach else (), total, runner.elements):
            probe.check_causal(probe.compared(runner.run(rows, scale=0.0), rows)[0], rows.start)

    checked, failed = longest_passing(check, totals, passed)
    probe.sweep.add_failure(checked, failed)
    near = (length for length in thresholds if passed <= length < checked)
    for query in sorted({checked // 2, checked - 2, checked - 1, *near}):
        row = Rows(query, query + 1, checked)
        results.weights[query] = probe.compared(runner.run(row, scale=0.0), row)[0][..., 0, :]
    results.checked, results.limit = checked, None if proved and failed is None and checked >= needed else checked
    return results


def _thresholds(probe: AttentionProbe, nodes: Iterable[ir.Node], *, proved: bool) -> tuple[list[int], list[int]]:
    """Return the positions and the lengths at which the weights that these nodes compute may change.

    Also return all queries for which context is not what it is for the query before.
    """
    flow, demands = probe.sweep.flow, probe.sweep.flow.demands
    values: list[ir.Value] = []
    by_query: dict[ir.Value, Axes] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is None or is_token(flow, value):
                continue
            values.append(value)
            axes = demands.get((node, index), ())
            if flow.kinds.get(value) is ValueKind.CONTEXT and any(_is_of_queries(axis) for axis in axes):
                by_query[value] = axes
    places, differs = changing_positions(probe.sweep, by_query)
    lengths = set() if proved else changing_lengths(probe.sweep, values)
    thresholds = {*probe.sweep.thresholds(values), *places, *lengths}
    return sorted(thresholds), [int(query) for query in np.flatnonzero(differs)]


def _check_span(
    probe: AttentionProbe, runner: RowRunner, rows: Rows, scales: Sequence[float], *, stable: bool
) -> np.ndarray:
    """Return rows of the weights for the first scale that attend to no later key.

    Unless they are known to be stable, they are the same without later tokens.

    Args:
        probe: The probe of the attention.
        runner: Computes the rows.
        rows: The rows.
        scales: Scales of the scores, the least first.
        stable: Whether the rows are known to be the same without later tokens.
    """
    longer = [probe.compared(runner.run(rows, scale=scale), rows) for scale in scales]
    for weights, *_ in longer:
        probe.check_causal(weights, rows.start)
    alone = Rows(rows.start, rows.stop, rows.stop)
    shorter = [] if stable else [probe.compared(runner.run(alone, scale=scale), alone) for scale in scales]
    for (weights, *others), (same, *without) in zip(longer, shorter, strict=False):
        probe.check_stable(weights[..., : rows.stop], same)
        for (value, axes), long, short in zip(probe.others, others, without, strict=True):
            first = first_tokens(long, axes, rows.stop)
            check_prefix_stable("reductions of attention scores", first, short, at=value, layer=probe.layer)
    return longer[0][0]


def _is_of_queries(axis: SequenceAxis) -> bool:
    return axis.variable.resolved() is Length.NEW
