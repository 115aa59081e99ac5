"""Continuous batching: sequences of one batch that start, end and go back one by one.

The model has a static cache and takes the number of tokens of each sequence from its mask (`fuse-attention --padding
lengths`) or as an input (`inject --past-length per-sequence`). A sequence owns one row of every buffer. Its prompt runs
alone in that row; a decode step runs one token of every sequence, or any number of each if the model takes them: with
`add-query-lengths`, or with that input. When one ends, the last one moves into its row, so that the rows in use come
first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvsurgeon.errors import UsageError
from kvsurgeon.runtime.axes import shape_with_rows, slice_axes
from kvsurgeon.runtime.cache_managers import UNFILLED
from kvsurgeon.runtime.decoder import CachedDecoder
from kvsurgeon.runtime.session import Session
from kvsurgeon.runtime.tensors import Array, from_runtime, to_runtime


class ContinuousBatch:
    """Sequences in one static cache.

    Attributes:
        lengths: Number of tokens of each sequence in the cache, by its number.
        capacity: The most tokens of a sequence.
        shortenable: The most tokens of a sequence of which some can be dropped; buffers that hold the rows of a window
            do not have the rows before it.
    """

    def __init__(self, session: Session, *, rows: int, capacity: int) -> None:
        """Allocate buffers.

        Args:
            session: The model.
            rows: The most sequences at a time.
            capacity: The most tokens of a sequence, if the model does not fix the rows of its buffers.

        Raises:
            UsageError: The model does not take sequences of different lengths.
        """
        decoder = CachedDecoder(session)
        if not decoder.takes_ragged_batches:
            raise UsageError(
                "expected a model that takes sequences of different lengths, found one length for all; make one by "
                "inject --cache static --past-length per-sequence, or --target genai-shared-buffer"
            )
        longest = decoder.max_length
        self.lengths: dict[int, int] = {}
        self.capacity = decoder.capacity or (capacity if longest is None else min(capacity, longest))
        self._session, self._inputs, self._logits = session, decoder.inputs, decoder.logits
        self._lengths, self._takes_chunks = decoder.lengths, decoder.takes_ragged_chunks
        self._masks_rows = decoder.places_rows
        self._presents = {entry.present: entry.past.name for entry in decoder.cache}
        sizes = {entry: self.capacity if entry.window is None else entry.window for entry in decoder.cache}
        shapes = {one.past: shape_with_rows(one.past, one.axis, rows, size) for one, size in sizes.items()}
        self._buffers = {past.name: np.full(shape, UNFILLED, past.dtype) for past, shape in shapes.items()}
        self.shortenable = min(sizes.values())
        self._rows: list[int] = []  # the sequence in each row in use
        self._most = rows
        self._next = 0

    @property
    def is_full(self) -> bool:
        """Whether no row is free."""
        return len(self._rows) == self._most

    def start(self, prompt: Sequence[int]) -> tuple[int, Array]:
        """Add a sequence, and return its number and the logits after its prompt, `[tokens, vocabulary]`.

        If its prompt fails to run, no sequence is added.

        Raises:
            UsageError: No row is free, or the prompt exceeds the capacity.
        """
        if self.is_full:
            raise UsageError(f"expected at most {self._most} sequences, found another")
        number, self._next = self._next, self._next + 1
        self._rows.append(number)
        self.lengths[number] = 0
        try:
            return number, self.extend(number, prompt)
        except Exception:
            self.end(number)
            raise

    def extend(self, number: int, tokens: Sequence[int]) -> Array:
        """Add tokens to one sequence, and return the logits after each, `[tokens, vocabulary]`.

        Raises:
            UsageError: They exceed the capacity.
        """
        row = self._rows.index(number)
        return self._call(slice(row, row + 1), [tokens])[number]

    def step(self, tokens: Mapping[int, int]) -> dict[int, Array]:
        """Add one token to every sequence, and return the logits after it, `[vocabulary]` by sequence.

        Raises:
            UsageError: A sequence has no token, or no room for it.
        """
        return {number: logits[-1] for number, logits in self.advance({n: [t] for n, t in tokens.items()}).items()}

    def advance(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, Array]:
        """Add tokens to every sequence, and return the logits after each, `[tokens, vocabulary]` by sequence.

        Raises:
            UsageError: There is no sequence, or one has no tokens, or no room for as many as the longest chunk has; or
                they are not one for each, and the model does not take chunks of several sequences.
        """
        if not tokens or set(tokens) != set(self._rows) or not all(tokens.values()):
            raise UsageError(f"expected tokens for each of the sequences {self._rows}, found {sorted(tokens)}")
        longest = max(map(len, tokens.values()))
        if longest > 1 and len(tokens) > 1 and not self._takes_chunks:
            raise UsageError(
                f"expected one token for each sequence, found {longest}; apply the pass add-query-lengths to the model"
            )
        return self._call(slice(0, len(self._rows)), [tokens[number] for number in self._rows])

    def shorten(self, number: int, length: int) -> None:
        """Drop the tokens of a sequence from `length` on, such as those that a verification rejected.

        Raises:
            UsageError: The sequence has fewer tokens, or more than `shortenable`.
        """
        if not 0 < length <= self.lengths[number]:
            raise UsageError(f"expected a length from 1 to {self.lengths[number]}, found {length}")
        if length < self.lengths[number] > self.shortenable:
            raise UsageError(
                f"expected a sequence of at most {self.shortenable} tokens, of which a window has all rows, found "
                f"{self.lengths[number]}"
            )
        self.lengths[number] = length

    def end(self, number: int) -> None:
        """Remove a sequence; the last one moves into its row."""
        row, last = self._rows.index(number), len(self._rows) - 1
        for buffer in self._buffers.values() if row < last else ():
            buffer[row] = buffer[last]
        self._rows[row] = self._rows[last]
        self._rows.pop()
        del self.lengths[number]

    def _call(self, rows: slice, tokens: Sequence[Sequence[int]]) -> dict[int, Array]:
        """Run tokens of each row after those that it has, and return the logits of these, by sequence."""
        numbers, counts = self._rows[rows], np.array([len(row) for row in tokens])
        pasts = np.array([self.lengths[number] for number in numbers])
        new, ends = counts.max(), pasts + counts
        needed = pasts.max() + new  # the chunk of each row is padded to the longest, and must fit too
        if needed > self.capacity:
            raise UsageError(f"expected at most {self.capacity} tokens, the rows of the cache, found {needed}")
        chunk = np.array([[*row, *[0] * (new - len(row))] for row in tokens], np.int64)
        feeds = self._feeds(chunk, pasts, ends) | self._lengths(pasts, counts)
        buffers = {name: to_runtime(buffer[rows]) for name, buffer in self._buffers.items()}
        presents = {present: buffers[past] for present, past in self._presents.items()}
        results = self._session.run({name: to_runtime(array) for name, array in feeds.items()} | buffers, presents)
        self.lengths |= dict(zip(numbers, ends.tolist(), strict=True))
        logits = from_runtime(results[self._logits])
        return {number: logits[row, :count] for row, (number, count) in enumerate(zip(numbers, counts, strict=True))}

    def _feeds(self, chunk: Array, pasts: Array, ends: Array) -> dict[str, Array]:
        """Return the inputs but the cache: new tokens `[rows, new]` of sequences that then have `ends` tokens."""
        new, first = chunk.shape[1], (pasts.max() - pasts)[:, None]
        columns = np.arange(pasts.max() + new)  # new tokens below each other, as positions have them
        aligned = (columns >= first) & (columns < first + ends[:, None])
        mask = np.arange(self.capacity if self._masks_rows else ends.max()) < ends[:, None]
        below, counted = (self._inputs.feeds(chunk, one.astype(np.int64)) for one in (aligned, mask))
        spans = {"sequence": slice(-new, None)}
        given = {one.name: (counted if "total" in one.axes else below)[one.name] for one in self._inputs.specs}
        return {one.name: slice_axes(given[one.name], one.axes, spans) for one in self._inputs.specs}
