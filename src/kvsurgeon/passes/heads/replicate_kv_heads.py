"""Let each key and value head stand several times in a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsurgeon.heads.counts import HeadCounts
from kvsurgeon.heads.selection import Selection, replicated
from kvsurgeon.passes.contract import Outcome, Subject
from kvsurgeon.passes.heads.change_heads import change_heads, check_one_of, not_a_count


@dataclass(frozen=True, kw_only=True)
class ReplicateKvHeads:
    """Let each key and value head stand several times in a row, so that as many devices or cores each own one.

    Before: `kv_heads` heads, each read by `heads / kv_heads` query heads. After: `repeat * kv_heads` heads, made by the
    weights, each read by fewer; the cache grows as they do. Exact: what is stored is repeated as it is stored.

    Not handled: heads that cannot be followed to weights.

    Attributes:
        repeat: How often each head is to stand there.
        kv_heads: How many heads there are to be, in place of `repeat`.
    """

    name: ClassVar[str] = "replicate-kv-heads"

    repeat: int | None = None
    kv_heads: int | None = None

    def apply(self, subject: Subject) -> Outcome:
        """Replicate the heads of every layer.

        Raises:
            UsageError: The count is not one that there can be; the message lists those that there are.
            UnsupportedError: It cannot be proved which weights make the heads.
        """
        given = {"--repeat": self.repeat is not None, "--kv-heads": self.kv_heads is not None}
        check_one_of(self.name, given)
        return change_heads(subject, self._wanted, lossy=False)

    def _wanted(self, layer: int, counts: HeadCounts) -> Selection | None:
        wanted = self.kv_heads if self.kv_heads is not None else counts.kv_heads * (self.repeat or 0)
        legal = legal_counts(counts)
        if wanted not in legal:
            raise not_a_count(layer, counts, wanted, legal)
        times = wanted // counts.kv_heads
        return replicated(counts.kv_heads, times) if times > 1 else None


def legal_counts(counts: HeadCounts) -> list[int]:
    """Counts that are a multiple of the key heads and divide the query heads."""
    return [new for new in range(counts.kv_heads, counts.heads + 1, counts.kv_heads) if counts.heads % new == 0]
