"""Predictions of a model for texts: its logits, and some of its inner values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from kvsurgeon.errors import MissingKernelError, ParityError, RunError
from kvsurgeon.parity.arithmetic.wide_model import wide_model
from kvsurgeon.parity.difference import distance, spread
from kvsurgeon.parity.model_source import load_graph, with_outputs
from kvsurgeon.runtime import AnyDecoder, Array, CachedDecoder, Source, Tokens, UncachedDecoder, open_session
from kvsurgeon.runtime.axes import find_cache
from kvsurgeon.runtime.cache_managers import read_cache_metadata
from kvsurgeon.runtime.session import folder_of
from kvsurgeon.runtime.shared_inputs import share_inputs


def open_decoder(
    source: Source, name: str, outputs: Sequence[str], folder: str | Path | None, threads: int | None
) -> AnyDecoder:
    """Open a model, with a cache or without, and with some inner values as further outputs.

    A model in bfloat16, for which onnxruntime has few kernels, is opened in float32.

    Raises:
        InputError: The model cannot be read.
        RunError: onnxruntime cannot run it.
    """
    model = with_outputs(load_graph(source), outputs) if outputs else source
    opened = partial(open_session, folder=folder_of(source, folder), threads=threads, name=name)
    try:
        session = opened(model)
    except MissingKernelError:
        wide = wide_model(load_graph(model))
        if wide is None:
            raise
        session = opened(wide)
    cache = find_cache(session.inputs, session.outputs, read_cache_metadata(session.metadata).layouts)
    decoder = CachedDecoder(session, cache) if cache else UncachedDecoder(session)
    share_inputs([decoder])
    return decoder


def predict(decoder: AnyDecoder, tokens: Tokens, outputs: Sequence[str] = ()) -> dict[str, Array]:
    """Return the logits, under this name, and some outputs for a text `[1, sequence]`.

    Raises:
        RunError: The model fails.
    """
    found = decoder.run(_feeds(decoder, tokens))
    return {name: _first_row(decoder, found[name]) for name in outputs} | {
        "logits": _first_row(decoder, found[decoder.logits])
    }


def longest_text(decoder: AnyDecoder, length: int, tokens: Sequence[int] | None = None) -> int:
    """Return the first of a length, its half, its quarter, ... that the model takes.

    Args:
        decoder: The model.
        length: The length.
        tokens: The text; zeros if None. Zeros may be padding, whose position some models leave out.

    Raises:
        RunError: The model takes none.
    """
    row = np.zeros((1, length), np.int64) if tokens is None else np.array([tokens[:length]], np.int64)
    return _largest(row.shape[1], lambda size: predict(decoder, row[:, :size]))


def vocabulary_size(decoder: AnyDecoder, length: int) -> int:
    """Return the first of the number of logits, its half, its quarter, ... whose token IDs the model takes.

    Raises:
        RunError: The model takes none.
    """
    logits = predict(decoder, np.zeros((1, length), np.int64))["logits"]
    return _largest(logits.shape[-1], lambda size: predict(decoder, np.full((1, length), size - 1, np.int64)))


def check_cache(decoder: AnyDecoder, tokens: Tokens, logits: Array, bound: float) -> None:
    """Check that a model returns finite logits, and with a cache the same in two calls as in one.

    Args:
        decoder: The model.
        tokens: A text, `[1, sequence]`.
        logits: Its logits in one call.
        bound: Largest error that is allowed.

    Raises:
        ParityError: It does not.
    """
    name = decoder.session.name
    if not np.isfinite(logits.astype(np.float32)).any():
        raise ParityError(f"expected numbers from {name}, found none among its logits")
    if not isinstance(decoder, CachedDecoder) or logits.shape[1:2] != tokens.shape[1:]:
        return
    feeds, half, length = _feeds(decoder, tokens), tokens.shape[1] // 2, tokens.shape[1]
    decoder.reset()
    parts = [decoder.step(decoder.inputs.part(feeds, *span)) for span in ((0, half), (half, length))]
    error = distance(logits, _first_row(decoder, np.concatenate(parts, axis=1)), spread(logits))
    if not error <= bound:
        raise ParityError(
            f"expected the same logits from {name} with and without its cache, found an error of {error:.1e} of their "
            f"spread (bound {bound:.0e})"
        )


def _feeds(decoder: AnyDecoder, tokens: Tokens) -> Mapping[str, Array]:
    """Return the feeds of a text, repeated in each row of a fixed batch."""
    rows = np.repeat(tokens, _batch(decoder), axis=0)
    return decoder.inputs.feeds(rows, np.ones_like(rows))


def _first_row(decoder: AnyDecoder, array: Array) -> Array:
    """Return an output for the first row of a fixed batch, in which all rows are equal."""
    rows = _batch(decoder)
    if rows == 1:
        return array
    axis = decoder.inputs.tokens.axes.index("batch")
    size = array.shape[axis] if axis < array.ndim else 1
    if size % rows:
        raise RunError(f"expected {rows} rows from {decoder.session.name}, found an output {list(array.shape)}")
    return array.take(range(size // rows), axis=axis)


def _batch(decoder: AnyDecoder) -> int:
    return decoder.batch or 1 if "batch" in decoder.inputs.tokens.axes else 1


def _largest(size: int, run: Callable[[int], object]) -> int:
    """Return the first of a size, its half, its quarter, ... at which the model runs.

    Raises:
        RunError: There is none.
    """
    while True:
        try:
            run(size)
        except RunError:
            if size == 1:
                raise
            size //= 2
        else:
            return size
