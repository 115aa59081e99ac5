"""Keys as onnxruntime computes them: of one layer, for a prompt, one matrix for each KV head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from kvsurgeon import io
from kvsurgeon.anatomy import Attention, Decoder
from kvsurgeon.errors import UsageError
from kvsurgeon.heads.grouped_products import key_heads_read
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import without_cache
from kvsurgeon.passes.contract import Source, Subject
from kvsurgeon.runtime import CachedDecoder, open_session
from kvsurgeon.runtime.text import Prompt, encode_prompt, load_tokenizer, side_folders

PROMPT = "The quick brown fox jumps over the lazy dog."
_TOKENS = 24  # rows of a picture that can still be read
_PLAIN_TOKENS = 9  # ids that any model knows, where there is neither a tokenizer nor a prompt of ids


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The keys of one layer for a prompt, as attention reads them.

    Attributes:
        model: What the model is called.
        layer: Index of the attention layer.
        reads: For each query head the KV head that it reads.
        keys: `[kv_heads, tokens, head_dim]`.
        tokens: What each token is, as text or as its id.
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
        """Return the keys that a query head reads, `[tokens, head_dim]`."""
        read: npt.NDArray[np.float32] = self.keys[self.reads[head]]
        return read


def capture_keys(
    source: Source, *, layer: int = 0, prompt: Prompt | None = None, folder: str | Path | None = None
) -> Keys:
    """Return the keys that a layer gives to attention for a prompt, with a cache in the model or without.

    Args:
        source: A file, a folder that holds one, or a model in memory, which stays as it is.
        layer: Index of the attention layer, counted in execution order.
        prompt: A text, or token ids where the model has no tokenizer.
        folder: Where weights and side files of a model in memory lie.

    Raises:
        UsageError: There is no such layer, or the prompt cannot be read.
        InputError: The model cannot be read.
        UnsupportedError: Its attention cannot be found.
        RunError: It cannot be run.
    """
    subject = without_cache(Subject.of(source, folder))
    decoder = subject.decoder()
    attention = _attention(decoder, layer)
    reads = key_heads_read(subject.analysis(), layer)
    Inject().apply(subject)
    proto = io.to_proto(subject.model)
    tokenizer = load_tokenizer(side_folders(proto, subject.folder))
    tokens = _encoded(tokenizer, prompt)
    cached = CachedDecoder(open_session(proto, folder=subject.folder, threads=1))
    given = np.array([tokens], np.int64)
    cached.advance(cached.inputs.feeds(given, np.ones_like(given)))
    entry = next(
        entry for entry in cached.cache if entry.layer == _entry_of(decoder, attention) and entry.part == "key"
    )
    keys = cached.cached_rows(entry)[0].astype(np.float32)  # [kv_heads, tokens, head_dim]
    if keys.ndim == 3 and len(keys) == len(reads):
        reads = tuple(range(len(reads)))  # repeated before the cache point
    if keys.ndim != 3 or set(reads) != set(range(len(keys))):
        raise UsageError(f"layer {layer} keeps {list(keys.shape)} for a text, which are not the keys of its heads")
    return Keys(
        model=_called(source),
        layer=layer,
        reads=reads,
        keys=keys,
        tokens=tuple(_token_text(tokenizer, token) for token in tokens),
    )


def _attention(decoder: Decoder, layer: int) -> Attention:
    count = len(decoder.attentions)
    if not 0 <= layer < count:
        raise UsageError(f"expected a layer from 0 to {count - 1}, found {layer}")
    return decoder.attentions[layer]


def _entry_of(decoder: Decoder, attention: Attention) -> int:
    """Return the number of the cache entry that a layer reads: its own, or that of the layer it shares."""
    owner = attention.layer if attention.shares_cache_with is None else attention.shares_cache_with
    return sum(one.shares_cache_with is None for one in decoder.attentions[:owner])


def _encoded(tokenizer: Tokenizer | None, prompt: Prompt | None) -> list[int]:
    """Return the first tokens of a prompt, or of one that any model can read; see `encode_prompt`."""
    if prompt is None:
        prompt = PROMPT if tokenizer is not None else range(1, 1 + _PLAIN_TOKENS)
    return encode_prompt(prompt, tokenizer)[:_TOKENS]


def _token_text(tokenizer: Tokenizer | None, token: int) -> str:
    text = str(token) if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False)
    return text.replace("\n", "↵").strip() or "␣"


def _called(source: Source) -> str:
    """Return a name for a model: that of its folder, or of its file unless that is `model.onnx`."""
    if not isinstance(source, str | Path):
        return "model"
    path = Path(source).resolve()
    if path.is_dir():
        return path.name
    return path.stem if path.stem != "model" else path.parent.name
