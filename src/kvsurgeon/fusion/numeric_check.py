"""Numeric check of a fusion match: run the attention of the graph and compare with what the fused operator computes."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.analysis.mask_patterns import MaskPattern, left_padded, sequence_last, unmasked, with_gaps
from kvsurgeon.analysis.probe_inputs import Rows, at_length
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.fusion.match import FusionMatch
from kvsurgeon.proof.causality import other_reductions
from kvsurgeon.proof.length_sweep import LengthSweep
from kvsurgeon.proof.proof import Proof
from kvsurgeon.proof.site_numbering import number_site

LONGEST = 160  # tokens; the products of all heads are run, not only masks
TOLERANCE = {"float32": 2e-4, "float16": 2e-2}  # relative to the largest element; random scores are in the hundreds


class NumericCheck:
    """Runs attention sites on random queries, keys and values, and compares with the fused operator's formula."""

    def __init__(self, analysis: Analysis, proof: Proof) -> None:
        self.sweep = LengthSweep(analysis, proof.bounds)
        self._keys: dict[Hashable, int] = {}
        self._checked: set[object] = set()

    def check(self, match: FusionMatch) -> None:
        """Check that an attention site computes what was matched; sites that are structurally equal are run once.

        Raises:
            UnsupportedError: The results differ.
        """
        layouts = ((one.parts, one.order, one.rank) for one in (match.query, match.key, match.value, match.result))
        reductions = other_reductions(self.sweep, match.site)
        structure = number_site(self.sweep.analysis, match.site, reductions, self._keys)
        key = structure, match.path.scale, match.path.softcap, *layouts
        if key in self._checked:
            return
        flow, masked = self.sweep.flow, match.path.masked
        inputs = (match.query.value, match.key.value, match.value.value)
        sinks = [] if match.sink is None else [match.sink]
        attention = SubgraphRunner(flow, [match.site.at, *sinks], probed=inputs)
        scores = [] if match.scores is None else [match.scores]
        bias = None if masked is None else SubgraphRunner(flow, [masked], probed=scores)
        lengths = [length for length in self.sweep.attention_lengths(match.site) if length <= LONGEST]
        for length in lengths or [min(self.sweep.lengths)]:
            for mask in [unmasked, left_padded, with_gaps] if attention.masks else [unmasked]:
                _compare(match, attention, bias, length, mask)
        self._checked.add(key)


def _compare(
    match: FusionMatch, attention: SubgraphRunner, bias: SubgraphRunner | None, length: int, mask: MaskPattern
) -> None:
    """Compare an attention site with the formula at one length, with some tokens masked.

    Raises:
        UnsupportedError: They differ.
    """
    result, *sinks = attention.run(length, mask)
    found = _by_heads(result, match.result, length)
    points = (match.query, match.key, match.value)
    operands = (attention.feeds[one.value.name or ""](Rows.of_text(length)).astype(np.float64) for one in points)
    query, key, value = (_by_heads(array, one, length) for array, one in zip(operands, points, strict=True))
    scores = _scores(match, query, key)
    if bias is not None:
        scores = scores + _bias(match, bias, length, mask, scores.shape)
    expected = _attend(scores, value, sinks[0].reshape(-1, 1, 1).astype(np.float64) if sinks else -np.inf)
    error = float(np.abs(found - expected)[:, :, mask(length)].max(initial=0.0))
    tolerance = TOLERANCE.get(str(match.dtype.numpy()), TOLERANCE["float32"])
    if not error <= tolerance * float(np.abs(expected).max(initial=1.0)):
        raise match.unsupported(
            "attention differs from what the fused operator computes",
            expected="softmax(scale * query @ key^T + bias) @ value" + (", with a sink" if sinks else ""),
            found=f"a difference of {error:.2g} at {length} tokens",
        )


def _bias(
    match: FusionMatch, runner: SubgraphRunner, length: int, mask: MaskPattern, shape: tuple[int, ...]
) -> np.ndarray:
    """Return the input of the softmax for scores of zero, [batch, heads, queries, keys]."""
    array = runner.run(length, mask, scale=0.0)[0]
    if match.scores is None or match.path.masked is None:  # mask of an attention operator, of any rank
        array = np.where(array, 0.0, -np.inf) if array.dtype == bool else array
        return np.broadcast_to(array.astype(np.float64), shape)
    array = sequence_last(array, runner.flow.axes[match.path.masked], Rows.of_text(length)).astype(np.float64)
    return np.asarray(np.maximum(array, np.finfo(np.float32).min).reshape(shape))


def _scores(match: FusionMatch, query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return the scaled and capped scores, [batch, heads, queries, keys]."""
    key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
    scores = query @ key.swapaxes(-1, -2) * match.path.scale
    softcap = match.path.softcap
    return np.asarray(softcap * np.tanh(scores / softcap) if softcap else scores)


def _attend(scores: np.ndarray, value: np.ndarray, sink: np.ndarray | float) -> np.ndarray:
    """Return causal softmax(scores) @ value, [batch, heads, sequence, head_dim]; rows without any key give 0.

    A sink is one more score of each row, [heads or 1, 1, 1], without a value.
    """
    scores = np.where(np.tril(np.ones(scores.shape[-2:], dtype=bool)), scores, -np.inf)
    largest = np.maximum(np.maximum(scores.max(-1, keepdims=True), sink), np.finfo(np.float32).min)
    weights = np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True) + np.exp(sink - largest)
    value = np.repeat(value, scores.shape[1] // value.shape[1], axis=1)
    return np.asarray(weights / np.where(total == 0, 1, total) @ value)


def _by_heads(array: np.ndarray, point: CachePoint, length: int) -> np.ndarray:
    """Return a tensor as [batch, heads, sequence, head_dim]."""
    sizes = [length if size is None else int(at_length(size, length)) for size in point.parts]
    return array.reshape(sizes).transpose(point.order).reshape(-1, point.heads, length, point.head_dim)
