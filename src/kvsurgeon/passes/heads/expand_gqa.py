"""Expand grouped-query attention to multi-head attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsurgeon.heads.counts import HeadCounts
from kvsurgeon.heads.selection import Selection, repeat_heads
from kvsurgeon.passes.contract import Outcome, Subject
from kvsurgeon.passes.heads.change_heads import change_heads


@dataclass(frozen=True, kw_only=True)
class ExpandGqa:
    """Expand grouped-query attention to multi-head attention: one KV head for each query head.

    Before: the graph repeats KV heads. After: duplicated weight columns compute as many KV heads as there are query
    heads, and the graph repeats none. Exact: stored weights are copied, quantized or not.

    Not supported: heads that cannot be traced to weights.
    """

    name: ClassVar[str] = "expand-gqa"

    def apply(self, subject: Subject) -> Outcome:
        """Expand the KV heads of every layer.

        Raises:
            UnsupportedError: The weights of the heads cannot be found.
        """
        return change_heads(subject, _select, lossy=False)


def _select(_layer: int, counts: HeadCounts) -> Selection | None:
    times = counts.heads // counts.kv_heads
    return repeat_heads(counts.kv_heads, times) if times > 1 else None
