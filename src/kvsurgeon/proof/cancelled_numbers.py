"""Numbers of the total length that cancel where queries meet keys, such as the middle of the text in xPos.

xPos scales queries by a power of their distance from the middle of the text, and keys by its inverse: each depends on
the length, and their product does not. Such a number is replaced by 0, after which cached keys stay valid. That it
cancels is measured: scores are computed with other numbers in its place, beyond all that the model will have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis, analyze
from kvsurgeon.analysis.mask_patterns import is_close
from kvsurgeon.analysis.probe_inputs import Rows
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.thresholds import Thresholds, lengths_near
from kvsurgeon.analysis.token_data import is_token, token_inputs
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import downstream, upstream
from kvsurgeon.ops.content import is_shape_only
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.proof.length_dependence import LengthDependence

LONGEST = 1 << 14  # tokens: the model ends with an error beyond
NUMBERS = (0, 1, -1, 5, -6, 100, -1000, 1024, LONGEST // 2, -LONGEST // 2, LONGEST, -LONGEST)
LENGTHS = (1, 2, 7, 40, 129)  # tokens


@dataclass(frozen=True, kw_only=True)
class _Scaled:
    """Values that a number has an effect on.

    Attributes:
        affected: The values of context that depend on the number.
        context: Those of them that token data reads.
        tokens: The token data that these are combined with.
        scores: The products of queries and keys that all of it ends in.
    """

    affected: list[ir.Value]
    context: list[ir.Value]
    tokens: list[ir.Value]
    scores: list[ir.Value]


def without_cancelled_numbers(analysis: Analysis) -> Analysis:
    """Return the analysis of a copy of the model without numbers that cancel; the analysis itself if there are none."""
    if isinstance(analysis.length, int):
        return analysis
    number = next((one for one in _numbers_of_length(analysis) if _cancels(analysis, one)), None)
    if number is None:
        return analysis
    try:
        changed = without_cancelled_numbers(analyze(_with_zero(analysis, number)))
    except UnsupportedError:
        return analysis
    changed.shapes.bounds.add(LONGEST)
    return changed


def _with_zero(analysis: Analysis, number: ir.Value) -> ir.Model:
    """Return a copy of the model with 0 in place of a number."""
    model = copy_model(analysis.model)
    editor = Editor(model)
    (same,) = (value for node in model.graph for value in node.outputs if value.name == number.name)
    content = _filled(analysis, number, 0)
    zero = editor.constant(content, content.dtype, name="cancelled")
    for node, index in list(same.uses()):
        editor.replace_input(node, index, zero)
    editor.finish()
    return model


def _filled(analysis: Analysis, number: ir.Value, content: int) -> np.ndarray:
    """Return an array of the shape and type of a number."""
    fact = analysis.shapes[number]
    return np.full([1] * (fact.rank or 0), content, (fact.dtype or ir.DataType.INT64).numpy())


def _numbers_of_length(analysis: Analysis) -> Iterator[ir.Value]:
    """Yield the single numbers that may depend on the length, and that values for each position are computed with."""
    dependence = LengthDependence(analysis)
    unproved = {place[0].inputs[place[1]] for place in dependence.unproved()}
    for value in upstream(unproved, stop=lambda one: one not in dependence.causes):
        shape = analysis.shapes[value].shape
        if value in dependence.causes and shape is not None and all(size == 1 for size in shape):
            users = [node for node, _ in value.uses() if has_trait(node, Trait.BROADCAST)]
            if any(size != 1 for node in users for size in analysis.shapes[node.outputs[0]].shape or ()):
                yield value


def _cancels(analysis: Analysis, number: ir.Value) -> bool:
    """Return whether scores are the same for all numbers, and nothing else depends on it."""
    scaled = _scaled(analysis, number)
    if scaled is None:
        return False
    try:
        runner = SubgraphRunner(analysis.flow, [*scaled.context, *scaled.scores], probed=scaled.tokens, given=[number])
        computed = {value.name for value in (*scaled.affected, *scaled.scores)}
        if not computed.isdisjoint(runner.inputs.types):
            return False  # one is fed as it is for the length, whatever the number is
        near = lengths_near(Thresholds(analysis.flow).find(scaled.context))
        numbers = (*NUMBERS, *near, *(-one for one in near))
        return all(_is_same(analysis, runner, number, numbers, len(scaled.context), length) for length in LENGTHS)
    except UnsupportedError:
        return False


def _is_same(
    analysis: Analysis, runner: SubgraphRunner, number: ir.Value, numbers: Sequence[int], count: int, length: int
) -> bool:
    """Return whether the first outputs, of context, change with the number, and the others, scores, do not."""
    runs: list[Sequence[np.ndarray]] = []
    for one in numbers:
        runner.inputs.give(number.name or "", partial(_given, _filled(analysis, number, one)))
        runs.append(runner.run(length))
    effective = all(any(not np.array_equal(run[index], runs[0][index]) for run in runs) for index in range(count))
    scores = [array for run in runs for array in run[count:]]
    finite = all(np.isfinite(array).all() for array in scores)
    same = all(is_close(one, other) for run in runs for one, other in zip(run[count:], runs[0][count:], strict=True))
    return effective and finite and same


def _given(array: np.ndarray, _rows: Rows) -> np.ndarray:
    return array


def _scaled(analysis: Analysis, number: ir.Value) -> _Scaled | None:
    """Return what a number has an effect on; None if it is more than the scores of attention."""
    flow = analysis.flow
    by_value = {score.node.outputs[0]: score for site in analysis.sites for score in site.scores}
    affected = list(downstream([number], stop=lambda node: is_shape_only(node) or is_token(flow, node.outputs[0])))
    read = {value: [node for node, _ in value.uses() if is_token(flow, node.outputs[0])] for value in affected}
    nodes = [node for users in read.values() for node in users]
    if any(value.is_graph_output() for value in affected) or not nodes:
        return None
    scaled = [node.outputs[0] for node in nodes]
    results = list(downstream(scaled, stop=lambda node: is_shape_only(node) or node.outputs[0] in by_value))
    if any(value.is_graph_output() or value in by_value for value in results):
        return None
    scores = {node.outputs[0] for value in results for node, _ in value.uses() if node.outputs[0] in by_value}
    tokens = {value for node in nodes for value in token_inputs(flow, node) if value not in results}
    context = [value for value, users in read.items() if users]
    return _Scaled(affected=affected[1:], context=context, tokens=list(tokens), scores=list(scores))
