"""Cache managers: they keep the cache between calls, one class for each cache mode.

The mode follows from the dims of pasts and presents: `dynamic` takes `past_sequence_length` rows and returns all rows;
`static` takes and returns a buffer of `max_length` rows, updated in place; `new-tokens` returns the rows of new tokens
only. For dims that are numbers, the metadata of the file gives the mode.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np

from kvsurgeon.errors import BrokenCacheError, RunError
from kvsurgeon.io.json_files import parse_json
from kvsurgeon.runtime.axes import CacheIO, Layout, axis_of, shape_with_rows
from kvsurgeon.runtime.tensors import Array, Dim, ValueInfo, from_runtime, to_runtime

CacheMode = Literal["dynamic", "static", "new-tokens"]

METADATA_KEY = "kvsurgeon.cache"
FIRST_CALL_KEY = "kvsurgeon.first_call"  # the inputs that open a block in the first call, and what they hold later
_BATCH_INDEX = "batch_index"
_PAST = "past"  # with which the names of inputs of past tokens begin
UNFILLED = 7  # value of rows without a token: reading them gives wrong results
UNFILLED_ROWS = 3  # in front of a past of any length, if the model allows as many
SMALLEST_BUFFER = 64  # rows of a static cache of any length, if the model allows as many


@dataclass(frozen=True, kw_only=True)
class DeclaredCache:
    """The cache as the metadata of a model file declares it.

    Attributes:
        cache_mode: Cache mode, if declared.
        layouts: Layouts of keys and values, by part.
        max_length: Number of tokens that a text may have.
        batch_chunks: Whether a batch of several rows takes more than one token after a past.
        padding: Whether texts may have padding.
        ragged: Whether the sequences of a batch may have different numbers of past tokens.
        outputs: Dims of outputs that the graph declares as numbers.
    """

    cache_mode: CacheMode | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    max_length: int | None = None
    batch_chunks: bool = True
    padding: bool = True
    ragged: bool = False
    outputs: Mapping[str, tuple[Dim, ...]] = field(default_factory=dict)

    def with_dims(self, output: ValueInfo) -> ValueInfo:
        """Return an output with the dims that the metadata declares."""
        dims = self.outputs.get(output.name, ())
        return replace(output, dims=dims) if len(dims) == len(output.dims) else output


def read_cache_metadata(metadata: Mapping[str, str]) -> DeclaredCache:
    """Return the cache that the metadata of a file declares; unreadable metadata declares nothing."""
    try:
        stored = parse_json(metadata.get(METADATA_KEY, "{}"))
        layouts = {part: tuple(stored.get(f"{part}_layout", ())) for part in ("key", "value")}
        max_length = stored.get("max_length")
        return DeclaredCache(
            cache_mode=cast("CacheMode | None", stored.get("mode")),
            layouts={part: layout for part, layout in layouts.items() if "sequence" in layout},
            max_length=max_length if isinstance(max_length, int) and max_length > 0 else None,
            batch_chunks=stored.get("batch_chunks") is not False,
            padding=stored.get("padding") is not False,
            ragged=stored.get("ragged") is True,
            outputs={name: tuple(dims) for name, dims in stored.get("outputs", {}).items()},
        )
    except (ValueError, TypeError, AttributeError):
        return DeclaredCache()


def read_first_call(metadata: Mapping[str, str]) -> dict[str, int]:
    """Return what inputs that open a block in the first call hold for later tokens; none if that cannot be read."""
    try:
        return {name: int(closed) for name, closed in parse_json(metadata.get(FIRST_CALL_KEY, "{}")).items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def find_length_input(inputs: Sequence[ValueInfo], cache: Sequence[CacheIO]) -> ValueInfo | None:
    """Return the input that takes the number of past tokens, for all rows or for each.

    It is the one whose name says so, else the only number that a model with a static cache takes.
    """
    named = next((tensor for tensor in inputs if tensor.name.startswith(_PAST) and _is_length(tensor)), None)
    if named is not None or _mode_by_dims(cache) != "static":
        return named
    batches = {1, *(tensor.dims[0] for tensor in inputs if len(tensor.dims) > 1)}
    numbers = [tensor for tensor in inputs if _is_length(tensor) and batches.issuperset(tensor.dims)]
    return numbers[0] if len(numbers) == 1 and not any(_is_total(tensor) for tensor in inputs) else None


def find_query_lengths(inputs: Sequence[ValueInfo], declared: DeclaredCache) -> ValueInfo | None:
    """Return the input that takes the number of new tokens of each sequence, if they may differ."""
    counts = (one for one in inputs if one.integer and len(one.dims) == 1 and axis_of(one.dims[0]) == "batch")
    numbers = (one for one in counts if not one.name.startswith(_PAST))
    return next(numbers, None) if declared.ragged else None


def find_batch_index(inputs: Sequence[ValueInfo]) -> ValueInfo | None:
    """Return the input that takes the row of the cache of each sequence, as `add-batch-index` adds it."""
    return next((one for one in inputs if one.name == _BATCH_INDEX and one.integer and one.dims[1:] == (1,)), None)


def _is_total(tensor: ValueInfo) -> bool:
    return any(axis_of(dim) == "total" for dim in tensor.dims)


def _is_length(tensor: ValueInfo) -> bool:
    single = all(dim == 1 for dim in tensor.dims)
    per_row = len(tensor.dims) == 1 and axis_of(tensor.dims[0]) not in ("sequence", "total")
    return tensor.integer and (single or per_row)


class CacheManager:
    """Cache mode `dynamic`: each present is the past of the next call."""

    bound_outputs: Mapping[str, Any] = {}  # values that presents are written to

    def __init__(self, cache: Sequence[CacheIO], capacity: int | None, max_length: int | None) -> None:
        self.cache = cache
        self.capacity = capacity
        self.max_length = max_length
        self._pasts: dict[str, Any] = {}

    def longest_text(self, step_length: int) -> int | None:
        """Return the most tokens of a text in calls of `step_length` tokens; None for any number."""
        return self.max_length

    def reset(self) -> None:
        """Empty the cache."""
        self._pasts = {}

    def pasts(self, batch: int, past: int, new: int) -> dict[str, Any]:
        """Return the pasts of a call on `new` tokens.

        Raises:
            RunError: The cache has too few rows.
        """
        return self._pasts or {entry.past.name: to_runtime(_empty(entry, batch)) for entry in self.cache}

    def mask_padding(self, past: int, total: int, new: int) -> tuple[int, int]:
        """Return the number of masked elements that a mask needs before and after those of the `total` tokens."""
        return 0, 0

    def store(self, results: Mapping[str, Any], past: int, new: int, size: int) -> None:
        """Store the first `new` of the `size` rows that a call returned."""
        for entry in self.cache:
            _check_present(entry, results[entry.present].shape(), past + new, new)
        self._pasts = {entry.past.name: results[entry.present] for entry in self.cache}

    def rows(self, entry: CacheIO, total: int) -> Array:
        """Return one row for each of the `total` tokens."""
        return from_runtime(self._pasts[entry.past.name])


class StaticCacheManager(CacheManager):
    """Cache mode `static`: past and present share one buffer, with rows for more tokens than the text has."""

    _size = 0  # rows of the buffers

    def longest_text(self, step_length: int) -> int | None:
        """Return the most tokens of a text in calls of `step_length` tokens, each of which needs as many free rows."""
        longest = self.capacity or self.max_length
        return None if longest is None else longest - step_length + 1

    @property
    def bound_outputs(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The buffer that each present is written to: that of its past."""
        return {entry.present: self._pasts[entry.past.name] for entry in self.cache if not entry.is_fixed}

    def pasts(self, batch: int, past: int, new: int) -> dict[str, Any]:
        """Return the buffers, enlarged if the new rows need it."""
        needed, most = past + new, self.capacity or self.max_length
        if most is not None and needed > most:
            raise RunError(f"expected at most {most} tokens, the rows of the cache, found {needed}")
        if not self._pasts or needed > self._size:
            self._size = self.capacity or min(max(SMALLEST_BUFFER, 2 * needed), most or sys.maxsize)
            self._pasts = {entry.past.name: to_runtime(self._buffer(entry, batch, past)) for entry in self.cache}
        return dict(self._pasts)

    def _buffer(self, entry: CacheIO, batch: int, past: int) -> Array:
        rows = self._size if entry.window is None else entry.window
        buffer = _empty(entry, batch) if entry.is_fixed else _unfilled(entry, batch, rows)
        if self._pasts:
            buffer[_rows(entry, past)] = self.rows(entry, past)
        return buffer

    def mask_padding(self, past: int, total: int, new: int) -> tuple[int, int]:
        """Return the padding of a mask, which has an element for each row of the buffer."""
        return 0, self._size - total

    def store(self, results: Mapping[str, Any], past: int, new: int, size: int) -> None:
        """Store the states of fixed size; the call wrote the other rows to the buffers."""
        for entry in self.cache:
            if entry.is_fixed:
                self._pasts[entry.past.name] = results[entry.present]

    def rows(self, entry: CacheIO, total: int) -> Array:
        """Return one row for each of the `total` tokens."""
        rows = super().rows(entry, total)
        return rows if entry.is_fixed else rows[_rows(entry, total)]


class NewTokensCacheManager(CacheManager):
    """Cache mode `new-tokens`: new rows are appended here; a past of fixed length starts with unfilled rows."""

    def longest_text(self, step_length: int) -> int | None:
        """Return the most tokens of a text: the rows of the past and a new token, if their number is fixed."""
        return self.max_length if self.capacity is None else self.capacity + 1

    def pasts(self, batch: int, past: int, new: int) -> dict[str, Any]:
        """Return the cached rows after the unfilled ones."""
        if not self._pasts:
            self._pasts = {entry.past.name: _empty(entry, batch) for entry in self.cache}
        count = self._unfilled_rows(past, new)
        if count < 0:
            raise RunError(f"expected at most {self.capacity} past tokens, the rows of the cache, found {past}")
        return {entry.past.name: to_runtime(self._after(entry, batch, count, past)) for entry in self.cache}

    def _after(self, entry: CacheIO, batch: int, unfilled: int, past: int) -> Array:
        """Return the cached rows of an entry after unfilled ones."""
        rows = self.rows(entry, past)
        return rows if entry.is_fixed else np.concatenate([_unfilled(entry, batch, unfilled), rows], entry.axis)

    def _unfilled_rows(self, past: int, new: int) -> int:
        """Return the number of unfilled rows, which is 0 for a past that has no rows to spare."""
        if self.capacity is not None:
            return self.capacity - past
        growing = next(entry for entry in self.cache if not entry.is_fixed)
        if axis_of(growing.past.dims[growing.axis]) != "capacity":
            return 0
        return UNFILLED_ROWS if self.max_length is None else max(0, min(UNFILLED_ROWS, self.max_length - past - new))

    def mask_padding(self, past: int, total: int, new: int) -> tuple[int, int]:
        """Return the padding of a mask, which has an element for each row of the past and each new token."""
        return self._unfilled_rows(past, new), past + new - total

    def store(self, results: Mapping[str, Any], past: int, new: int, size: int) -> None:
        """Append the first `new` of the `size` rows that a call returned."""
        for entry in self.cache:
            _check_present(entry, results[entry.present].shape(), size, new)
        for entry in self.cache:
            present, rows = from_runtime(results[entry.present]), self.rows(entry, past)
            joined = present if entry.is_fixed else np.concatenate([rows, present[_rows(entry, new)]], axis=entry.axis)
            self._pasts[entry.past.name] = joined

    def rows(self, entry: CacheIO, total: int) -> Array:
        """Return one row for each of the `total` tokens."""
        rows: Array = self._pasts[entry.past.name]
        return rows


_MODES = {"dynamic": CacheManager, "static": StaticCacheManager, "new-tokens": NewTokensCacheManager}


def open_cache_manager(cache: Sequence[CacheIO], declared: DeclaredCache) -> CacheManager:
    """Return a cache manager of the mode that a model needs."""
    growing = next((entry for entry in cache if not entry.is_fixed), None)
    rows = None if growing is None else growing.past.dims[growing.axis]
    manager = _MODES.get(declared.cache_mode or _mode_by_dims(cache), CacheManager)
    return manager(cache, rows if isinstance(rows, int) else None, declared.max_length)


def _mode_by_dims(cache: Sequence[CacheIO]) -> CacheMode:
    entry = next((entry for entry in cache if not entry.is_fixed), None)
    if entry is None:
        return "dynamic"
    past = entry.past.dims[entry.axis]
    if past == entry.present_length and (isinstance(past, int) or axis_of(past) == "max"):
        return "static"
    return "new-tokens" if axis_of(entry.present_length) == "sequence" else "dynamic"


def _empty(entry: CacheIO, batch: int) -> Array:
    """Return the past of the first call: no rows, or zeros of a fixed size."""
    if entry.is_fixed:
        return np.zeros(shape_with_rows(entry.past, None, batch, 0), entry.past.dtype)
    return _unfilled(entry, batch, 0)


def _unfilled(entry: CacheIO, batch: int, rows: int) -> Array:
    return np.full(shape_with_rows(entry.past, entry.axis, batch, rows), UNFILLED, entry.past.dtype)


def _rows(entry: CacheIO, count: int) -> tuple[slice, ...]:
    return (slice(None),) * entry.axis + (slice(0, count),)


def _check_present(entry: CacheIO, shape: Sequence[int], rows: int, new: int) -> None:
    """Check the shape of a present.

    Raises:
        BrokenCacheError: It has another number of rows, or other sizes than its past.
    """
    dims = entry.past.dims
    rows = rows if entry.window is None else min(rows, entry.window)
    expected = [rows if axis == entry.axis and not entry.is_fixed else dim for axis, dim in enumerate(dims)]
    if len(expected) == len(shape) and all(
        want == have for want, have in zip(expected, shape, strict=True) if isinstance(want, int)
    ):
        return
    text = ", ".join(
        f"{rows} tokens" if axis == entry.axis and not entry.is_fixed else str(dim) for axis, dim in enumerate(dims)
    )
    raise BrokenCacheError(
        f"expected [{text}] after {new} more, found {list(shape)} - at `{entry.present}`", layer=entry.layer
    )
