"""A model as a judge of losses asks it: texts in, what it predicts of each token out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from kvsurgeon.errors import ParityError, RunError
from kvsurgeon.parity.difference import distance, spread
from kvsurgeon.parity.tolerance import load_graph
from kvsurgeon.runtime import (
    Array,
    CachedDecoder,
    Source,
    Tokens,
    UncachedDecoder,
    find_cache,
    fixed_size,
    folder_of,
    open_session,
    read_cache_metadata,
)


class Predictor:
    """A model that is given texts, and predicts of each token what comes next."""

    def __init__(
        self, source: Source, name: str, exposed: Sequence[str], folder: str | Path | None, threads: int | None
    ) -> None:
        """Open the model.

        Args:
            source: Where it is.
            name: What errors call it.
            exposed: Names of values that it is to return beside its outputs.
            folder: Where the weights of a model in memory lie.
            threads: Threads that onnxruntime may use for one operator.

        Raises:
            InputError: It cannot be read.
            RunError: It cannot be run.
        """
        session = open_session(_exposing(source, exposed), folder=folder_of(source, folder), threads=threads, name=name)
        cache = find_cache(session.inputs, session.outputs, read_cache_metadata(session.metadata).layouts)
        self.decoder = CachedDecoder(session, cache) if cache else UncachedDecoder(session)
        self.name = name
        self._exposed = tuple(exposed)
        tokens = self.decoder.inputs.tokens
        self._batch_axis = tokens.axes.index("batch") if "batch" in tokens.axes else None
        self._rows = 1 if self._batch_axis is None else fixed_size(self.decoder.inputs, session.inputs, "batch") or 1

    @property
    def length(self) -> int | None:
        """The only length that it takes; None where it takes any."""
        return self.decoder.length if isinstance(self.decoder, UncachedDecoder) else None

    def predict(self, tokens: Tokens) -> Mapping[str, Array]:
        """Return what it computes of a text `[1, sequence]`: its logits, called so, and the values that it exposes.

        Raises:
            RunError: It cannot be run on it.
        """
        feeds = self._feeds(tokens)
        if isinstance(self.decoder, CachedDecoder):
            self.decoder.reset()
            outputs = self.decoder.advance(feeds)
        else:
            outputs = self.decoder.run(feeds)
        kept = {name: outputs[name] for name in self._exposed} | {"logits": outputs[self.decoder.logits]}
        return {name: self._first_row(array) for name, array in kept.items()}

    def _feeds(self, tokens: Tokens) -> dict[str, Array]:
        """What it is given: the text in every row of a batch that is fixed."""
        rows = np.repeat(tokens, self._rows, axis=0)
        return self.decoder.inputs.whole(rows, np.ones_like(rows))

    def _first_row(self, array: Array) -> Array:
        """What it says of one of the texts, which are all the same."""
        if self._rows == 1 or self._batch_axis is None:
            return array
        size = array.shape[self._batch_axis] if self._batch_axis < array.ndim else 1
        if size % self._rows:
            raise RunError(f"expected {self._rows} rows from {self.name}, found an output {list(array.shape)}")
        return array.take(range(size // self._rows), axis=self._batch_axis)

    def longest(self, length: int) -> int:
        """Return how many tokens it takes at once: so many, or half of it, or a quarter, ...

        Raises:
            RunError: It takes none.
        """
        return _largest(length, lambda size: np.zeros((1, size), np.int64), self.predict)

    def vocabulary(self, length: int) -> int:
        """Return how many ids it knows: as many as it has logits for, or fewer where it has fewer rows for them.

        Raises:
            RunError: It knows none.
        """
        logits = self.predict(np.zeros((1, length), np.int64))["logits"]
        return _largest(logits.shape[-1], lambda size: np.full((1, length), size - 1, np.int64), self.predict)

    def check_cache(self, tokens: Tokens, whole: Mapping[str, Array], allowed: float) -> None:
        """Leave quietly if the model predicts the same when the text is given in two calls.

        Raises:
            ParityError: It does not.
        """
        logits = whole["logits"]
        if not np.isfinite(logits.astype(np.float32)).any():
            raise ParityError(f"expected numbers from {self.name}, found none among its logits")
        if not isinstance(self.decoder, CachedDecoder) or logits.shape[1:2] != tokens.shape[1:]:
            return
        feeds, length = self._feeds(tokens), tokens.shape[1]
        self.decoder.reset()
        spans = ((0, length // 2), (length // 2, length))
        parts = [self.decoder.step(self.decoder.inputs.part(feeds, past, total)) for past, total in spans]
        error = distance(logits, self._first_row(np.concatenate(parts, axis=1)), spread(logits))
        if not error <= allowed:
            raise ParityError(
                f"expected the same logits from {self.name} whether its cache is used or not, found them off by "
                f"{error:.1e} of their spread ({allowed:.0e} allowed)"
            )


def _largest(size: int, tokens: Callable[[int], Tokens], run: Callable[[Tokens], object]) -> int:
    """Return the size, or half of it, or a quarter, ...: the first at which the model runs.

    Raises:
        RunError: There is none.
    """
    while True:
        try:
            run(tokens(size))
        except RunError:
            if size == 1:
                raise
            size //= 2
        else:
            return size


def _exposing(source: Source, names: Sequence[str]) -> Source:
    """Return the model with some of its values as further outputs."""
    if not names:
        return source
    exposed = onnx.ModelProto()
    exposed.CopyFrom(load_graph(source))
    have = {output.name for output in exposed.graph.output}
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in have)
    return exposed
