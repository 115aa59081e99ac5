"""`Scan` over tokens: its state is that of the tokens so far, whatever its body computes.

This is proved by the operator alone: the body runs once for each token, in order, and reads earlier ones only through
its state. So a text in two pieces, the second from the state after the first, gives what the whole gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.analysis.regions.sequence_state import has_new_tokens
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.analysis.token_flow import RecurrentState, SequenceState, TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.query import all_inputs, is_operator
from kvsurgeon.ops.content import is_zero
from kvsurgeon.symbolic.sequence_axes import SequenceAxis


def find_scan(flow: TokenFlow, node: ir.Node) -> SequenceState | None:
    """Return the state of a `Scan` over tokens with one state that starts with zeros; None for any other node.

    Sequences of a batch are not compared, so the batch must be one sequence.
    """
    if not is_operator(node, "Scan") or flow.batch != 1 or len(node.outputs) != 2:
        return None
    start, *sources = node.inputs
    if len(sources) != node.attributes.get_int("num_scan_inputs") or not _runs_forward(node):
        return None
    captured = [value for value in all_inputs(node) if value not in node.inputs]
    shape, result = flow.shapes[node.outputs[0]].shape, flow.shapes[node.outputs[1]].shape
    if shape is None or result is None or not is_zero(start) or not _is_static(shape):
        return None
    if any(flow.kinds.get(value, ValueKind.CONSTANT) is not ValueKind.CONSTANT for value in captured):
        return None
    axes = _axes(node, "scan_input_axes", len(sources))
    if not all(_is_token_axis(flow, value, axis) for value, axis in zip(sources, axes, strict=True)):
        return None
    (axis,) = _axes(node, "scan_output_axes", 1)
    return SequenceState(
        nodes=(node,), places=tuple((node, index) for index in range(1, len(node.inputs))),
        axes=(SequenceAxis(axis + len(result) if axis < 0 else axis, flow.query_axis),), output=1,
        recurrent=RecurrentState(start=(node, 0), value=node.outputs[0], axis=None, sizes=shape),
    )  # fmt: skip


def _runs_forward(node: ir.Node) -> bool:
    directions = (node.attributes.get_ints(name, ()) for name in ("scan_input_directions", "scan_output_directions"))
    return not any(direction for given in directions for direction in given or ())


def _axes(node: ir.Node, name: str, count: int) -> Sequence[int]:
    return node.attributes.get_ints(name) or [0] * count


def _is_static(shape: Sequence[object]) -> bool:
    """Return whether a shape is of numbers, of which the first may be the batch."""
    return len(shape) > 1 and shape[0] == 1 and all(isinstance(size, int) for size in shape)


def _is_token_axis(flow: TokenFlow, value: ir.Value | None, axis: int) -> bool:
    """Return whether a tensor is read token by token."""
    if value is None or not is_token(flow, value) or not has_new_tokens(flow, value):
        return False
    rank = len(flow.shapes[value].shape or ())
    return flow.axes[value][0].axis == axis % rank
