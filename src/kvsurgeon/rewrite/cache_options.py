"""Options of a cache: names, cache mode, layout and element type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvsurgeon.cache.layout import DEFAULT_LAYOUT, Layout
from kvsurgeon.cache.length_inputs import PastLength
from kvsurgeon.cache.pairs import CacheMode


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Options of a cache.

    Attributes:
        past: Name template of the cache inputs; {kind} is "key", "value" or "state".
        present: Name template of the cache outputs.
        first_layer: {layer} of the first layer, for a model that is one part of a longer one.
        cache: Cache mode: past in, past and new rows out (dynamic); a fixed buffer, updated in place (static); or past
            in, only new rows out (new-tokens).
        past_length: Source of the number of past tokens: the shape of the cache inputs, a separate input with one
            number for the whole batch or per sequence of it, the first position (for batches without left padding), or
            the length of the attention mask; none is shape, or input for a static cache.
        max_length: Capacity of a static cache in tokens; none is dynamic, read from its shape.
        key_layout: Order of the axes of the cached keys.
        value_layout: Order of the axes of the cached values.
        cache_dtype: Element type of the cache; none is that of the keys and values in the model.
    """

    past: str = "past_key_values.{layer}.{kind}"
    present: str = "present.{layer}.{kind}"
    first_layer: int = 0
    cache: CacheMode = "dynamic"
    past_length: PastLength | None = None
    max_length: int | None = None
    key_layout: Layout = DEFAULT_LAYOUT
    value_layout: Layout = DEFAULT_LAYOUT
    cache_dtype: Literal["float16"] | None = None
