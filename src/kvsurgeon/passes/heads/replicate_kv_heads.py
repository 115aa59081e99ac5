"""Duplicate KV heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsurgeon.heads.counts import HeadCounts
from kvsurgeon.heads.selection import Selection, repeat_heads
from kvsurgeon.passes.contract import Outcome, Subject
from kvsurgeon.passes.heads.change_heads import change_heads, check_one_of, invalid_count


@dataclass(frozen=True, kw_only=True)
class ReplicateKvHeads:
    """Duplicate each KV head N times, so that more devices or cores can own one each.

    Before: `kv_heads` heads, each read by `heads / kv_heads` query heads. After: `repeat * kv_heads` heads, computed by
    duplicated weight columns, each read by fewer query heads; the cache grows in proportion. Exact: stored weights are
    copied, quantized or not.

    Not supported: heads that cannot be traced to weights.

    Attributes:
        repeat: Number of copies of each KV head.
        kv_heads: New number of KV heads, instead of `repeat`.
    """

    name: ClassVar[str] = "replicate-kv-heads"

    repeat: int | None = None
    kv_heads: int | None = None

    def apply(self, subject: Subject) -> Outcome:
        """Duplicate the KV heads of every layer.

        Raises:
            UsageError: The number of heads is not valid; the message lists the valid ones.
            UnsupportedError: The weights of the heads cannot be found.
        """
        check_one_of(self.name, {"--repeat": self.repeat is not None, "--kv-heads": self.kv_heads is not None})
        return change_heads(subject, self._select, lossy=False)

    def _select(self, layer: int, counts: HeadCounts) -> Selection | None:
        kv_heads = self.kv_heads if self.kv_heads is not None else counts.kv_heads * (self.repeat or 0)
        valid = valid_counts(counts)
        if kv_heads not in valid:
            raise invalid_count(layer, counts, kv_heads, valid)
        times = kv_heads // counts.kv_heads
        return repeat_heads(counts.kv_heads, times) if times > 1 else None


def valid_counts(counts: HeadCounts) -> list[int]:
    """Return the numbers of KV heads that are a multiple of the present one and divide the query heads."""
    return [new for new in range(counts.kv_heads, counts.heads + 1, counts.kv_heads) if counts.heads % new == 0]
