"""What a decoder with a cache does when it is given a text in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from kvsurgeon.errors import BrokenCacheError, RunError
from kvsurgeon.runtime import Array, CachedDecoder, CacheEntry


@dataclass(frozen=True, kw_only=True)
class ChunkCall:
    """One call, and all outputs of it but the cache."""

    past: int
    total: int
    outputs: Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class Performance:
    """All calls for a text, and the cache after the last one.

    Attributes:
        calls: Those that succeeded.
        cache: By name of the past input; empty where a call failed.
        forgot: Presents that did not begin with their past, and the past that they began with, if any.
        failure: Why a call failed.
        layer: The layer whose cache made it fail, where it was that.
    """

    calls: tuple[ChunkCall, ...]
    cache: Mapping[str, Array] = field(default_factory=dict)
    forgot: Mapping[str, str | None] = field(default_factory=dict)
    failure: str | None = None
    layer: int | None = None


def perform(decoder: CachedDecoder, feeds: Mapping[str, Array], spans: Iterable[tuple[int, int]]) -> Performance:
    """Give the text to the decoder in chunks, from an empty cache, and return what it did."""
    decoder.reset()
    calls: list[ChunkCall] = []
    forgot: dict[str, str | None] = {}
    cache: dict[str, Array] = {}
    for past, total in spans:
        before = cache
        try:
            outputs = decoder.advance(decoder.inputs.part(feeds, past, total))
        except RunError as error:
            layer = error.layer if isinstance(error, BrokenCacheError) else None
            failure = f"the call for the tokens {past} to {total - 1} failed: {error}"
            return Performance(calls=tuple(calls), forgot=forgot, failure=failure, layer=layer)
        calls.append(ChunkCall(past=past, total=total, outputs=outputs))
        cache = {entry.past.name: decoder.remembered(entry) for entry in decoder.cache}
        for entry in decoder.cache:
            if past and entry.present not in forgot and not _begins(cache[entry.past.name], before, entry):
                forgot[entry.present] = _begins_instead(cache[entry.past.name], before, decoder.cache)
    return Performance(calls=tuple(calls), cache=cache, forgot=forgot)


def _begins(present: Array, before: Mapping[str, Array], entry: CacheEntry) -> bool:
    past = before[entry.past.name]
    head = present[(slice(None),) * entry.axis + (slice(0, past.shape[entry.axis]),)]
    return head.shape == past.shape and np.ascontiguousarray(head).tobytes() == np.ascontiguousarray(past).tobytes()


def _begins_instead(present: Array, before: Mapping[str, Array], cache: Iterable[CacheEntry]) -> str | None:
    return next((entry.past.name for entry in cache if _begins(present, before, entry)), None)
