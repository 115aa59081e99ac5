"""Models that run: sessions, what they are given, decoding with and without a cache, and text.

Of a model nothing is used but its file and what it declares: names, types and dims of inputs and outputs.
"""

from kvsurgeon.runtime.axes import (
    Axis,
    CacheEntry,
    axes_of,
    cache_entries,
    cache_mismatch,
    find_cache,
    find_presents,
    is_past,
    may_be_past,
    token_axes,
)
from kvsurgeon.runtime.cache_managers import CacheManager, CacheSpec, read_cache_metadata
from kvsurgeon.runtime.decoder import CachedDecoder, UncachedDecoder, has_cache, logits_name
from kvsurgeon.runtime.feeds import Given, Inputs, Tokens, fixed_size, inputs_of
from kvsurgeon.runtime.generate import Generation, Token, Writer, generate
from kvsurgeon.runtime.sampling import Sampling
from kvsurgeon.runtime.session import Optimisation, Session, Source, folder_of, model_file, open_session, useful_line
from kvsurgeon.runtime.tensors import Array, Tensor, from_proto, from_runtime, to_runtime

__all__ = [
    "Array",
    "Axis",
    "CacheEntry",
    "CacheManager",
    "CacheSpec",
    "CachedDecoder",
    "Generation",
    "Given",
    "Inputs",
    "Optimisation",
    "Sampling",
    "Session",
    "Source",
    "Tensor",
    "Token",
    "Tokens",
    "UncachedDecoder",
    "Writer",
    "axes_of",
    "cache_entries",
    "cache_mismatch",
    "find_cache",
    "find_presents",
    "fixed_size",
    "folder_of",
    "from_proto",
    "from_runtime",
    "generate",
    "has_cache",
    "inputs_of",
    "is_past",
    "logits_name",
    "may_be_past",
    "model_file",
    "open_session",
    "read_cache_metadata",
    "to_runtime",
    "token_axes",
    "useful_line",
]
