"""Runs of a text in chunks, with a cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from kvsurgeon.errors import BrokenCacheError, RunError
from kvsurgeon.runtime import AnyDecoder, Array, CachedDecoder, CacheIO


@dataclass(frozen=True, kw_only=True)
class ChunkedRun:
    """Outputs and cache of a text that was run in chunks.

    Attributes:
        spans: Past and total length of each call that succeeded.
        outputs: Outputs of each of these calls, without the cache.
        cache: Cached tensors after the last call, by past input; empty after a failure.
        changed_pasts: Presents that do not start with their past, with the past input that they start with, if any.
        failure: Reason why a call failed.
        layer: Layer whose cache made the call fail.
    """

    spans: tuple[tuple[int, int], ...]
    outputs: tuple[Mapping[str, Array], ...]
    cache: Mapping[str, Array] = field(default_factory=dict)
    changed_pasts: Mapping[str, str | None] = field(default_factory=dict)
    failure: str | None = None
    layer: int | None = None


def run_in_chunks(decoder: AnyDecoder, feeds: Mapping[str, Array], spans: Iterable[tuple[int, int]]) -> ChunkedRun:
    """Run a text from an empty cache, a call for each span."""
    spans, outputs = tuple(spans), []
    changed: dict[str, str | None] = {}
    cache: dict[str, Array] = {}
    for past, total in spans:
        before = cache
        try:
            if isinstance(decoder, CachedDecoder):
                if not past:
                    decoder.reset()
                outputs.append(decoder.advance(decoder.inputs.part(feeds, past, total)))
                cache = {entry.past.name: decoder.cached_rows(entry) for entry in decoder.cache}
            else:
                outputs.append(decoder.run(feeds))
        except RunError as error:
            return ChunkedRun(
                spans=spans[: len(outputs)],
                outputs=tuple(outputs),
                changed_pasts=changed,
                failure=f"the call on tokens {past} to {total - 1} failed: {error}",
                layer=error.layer if isinstance(error, BrokenCacheError) else None,
            )
        if past and isinstance(decoder, CachedDecoder):
            for entry in (entry for entry in decoder.cache if not entry.is_fixed and entry.window is None):
                present = cache[entry.past.name]
                if entry.present not in changed and not _starts_with(present, before, entry):
                    others = (other.past.name for other in decoder.cache if _starts_with(present, before, other))
                    changed[entry.present] = next(others, None)
    return ChunkedRun(spans=spans, outputs=tuple(outputs), cache=cache, changed_pasts=changed)


def _starts_with(present: Array, pasts: Mapping[str, Array], entry: CacheIO) -> bool:
    past = pasts[entry.past.name]
    start = present[(slice(None),) * entry.axis + (slice(0, past.shape[entry.axis]),)]
    if start.shape != past.shape:
        return False
    same = np.ascontiguousarray(start).tobytes() == np.ascontiguousarray(past).tobytes()
    return same or bool(np.array_equal(start.astype(np.float32), past.astype(np.float32), equal_nan=True))
