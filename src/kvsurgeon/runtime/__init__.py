"""Models in onnxruntime: sessions, input values, decoding with and without a cache, and text generation.

Of a model only the file and the declared names, types and dims of its inputs and outputs are used.
"""

from kvsurgeon.runtime.axes import (
    Axis,
    CacheIO,
    axes_of,
    cache_entries,
    cache_mismatch,
    find_cache,
    find_presents,
    is_past,
    may_be_past,
    token_axes,
)
from kvsurgeon.runtime.cache_managers import CacheManager, DeclaredCache, read_cache_metadata
from kvsurgeon.runtime.decoder import CachedDecoder, Runnable, UncachedDecoder, logits_name
from kvsurgeon.runtime.feeds import DecoderInputs, InputSpec, Tokens, fixed_size, inputs_of
from kvsurgeon.runtime.generate import GeneratedToken, Generation, TextGenerator, generate
from kvsurgeon.runtime.sampling import Sampling
from kvsurgeon.runtime.session import Optimization, Session, Source, folder_of, model_file, open_session
from kvsurgeon.runtime.tensors import Array, ValueInfo, from_proto, from_runtime, to_runtime

__all__ = [
    "Array",
    "Axis",
    "CacheIO",
    "CacheManager",
    "CachedDecoder",
    "DeclaredCache",
    "DecoderInputs",
    "GeneratedToken",
    "Generation",
    "InputSpec",
    "Optimization",
    "Runnable",
    "Sampling",
    "Session",
    "Source",
    "ValueInfo",
    "TextGenerator",
    "Tokens",
    "UncachedDecoder",
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
    "inputs_of",
    "is_past",
    "logits_name",
    "may_be_past",
    "model_file",
    "open_session",
    "read_cache_metadata",
    "to_runtime",
    "token_axes",
]
