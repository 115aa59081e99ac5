"""The masks that a fused attention operator applies itself: all keys up to the query, or the last of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvsurgeon.anatomy.masks import read_mask
from kvsurgeon.dataflow.input_roles import InputRole, padding_mask
from kvsurgeon.proof.attention.attention_pattern import AttentionPattern


@dataclass(frozen=True, kw_only=True)
class OperatorMask:
    """A causal mask without a bias, the same for all heads.

    Attributes:
        window: Keys that a query attends to, its own position included; None for all keys up to the query.
        maskable: Whether an input masks further tokens, such as padding.
    """

    window: int | None
    maskable: bool


def operator_mask(pattern: AttentionPattern) -> OperatorMask | None:
    """Return the mask of an attention layer if a fused operator has it; None for a bias or any other mask."""
    mask = read_mask(pattern)
    if pattern.uniform_weights is None or mask.bias or mask.block or mask.kind not in ("causal", "sliding-window"):
        return None
    measured = (pattern.uniform_weights, *(row[..., None, :] for row in pattern.rows.values()))
    if not all(_is_same_for_heads(weights) for weights in measured):
        return None
    return OperatorMask(window=mask.window, maskable=pattern.padded_weights is not None)


def _is_same_for_heads(weights: np.ndarray) -> bool:
    """Whether all heads of all sequences see the same keys, from weights `[..., query, key]`."""
    visible = (weights != 0).reshape(-1, *weights.shape[-2:])
    return bool((visible == visible[:1]).all())


def is_padding_counted(inputs: Sequence[InputRole]) -> bool:
    """Return whether the inputs give the number of tokens of each sequence, and mask no others."""
    return not _masks(inputs) or padding_mask(inputs) is not None


def _masks(inputs: Sequence[InputRole]) -> list[InputRole]:
    return [given for given in inputs if given.lengths and not given.is_token]
