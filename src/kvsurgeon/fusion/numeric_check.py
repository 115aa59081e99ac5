"""Numeric check of a fusion match: run the attention of the graph and compare with what the fused operator computes."""

from __future__ import annotations

from collections.abc import Collection, Hashable

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.analysis.mask_patterns import MaskPattern, left_padded, sequence_last, unmasked, with_gaps
from kvsurgeon.analysis.probe_inputs import at_length
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
        attention = self._runner([match.site.at], (match.query.value, match.key.value, match.value.value))
        bias = None
        if match.path.masked is not None:
            bias = self._runner([match.path.masked], [] if match.scores is None else [match.scores])
        lengths = [length for length in self.sweep.attention_lengths(match.site) if length <= LONGEST]
        masks = [unmasked, left_padded, with_gaps] if attention.masks else [unmasked]
        for length in lengths or [min(self.sweep.lengths)]:
            for mask in masks:
                self._compare(match, attention, bias, length, mask)
        self._checked.add(key)

    def _runner(self, outputs: list[ir.Value], random: Collection[ir.Value]) -> SubgraphRunner:
        return SubgraphRunner(self.sweep.flow, outputs, probed=random)

    def _compare(
        self,
        match: FusionMatch,
        attention: SubgraphRunner,
        bias: SubgraphRunner | None,
        length: int,
        mask: MaskPattern,
    ) -> None:
        found = _by_heads(attention.run(length, mask)[0], match.result, length)
        points = (match.query, match.key, match.value)
        operands = (attention.feeds[one.value.name or ""](length).astype(np.float64) for one in points)
        query, key, value = (_by_heads(array, one, length) for array, one in zip(operands, points, strict=True))
        scores = _scores(match, query, key)
        expected = _attend(scores + self._bias(match, bias, length, mask, scores.shape), value)
        error = float(np.abs(found - expected)[:, :, mask(length)].max(initial=0.0))
        tolerance = TOLERANCE.get(str(match.dtype.numpy()), TOLERANCE["float32"])
        if not error <= tolerance * float(np.abs(expected).max(initial=1.0)):
            raise match.unsupported(
                "attention differs from what the fused operator computes",
                expected="softmax(scale * query @ key^T + bias) @ value",
                found=f"a difference of {error:.2g} at {length} tokens",
            )

    def _bias(
        self,
        match: FusionMatch,
        runner: SubgraphRunner | None,
        length: int,
        mask: MaskPattern,
        shape: tuple[int, ...],
    ) -> np.ndarray:
        """Return the input of the softmax for scores of zero, [batch, heads, queries, keys]."""
        if runner is None or match.path.masked is None:
            return np.zeros(shape)
        made = runner.run(length, mask, scale=0.0)[0]
        if match.scores is None:  # mask of an attention operator, of any rank
            made = np.where(made, 0.0, -np.inf) if made.dtype == bool else made
            return np.broadcast_to(made.astype(np.float64), shape)
        axes = self.sweep.flow.axes[match.path.masked]
        return np.maximum(sequence_last(made, axes, length).astype(np.float64), np.finfo(np.float32).min).reshape(shape)


def _scores(match: FusionMatch, query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return the scaled and capped scores, [batch, heads, queries, keys]."""
    key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
    scores = query @ key.swapaxes(-1, -2) * match.path.scale
    softcap = match.path.softcap
    return np.asarray(softcap * np.tanh(scores / softcap) if softcap else scores)


def _attend(scores: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return causal softmax(scores) @ value, [batch, heads, sequence, head_dim]; rows without any key give 0."""
    scores = np.where(np.tril(np.ones(scores.shape[-2:], dtype=bool)), scores, -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), np.finfo(np.float32).min))
    total = weights.sum(-1, keepdims=True)
    value = np.repeat(value, scores.shape[1] // value.shape[1], axis=1)
    return np.asarray(weights / np.where(total == 0, 1, total) @ value)


def _by_heads(array: np.ndarray, point: CachePoint, length: int) -> np.ndarray:
    """Return a tensor as [batch, heads, sequence, head_dim]."""
    sizes = [length if size is None else int(at_length(size, length)) for size in point.parts]
    return array.reshape(sizes).transpose(point.order).reshape(-1, point.heads, length, point.head_dim)
