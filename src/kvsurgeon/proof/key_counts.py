"""Key counts: the numbers of keys that a fused operator is given, which its decomposition leaves to causality.

Without padding each sequence must have as many keys as tokens, and with padding after the text at least as many as
tokens count: then the numbers hide nothing from the text that causality does not hide. They are run alone, from the
inputs on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.mask_patterns import first_half
from kvsurgeon.analysis.regions.probe_lengths import elements_at
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.thresholds import MAX_LENGTH, Thresholds, lengths_near
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.input_dimensions import declared_dimensions, resolve_inputs
from kvsurgeon.dataflow.input_roles import InputRole, MaskForm, classify_inputs, find_positions
from kvsurgeon.dataflow.value_kinds import classify_values
from kvsurgeon.decompose import DecomposedModel
from kvsurgeon.decompose.fused_node import KeyCount
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import producers, upstream
from kvsurgeon.proof.length_sweep import growing_lengths
from kvsurgeon.proof.row_checks import MAX_RUN, longest_passing
from kvsurgeon.symbolic.dimension import BATCH, Dimension, Extent
from kvsurgeon.symbolic.sequence_axes import Length

_LENGTHS = range(1, 131)  # tokens; beyond, some lengths and those near thresholds
_USUAL = 12  # tokens at which the form of the inputs is found

Check = Callable[[int], None]


def with_checked_key_counts(decomposed: DecomposedModel) -> DecomposedModel:
    """Return the model, which ends where a fused operator is given too few keys.

    Raises:
        UnsupportedError: It is given too few of a short text, or as many as the content of tokens says.
    """
    limits = [_limit(count) for count in {count.value: count for count in decomposed.key_counts}.values()]
    for limit in limits:
        decomposed = decomposed if limit is None else decomposed.limited_to(limit)
    return decomposed


def _limit(count: KeyCount) -> int | None:
    """Return the longest text in tokens of which there are enough keys; None if there is no limit."""
    graph = count.value.graph
    if graph is None or count.value.is_graph_input():
        return None  # the application states it
    flow = _flow(graph, count.value)
    if is_token(flow, count.value):
        raise _unsupported(count, "computed from the tokens", "a number of tokens, or one of unmasked tokens")
    runner = SubgraphRunner(flow, [count.value])
    check = _check_in_form(count, runner)
    if isinstance(flow.length, int):
        check(flow.length)
        return None
    near = lengths_near(Thresholds(flow).find([count.value]))
    shapes = [flow.shapes[value].shape or () for node in runner.nodes for value in node.outputs]
    totals = sorted({*_LENGTHS, *growing_lengths(_LENGTHS[-1], MAX_LENGTH, near)})
    small = [total for total in totals if all(elements_at(shape, total) <= MAX_RUN for shape in shapes)]
    passing, failed = longest_passing(check, small, passed=0)
    return None if failed is None and len(small) == len(totals) else passing


def _flow(graph: ir.Graph, value: ir.Value) -> TokenFlow:
    """Return the flow of the nodes that compute a value; a size that nothing ties to the text is that of the text."""
    needed = producers(upstream([value]))
    nodes = [node for node in graph if node in needed]
    dimensions, length = declared_dimensions(graph)
    dimensions = {one: tuple(_of_text(size, length) for size in sizes) for one, sizes in dimensions.items()}
    given = resolve_inputs(graph, nodes, dimensions, length)
    inputs = classify_inputs(given.dimensions, given.length)
    inputs = [_of_all_tokens(one) if one in find_positions(inputs) else one for one in inputs]
    return TokenFlow(
        shapes=given.shapes, kinds=classify_values(nodes, inputs, given.shapes), length=given.length, batch=BATCH,
        inputs=inputs, fixed={}, opsets=graph.opset_imports, order={node: place for place, node in enumerate(nodes)},
    )  # fmt: skip


def _of_text(size: Dimension, length: Dimension) -> Dimension:
    return length if isinstance(size, Extent) else size


def _of_all_tokens(positions: InputRole) -> InputRole:
    return replace(positions, holds_positions=True, lengths=dict.fromkeys(positions.lengths, Length.TOTAL))


def _check_in_form(count: KeyCount, runner: SubgraphRunner) -> Check:
    """Return the check with the inputs in the first form in which it passes for a usual text."""
    masks = list(runner.masks)

    def check(missing: int, length: int) -> None:
        number = length - missing if runner.reads_numbers else None
        _check(count, runner.run(length, number=number)[0], length, length)
        if runner.maskable_sequences:
            found = runner.run(length, first_half, number=number)[0]
            _check(count, found, length // 2, length)

    forms = [
        (missing, [replace(mask, mask_form=form) for mask in masks])
        for missing, form in product((count.missing, 0), MaskForm)
    ]
    for missing, runner.masks[:] in forms:
        with suppress(UnsupportedError):
            check(missing, _USUAL)
            return partial(check, missing)
    runner.masks[:] = masks
    return partial(check, count.missing)


def _check(count: KeyCount, found: np.ndarray, least: int, length: int) -> None:
    """Check the numbers of keys of two sequences, whose first tokens count.

    Raises:
        UnsupportedError: One is less than the number of these tokens, or more than the operator has.
    """
    keys = found.reshape(-1)[:2] + count.missing
    if (keys < least).any() or (count.exact and (keys > length).any()):
        raise _unsupported(count, f"{keys.min()} of {length} keys", f"{least} keys, as many as tokens")


def _unsupported(count: KeyCount, found: str, expected: str) -> UnsupportedError:
    return UnsupportedError(
        "the number of keys that attention reads is not that of the tokens", code=Code.FUSED_OPERATOR, at=count.at,
        expected=expected, found=found, hint="export with lengths that are computed from the input or its mask",
    )  # fmt: skip
