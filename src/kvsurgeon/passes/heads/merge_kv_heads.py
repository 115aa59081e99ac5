"""Merge KV heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.heads.counts import HeadCounts, counts_of
from kvsurgeon.heads.selection import Selection, merge_heads
from kvsurgeon.passes.contract import Outcome, Subject
from kvsurgeon.passes.heads.change_heads import change_heads, invalid_count


@dataclass(frozen=True, kw_only=True)
class MergeKvHeads:
    """Merge KV heads, which makes the cache smaller (MHA to GQA or MQA).

    Before: one KV head for each query head or group of them. After: `kv_heads` heads, repeated in the graph. With a
    text (`--text FILE`), a head holds the principal components of its group, as queries and output projection see them;
    without one, the mean of the weights. Not exact: the report states the accuracy loss.

    Not supported: means and components of quantized weights (`method=first` copies stored weights), heads that cannot
    be traced to weights.

    Attributes:
        kv_heads: New number of KV heads.
        method: Principal components of groups of similar heads on a text, the mean of neighboring heads, or the first
            of them. By default components if a text is given, else the mean.
    """

    name: ClassVar[str] = "merge-kv-heads"
    exact: ClassVar[bool] = False  # its command measures the accuracy loss

    kv_heads: int
    method: Literal["pca", "mean", "first"] | None = None

    def apply(self, subject: Subject) -> Outcome:
        """Merge the KV heads of every layer.

        Raises:
            UsageError: The number of heads is not valid; the message lists the valid ones. Or there is no text.
            UnsupportedError: The weights of the heads cannot be found or averaged.
        """
        method = self.method or ("mean" if subject.text is None else "pca")
        calibrate = partial(self._merge_weights, subject.text_for("for method=pca")) if method == "pca" else None
        # Of heads that are merged in the weights, the first of each group holds all.
        select = partial(self._select, "first" if method == "pca" else method)
        return change_heads(subject, select, lossy=True, calibrate=calibrate)

    def _select(self, method: str, layer: int, counts: HeadCounts) -> Selection | None:
        self._check(layer, counts)
        return merge_heads(counts.kv_heads, self.kv_heads, method) if self.kv_heads < counts.kv_heads else None

    def _merge_weights(self, text: Path, subject: Subject) -> tuple[str, ...]:
        from kvsurgeon.calibration import merge_into_first  # onnxruntime is slow to import

        analysis = subject.analysis()
        for layer, site in enumerate(analysis.sites):
            self._check(layer, counts_of(analysis.flow, site))
        with deep_recursion():
            return merge_into_first(analysis, self.kv_heads, text, subject.folder)

    def _check(self, layer: int, counts: HeadCounts) -> None:
        valid = [new for new in range(1, counts.kv_heads + 1) if counts.kv_heads % new == 0]
        if self.kv_heads not in valid:
            raise invalid_count(layer, counts, self.kv_heads, valid)
