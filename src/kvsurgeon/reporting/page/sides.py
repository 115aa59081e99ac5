"""The models of a report page: what is known of each, and what is measured by running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TypeAlias, TypeVar

from kvsurgeon import io
from kvsurgeon.anatomy import Decoder
from kvsurgeon.cache.sizes import CacheSize, cache_size
from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.io.loading import Source, as_runnable
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import without_cache
from kvsurgeon.passes.contract import Subject
from kvsurgeon.proof.proof import Proof
from kvsurgeon.reporting.page.attention_graph import AttentionGraph, attention_graph
from kvsurgeon.runtime import Generation, TextGenerator
from kvsurgeon.runtime.text import Prompt, load_tokenizer, side_folders
from kvsurgeon.workflow.attention_weights import AttentionWeights, capture_attention_weights
from kvsurgeon.workflow.keys import KeyReader, Keys, model_name
from kvsurgeon.workflow.prompts import short_prompt

T = TypeVar("T")
Measured: TypeAlias = T | KvsurgeonError  # or why it cannot be measured


class Side:
    """One model of a report page.

    Attributes:
        name: Name of the model.
        source: A file, a folder that holds one, or a model in memory.
        folder: Folder of the weights and side files of a model in memory.
        subject: The model as it is.
    """

    def __init__(self, source: Source, *, name: str | None = None, folder: str | Path | None = None) -> None:
        """Read a model, without its weights.

        Raises:
            InputError: The model cannot be read.
        """
        self.name = model_name(source) if name is None else name
        (self.source,), self.folder = as_runnable((source,), folder)
        self.subject = Subject.of(self.source, self.folder)

    @cached_property
    def without_cache(self) -> Subject:
        """The model without its cache.

        Raises:
            UnsupportedError: The cache cannot be removed.
        """
        return without_cache(self.subject)

    @cached_property
    def decoder(self) -> Decoder:
        """Facts about the model.

        Raises:
            UnsupportedError: It is not a causal decoder that can be handled soundly.
        """
        return self.subject.decoder()

    @property
    def proof(self) -> Proof:
        """The proof of the model; that of its first call if it has a cache."""
        return self.without_cache.proof()

    @property
    def has_cache(self) -> bool:
        """Whether the model has a cache."""
        return bool(self.decoder.cache)

    @property
    def cache_size(self) -> CacheSize:
        """The size of the cache, or of the one that `inject` would add."""
        if self.has_cache:
            return cache_size(self.subject.model.graph)
        states = (state.bytes_per_token * state.rows for state in self.decoder.states if state.rows is not None)
        return CacheSize(per_token=self.decoder.cache_bytes_per_token, fixed=sum(states))

    def attention_graph(self, layer: int) -> AttentionGraph | str:
        """Return the graph around the attention of a layer, or why it cannot be drawn."""
        facts = self.without_cache.analysis().shapes.facts
        return attention_graph(self.subject.model.graph, facts, self.decoder, layer)

    def injected(self) -> Side:
        """Return the model with the cache that `inject` adds by default, in memory.

        Raises:
            UnsupportedError: No cache can be added.
        """
        subject = Subject.of(self.source, self.folder)
        Inject().apply(subject)
        return Side(io.to_proto(subject.model, subject.folder), name=f"{self.name} with a cache", folder=subject.folder)

    def attention_weights(self, prompt: Prompt | None) -> Measured[AttentionWeights]:
        """Return the attention weights of all layers for a prompt."""
        return _measured(partial(capture_attention_weights, self.source, prompt=prompt, folder=self.folder))

    def keys(self, prompt: Prompt | None) -> Measured[Sequence[Measured[Keys]]]:
        """Return the keys of all layers for a prompt."""

        def read() -> list[Measured[Keys]]:
            reader = KeyReader(self.source, prompt=prompt, folder=self.folder, name=self.name)
            return [_measured(partial(reader.of_layer, layer)) for layer in range(len(self.decoder.attentions))]

        return _measured(read)

    def generation(self, prompt: Prompt | None, tokens: int) -> Measured[Generation]:
        """Return so many generated tokens, with the time of each."""

        def generate() -> Generation:
            generator = TextGenerator(self.source, folder=self.folder, stop=())
            start = short_prompt(prompt, load_tokenizer(side_folders(self.source, self.folder))).ids[0].tolist()
            return generator.generate(start, max_new_tokens=tokens)

        return _measured(generate)


def _measured(run: Callable[[], T]) -> Measured[T]:
    """Return a result, or the error that it ends with: a page shows the rest."""
    try:
        return run()
    except KvsurgeonError as error:
        return error
