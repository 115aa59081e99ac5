"""Give every query head a key and value head of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsurgeon.heads.counts import HeadCounts
from kvsurgeon.heads.selection import Selection, replicated
from kvsurgeon.passes.contract import Outcome, Subject
from kvsurgeon.passes.heads.change_heads import change_heads


@dataclass(frozen=True, kw_only=True)
class ExpandGqa:
    """Give every query head a key and value head of its own: grouped queries become multi-head attention.

    Before: heads are repeated in the graph. After: the weights make as many as there are query heads, and nothing is
    repeated. Exact: what is stored is repeated as it is stored.

    Not handled: heads that cannot be followed to weights.
    """

    name: ClassVar[str] = "expand-gqa"

    def apply(self, subject: Subject) -> Outcome:
        """Expand the heads of every layer.

        Raises:
            UnsupportedError: It cannot be proved which weights make the heads.
        """
        return change_heads(subject, _wanted, lossy=False)


def _wanted(layer: int, counts: HeadCounts) -> Selection | None:
    del layer
    times = counts.heads // counts.kv_heads
    return replicated(counts.kv_heads, times) if times > 1 else None
