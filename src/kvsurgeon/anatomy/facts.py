"""What was found in a decoder, as facts: frozen, and free of any reference into the graph.

Shapes use the words of ``docs/glossary.md``; every name is the name of a value or an initializer in the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MaskKind = Literal["causal", "window", "chunk", "other"]
Layout = tuple[str, ...]  # e.g. ("batch", "kv_heads", "sequence", "head_dim")


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query may see, as measured by running the mask and not as dim_names."""

    kind: MaskKind
    window: int | None = None  # keys that a query sees, itself included
    chunk: int | None = None  # positions in a block beyond which nothing is seen
    padding: bool = False  # follows an input such as `attention_mask`
    bias: bool = False  # adds a finite bias that varies with position (ALiBi, T5)


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """The key is rotated by position before it meets the query."""

    width: int  # features that are rotated, of head_dim
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The weights that make one of query, key or value out of the hidden state."""

    initializers: tuple[str, ...]  # in execution order; biases and quantisation parameters included
    output: str  # the product's output value
    fused: bool = False  # the same product also makes others of query, key and value


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The tensor that is kept for the past: its rows for new tokens are computed, the others remembered."""

    value: str
    dtype: str  # as numpy or ml_dtypes spells it: "float32", "bfloat16", "uint8"
    layout: Layout
    heads: int
    head_dim: int
    bytes_per_token: int  # of one sequence


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention layer: `softmax(query @ key^T) @ value`, wherever and however it is written."""

    layer: int
    at: str  # output of the context product
    scores: str  # output of the score product
    query_heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    scale: float | None  # None: not a constant
    softcap: float | None
    mask: Mask
    rotary: Rotary | None
    head_repeat: tuple[str, ...]  # values at which key and value heads become query heads
    query: Projection | None
    key: Projection | None
    value: Projection | None
    key_cut: Cut
    value_cut: Cut
    shares_cache_with: int | None = None  # an earlier layer whose tensors this one reads


@dataclass(frozen=True, kw_only=True)
class Input:
    """What one graph input is given for at a decode step."""

    name: str
    dtype: str
    original: tuple[str | int, ...]
    given: tuple[str | int, ...]  # with "sequence_length" (new tokens) and "total_sequence_length" (all so far)


@dataclass(frozen=True, kw_only=True)
class CachedTensor:
    """One past input of a model that has a cache, and the output that returns it with new rows, or these alone."""

    past: str
    present: str
    layer: int  # that reads it, counted in execution order among those with a cache of their own; a state's number
    kind: Literal["key", "value", "state"]
    dtype: str  # as numpy or ml_dtypes spells it
    shape: tuple[str | int, ...]  # of the past, as the model declares it
    cache_mode: Literal["dynamic", "static", "new-tokens"]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A causal decoder: its attention layers in execution order, and what was established about it.

    Of a model that has a cache it is all as if nothing were remembered, in a first call, and `cache` says what is.
    """

    attentions: tuple[Attention, ...]
    inputs: tuple[Input, ...]
    opset: int
    max_length: int | None  # the longest total length that the graph's own tables allow
    proved: tuple[str, ...]
    assumed: tuple[str, ...]
    states: tuple[Cut, ...] = ()  # what a cache would hold outside attention: what convolutions and shifts read
    cache: tuple[CachedTensor, ...] = ()  # in the order of the graph's inputs; empty where there is none

    @property
    def cache_entries(self) -> int:
        """Number of (key, value) pairs that the cache holds; below the number of layers where they share."""
        return sum(attention.shares_cache_with is None for attention in self.attentions)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one more token of one sequence adds to the cache."""
        own = [a for a in self.attentions if a.shares_cache_with is None]
        cuts = [*(cut for a in own for cut in (a.key_cut, a.value_cut)), *self.states]
        return sum(cut.bytes_per_token for cut in cuts)
