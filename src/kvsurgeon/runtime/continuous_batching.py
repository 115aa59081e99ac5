"""Continuous batching: sequences of one batch that start, end and go back one by one.

The model has a static cache and takes the number of tokens of each sequence from its mask (`fuse-attention --padding
lengths`). A sequence owns one row of every buffer. Its prompt runs alone in that row; a decode step runs one token of
every sequence. When one ends, the last one moves into its row, so that the rows in use come first.
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
    """

    def __init__(self, session: Session, *, rows: int, capacity: int) -> None:
        """Allocate buffers.

        Args:
            session: The model.
            rows: The most sequences at a time.
            capacity: The most tokens of a sequence.

        Raises:
            UsageError: The model does not take sequences of different lengths.
        """
        decoder = CachedDecoder(session)
        if not decoder.takes_ragged_batches:
            raise UsageError(
                "expected a model that takes sequences of different lengths, found one length for all; make one by "
                "inject --target genai-shared-buffer, whose notes say what prevents it"
            )
        longest = decoder.max_length
        self.lengths: dict[int, int] = {}
        self.capacity = capacity if longest is None else min(capacity, longest)
        self._session, self._inputs, self._logits = session, decoder.inputs, decoder.logits
        self._presents = {entry.present: entry.past.name for entry in decoder.cache}
        shapes = {entry.past: shape_with_rows(entry.past, entry.axis, rows, self.capacity) for entry in decoder.cache}
        self._buffers = {past.name: np.full(shape, UNFILLED, past.dtype) for past, shape in shapes.items()}
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
        logits: Array = self._call(slice(row, row + 1), np.array([tokens], np.int64))[0]
        return logits

    def step(self, tokens: Mapping[int, int]) -> dict[int, Array]:
        """Add one token to every sequence, and return the logits after it, `[vocabulary]` by sequence.

        Raises:
            UsageError: A sequence has no token, or no room for it.
        """
        if set(tokens) != set(self._rows):
            raise UsageError(f"expected a token for each of the sequences {self._rows}, found {sorted(tokens)}")
        logits = self._call(slice(0, len(self._rows)), np.array([[tokens[number]] for number in self._rows], np.int64))
        return {number: logits[row, -1] for row, number in enumerate(self._rows)}

    def shorten(self, number: int, length: int) -> None:
        """Drop the tokens of a sequence from `length` on, such as those that a verification rejected.

        Raises:
            UsageError: The sequence has fewer tokens.
        """
        if not 0 < length <= self.lengths[number]:
            raise UsageError(f"expected a length from 1 to {self.lengths[number]}, found {length}")
        self.lengths[number] = length

    def end(self, number: int) -> None:
        """Remove a sequence; the last one moves into its row."""
        row, last = self._rows.index(number), len(self._rows) - 1
        for buffer in self._buffers.values() if row < last else ():
            buffer[row] = buffer[last]
        self._rows[row] = self._rows[last]
        self._rows.pop()
        del self.lengths[number]

    def _call(self, rows: slice, tokens: Array) -> Array:
        """Run tokens `[rows, new]` after those that the rows have, and return the logits."""
        numbers, new = self._rows[rows], tokens.shape[1]
        ends = np.array([self.lengths[number] + new for number in numbers])
        if ends.max() > self.capacity:
            raise UsageError(f"expected at most {self.capacity} tokens, the rows of the cache, found {ends.max()}")
        mask = (np.arange(ends.max()) < ends[:, None]).astype(np.int64)
        given, spans = self._inputs.feeds(tokens, mask), {"sequence": slice(-new, None)}
        feeds = {one.name: to_runtime(slice_axes(given[one.name], one.axes, spans)) for one in self._inputs.specs}
        pasts = {name: to_runtime(buffer[rows]) for name, buffer in self._buffers.items()}
        presents = {present: pasts[past] for present, past in self._presents.items()}
        results = self._session.run(feeds | pasts, presents)
        self.lengths |= dict(zip(numbers, ends.tolist(), strict=True))
        return from_runtime(results[self._logits])
