"""The two obligations that axes alone do not prove, decided by running context without weights.

Causal: no query gives weight to a key after it. Prefix-stable: what context says of a position does not depend on how
many tokens follow. Both are tried at lengths on either side of every number that the context compares lengths with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.sequence_state import sees_masked
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.proof.causality import AttentionPattern, beside_weights, check_causality
from kvsurgeon.proof.length_sweep import LengthSweep
from kvsurgeon.proof.stability import find_limit
from kvsurgeon.proof.structural_hash import StructuralHash


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was found by running context."""

    seen: tuple[AttentionPattern, ...]  # for each attention
    lengths: tuple[int, ...]  # that were tried
    limit: int | None  # the longest total length up to which context is stable, where there is one
    max_length: int | None  # the longest that the model can be run on: so far context is stable, and tables have rows


def _check_padding(analysis: Analysis, seen: list[AttentionPattern]) -> None:
    """What a padded token sees of those after it must not reach the others through its keys and values."""
    for pattern in {pattern for one in seen for pattern in one.peeking}:
        peeking = _all_together([one.peeking[pattern] for one in seen if pattern in one.peeking])
        for layer, one in enumerate(seen):
            looked_at = one.looked_at.get(pattern, np.zeros(0, dtype=bool))
            if (looked_at & peeking[: len(looked_at)]).any():
                raise UnsupportedError(
                    "tokens that an input masks see those after them, and are seen by tokens that it does not mask",
                    layer=layer, at=analysis.heads[layer].at.name,
                )  # fmt: skip

        for recall in analysis.flow.states if peeking.any() else ():
            if sees_masked(analysis.flow, recall, pattern):
                raise UnsupportedError(
                    "tokens that an input masks see those after them, and are seen outside attention",
                    at=recall.result.name, hint="export it without that input, or with what is masked set to 0 before",
                )  # fmt: skip


def _all_together(tokens: list[np.ndarray]) -> np.ndarray:
    """[token]: true where one of several, which need not be equally long, is; the longest has the say at its end."""
    result = np.zeros(max(len(one) for one in tokens), dtype=bool)
    for one in tokens:
        result[: len(one)] |= one
    return result


def prove(analysis: Analysis) -> Proof:
    """Run the context of every attention and of every place where context meets tokens.

    Raises:
        UnsupportedError: An attention sees the future, or context changes with the total length.
    """
    trial, signatures = LengthSweep(analysis), StructuralHash(analysis)
    looked_at: dict[int, AttentionPattern] = {}
    seen = []
    for layer, head in enumerate(analysis.heads):
        beside = beside_weights(trial, head)
        how = signatures.of(head, beside)
        if how not in looked_at:
            looked_at[how] = check_causality(trial, layer, head, beside)
        seen.append(looked_at[how])
    _check_padding(analysis, seen)
    limits = [limit for limit in (find_limit(trial), *(one.limit for one in seen)) if limit is not None]
    limit = min(limits, default=None)
    return Proof(seen=tuple(seen), lengths=trial.lengths, limit=limit, max_length=_longest(analysis, limit))


def _longest(analysis: Analysis, limit: int | None) -> int | None:
    fixed = analysis.length if isinstance(analysis.length, int) else None
    return min((bound for bound in (*analysis.flow.shapes.bounds, limit, fixed) if bound is not None), default=None)
