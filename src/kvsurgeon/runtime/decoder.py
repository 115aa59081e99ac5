"""Decoders that are run: with a cache, a chunk at a time; without one, the whole text each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvsurgeon.errors import UsageError
from kvsurgeon.runtime.axes import Axis, CacheEntry, axes_of, axis_of, find_cache, is_past
from kvsurgeon.runtime.cache_managers import find_counter, open_cache_manager, read_cache_metadata
from kvsurgeon.runtime.feeds import Given, Inputs, fixed_size, inputs_of, padded
from kvsurgeon.runtime.open_dims import settled
from kvsurgeon.runtime.session import Session
from kvsurgeon.runtime.tensors import Array, Tensor, from_runtime, to_runtime


def logits_name(outputs: Sequence[Tensor]) -> str:
    """Return the output that holds the logits: the one called so, else the first floating one of rank 3.

    Raises:
        UsageError: No output holds floating-point numbers.
    """
    floating = [tensor for tensor in outputs if tensor.floating]
    by_merit = [[t for t in floating if t.name == "logits"], [t for t in floating if len(t.dims) == 3], floating]
    for tensors in by_merit:
        if tensors:
            return tensors[0].name
    raise UsageError(f"expected an output of logits, found {', '.join(t.name for t in outputs) or 'none'}")


def has_cache(session: Session) -> bool:
    """Whether a model remembers anything between calls."""
    return any(is_past(tensor) for tensor in session.inputs)


class CachedDecoder:
    """A decoder with a cache, and what it remembers between calls.

    Attributes:
        session: The model.
        cache: Its past inputs and present outputs, in order.
        inputs: What else it is given.
        logits: Name of the output that holds the logits.
        host: Keeps the cache in the model's cache mode.
        step_length: The only number of tokens that a call takes; None where it takes any.
        past_length: Tokens remembered.
    """

    def __init__(self, session: Session, cache: Sequence[CacheEntry] | None = None) -> None:
        self.session = session
        note = read_cache_metadata(session.metadata)
        self.cache = tuple(find_cache(session.inputs, session.outputs, note.layouts) if cache is None else cache)
        if not self.cache:
            raise UsageError(f"expected inputs named past_key_values.*, found none in {session.name}")
        self.host = open_cache_manager(self.cache, note)
        self._batch_chunks = note.batch_chunks
        pasts = {entry.past.name for entry in self.cache}
        presents = {entry.present for entry in self.cache}
        self._counter = find_counter(session.inputs)
        given = [one for one in inputs_of(session.inputs, pasts).given if one.name != self._counter]
        self.inputs = Inputs(given=tuple(given))
        self.outputs = tuple(note.meant(tensor) for tensor in session.outputs if tensor.name not in presents)
        self.logits = logits_name(self.outputs)
        self.step_length = fixed_size(self.inputs, session.inputs, "new")
        self.past_length = 0
        self.cache = settled(self.cache, self._run_on_one_token)

    @property
    def room(self) -> int | None:
        """The most tokens that a text may have; None where there is no such bound."""
        return self.host.longest(self.step_length or 1)

    def reset(self) -> None:
        """Forget all tokens."""
        self.past_length = 0
        self.host.reset()

    def prefill(self, feeds: Mapping[str, Array]) -> Array:
        """Forget all tokens, take the first ones, and return their logits."""
        self.reset()
        return self.step(feeds)

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Take further tokens, and return their logits."""
        return self.advance(feeds)[self.logits]

    def advance(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Take further tokens, and return all outputs but the cache.

        A model that takes a fixed number of tokens is called as often as that needs, and so is one that takes several
        sequences token by token. What a call is given in excess are tokens of the future to it, and forgotten.

        Raises:
            RunError: The model cannot be run on them.
            BrokenCacheError: It ran, and a present does not hold what it must.
        """
        tokens = self.inputs.tokens
        new = feeds[tokens.name].shape[tokens.axes.index("new")]
        size, start = self._size_of_calls(feeds, new), self.past_length
        calls = []
        for first in range(0, new, size):
            stop = min(first + size, new)
            piece = {given.name: _piece(given, feeds[given.name], start, first, stop) for given in self.inputs.given}
            calls.append(self._call(piece, stop - first, size))
        return {name: self._joined(name, [call[name] for call in calls], new, size) for name in calls[0]}

    def _size_of_calls(self, feeds: Mapping[str, Array], new: int) -> int:
        """How many tokens a call is given."""
        if self.step_length is not None:
            return self.step_length
        return 1 if self.past_length and self._batch(feeds) > 1 and not self._batch_chunks else new

    def _batch(self, feeds: Mapping[str, Array]) -> int:
        tokens = self.inputs.tokens
        return feeds[tokens.name].shape[tokens.axes.index("batch")] if "batch" in tokens.axes else 1

    def remembered(self, entry: CacheEntry) -> Array:
        """Return one entry of the cache as it is now: a row for each token so far."""
        return self.host.rows(entry, self.past_length)

    def _run_on_one_token(self, cache: Sequence[CacheEntry]) -> None:
        """Keep the cache in these entries, and see that the model runs.

        Raises:
            RunError: It does not.
        """
        self.host = open_cache_manager(cache, read_cache_metadata(self.session.metadata))
        shape = fixed_size(self.inputs, self.session.inputs, "batch") or 1, self.step_length or 1
        self.prefill(self.inputs.whole(np.zeros(shape, np.int64), np.ones(shape, np.int64)))
        self.reset()

    def _call(self, feeds: Mapping[str, Array], new: int, size: int) -> dict[str, Array]:
        """Take up to `size` tokens in one call of that many."""
        past = self.past_length
        batch = self._batch(feeds)
        pasts = self.host.given(batch, past, size)
        given = {one.name: self._fitted(one, feeds[one.name], size) for one in self.inputs.given}
        if self._counter is not None:
            given[self._counter] = self._count(past, batch)
        results = self.session.run({name: to_runtime(array) for name, array in given.items()} | pasts, self.host.into)
        self.host.keep(results, past, new, size)
        self.past_length = past + new
        before, _ = self.host.margins(past, past + new, size)
        seen = slice(before, before + past + new)
        return {t.name: _cut(t, from_runtime(results[t.name]), seen) for t in self.outputs if t.dtype is not None}

    def _count(self, past: int, batch: int) -> Array:
        tensor = next(tensor for tensor in self.session.inputs if tensor.name == self._counter)
        return np.full([dim if isinstance(dim, int) else batch for dim in tensor.dims], past, tensor.dtype)

    def _fitted(self, given: Given, array: Array, size: int) -> Array:
        """What an input is given, at the sizes that the model and its cache have room for."""
        for axis, follows in enumerate(given.axes):
            if follows == "new":
                array = padded(array, axis, 0, size - array.shape[axis], None)
            elif follows == "total" and axis_of(given.tensor.dims[axis]) != "total":
                before, after = self.host.margins(self.past_length, array.shape[axis], size)
                array = padded(array, axis, before, after, given.unseen)
        return array

    def _joined(self, name: str, parts: Sequence[Array], new: int, size: int) -> Array:
        """One output of calls of so many tokens, without what belongs to tokens in excess."""
        if size == new:
            return parts[0]
        axes = axes_of(next(tensor for tensor in self.outputs if tensor.name == name))
        places = [place for place, length in enumerate(parts[0].shape) if length == size and axes[place] != "batch"]
        place = axes.index("new") if "new" in axes else next((one for one in places if one or len(places) == 1), None)
        if place is None:
            return parts[-1]
        last = parts[-1].shape
        whole = np.concatenate([_reaching(part, axes, last) for part in parts], axis=place)
        return whole[(slice(None),) * place + (slice(0, new),)]


class UncachedDecoder:
    """A decoder without a cache, whatever batch and length it was exported for.

    Attributes:
        session: The model.
        inputs: What it is given.
        length: The only length that it takes; None where it takes any.
        batch: The only batch size that it takes; None where it takes any.
    """

    def __init__(self, session: Session, inputs: Inputs | None = None) -> None:
        self.session = session
        self.inputs = inputs_of(session.inputs) if inputs is None else inputs
        self.logits = logits_name(session.outputs)
        self.length = fixed_size(self.inputs, session.inputs, "new")
        self.batch = fixed_size(self.inputs, session.inputs, "batch")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return all outputs for the whole text; a fixed batch size is served in several calls.

        Raises:
            RunError: The model cannot be run on it.
        """
        tokens = self.inputs.tokens
        rows = feeds[tokens.name].shape[tokens.axes.index("batch")] if "batch" in tokens.axes else 1
        return self.run_in_groups(feeds, rows, self.batch or rows)

    def run_in_groups(self, feeds: Mapping[str, Array], rows: int, size: int) -> dict[str, Array]:
        """Return all outputs for the whole text, computed `size` rows at a time."""
        if rows == size:
            return self._run(feeds)
        parts = []
        for start in range(0, rows, size):
            group = [min(row, rows - 1) for row in range(start, start + size)]  # the last row fills up its group
            parts.append(self._run(self.inputs.rows(feeds, group)))
        return {name: np.concatenate([part[name] for part in parts])[:rows] for name in parts[0]}

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        results = self.session.run({name: to_runtime(array) for name, array in feeds.items()})
        return {t.name: from_runtime(results[t.name]) for t in self.session.outputs if t.dtype is not None}


def _piece(given: Given, array: Array, past: int, first: int, stop: int) -> Array:
    """What a call is given that takes the tokens `first:stop` of those that were given after `past`."""
    spans = {"new": slice(first, stop), "total": slice(0, past + stop)}
    return array[tuple(spans.get(axis, slice(None)) for axis in given.axes)]


def _cut(output: Tensor, array: Array, seen: slice) -> Array:
    """An output with a place for each token so far, where it has one for each row that a call reads."""
    return array[tuple(seen if axis == "room" else slice(None) for axis in axes_of(output))]


def _reaching(part: Array, axes: Sequence[Axis], last: Sequence[int]) -> Array:
    """What an earlier call gave, with nothing at the places of tokens that only the last one has."""
    missing = [length - have if axis in ("total", "room") else 0
               for axis, have, length in zip(axes, part.shape, last, strict=True)]  # fmt: skip
    return np.pad(part, [(0, most) for most in missing])
