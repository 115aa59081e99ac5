"""Decoders that are run: with a cache, a chunk at a time; without one, the whole text each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvsurgeon.errors import BrokenCacheError, UsageError
from kvsurgeon.runtime.axes import CacheEntry, empty_shape, find_cache
from kvsurgeon.runtime.feeds import Inputs, fixed_size, inputs_of
from kvsurgeon.runtime.session import Session
from kvsurgeon.runtime.tensor import Array, Tensor, from_runtime, to_runtime


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


class CachedDecoder:
    """A decoder with a cache, and what it remembers between calls.

    Attributes:
        session: The model.
        cache: Its past inputs and present outputs, in order.
        inputs: What else it is given.
        logits: Name of the output that holds the logits.
        past_length: Tokens remembered.
    """

    def __init__(self, session: Session, cache: Sequence[CacheEntry] | None = None) -> None:
        self.session = session
        self.cache = tuple(find_cache(session.inputs, session.outputs) if cache is None else cache)
        if not self.cache:
            raise UsageError(f"expected inputs named past_key_values.*, found none in {session.name}")
        pasts = {entry.past.name for entry in self.cache}
        presents = {entry.present for entry in self.cache}
        self.inputs: Inputs = inputs_of(session.inputs)
        self.inputs = Inputs(given=tuple(given for given in self.inputs.given if given.name not in pasts))
        self.outputs = tuple(tensor for tensor in session.outputs if tensor.name not in presents)
        self.logits = logits_name(self.outputs)
        self.past_length = 0
        self._pasts: dict[str, Any] = {}

    def reset(self) -> None:
        """Forget all tokens."""
        self.past_length = 0
        self._pasts = {}

    def prefill(self, feeds: Mapping[str, Array]) -> Array:
        """Forget all tokens, take the first ones, and return their logits."""
        self.reset()
        return self.step(feeds)

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Take further tokens, and return their logits."""
        return self.advance(feeds)[self.logits]

    def advance(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Take further tokens, and return all outputs but the cache.

        Raises:
            RunError: The model cannot be run on them.
            BrokenCacheError: It ran, and a present does not hold the past and the new tokens.
        """
        tokens = self.inputs.tokens
        shape = feeds[tokens.name].shape
        new = shape[tokens.axes.index("new")]
        batch = shape[tokens.axes.index("batch")] if "batch" in tokens.axes else 1
        pasts = self._pasts or {entry.past.name: _empty(entry.past, batch) for entry in self.cache}
        given = {name: to_runtime(array) for name, array in feeds.items()}
        results = self.session.run({**given, **pasts})
        self._remember(results, new)
        return {t.name: from_runtime(results[t.name]) for t in self.outputs if t.dtype is not None}

    def remembered(self, entry: CacheEntry) -> Array:
        """Return one entry of the cache as it is now."""
        return from_runtime(self._pasts[entry.past.name])

    def _remember(self, results: Mapping[str, Any], new: int) -> None:
        total = self.past_length + new
        for entry in self.cache:
            shape = results[entry.present].shape()
            if not _fits(shape, entry, total):
                dims = [f"{total} tokens" if axis == entry.axis else dim for axis, dim in enumerate(entry.past.dims)]
                expected = "[" + ", ".join(str(dim) for dim in dims) + "]"
                raise BrokenCacheError(
                    f"expected {expected} after {new} more, found {list(shape)} - at `{entry.present}`",
                    layer=entry.layer,
                )
        self.past_length = total
        self._pasts = {entry.past.name: results[entry.present] for entry in self.cache}


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


def _fits(shape: Sequence[int], entry: CacheEntry, total: int) -> bool:
    """Whether a present can be the next call's past: the tokens so far, and every size that the past declares."""
    wanted = [total if axis == entry.axis else dim for axis, dim in enumerate(entry.past.dims)]
    if len(wanted) != len(shape):
        return False
    return all(want == have for want, have in zip(wanted, shape, strict=True) if isinstance(want, int))


def _empty(past: Tensor, batch: int) -> Any:
    return to_runtime(np.zeros(empty_shape(past, batch), past.dtype))
