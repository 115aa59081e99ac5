"""Padding masks of fused attention, as biases of the scores: `[batch or 1, 1, S or 1, T]`."""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.decompose.fused_node import FusedNode
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.symbolic import dimension as dim


def padding_bias(op: FusedNode, index: int, *, causal: bool) -> ir.Value | None:
    """Return the bias that masks padding; None if there is no mask, or causality masks all that it would.

    Args:
        op: The fused node.
        index: Input index of the mask: `[batch, T]` or `[batch, S, T]`, which hold 1 for a key to attend to and 0
            otherwise; `[batch]`, the number of keys; or `[2 * batch]`, first the ends of the keys, then their starts.
        causal: Whether later keys are masked in any case.

    Raises:
        UnsupportedError: The mask has another shape.
    """
    mask = op.optional(index)
    if mask is None:
        return None
    if op.rank(index) == 1:
        visible = _key_ranges(op, mask, index, causal=causal)
    elif op.rank(index) in (2, 3):
        visible = op.Greater(mask, op.number(0, op.fact(index).dtype))
        visible = op.reshape(visible, 0, 1, 1, -1) if op.rank(index) == 2 else op.with_axes("Unsqueeze", visible, [1])
    else:
        raise _unknown_mask(op, index)
    if visible is None:
        return None
    filtered = op.node.attributes.get_float("mask_filter_value", -10000.0)
    return op.Where(visible, op.number(0), op.number(filtered))


def _key_ranges(op: FusedNode, mask: ir.Value, index: int, *, causal: bool) -> ir.Value | None:
    """Add whether a key is within the range of its sequence.

    If later keys are masked in any case, no token attends to one after the end.
    """
    size, batch = (op.fact(index).shape or (None,))[0], (op.fact(0).shape or (None,))[0]
    known = size is not None and batch is not None
    with_starts = known and dim.is_equal(size, dim.multiply(2, batch))
    if not with_starts and not (known and dim.is_equal(size, batch)):
        raise _unknown_mask(op, index)
    bounds = op.Cast(mask, to=ir.DataType.INT64)
    keys, visible = op.positions(), None
    if with_starts:
        pairs = op.reshape(bounds, 2, -1, 1, 1, 1)
        ends, starts = (op.Gather(pairs, op.int64(half), axis=0) for half in (0, 1))
        visible = op.Not(op.Less(keys, starts))
    else:
        ends = op.reshape(bounds, -1, 1, 1, 1)
    if causal:
        op.assume_right_padding(bounds)
        return visible
    before = op.Less(keys, ends)
    return before if visible is None else op.And(visible, before)


def _unknown_mask(op: FusedNode, index: int) -> UnsupportedError:
    return op.unsupported(
        "unknown mask layout", expected="[batch, sequence], with 1 for a token and 0 for padding",
        found=str(op.fact(index).shape), hint="export with a mask of zeros and ones",
    )  # fmt: skip
