"""Causal masks in place of the attribute `is_causal`, which runtimes align differently if S and T differ.

Source: ONNX `Attention`, whose alignment was corrected in place after the release of opset 24.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.token_flow import FusedAttention, TokenFlow
from kvsurgeon.resizing.context_slices import ContextSlices
from kvsurgeon.resizing.lengths import INT64, LengthValues
from kvsurgeon.resizing.token_data import InputsBefore
from kvsurgeon.resizing.unfilled_rows import in_row_order
from kvsurgeon.symbolic.sequence_axes import Length, LengthVariable, SequenceAxis

MASK = 3  # index of the mask input of ONNX `Attention`


def mask_causal_operators(flow: TokenFlow, slices: ContextSlices, before: InputsBefore) -> None:
    """Replace `is_causal` of all fused attention operators by a mask input."""
    causal = [fused for fused in flow.fused if fused.inputs.causal]
    if not causal:
        return
    mask = _causal_mask(slices.lengths)
    for fused in causal:
        _set_mask(flow, slices, fused, mask, before[fused.node])


def _set_mask(
    flow: TokenFlow, slices: ContextSlices, fused: FusedAttention, causal: ir.Value, before: Sequence[ir.Value | None]
) -> None:
    editor, node = slices.editor, fused.node
    given = node.inputs[fused.inputs.mask] if fused.inputs.mask is not None else None
    original = before[fused.inputs.mask] if fused.inputs.mask is not None else None
    dtype = None if original is None else flow.shapes[original].dtype
    mask = causal
    if given is not None and dtype is ir.DataType.BOOL:
        mask = editor.node("And", [given, causal], name=f"{given.name}.causal", dtype=dtype)
    elif given is not None and dtype is not None:
        lowest = editor.constant(-np.inf, dtype.numpy(), name="masked")
        mask = editor.node("Where", [causal, given, lowest], name=f"{given.name}.causal", dtype=dtype)
    if len(node.inputs) <= MASK:
        node.resize_inputs(MASK + 1)
    editor.replace_input(node, MASK, mask)
    editor.remove_attribute(node, "is_causal")


def _causal_mask(lengths: LengthValues) -> ir.Value:
    """Return a mask [sequence, total_sequence], true if the key is not after the query."""
    editor = lengths.editor
    keys, queries = (
        [lengths.scalar(end) for end in (*lengths.span(length), 1)] for length in (Length.TOTAL, Length.NEW)
    )
    row = editor.node("Range", keys, name="keys", dtype=INT64)
    column = editor.node("Range", queries, name="queries", dtype=INT64)
    column = editor.node("Reshape", [column, lengths.vector([-1, 1])], name="queries.column", dtype=INT64)
    mask = editor.node("LessOrEqual", [row, column], name="causal", dtype=ir.DataType.BOOL)
    return in_row_order(lengths, mask, (SequenceAxis(1, LengthVariable(Length.TOTAL)),))
