"""Operators with a state as an input and an output, such as `LinearAttention`.

Their definition says that the state is that of the tokens so far: a text in two pieces, the second from the state after
the first, gives what the whole gives.
"""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.analysis.regions.sequence_state import has_new_tokens, result_axes
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.analysis.token_flow import RecurrentState, SequenceState, TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.ops.content import is_zero
from kvsurgeon.ops.table import operator_of


def find_stateful_operator(flow: TokenFlow, node: ir.Node) -> SequenceState | None:
    """Return the state of an operator that starts with zeros and returns its state to no one; None for any other."""
    operator = operator_of(node)
    if operator is None or operator.state is None or isinstance(flow.length, int):
        return None
    before, after = operator.state
    if len(node.inputs) <= before or len(node.outputs) <= after or not is_zero(node.inputs[before]):
        return None
    last, axes = node.outputs[after], result_axes(flow, node.outputs[0])
    sizes = flow.shapes[last].shape
    if sizes is None or not axes or last.uses() or last.is_graph_output():
        return None
    if sizes[0] != flow.batch or not all(isinstance(size, int) for size in sizes[1:]):
        return None
    given = [(index, value) for index, value in enumerate(node.inputs) if value is not None and index != before]
    tokens = [(index, value) for index, value in given if is_token(flow, value)]
    others = [value for _, value in given if not is_token(flow, value)]
    if any(flow.kinds.get(value, ValueKind.CONSTANT) is not ValueKind.CONSTANT for value in others):
        return None
    if not all(has_new_tokens(flow, value) for _, value in tokens):
        return None
    return SequenceState(
        nodes=(node,), places=tuple((node, index) for index, _ in tokens), axes=axes,
        recurrent=RecurrentState(start=(node, before), value=last, axis=None, sizes=sizes),
    )  # fmt: skip
