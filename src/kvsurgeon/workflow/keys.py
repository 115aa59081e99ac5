"""Keys of an attention layer for a prompt, computed in onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from kvsurgeon import io
from kvsurgeon.anatomy import Decoder
from kvsurgeon.errors import UsageError
from kvsurgeon.heads.grouped_products import key_heads_read
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import without_cache
from kvsurgeon.passes.contract import Source, Subject
from kvsurgeon.runtime import CachedDecoder, open_session
from kvsurgeon.runtime.text import Prompt, encode_prompt, load_tokenizer, side_folders

PROMPT = "The quick brown fox jumps over the lazy dog."
_MAX_TOKENS = 24  # rows of a legible plot
_DEFAULT_TOKENS = range(1, 10)  # IDs that any model knows, for a model without a tokenizer


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The keys of an attention layer for a prompt.

    Attributes:
        model: Name of the model.
        layer: Index of the attention layer.
        reads: KV head of each query head.
        keys: Keys, `[kv_heads, tokens, head_dim]`.
        tokens: Text or ID of each token.
    """

    model: str
    layer: int
    reads: tuple[int, ...]
    keys: npt.NDArray[np.float32]
    tokens: tuple[str, ...]

    @property
    def query_heads(self) -> int:
        """Number of query heads."""
        return len(self.reads)

    @property
    def kv_heads(self) -> int:
        """Number of KV heads."""
        return len(self.keys)

    def of_query_head(self, head: int) -> npt.NDArray[np.float32]:
        """Return the keys of a query head, `[tokens, head_dim]`."""
        read: npt.NDArray[np.float32] = self.keys[self.reads[head]]
        return read


def capture_keys(
    source: Source, *, layer: int = 0, prompt: Prompt | None = None, folder: str | Path | None = None
) -> Keys:
    """Return the keys of an attention layer for a prompt.

    Args:
        source: A file, a folder with one, or a model in memory, which is not changed; with a cache or without.
        layer: Index of the attention layer, in execution order.
        prompt: A text, or token IDs for a model without a tokenizer.
        folder: Folder of the weights and side files of a model in memory.

    Raises:
        UsageError: The layer does not exist, has no keys of heads, or the prompt cannot be encoded.
        InputError: The model cannot be read.
        UnsupportedError: No attention is found.
        RunError: The model fails.
    """
    subject = without_cache(Subject.of(source, folder))
    decoder = subject.decoder()
    if not 0 <= layer < len(decoder.attentions):
        raise UsageError(f"expected a layer from 0 to {len(decoder.attentions) - 1}, found {layer}")
    reads = key_heads_read(subject.analysis(), layer)
    Inject().apply(subject)
    proto = io.to_proto(subject.model)
    tokenizer = load_tokenizer(side_folders(proto, subject.folder))
    tokens = np.array([_encode(tokenizer, prompt)], np.int64)
    cached = CachedDecoder(open_session(proto, folder=subject.folder, threads=1))
    cached.run(cached.inputs.feeds(tokens, np.ones_like(tokens)))
    owner = _cache_layer(decoder, layer)
    entry = next(entry for entry in cached.cache if entry.layer == owner and entry.part == "key")
    keys = cached.cached_rows(entry)[0].astype(np.float32)  # [kv_heads, tokens, head_dim]
    if keys.ndim == 3 and len(keys) == len(reads):
        reads = tuple(range(len(reads)))  # heads are repeated before the cache
    if keys.ndim != 3 or set(reads) != set(range(len(keys))):
        raise UsageError(
            f"cannot plot the keys of layer {layer}: expected [kv_heads, tokens, head_dim], found {list(keys.shape)}"
        )
    texts = tuple(_decode(tokenizer, token) for token in tokens[0].tolist())
    return Keys(model=_name(source), layer=layer, reads=reads, keys=keys, tokens=texts)


def _cache_layer(decoder: Decoder, layer: int) -> int:
    """Return the index of the cache entry of a layer: its own, or that of the layer whose cache it shares."""
    shared = decoder.attentions[layer].shares_cache_with
    owner = layer if shared is None else shared
    return sum(one.shares_cache_with is None for one in decoder.attentions[:owner])


def _encode(tokenizer: Tokenizer | None, prompt: Prompt | None) -> list[int]:
    """Return the first token IDs of a prompt, or of a default one."""
    if prompt is None:
        prompt = PROMPT if tokenizer is not None else _DEFAULT_TOKENS
    return encode_prompt(prompt, tokenizer)[:_MAX_TOKENS]


def _decode(tokenizer: Tokenizer | None, token: int) -> str:
    text = str(token) if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False)
    return text.replace("\n", "↵").strip() or "␣"


def _name(source: Source) -> str:
    """Return the name of a model: that of its file, or of the folder of a file named `model`."""
    if not isinstance(source, str | Path):
        return "model"
    path = Path(source).resolve()
    if path.is_dir():
        return path.name
    return path.stem if path.stem != "model" else path.parent.name
