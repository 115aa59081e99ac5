"""Attention weights of a site as arrays: which values are computed, and how weights are read from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.mask_patterns import sequence_last
from kvsurgeon.analysis.probe_inputs import Rows
from kvsurgeon.analysis.token_flow import ContextProduct, TokenFlow
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.symbolic.sequence_axes import Axes

ReadWeights = Callable[[Sequence[np.ndarray], Rows], np.ndarray]  # outputs and rows -> weights [..., query, key]


def weights_of_product(flow: TokenFlow, product: ContextProduct) -> tuple[tuple[ir.Value, ...], ReadWeights]:
    """Return the values from which the weights of a product are read, and the function that reads them."""
    return product.weights_read, partial(_read_weights, axes=flow.axes[product.weights_read[0]])


def weights_of_mask(flow: TokenFlow, site: AttentionSite) -> tuple[tuple[ir.Value, ...], ReadWeights, Axes]:
    """Return the mask of an operator that computes a whole attention, the function that reads it, and its axes.

    Without a mask there are no values.
    """
    assert site.fused is not None
    node, index = site.fused.node, site.fused.inputs.mask
    mask = None if index is None else node.inputs[index]
    if index is None or mask is None:
        return (), _no_weights, ()
    axes = flow.demands.get((node, index), ())
    return (mask,), partial(_mask_weights, axes=axes, causal=site.fused.inputs.causal), axes


def _no_weights(_arrays: Sequence[np.ndarray], rows: Rows) -> np.ndarray:
    return np.ones((rows.stop - rows.start, rows.total))


def _read_weights(arrays: Sequence[np.ndarray], rows: Rows, axes: Axes) -> np.ndarray:
    """Return the weights, minus their zero point if they are quantized."""
    weights, *zero_point = arrays
    if zero_point:
        if zero_point[0].size != 1:
            raise UnsupportedError(
                "attention weights are quantized per row, so zero weights cannot be identified",
                code=Code.CONTEXT_NOT_RUNNABLE, expected="one zero point", found=str(zero_point[0].size),
            )  # fmt: skip
        weights = weights.astype(np.int64) - zero_point[0].astype(np.int64)
    return sequence_last(weights, axes, rows)


def _mask_weights(arrays: Sequence[np.ndarray], rows: Rows, axes: Axes, *, causal: bool) -> np.ndarray:
    """Return the weights that a fused operator gives to equal scores under its mask."""
    (mask,) = arrays
    if len(axes) == 2:
        mask = sequence_last(mask, axes, rows)
    else:
        mask = np.broadcast_to(mask, (*mask.shape[:-2], rows.stop - rows.start, rows.total))
    weights = mask.astype(np.float64)
    if mask.dtype != bool:
        weights = np.exp(np.minimum(weights, 0.0))
    return np.where(rows.keys <= rows.queries[:, None], weights, 0.0) if causal else weights
