"""Make one key and value head of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvsurgeon.heads.counts import HeadCounts
from kvsurgeon.heads.selection import Selection, merged
from kvsurgeon.passes.contract import Outcome, Subject
from kvsurgeon.passes.heads.change_heads import change_heads, not_a_count


@dataclass(frozen=True, kw_only=True)
class MergeKvHeads:
    """Make one key and value head of several neighbours, so that the cache shrinks as they do.

    Before: a head for each query head, or for a few. After: `kv_heads` of them, made by averaged weights and repeated
    in the graph. Not exact: the model has to be trained on, and the report says how far it is off.

    Not handled: means of quantised weights (`method=first` takes stored values), heads that cannot be followed.

    Attributes:
        kv_heads: How many heads there are to be.
        method: What becomes of a group of neighbours: its mean, or the first of it.
    """

    name: ClassVar[str] = "merge-kv-heads"
    exact: ClassVar[bool] = False  # so that its command says how much is lost, and of what text

    kv_heads: int
    method: Literal["mean", "first"] = "mean"

    def apply(self, subject: Subject) -> Outcome:
        """Merge the heads of every layer.

        Raises:
            UsageError: The count is not one that there can be; the message lists those that there are.
            UnsupportedError: It cannot be proved which weights make the heads, or they have no mean.
        """
        return change_heads(subject, self._wanted, lossy=True)

    def _wanted(self, layer: int, counts: HeadCounts) -> Selection | None:
        legal = [new for new in range(1, counts.kv_heads + 1) if counts.kv_heads % new == 0]
        if self.kv_heads not in legal:
            raise not_a_count(layer, counts, self.kv_heads, legal)
        return merged(counts.kv_heads, self.kv_heads, self.method) if self.kv_heads < counts.kv_heads else None
