"""Decoders in onnxruntime: with a cache, call by call; without one, on the whole text each time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvsurgeon.errors import RunError, UsageError
from kvsurgeon.runtime.axes import Axis, CacheIO, axes_of, axis_of, find_cache, slice_axes
from kvsurgeon.runtime.cache_managers import (
    UNFILLED,
    find_batch_index,
    find_length_input,
    find_query_lengths,
    open_cache_manager,
    read_cache_metadata,
)
from kvsurgeon.runtime.feeds import DecoderInputs, InputSpec, fixed_size, inputs_of, pad_axis
from kvsurgeon.runtime.first_call import FirstCall
from kvsurgeon.runtime.open_dims import resolve_axes, resolve_head_dims
from kvsurgeon.runtime.session import Session
from kvsurgeon.runtime.tensors import Array, ValueInfo, from_runtime, to_runtime


def logits_name(outputs: Sequence[ValueInfo]) -> str:
    """Return the output of logits: the one named so, else the first floating-point output, rank 3 preferred.

    Raises:
        UsageError: No output holds floating-point numbers.
    """
    floating = [tensor for tensor in outputs if tensor.floating]
    if not floating:
        raise UsageError(f"expected an output of logits, found {', '.join(t.name for t in outputs) or 'none'}")
    return max(floating, key=lambda tensor: (tensor.name == "logits", len(tensor.dims) == 3)).name


class AnyDecoder(ABC):
    """A decoder in onnxruntime, with a cache or without.

    Attributes:
        session: The model.
        cache: Its cache inputs and outputs, in order; empty without a cache.
        inputs: Its other inputs.
        outputs: Its other outputs.
        orders: Orders of the axes of outputs, by name.
        batch: The only batch size of a call; None for any.
        length: The only length of a text; None for any.
        step_length: The only number of tokens of a call on a part of a text; None for any.
    """

    cache: tuple[CacheIO, ...] = ()
    length: int | None = None
    step_length: int | None = None

    def __init__(self, session: Session, outputs: Iterable[ValueInfo], inputs: DecoderInputs) -> None:
        self.session = session
        self.outputs = tuple(outputs)
        self.orders: Mapping[str, tuple[int, ...]] = {}
        self.use_inputs(inputs)

    @property
    def logits(self) -> str:
        """Name of the output of logits.

        Raises:
            UsageError: No output holds floating-point numbers.
        """
        return logits_name(self.outputs)

    @property
    def capacity(self) -> int | None:
        """Number of rows of the cache, if it is fixed."""
        return None

    @property
    def max_length(self) -> int | None:
        """The most tokens of a text for which the cache has room; None for any number."""
        return None

    @property
    def takes_padding(self) -> bool:
        """Whether texts may have padding, by its mask."""
        return self.inputs.masked

    def use_inputs(self, inputs: DecoderInputs) -> None:
        """Set the inputs, and the sizes that their dims fix."""
        self.inputs = inputs
        self.batch = fixed_size(inputs, self.session.inputs, "batch")

    def takes(self, inputs: DecoderInputs) -> bool:
        """Return whether the model runs with these inputs."""
        before = self.inputs
        self.use_inputs(inputs)
        ones = np.ones((self.batch or 1, self.length or self.step_length or 2), np.int64)
        try:
            self.run(inputs.feeds(np.zeros_like(ones), ones))
        except (RunError, UsageError):
            return False
        finally:
            self.use_inputs(before)
        return True

    def use_orders(self, orders: Mapping[str, tuple[int, ...]]) -> None:
        """Order the axes of outputs, by name; others keep theirs."""
        self.orders, self.outputs = orders, _arranged(self.outputs, orders)

    @abstractmethod
    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return all outputs but the cache for a text.

        Raises:
            RunError: The model fails.
        """


class CachedDecoder(AnyDecoder):
    """A decoder with a KV cache.

    Attributes:
        cache_manager: Keeps the cache between calls.
        past_length: Number of cached tokens.
    """

    def __init__(self, session: Session, cache: Sequence[CacheIO] | None = None) -> None:
        self._declared = read_cache_metadata(session.metadata)
        cache = find_cache(session.inputs, session.outputs, self._declared.layouts) if cache is None else tuple(cache)
        if not cache:
            raise UsageError(f"expected inputs named past_key_values.*, found none in {session.name}")
        self.cache_manager = open_cache_manager(cache, self._declared)
        presents = {entry.present for entry in cache}
        self._query_lengths = find_query_lengths(session.inputs, self._declared)
        self._length_input = find_length_input([one for one in session.inputs if one != self._query_lengths], cache)
        self._first_call = FirstCall(session.inputs, session.outputs)
        others = self._first_call.names
        self._batch_index = find_batch_index(session.inputs)
        lengths = (self._length_input, self._query_lengths, self._batch_index)
        inputs = [one for one in session.inputs if one not in lengths and one.name not in others]
        outputs = (one for one in session.outputs if one.name not in presents | others)
        super().__init__(
            session, map(self._declared.with_dims, outputs), inputs_of(inputs, {entry.past.name for entry in cache})
        )
        self.past_length = 0
        cache = resolve_axes(resolve_head_dims(cache, self._run_one_token), self._run_one_token, UNFILLED)
        self.cache_manager = open_cache_manager(cache, self._declared)
        self.cache = cache

    @property
    def capacity(self) -> int | None:
        """Number of rows of the cache, if it is fixed."""
        return self.cache_manager.capacity

    @property
    def max_length(self) -> int | None:
        """The most tokens of a text for which the cache has room; None for any number."""
        return self.cache_manager.longest_text(self.step_length or 1)

    @property
    def takes_padding(self) -> bool:
        """Whether texts may have padding, by its mask and by the metadata of the file."""
        return super().takes_padding and self._declared.padding

    @property
    def takes_ragged_batches(self) -> bool:
        """Whether sequences of a batch may have different lengths, each with its padding last.

        Each needs one row of every buffer, and a state of fixed size would take padding for tokens.
        """
        rows = all(entry.batch_axis in (None, 0) and entry.axis and not entry.is_fixed for entry in self.cache)
        shared = self._length_input is not None and not self.places_rows
        return self._declared.ragged and rows and not shared

    @property
    def takes_ragged_chunks(self) -> bool:
        """Whether sequences of a batch may have different numbers of new tokens."""
        return self._query_lengths is not None or self.places_rows

    @property
    def places_rows(self) -> bool:
        """Whether an input gives the number of past tokens of each sequence, from which on its rows are written."""
        dims = () if self._length_input is None else self._length_input.dims
        return self._declared.ragged and [axis_of(dim) for dim in dims] == ["batch"]

    def lengths(self, pasts: Array, counts: Array) -> dict[str, Array]:
        """Return the inputs, if any, for the number of past and of new tokens of each sequence, and for its row."""
        rows = np.arange(len(counts))[:, None]
        given = (self._length_input, pasts), (self._query_lengths, counts), (self._batch_index, rows)
        return {one.name: numbers.astype(one.dtype) for one, numbers in given if one is not None}

    def use_inputs(self, inputs: DecoderInputs) -> None:
        """Set the inputs, and the sizes that their dims fix."""
        super().use_inputs(inputs)
        self.step_length = fixed_size(inputs, self.session.inputs, "sequence")

    def reset(self) -> None:
        """Empty the cache."""
        self.past_length = 0
        self.cache_manager.reset()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return all outputs but the cache for a text, run from an empty cache."""
        self.reset()
        return self.advance(feeds)

    def prefill(self, feeds: Mapping[str, Array]) -> Array:
        """Return the logits of the first tokens, run from an empty cache."""
        return self.run(feeds)[self.logits]

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Return the logits of the next tokens."""
        return self.advance(feeds)[self.logits]

    def advance(self, feeds: Mapping[str, Array], session: Session | None = None) -> dict[str, Array]:
        """Return all outputs but the cache for the next tokens.

        A model of fixed step length is called several times, and so is one that takes a batch token by token. Padding
        at the end of the last call is masked by causality, and not stored.

        Args:
            feeds: The inputs but the cache.
            session: Another model with the same inputs and cache outputs, to compute these tokens.

        Raises:
            RunError: The model fails.
            BrokenCacheError: A present has a wrong shape.
        """
        new = self.inputs.size(feeds, "sequence")
        size, start = self._call_length(feeds, new), self.past_length
        calls = []
        for first in range(0, new, size):
            stop = min(first + size, new)
            spans = {"sequence": slice(first, stop), "total": slice(0, start + stop)}
            part = {spec.name: slice_axes(feeds[spec.name], spec.axes, spans) for spec in self.inputs.specs}
            calls.append(self._call(part, stop - first, size, session or self.session))
        return {name: self._joined(name, [call[name] for call in calls], new, size) for name in calls[0]}

    def cached_rows(self, entry: CacheIO) -> Array:
        """Return one cached tensor, with one row for each token so far."""
        return self.cache_manager.rows(entry, self.past_length)

    def _call_length(self, feeds: Mapping[str, Array], new: int) -> int:
        """Return the number of tokens that a call takes."""
        if self.step_length is not None:
            return self.step_length
        one_by_one = self.past_length and not self._declared.batch_chunks and self.inputs.size(feeds, "batch") > 1
        return 1 if one_by_one else new

    def _run_one_token(self, cache: Sequence[CacheIO]) -> dict[str, Array]:
        """Run the model on one token with these cache inputs and outputs, and return the pasts of the next call.

        Raises:
            RunError: The model fails.
        """
        self.cache_manager = open_cache_manager(cache, self._declared)
        ones = np.ones((self.batch or 1, self.step_length or 1), np.int64)
        self.run(self.inputs.feeds(np.zeros_like(ones), ones))
        pasts = {entry.past.name: self.cache_manager.rows(entry, self.cache_manager.capacity or 1) for entry in cache}
        self.reset()
        return pasts

    def _call(self, feeds: Mapping[str, Array], new: int, size: int, session: Session) -> dict[str, Array]:
        """Run `new` tokens in one call of `size` tokens."""
        past, batch = self.past_length, self.inputs.size(feeds, "batch")
        pasts = self.cache_manager.pasts(batch, past, size)
        arrays = {spec.name: self._padded(spec, feeds[spec.name], size) for spec in self.inputs.specs}
        dims = () if self._length_input is None else self._length_input.dims
        pasts_of = np.full([dim if isinstance(dim, int) else batch for dim in dims], past)
        arrays |= self.lengths(pasts_of, np.full(batch, new))
        values = {name: to_runtime(array) for name, array in arrays.items()} | pasts
        values |= self._first_call.feeds(batch, first=not past)
        results = session.run(values, self.cache_manager.bound_outputs)
        self._first_call.store(results, first=not past)
        self.cache_manager.store(results, past, new, size)
        self.past_length = past + new
        before, _ = self.cache_manager.mask_padding(past, past + new, size)
        spans = {"max": slice(before, before + past + new)}
        known = [output for output in self.outputs if output.dtype is not None and output.name in results]
        arrays = {one.name: _ordered(one.name, results, self.orders) for one in known}
        return {one.name: slice_axes(arrays[one.name], axes_of(one), spans) for one in known}

    def _padded(self, spec: InputSpec, array: Array, size: int) -> Array:
        """Return the value of an input, padded to the tokens of a call and the rows of the cache."""
        for axis, follows in enumerate(spec.axes):
            if follows == "sequence":
                array = pad_axis(array, axis, 0, size - array.shape[axis], None)
            elif follows == "total" and axis_of(spec.tensor.dims[axis]) != "total":
                before, after = self.cache_manager.mask_padding(self.past_length, array.shape[axis], size)
                array = pad_axis(array, axis, before, after, spec.masked_value)
        return array

    def _joined(self, name: str, parts: Sequence[Array], new: int, size: int) -> Array:
        """Return an output of several calls of `size` tokens as that of one call on `new` tokens."""
        if size == new:
            return parts[0]
        axes = axes_of(next(tensor for tensor in self.outputs if tensor.name == name))
        places = [place for place, length in enumerate(parts[0].shape) if length == size and axes[place] != "batch"]
        default = next((place for place in places if place or len(places) == 1), None)
        place = axes.index("sequence") if "sequence" in axes else default
        if place is None:
            return parts[-1]
        whole = np.concatenate([_padded_keys(part, axes, parts[-1].shape) for part in parts], axis=place)
        return whole[(slice(None),) * place + (slice(0, new),)]


class UncachedDecoder(AnyDecoder):
    """A decoder without a cache, of any or of a fixed batch size and length."""

    def __init__(self, session: Session, inputs: DecoderInputs | None = None) -> None:
        super().__init__(session, session.outputs, inputs_of(session.inputs) if inputs is None else inputs)

    def use_inputs(self, inputs: DecoderInputs) -> None:
        """Set the inputs, and the sizes that their dims fix."""
        super().use_inputs(inputs)
        self.length = fixed_size(inputs, self.session.inputs, "sequence")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return all outputs for the whole text, in several calls if the batch size is fixed.

        Raises:
            RunError: The model fails.
        """
        rows = self.inputs.size(feeds, "batch")
        size = self.batch or rows
        if rows == size:
            return self._run(feeds)
        parts = []
        for start in range(0, rows, size):
            group = [min(row, rows - 1) for row in range(start, start + size)]  # the last row fills the last group
            parts.append(self._run(self.inputs.rows(feeds, group)))
        return {name: np.concatenate([part[name] for part in parts])[:rows] for name in parts[0]}

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        results = self.session.run({name: to_runtime(array) for name, array in feeds.items()})
        known = (one.name for one in self.outputs if one.dtype is not None)
        return {name: _ordered(name, results, self.orders) for name in known}


def _ordered(name: str, results: Mapping[str, Any], orders: Mapping[str, tuple[int, ...]]) -> Array:
    """Return an output with its axes in order."""
    array = from_runtime(results[name])
    return array.transpose(orders[name]) if name in orders else array


def _arranged(outputs: Sequence[ValueInfo], orders: Mapping[str, tuple[int, ...]]) -> tuple[ValueInfo, ...]:
    """Return outputs as they are after their axes are ordered."""
    return tuple(
        replace(one, dims=tuple(one.dims[axis] for axis in orders[one.name])) if one.name in orders else one
        for one in outputs
    )


def _padded_keys(part: Array, axes: Sequence[Axis], shape: Sequence[int]) -> Array:
    """Return the output of an earlier call with zeros for the keys that only the last call has."""
    missing = [size - have if axis in ("total", "max") else 0
               for axis, have, size in zip(axes, part.shape, shape, strict=True)]  # fmt: skip
    return np.pad(part, [(0, count) for count in missing])
