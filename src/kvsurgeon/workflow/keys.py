"""Keys of an attention layer for a prompt, computed in onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvsurgeon import io
from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.anatomy import Decoder
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.heads.grouped_products import key_heads_read
from kvsurgeon.io.loading import Source
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import without_cache
from kvsurgeon.passes.contract import Subject
from kvsurgeon.runtime import CachedDecoder, open_session
from kvsurgeon.runtime.text import Prompt, load_tokenizer, side_folders
from kvsurgeon.workflow.prompts import short_prompt


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
    return KeyReader(source, prompt=prompt, folder=folder).of_layer(layer)


class KeyReader:
    """Reads the keys of any attention layer after one run of the model."""

    def __init__(
        self, source: Source, *, prompt: Prompt | None = None, folder: str | Path | None = None, name: str | None = None
    ) -> None:
        """Analyze a model; see `capture_keys`. Its name is that of its file by default.

        Raises:
            InputError: The model cannot be read.
            UnsupportedError: No attention is found.
        """
        self._name = model_name(source) if name is None else name
        self._subject = without_cache(Subject.of(source, folder))
        self._analysis, self._decoder = self._subject.analysis(), self._subject.decoder()
        self._prompt = prompt

    def of_layer(self, layer: int) -> Keys:
        """Return the keys of an attention layer.

        Raises:
            UsageError: The layer does not exist, has no keys of heads, or the prompt cannot be encoded.
            UnsupportedError: The heads cannot be traced.
            RunError: The model fails.
        """
        layers = len(self._decoder.attentions)
        if not 0 <= layer < layers:
            raise UsageError(f"expected a layer from 0 to {layers - 1}, found {layer}")
        reads = self._reads[layer]
        if isinstance(reads, UnsupportedError):
            raise reads
        cached, tokens = self._run
        owner = _cache_layer(self._decoder, layer)
        entry = next(entry for entry in cached.cache if entry.layer == owner and entry.part == "key")
        keys = cached.cached_rows(entry)[0].astype(np.float32)  # [kv_heads, tokens, head_dim]
        if keys.ndim == 3 and len(keys) == len(reads):
            reads = tuple(range(len(reads)))  # heads are repeated before the cache
        if keys.ndim != 3 or set(reads) != set(range(len(keys))):
            raise UsageError(
                f"cannot plot the keys of layer {layer}: expected [kv_heads, tokens, head_dim], "
                f"found {list(keys.shape)}"
            )
        return Keys(model=self._name, layer=layer, reads=reads, keys=keys, tokens=tokens)

    @cached_property
    def _reads(self) -> list[tuple[int, ...] | UnsupportedError]:
        """KV head of each query head of each layer, or why it cannot be traced."""
        return [_heads_read(self._analysis, layer) for layer in range(len(self._decoder.attentions))]

    @cached_property
    def _run(self) -> tuple[CachedDecoder, tuple[str, ...]]:
        """The model with a cache that holds the prompt, and the tokens of the prompt."""
        subject = self._subject
        Inject().apply(subject)
        proto = io.to_proto(subject.model)
        prompt = short_prompt(self._prompt, load_tokenizer(side_folders(proto, subject.folder)))
        cached = CachedDecoder(open_session(proto, folder=subject.folder, threads=1))
        cached.run(cached.inputs.feeds(prompt.ids, np.ones_like(prompt.ids)))
        return cached, prompt.texts


def _heads_read(analysis: Analysis, layer: int) -> tuple[int, ...] | UnsupportedError:
    try:
        return key_heads_read(analysis, layer)
    except UnsupportedError as error:
        return error


def _cache_layer(decoder: Decoder, layer: int) -> int:
    """Return the index of the cache entry of a layer: its own, or that of the layer whose cache it shares."""
    shared = decoder.attentions[layer].shares_cache_with
    owner = layer if shared is None else shared
    return sum(one.shares_cache_with is None for one in decoder.attentions[:owner])


def model_name(source: Source) -> str:
    """Return the name of a model: that of its file, or of the folder of a file named `model`."""
    if not isinstance(source, str | Path):
        return "model"
    path = Path(source).resolve()
    if path.is_dir():
        return path.name
    return path.stem if path.stem != "model" else path.parent.name
