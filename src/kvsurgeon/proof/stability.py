"""Obligation (iii): what context says of a position does not depend on how many tokens follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.mask_patterns import (
    Pattern,
    all_seen,
    beside_border,
    border_of,
    cut_short,
    has_border,
    left_padded,
    unfolded,
    with_holes,
)
from kvsurgeon.analysis.subgraph_runner import downstream
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.proof.causality import beside_weights
from kvsurgeon.proof.length_sweep import USEFUL, LengthSweep, check_same, first
from kvsurgeon.symbolic.sequence_axes import Axes


@dataclass(frozen=True, kw_only=True)
class _Meeting:
    """Where context meets tokens outside the scores."""

    axes: Axes  # that hold tokens
    rows: int | None = None  # of the table of weights that the context picks from, where it is positions


def find_limit(trial: LengthSweep) -> int | None:
    """Compare every context value that meets tokens outside the scores at several lengths.

    What is picked from tables of weights bounds the lengths that the decoder's shapes know of.

    Returns:
        The longest total length up to which all are stable; None where none changes at any length.

    Raises:
        UnsupportedError: One changes at lengths that matter.
    """
    meetings = _meetings(trial)
    if not meetings:
        return None
    experiment = trial.experiment(list(meetings))
    bordered = {value: beside_border(met.axes) for value, met in meetings.items() if has_border(met.axes)}
    looked_at = [*((value, met.axes) for value, met in meetings.items()), *bordered.items()]

    def look(length: int, seen: Pattern) -> list[np.ndarray]:
        arrays = dict(zip(meetings, trial.run(experiment, length, seen), strict=True))
        tokens = [unfolded(array, meetings[value].axes, length) for value, array in arrays.items()]
        return tokens + [border_of(arrays[value], meetings[value].axes, length) for value in bordered]

    def compare(longer: list[np.ndarray], shorter: list[np.ndarray], length: int) -> None:
        for (value, axes), long, short in zip(looked_at, longer, shorter, strict=True):
            check_same(None, value, first(long, axes, length), first(short, axes, length))

    for seen in (all_seen, left_padded, with_holes) if experiment.masks else (all_seen,):
        lengths = [length for length in trial.further([*meetings]) if seen(length).sum() > 1 or length == 1]
        found = trial.as_far_as_it_runs(lengths, lambda length, seen=seen: look(length, seen))  # type: ignore[misc]
        trial.flow.shapes.bounds.update(_bounds([*meetings.values()], found))
        for previous, length in pairwise(found):
            try:
                compare(found[length], found[previous], previous)
            except UnsupportedError:
                if previous < USEFUL:
                    raise
                return previous
    if trial.fixed is not None and experiment.masks:
        compare(look(trial.fixed, all_seen), look(trial.fixed, cut_short), trial.fixed // 2)
    return None


def _bounds(meetings: Sequence[_Meeting], found: Mapping[int, list[np.ndarray]]) -> Iterator[int]:
    """Yield for how many tokens each table has rows, where positions rise by one with every token."""
    if len(found) < 2:
        return
    (short, before), (long, after) = sorted(found.items())[-2:]
    for met, fewer, more in zip(meetings, before, after, strict=False):  # borders come last
        if met.rows is not None and int(more.max()) - int(fewer.max()) == long - short:
            yield met.rows - (int(more.max()) - (long - 1))


def _meetings(trial: LengthSweep) -> dict[ir.Value, _Meeting]:
    """Context that meets tokens outside the scores."""
    inside = _inside(trial)
    found: dict[ir.Value, _Meeting] = {}
    for node in trial.flow.order:
        if (
            node in inside
            or node in trial.flow.routed_regions
            or node in trial.flow.recalling
            or not any(trial.flow.kinds.get(value) is ValueKind.TOKEN for value in node.outputs)
        ):
            continue
        for index, value in enumerate(node.inputs):
            if value is None or trial.flow.kinds.get(value) is not ValueKind.CONTEXT:
                continue
            if trial.flow.targets.get(node) == index or (node, index) in trial.flow.parameters:
                continue
            if (node, index) in trial.flow.addresses:
                continue
            axes = trial.flow.demands.get((node, index), ())
            value, met = _positions(trial, trial.analysis.same.get(value, value), axes)
            if met.axes or not _is_fixed(trial, value):
                before = found.setdefault(value, met)
                rows = [rows for rows in (before.rows, met.rows) if rows is not None]
                found[value] = replace(before, rows=min(rows, default=None))
    return found


def _is_fixed(trial: LengthSweep, value: ir.Value) -> bool:
    numbers = trial.flow.shapes[value].value
    return numbers is not None and not any(getattr(number, "free_symbols", ()) for number in numbers.reshape(-1))


def _positions(trial: LengthSweep, value: ir.Value, axes: Axes) -> tuple[ir.Value, _Meeting]:
    """Rows of a table of weights are as stable as the positions that pick them."""
    node = value.producer()
    while node is not None and node.op_type in ("Gather", "Cast", "Identity"):
        source = node.inputs[0]
        if node.op_type != "Gather":
            if source is None or trial.flow.kinds.get(source) is not ValueKind.CONTEXT:
                break
            value, node = source, source.producer()
            continue
        tensor, picked = constant_tensor(source), node.inputs[1]
        axis = next(iter(node.attributes.values())).value if node.attributes else 0
        if tensor is None or picked is None or axis != 0 or trial.flow.kinds.get(picked) is not ValueKind.CONTEXT:
            break
        rank = trial.flow.shapes[picked].rank or 0
        if any(held.axis >= rank for held in axes):
            break
        return trial.analysis.same.get(picked, picked), _Meeting(axes=axes, rows=int(tensor.shape.numpy()[0]))
    return value, _Meeting(axes=axes)


def _inside(trial: LengthSweep) -> set[ir.Node]:
    """Nodes between scores and weights, or what else is made of scores over keys, which are looked at as a whole."""
    inside: set[ir.Node] = set()
    for head in trial.analysis.heads:
        behind = {node for value in downstream(head.stand_ins, head.ends) if (node := value.producer())}
        inside |= behind & (head.upstream_of_weights() | head.upstream_of(beside_weights(trial, head)))
    return inside
