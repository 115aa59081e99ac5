"""That an attention is what a fused operator computes, shown by running it: products, heads, scale, cap and masks."""

from __future__ import annotations

import numpy as np

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.analysis.mask_patterns import Pattern, all_seen, left_padded, unfolded, with_holes
from kvsurgeon.analysis.probe_inputs import at_length
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.fusion.match import Fusable
from kvsurgeon.proof.causality import beside_weights
from kvsurgeon.proof.length_sweep import LengthSweep
from kvsurgeon.proof.structural_hash import StructuralHash

LONGEST = 160  # tokens: products of all heads are run, not masks alone
ALLOWED = {"float32": 2e-4, "float16": 2e-2}  # of the largest number; scores of noise are in the hundreds


class Showing:
    """Runs attentions on noise in place of queries, keys and values, and compares with what the operator would give."""

    def __init__(self, analysis: Analysis) -> None:
        self.trial = LengthSweep(analysis)
        self.signatures = StructuralHash(analysis)
        self._shown: set[object] = set()

    def check(self, fusable: Fusable) -> None:
        """Hold that an attention is what was read off its operators; those that do the same are run once.

        Raises:
            UnsupportedError: It gives something else.
        """
        how = self.signatures.of(fusable.head, beside_weights(self.trial, fusable.head)), *_layout(fusable)
        if how not in self._shown:
            _Comparison(self.trial, fusable).check()
            self._shown.add(how)


def _layout(fusable: Fusable) -> tuple[object, ...]:
    ends = (fusable.query, fusable.key, fusable.value, fusable.result)
    return fusable.scale, fusable.softcap, *((one.parts, one.order, one.rank) for one in ends)


class _Comparison:
    """One attention, cut out of its graph twice: whole, and up to the softmax."""

    def __init__(self, trial: LengthSweep, fusable: Fusable) -> None:
        self.trial = trial
        self.fusable = fusable
        flow, head = trial.flow, fusable.head
        given = dict(flow=flow, inputs=trial.analysis.inputs, opsets=dict(flow.opsets))
        ends = (fusable.query.value, fusable.key.value, fusable.value.value)
        self.whole = SubgraphRunner(**given, outputs=[head.at], stand_ins=frozenset(ends))  # type: ignore[arg-type]
        self.bias: SubgraphRunner | None = None
        if fusable.masked is not None:
            zeros = frozenset() if fusable.scores is None else frozenset({fusable.scores})
            self.bias = SubgraphRunner(**given, outputs=[fusable.masked], stand_ins=zeros)  # type: ignore[arg-type]

    def check(self) -> None:
        """Try it at several lengths and with several masks."""
        lengths = [length for length in self.trial.dense(self.fusable.head) if length <= LONGEST]
        patterns = [all_seen, left_padded, with_holes] if self.whole.masks else [all_seen]
        for length in lengths or [min(self.trial.lengths)]:
            for seen in patterns:
                self._compare(length, seen)

    def _compare(self, length: int, seen: Pattern) -> None:
        found = self._of_heads(self.trial.run(self.whole, length, seen)[0], self.fusable.result, length)
        wanted = self._fused(length, seen)
        here = seen(length)
        gap = np.abs(found - wanted)[:, :, here]
        allowed = ALLOWED.get(str(self.fusable.dtype.numpy()), ALLOWED["float32"])
        largest = float(np.abs(wanted).max(initial=1.0))
        if not gap.size or float(gap.max()) <= allowed * largest:
            return
        raise UnsupportedError(
            "attention is not what the fused operator computes", layer=self.fusable.layer, at=self.fusable.head.at.name,
            expected="softmax(scale * query @ key^T + bias) @ value",
            found=f"a difference of {float(gap.max()):.2g} at {length} tokens",
        )  # fmt: skip

    def _fused(self, length: int, seen: Pattern) -> np.ndarray:
        """[batch, heads, sequence, head_dim]: what the operator would give."""
        ends = (self.fusable.query, self.fusable.key, self.fusable.value)
        arrays = (self.whole.feeds[one.value.name or ""](length).astype(np.float64) for one in ends)
        query, key, value = (self._of_heads(array, one, length) for array, one in zip(arrays, ends, strict=True))
        shared = query.shape[1] // key.shape[1]
        key, value = (np.repeat(one, shared, axis=1) for one in (key, value))
        scores = query @ key.swapaxes(-1, -2) * self.fusable.scale
        if self.fusable.softcap:
            scores = self.fusable.softcap * np.tanh(scores / self.fusable.softcap)
        scores = scores + self._bias(length, seen, scores.shape)
        scores = np.where(np.tril(np.ones((length, length), dtype=bool)), scores, -np.inf)
        weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), np.finfo(np.float32).min))
        total = weights.sum(-1, keepdims=True)
        return np.asarray(weights / np.where(total == 0, 1, total) @ value)

    def _bias(self, length: int, seen: Pattern, shape: tuple[int, ...]) -> np.ndarray:
        """What the graph makes of scores of zero, [batch, heads, queries, keys]."""
        if self.bias is None or self.fusable.masked is None:
            return np.zeros(shape)
        made = self.trial.run(self.bias, length, seen, loudness=0.0)[0]
        if self.fusable.scores is None:  # the mask of an operator, with any of its axes missing
            made = np.where(made, 0.0, -np.inf) if made.dtype == bool else made
            return np.broadcast_to(made.astype(np.float64), shape)
        axes = self.trial.flow.axes[self.fusable.masked]
        return np.maximum(unfolded(made, axes, length).astype(np.float64), np.finfo(np.float32).min).reshape(shape)

    def _of_heads(self, array: np.ndarray, memory: CachePoint, length: int) -> np.ndarray:
        """A tensor as [batch, heads, sequence, head_dim]."""
        sizes = [length if size is None else int(at_length(size, length)) for size in memory.parts]
        ordered = array.reshape(sizes).transpose(memory.order)
        return ordered.reshape(-1, memory.heads, length, memory.head_dim)
