"""Indices into the tokens of one call: they must be as long as the query length S, not the total length T.

Context of this kind is not sliced. If it is computed from the shapes of token data alone, its length is S at run time.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.query import upstream
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.symbolic.sequence_axes import Length

LENGTHS = (3, 8)  # tokens at which indices are computed
LONG = 300  # tokens, if an input gives their number


def follows_query_length(flow: TokenFlow, value: ir.Value, count: ir.Value | None = None) -> bool:
    """Return whether a value follows the query length: it reads nothing that is given for the total length.

    Args:
        flow: The token flow.
        value: The value.
        count: An input without tokens that it may read.
    """
    if isinstance(flow.length, int):
        return False
    variables = {given.value: given for given in flow.inputs}
    for current in upstream([value], stop=lambda value: value in flow.axes, inputs=lambda node: node.inputs):
        if constant_tensor(current) is not None or current is count:
            continue
        if current in variables and not variables[current].is_token:
            return False
        if any(axis.variable.resolved() is not Length.NEW for axis in flow.axes.get(current, ())):
            return False
    return True


def count_of_last(flow: TokenFlow, indices: ir.Value) -> ir.Value | None:
    """Return the input that says how many of the last tokens of a call indices [n] name, in order; None if none does.

    Args:
        flow: The token flow.
        indices: The indices, context that is run.
    """
    numbers = [given.value for given in flow.inputs if not given.lengths]
    found = [value for value in upstream([indices], inputs=content_inputs) if value in numbers]
    if len(found) != 1 or not follows_query_length(flow, indices, found[0]):
        return None
    try:
        runner = SubgraphRunner(flow, [indices], assumptions=flow.assumed)
        for length in (*LENGTHS, LONG):
            for count in sorted({1, 2, length // 2, length - 1, length} - {0}):
                if not np.array_equal(runner.run(length, number=count)[0], np.arange(length - count, length)):
                    return None
    except UnsupportedError:
        return None
    return found[0]


def addresses_block(flow: TokenFlow, indices: ir.Value, whole: set[int]) -> bool:
    """Return whether indices [d0, d1, ..., n] address a block: index c depends on the position along axis c alone.

    Args:
        flow: The token flow.
        indices: The indices, context that is run.
        whole: Axes along which every position must be addressed, in order.
    """
    try:
        runner = SubgraphRunner(flow, [indices], assumptions=flow.assumed)
        first, second = (_columns(runner.run(length)[0]) for length in LENGTHS)
    except UnsupportedError:
        return False
    if first is None or second is None:
        return False
    for axis, columns in enumerate(zip(first, second, strict=True)):
        in_order = all(np.array_equal(column, np.arange(len(column))) for column in columns)
        if not (in_order if axis in whole else np.array_equal(*columns)):
            return False
    return True


def _columns(indices: np.ndarray) -> list[np.ndarray] | None:
    """Return each index of the last axis along its own axis; None if it depends on another axis."""
    if indices.ndim - 1 != indices.shape[-1]:
        return None
    columns = []
    for axis in range(indices.shape[-1]):
        moved = np.moveaxis(indices[..., axis], axis, -1)
        column = moved.reshape(-1, moved.shape[-1])[0]
        if not (moved == column).all():
            return None
        columns.append(column)
    return columns
