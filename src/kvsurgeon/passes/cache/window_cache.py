"""Keep the last rows of layers with a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsurgeon.cache.layout import declared_shape
from kvsurgeon.cache.pairs import CachePair, find_cache_pairs
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.passes.cache.remove_cache import detach_cache, reattach_cache
from kvsurgeon.passes.contract import Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class WindowCache:
    """Keep only the last rows in the cache of layers with a sliding window, as many as the window has keys.

    Before: `past_key_values.{i}.key [batch_size, kv_heads, past_sequence_length, head_dim]` of every layer. After:
    those of layers with a window of W have at most W rows, `last_W_rows`: each call drops the oldest ones. The model
    computes the same, also beyond the window.

    Not supported: caches other than dynamic ones, masks that depend on more than distances and padding, a cache before
    the rotary embedding.
    """

    name: ClassVar[str] = "window-cache"

    def apply(self, subject: Subject) -> Outcome:
        """Drop the rows that no query reads any more from the cache of `subject.model`.

        Raises:
            UnsupportedError: The cache cannot be removed and injected again in this form; the model is unchanged.
        """
        windowed = next((pair.past for pair in find_cache_pairs(subject.model.graph) if _is_windowed(pair)), None)
        if windowed is not None:
            return Unchanged(reason=f"`{windowed.name}` holds the last rows already")
        work = Subject(model=subject.model, folder=subject.folder, config=subject.config)
        signature = detach_cache(work)
        if signature is None:
            return Unchanged(reason="the model has no cache: use inject")
        masks = [attention.mask for attention in work.decoder().attentions]
        windows = {
            index: mask.window
            for index, mask in enumerate(masks)
            if mask.kind == "sliding-window" and mask.window is not None and not mask.bias
        }
        if not windows:
            return Unchanged(reason="no layer has a sliding window")
        if signature.past_length != "shape":
            raise UnsupportedError(
                "rows can be dropped of a dynamic cache only", code=Code.PASS_PRECONDITION,
                at=signature.entries[0].past, expected="dynamic", found=signature.entries[0].cache_mode,
            )  # fmt: skip
        outcome = reattach_cache(work, signature, windows=windows)
        subject.model = work.model
        return outcome


def _is_windowed(pair: CachePair) -> bool:
    return pair.cache_mode == "last-rows" and not isinstance(declared_shape(pair.past)[pair.axis], int)
