"""Numbers that a report page embeds: attention weights and keys, in few bytes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.runtime import Array
from kvsurgeon.workflow.attention_weights import AttentionWeights
from kvsurgeon.workflow.keys import Keys

_BUDGET = 1_000_000  # bytes of the weights of a model, and of its keys, before they are written as text
_LEVELS, _KEY_LEVELS = 255, 32767


def embedded_weights(found: AttentionWeights | KvsurgeonError) -> dict[str, Any]:
    """Return attention weights for JSON: one byte for the square root of each, key by key up to the query.

    The error of a weight is below 0.004. As many tokens are kept as fit.
    """
    if isinstance(found, KvsurgeonError):
        return {"error": str(found)}
    heads = sum(len(one) for one in found.layers if not isinstance(one, str))
    tokens = len(found.tokens)
    while tokens > 1 and heads * tokens * (tokens + 1) // 2 > _BUDGET:
        tokens -= 1
    return {"tokens": found.tokens[:tokens], "layers": [_weights(one, tokens) for one in found.layers]}


def embedded_keys(found: Sequence[Keys | KvsurgeonError] | KvsurgeonError) -> dict[str, Any]:
    """Return keys for JSON: integers of 16 bits, `[kv_heads, tokens, head_dim]`, with a scale for each layer."""
    if isinstance(found, KvsurgeonError):
        return {"error": str(found)}
    shown = [one for one in found if not isinstance(one, KvsurgeonError)]
    row = 2 * sum(one.keys.shape[0] * one.keys.shape[2] for one in shown)
    tokens = max(1, min(_BUDGET // max(row, 1), max((len(one.tokens) for one in shown), default=1)))
    layers = [{"error": str(one)} if isinstance(one, KvsurgeonError) else _keys(one, tokens) for one in found]
    return {"tokens": shown[0].tokens[:tokens] if shown else [], "layers": layers}


def _weights(weights: Array | str, tokens: int) -> dict[str, Any]:
    if isinstance(weights, str):
        return {"error": weights}
    return {"heads": len(weights), "data": _lower_triangle(weights[:, :tokens, :tokens])}


def _keys(keys: Keys, tokens: int) -> dict[str, Any]:
    values = np.nan_to_num(keys.keys[:, :tokens])
    scale = float(np.abs(values).max(initial=0.0)) / _KEY_LEVELS or 1.0
    limit = float(np.percentile(np.abs(values), 99)) or 1.0  # a few rotated features are far larger
    return {
        "reads": keys.reads, "dim": values.shape[2], "scale": scale, "limit": limit,
        "data": _text(np.rint(values / scale).astype("<i2")),
    }  # fmt: skip


def _lower_triangle(weights: Array) -> str:
    rows, columns = np.tril_indices(weights.shape[-1])
    kept = np.clip(np.nan_to_num(weights[:, rows, columns]), 0, 1)
    return _text(np.rint(np.sqrt(kept) * _LEVELS).astype(np.uint8))


def _text(array: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
