"""Merge KV heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvsurgeon.heads.counts import HeadCounts
from kvsurgeon.heads.selection import Selection, merge_heads
from kvsurgeon.passes.contract import Outcome, Subject
from kvsurgeon.passes.heads.change_heads import change_heads, invalid_count


@dataclass(frozen=True, kw_only=True)
class MergeKvHeads:
    """Merge neighboring KV heads, which makes the cache smaller (MHA to GQA or MQA).

    Before: one KV head for each query head or group of them. After: `kv_heads` heads, computed by averaged weights and
    repeated in the graph. Not exact: the model needs further training, and the report states the accuracy loss.

    Not supported: means of quantized weights (`method=first` copies stored weights), heads that cannot be traced to
    weights.

    Attributes:
        kv_heads: New number of KV heads.
        method: Mean of each group of neighboring heads, or its first head.
    """

    name: ClassVar[str] = "merge-kv-heads"
    exact: ClassVar[bool] = False  # its command measures the accuracy loss

    kv_heads: int
    method: Literal["mean", "first"] = "mean"

    def apply(self, subject: Subject) -> Outcome:
        """Merge the KV heads of every layer.

        Raises:
            UsageError: The number of heads is not valid; the message lists the valid ones.
            UnsupportedError: The weights of the heads cannot be found or averaged.
        """
        return change_heads(subject, self._select, lossy=True)

    def _select(self, layer: int, counts: HeadCounts) -> Selection | None:
        valid = [new for new in range(1, counts.kv_heads + 1) if counts.kv_heads % new == 0]
        if self.kv_heads not in valid:
            raise invalid_count(layer, counts, self.kv_heads, valid)
        return merge_heads(counts.kv_heads, self.kv_heads, self.method) if self.kv_heads < counts.kv_heads else None
