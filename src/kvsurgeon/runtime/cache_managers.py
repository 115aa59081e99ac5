"""Hosts: what keeps a cache between calls, one for each cache mode.

Which one a model needs is read from the dims of its pasts and presents: `past_sequence_length` rows in and all out
grow; a buffer of `max_length` rows in and out is written in place; where only the rows of the new tokens come out, the
host puts them behind its past. Where dims are numbers, a note in the file's metadata tells.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast

import numpy as np

from kvsurgeon.errors import BrokenCacheError, RunError
from kvsurgeon.runtime.axes import CacheEntry, Layout, axis_of, shape_with_rows
from kvsurgeon.runtime.tensors import Array, Dim, Tensor, from_runtime, to_runtime

CacheMode = Literal["dynamic", "static", "new-tokens"]

NOTE = "kvsurgeon.cache"  # key of the note in a file's metadata
STALE = 7  # lies in rows that no token was written to: whoever reads them gives wrong numbers
SPARE = 3  # unfilled rows of a past whose length the model leaves open, where there is room for them
SMALLEST = 64  # rows of a buffer whose length the model leaves open, if it can be run on so many


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What a model's file notes of its cache."""

    cache_mode: CacheMode | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict)  # of keys and of values
    max_length: int | None = None  # tokens that a text may have
    batch_chunks: bool = True  # whether several sequences at once take more than one token behind a past
    outputs: Mapping[str, tuple[Dim, ...]] = field(default_factory=dict)  # dims of some, where the file has numbers

    def meant(self, output: Tensor) -> Tensor:
        """Return an output with the dims that are noted of it."""
        dims = self.outputs.get(output.name, ())
        return replace(output, dims=dims) if len(dims) == len(output.dims) else output


class CacheManager(Protocol):
    """Keeps a cache between calls."""

    def longest(self, step_length: int) -> int | None:
        """Return how long a text may be that is given in calls of so many tokens; None where it may have any length."""

    @property
    def into(self) -> Mapping[str, Any]:
        """Values that presents are written to; the others are made by the call."""

    def reset(self) -> None:
        """Forget all rows."""

    def given(self, batch: int, past: int, new: int) -> dict[str, Any]:
        """Return what each past is given in a call on `new` tokens."""

    def margins(self, past: int, total: int, new: int) -> tuple[int, int]:
        """Return how much longer, before and after, a mask is than the tokens so far."""

    def keep(self, results: Mapping[str, Any], past: int, new: int, size: int) -> None:
        """Keep the first `new` of the `size` rows that a call gave."""

    def rows(self, entry: CacheEntry, total: int) -> Array:
        """Return a row for each token so far."""


def read_cache_metadata(metadata: Mapping[str, str]) -> CacheSpec:
    """Return what a file notes of its cache; nothing where it notes nothing that can be read."""
    try:
        told = json.loads(metadata.get(NOTE, "{}"))
        layouts = {part: tuple(told.get(f"{part}_layout", ())) for part in ("key", "value")}
        known = {part: layout for part, layout in layouts.items() if "sequence" in layout}
        outputs = {name: tuple(dims) for name, dims in told.get("outputs", {}).items()}
        longest = told.get("max_length")
        longest = longest if isinstance(longest, int) and longest > 0 else None
        return CacheSpec(
            cache_mode=cast("CacheMode | None", told.get("mode")), layouts=known, max_length=longest,
            batch_chunks=told.get("batch_chunks") is not False, outputs=outputs,
        )  # fmt: skip
    except (ValueError, TypeError, AttributeError):
        return CacheSpec()


def find_counter(inputs: Sequence[Tensor]) -> str | None:
    """Return the input that is given the number of past tokens, once or for each text, if there is one."""
    able = [t.name for t in inputs if t.integer and t.name.startswith("past") and _is_a_number(t)]
    return able[0] if able else None


def _is_a_number(tensor: Tensor) -> bool:
    alone = all(dim == 1 for dim in tensor.dims)
    return alone or (len(tensor.dims) == 1 and axis_of(tensor.dims[0]) not in ("new", "total"))


def open_cache_manager(cache: Sequence[CacheEntry], note: CacheSpec) -> CacheManager:
    """Return the host that a model needs."""
    cache_mode = note.cache_mode or _told_by_dims(cache[0])
    rows = cache[0].past.dims[cache[0].axis]
    fixed = rows if isinstance(rows, int) else None
    if cache_mode == "static":
        return StaticCacheManager(cache, fixed, note.max_length)
    return (
        NewTokensCacheManager(cache, fixed, note.max_length)
        if cache_mode == "new-tokens"
        else DynamicCacheManager(cache, note.max_length)
    )


def _told_by_dims(entry: CacheEntry) -> CacheMode:
    given, returned = entry.past.dims[entry.axis], entry.returned
    if given == returned and (isinstance(given, int) or axis_of(given) == "room"):
        return "static"
    return "new-tokens" if axis_of(returned) == "new" else "dynamic"


class DynamicCacheManager:
    """Each present is the next call's past."""

    into: Mapping[str, Any] = {}

    def __init__(self, cache: Sequence[CacheEntry], most: int | None = None) -> None:
        self.cache = cache
        self.most = most
        self._pasts: dict[str, Any] = {}

    def longest(self, step_length: int) -> int | None:
        """Any text has room that the model can be run on."""
        return self.most

    def reset(self) -> None:
        """Forget all rows."""
        self._pasts = {}

    def given(self, batch: int, past: int, new: int) -> dict[str, Any]:
        """Return the presents of the call before, or pasts without rows."""
        return self._pasts or {entry.past.name: to_runtime(_filled(entry, batch, 0)) for entry in self.cache}

    def margins(self, past: int, total: int, new: int) -> tuple[int, int]:
        """A mask is as long as the tokens so far."""
        return 0, 0

    def keep(self, results: Mapping[str, Any], past: int, new: int, size: int) -> None:
        """Keep the presents."""
        for entry in self.cache:
            _check(entry, results[entry.present].shape(), past + new, new)
        self._pasts = {entry.past.name: results[entry.present] for entry in self.cache}

    def rows(self, entry: CacheEntry, total: int) -> Array:
        """Return a row for each token so far."""
        return from_runtime(self._pasts[entry.past.name])


class StaticCacheManager:
    """One buffer for past and present of an entry, with room for more tokens than there are."""

    def __init__(self, cache: Sequence[CacheEntry], room: int | None, most: int | None = None) -> None:
        self.cache = cache
        self.room = room
        self.most = most
        self._buffers: dict[str, Any] = {}
        self._rows = 0

    def longest(self, step_length: int) -> int | None:
        """A call has room if all its tokens do, those in excess too."""
        room = self.room or self.most
        return None if room is None else room - step_length + 1

    @property
    def into(self) -> Mapping[str, Any]:
        """Each present is written to the buffer that its past is read from."""
        return {entry.present: self._buffers[entry.past.name] for entry in self.cache}

    def reset(self) -> None:
        """Let all rows be stale."""
        self._buffers = {}

    def given(self, batch: int, past: int, new: int) -> dict[str, Any]:
        """Return the buffers, made longer where there is no room for the new rows.

        Raises:
            RunError: They cannot be made longer.
        """
        needed = past + new
        room = self.room or self.most
        if room is not None and needed > room:
            raise RunError(f"expected at most {room} tokens, as many as the cache has rows for, found {needed}")
        if not self._buffers or needed > self._rows:
            self._rows = self.room or min(max(SMALLEST, 2 * needed), room or sys.maxsize)
            self._buffers = {entry.past.name: to_runtime(self._longer(entry, batch, past)) for entry in self.cache}
        return dict(self._buffers)

    def _longer(self, entry: CacheEntry, batch: int, past: int) -> Array:
        buffer = _filled(entry, batch, self._rows)
        if self._buffers:
            buffer[_span(entry, 0, past)] = self.rows(entry, past)
        return buffer

    def margins(self, past: int, total: int, new: int) -> tuple[int, int]:
        """A mask has a place for each row of the buffer."""
        return 0, self._rows - total

    def keep(self, results: Mapping[str, Any], past: int, new: int, size: int) -> None:
        """Keep nothing: the rows were written where they belong."""

    def rows(self, entry: CacheEntry, total: int) -> Array:
        """Return a row for each token so far."""
        return from_runtime(self._buffers[entry.past.name])[_span(entry, 0, total)]


class NewTokensCacheManager:
    """A past of rows that the host puts together: as many as there are, or a fixed number, the unfilled ones first."""

    into: Mapping[str, Any] = {}

    def __init__(self, cache: Sequence[CacheEntry], held: int | None, most: int | None = None) -> None:
        self.cache = cache
        self.held = held
        self.most = most
        self._rows: dict[str, Array] = {}

    def longest(self, step_length: int) -> int | None:
        """The rows of the past, and at least one new token; any text has room else that the model can be run on."""
        return self.most if self.held is None else self.held + 1

    def reset(self) -> None:
        """Forget all rows."""
        self._rows = {}

    def given(self, batch: int, past: int, new: int) -> dict[str, Any]:
        """Return the rows so far, behind unfilled ones where a past has a fixed length.

        Raises:
            RunError: There are more rows than it has room for.
        """
        if not self._rows:
            self._rows = {entry.past.name: _filled(entry, batch, 0) for entry in self.cache}
        unfilled = self._unfilled(past, new)
        if unfilled < 0:
            raise RunError(f"expected at most {self.held} past tokens, as many as the cache has rows for, found {past}")
        return {entry.past.name: to_runtime(self._behind(unfilled, entry, batch)) for entry in self.cache}

    def _behind(self, unfilled: int, entry: CacheEntry, batch: int) -> Array:
        return np.concatenate([_filled(entry, batch, unfilled), self._rows[entry.past.name]], axis=entry.axis)

    def _unfilled(self, past: int, new: int) -> int:
        """How many rows come before those of the past: as many as its length asks for, some where that is open.

        Where the model takes so many rows in a call and no more, the tokens go before unfilled rows.
        """
        if self.held is not None:
            return self.held - past
        if axis_of(self.cache[0].past.dims[self.cache[0].axis]) != "held":
            return 0
        return SPARE if self.most is None else max(0, min(SPARE, self.most - past - new))

    def margins(self, past: int, total: int, new: int) -> tuple[int, int]:
        """A mask has a place for each row of the past and each new token."""
        return self._unfilled(past, new), past + new - total

    def keep(self, results: Mapping[str, Any], past: int, new: int, size: int) -> None:
        """Put the new rows behind the others."""
        for entry in self.cache:
            _check(entry, results[entry.present].shape(), size, new)
        for entry in self.cache:
            fresh = from_runtime(results[entry.present])[_span(entry, 0, new)]
            self._rows[entry.past.name] = np.concatenate([self._rows[entry.past.name], fresh], axis=entry.axis)

    def rows(self, entry: CacheEntry, total: int) -> Array:
        """Return a row for each token so far."""
        return self._rows[entry.past.name]


def _filled(entry: CacheEntry, batch: int, rows: int) -> Array:
    return np.full(shape_with_rows(entry.past, entry.axis, batch, rows), STALE, entry.past.dtype)


def _span(entry: CacheEntry, start: int, stop: int) -> tuple[slice, ...]:
    return (slice(None),) * entry.axis + (slice(start, stop),)


def _check(entry: CacheEntry, shape: Sequence[int], rows: int, new: int) -> None:
    """Hold a present against what it must hold.

    Raises:
        BrokenCacheError: It has another number of rows, or sizes that its past does not have.
    """
    wanted = [rows if axis == entry.axis else dim for axis, dim in enumerate(entry.past.dims)]
    fits = len(wanted) == len(shape) and all(
        want == have for want, have in zip(wanted, shape, strict=True) if isinstance(want, int)
    )
    if fits:
        return
    dims = [f"{rows} tokens" if axis == entry.axis else dim for axis, dim in enumerate(entry.past.dims)]
    expected = "[" + ", ".join(str(dim) for dim in dims) + "]"
    raise BrokenCacheError(
        f"expected {expected} after {new} more, found {list(shape)} - at `{entry.present}`", layer=entry.layer
    )
