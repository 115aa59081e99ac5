"""Facts about a decoder: its attention layers, inputs and cache."""

from kvsurgeon.anatomy.facts import (
    Attention,
    CachedTensor,
    CachePointFacts,
    CrossAttention,
    Decoder,
    Input,
    Mask,
    Projection,
)
from kvsurgeon.anatomy.find import cache_facts, decoder_facts

__all__ = [
    "Attention",
    "CachePointFacts",
    "CachedTensor",
    "CrossAttention",
    "Decoder",
    "Input",
    "Mask",
    "Projection",
    "cache_facts",
    "decoder_facts",
]
