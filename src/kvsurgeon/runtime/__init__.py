"""Models in onnxruntime: sessions, input values, decoding with and without a cache, and text generation.

Of a model only the file and the declared names, types and dims of its inputs and outputs are used.
"""

from kvsurgeon.runtime.axes import CacheIO
from kvsurgeon.runtime.continuous_batching import ContinuousBatch
from kvsurgeon.runtime.decoder import AnyDecoder, CachedDecoder, UncachedDecoder
from kvsurgeon.runtime.feeds import DecoderInputs, InputSpec, Tokens
from kvsurgeon.runtime.generate import GeneratedToken, Generation, TextGenerator
from kvsurgeon.runtime.sampling import Sampling
from kvsurgeon.runtime.session import Optimization, Session, Source, open_session
from kvsurgeon.runtime.tensors import Array, ValueInfo

__all__ = [
    "AnyDecoder",
    "Array",
    "CacheIO",
    "CachedDecoder",
    "ContinuousBatch",
    "DecoderInputs",
    "GeneratedToken",
    "Generation",
    "InputSpec",
    "Optimization",
    "Sampling",
    "Session",
    "Source",
    "TextGenerator",
    "Tokens",
    "UncachedDecoder",
    "ValueInfo",
    "open_session",
]
