"""The meaning of a model's input axes, and its cache inputs and outputs, from declared names, types and dims.

The dim names are those of `docs/glossary.md`; `past_sequence_length + sequence_length` means `total_sequence_length`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvsurgeon.errors import UsageError
from kvsurgeon.runtime.tensors import Array, Dim, ValueInfo

Axis = Literal["batch", "sequence", "past", "total", "capacity", "max", "last", "fixed"]

Layout = tuple[str, ...]  # "batch", "kv_heads", "sequence", "head_dim" in any order

_NAMED: dict[str, Axis] = {
    "batch_size": "batch",
    "sequence_length": "sequence",
    "past_sequence_length": "past",
    "total_sequence_length": "total",
    "past_sequence_length+sequence_length": "total",
    "sequence_length+past_sequence_length": "total",
    "cache_length": "capacity",
    "max_length": "max",
}
FIXED_PARTS = ("conv_state", "recurrent_state")
_WORDS_OF_PARTS = {"conv": "conv_state", "recurrent": "recurrent_state", "ssm": "recurrent_state"}  # of each runtime
_LAST_ROWS = re.compile(r"(?:first_(\d+)_)?last_(\d+)_rows")
_INDEX = re.compile(r"(?<!\d)(\d+)(?!\d)")
_BATCHED = re.compile(r"(?:(\d+)\*)?batch_size(?:\*(\d+))?")  # batch and heads merged


def axis_of(dim: Dim) -> Axis:
    """Return the meaning of a dim by its name.

    >>> axis_of("past_sequence_length + 1"), axis_of("sequence_length"), axis_of(8)
    ('fixed', 'sequence', 'fixed')
    """
    if last_rows(dim) is not None:
        return "last"
    return _NAMED.get(dim.replace(" ", ""), "fixed") if isinstance(dim, str) else "fixed"


def last_rows(dim: Dim) -> int | None:
    """Return the most rows of a past that holds first and last ones, by the name of its dim; None for another dim.

    >>> last_rows("last_128_rows"), last_rows("first_4_last_128_rows"), last_rows("past_sequence_length")
    (128, 132, None)
    """
    found = _LAST_ROWS.fullmatch(dim) if isinstance(dim, str) else None
    return None if found is None else int(found.group(1) or 0) + int(found.group(2))


def axes_of(tensor: ValueInfo) -> tuple[Axis, ...]:
    """Return the meaning of each axis of a tensor by its dim name."""
    return tuple(axis_of(dim) for dim in tensor.dims)


def slice_axes(array: Array, axes: Sequence[str], spans: Mapping[str, slice]) -> Array:
    """Return the part of an array within a slice for each axis name; other axes are kept whole."""
    return array[tuple(spans.get(axis, slice(None)) for axis in axes)]


def token_axes(output: ValueInfo, shape: Sequence[int], size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the batch axis and the sequence axis of an output: by dim names, else axes 0 and 1.

    Args:
        output: The output as the model declares it.
        shape: Its shape in a call.
        size: Batch size and number of tokens of that call. None is returned if the axes have other sizes.
    """
    axes = axes_of(output)
    named = (axes.index("batch"), axes.index("sequence")) if {"batch", "sequence"} <= set(axes) else (0, 1)
    fits = len(shape) > max(named) and tuple(shape[axis] for axis in named) == size
    return named if fits else None


@dataclass(frozen=True, kw_only=True)
class CacheIO:
    """A past input and the present output that feeds it in the next call.

    Attributes:
        past: The past input.
        present: Name of the present output.
        layer: Index of the layer.
        part: "key", "value", "key_scale" or "value_scale" of quantized rows, "state", or "conv_state" or
            "recurrent_state" of the same size after any text.
        axis: Sequence axis of past and present; the last axis of a recurrent state.
        present_length: Dim of the present along the sequence axis, as declared.
        batch_axis: Batch axis, if the metadata or the dim names give it.
        is_axis_known: Whether the metadata or the dim names give the sequence axis.
    """

    past: ValueInfo
    present: str
    layer: int
    part: str
    axis: int
    present_length: Dim = None
    batch_axis: int | None = None
    is_axis_known: bool = True

    @property
    def window(self) -> int | None:
        """Most rows of past and present, if they hold the last ones alone."""
        return last_rows(self.past.dims[self.axis])

    @property
    def is_fixed(self) -> bool:
        """Whether past and present have the same size after any text; zeros are the past of the first call."""
        return self.part in FIXED_PARTS


def cache_entries(
    pasts: Sequence[ValueInfo], presents: Sequence[ValueInfo], layouts: Mapping[str, Layout] | None = None
) -> tuple[CacheIO, ...]:
    """Pair past inputs and present outputs in order.

    Args:
        pasts: Past inputs.
        presents: Present outputs.
        layouts: Layouts of keys and values, by part; without one, dim names give the axes.

    Raises:
        UsageError: The counts differ, or no dim of a past is called `past_sequence_length`.
    """
    if len(pasts) != len(presents):
        raise UsageError(f"expected as many present outputs as past inputs, found {len(presents)} and {len(pasts)}")
    return tuple(
        _entry(index, past, present, layouts or {})
        for index, (past, present) in enumerate(zip(pasts, presents, strict=True))
    )


def find_cache(
    inputs: Sequence[ValueInfo], outputs: Sequence[ValueInfo], layouts: Mapping[str, Layout] | None = None
) -> tuple[CacheIO, ...]:
    """Return the cache inputs and outputs of a model; empty for a model without a cache.

    Raises:
        UsageError: Past inputs have no present outputs.
    """
    pasts = [tensor for tensor in inputs if is_past(tensor)]
    return cache_entries(pasts, find_presents(pasts, outputs), layouts) if pasts else ()


def find_presents(pasts: Sequence[ValueInfo], outputs: Sequence[ValueInfo]) -> list[ValueInfo]:
    """Return the present outputs: by name, else all outputs with the type and rank of a past."""
    candidates = (
        [tensor for tensor in outputs if "present" in tensor.name and not is_cross_attention(tensor)],
        [tensor for tensor in outputs if tensor.name.startswith("past")],
        [tensor for tensor in outputs if _matches_any(tensor, pasts)],
    )
    return next((found for found in candidates if len(found) == len(pasts)), candidates[0])


def tokens_first(output: ValueInfo, batch: Dim, sequence: Dim) -> tuple[int, ...]:
    """Return the order of an output's axes in which batch and tokens come first, by the names of their dims.

    >>> tokens_first(ValueInfo(name="logits", dtype=None, dims=("n", "b", 8)), "b", "n")
    (1, 0, 2)
    """
    names = [dim for dim in (batch, sequence) if isinstance(dim, str)]
    first = [output.dims.index(name) for name in names if output.dims.count(name) == 1]
    if len(set(first)) < 2:
        return tuple(range(len(output.dims)))
    return (*first, *(axis for axis in range(len(output.dims)) if axis not in first))


def may_be_past(tensor: ValueInfo, presents: Sequence[ValueInfo]) -> bool:
    """Whether an input can be fed from one of some outputs: equal type and rank, and no axis of new tokens.

    A mask of the same type and rank has such an axis.
    """
    return _matches_any(tensor, presents) and "sequence" not in axes_of(tensor)


def is_past(tensor: ValueInfo) -> bool:
    """Whether an input is a past: by its name, or because it has an axis of cached tokens only."""
    axes = set(axes_of(tensor))
    if is_cross_attention(tensor):
        return False
    if tensor.name.startswith("past_key_values.") or {"past", "capacity", "last"} & axes:
        return True
    if "max" in axes and "sequence" not in axes and any(isinstance(dim, int) and dim > 1 for dim in tensor.dims):
        return True
    return tensor.name.startswith("past") and len(tensor.dims) > 2


def is_cross_attention(tensor: ValueInfo) -> bool:
    """Whether an input or output has keys or values of cross-attention by its name: they get no rows of tokens."""
    return ".encoder." in tensor.name


def shape_with_rows(tensor: ValueInfo, axis: int | None, batch: int, rows: int) -> tuple[int, ...]:
    """Return the shape of a past with a number of rows along its sequence axis, if it has one.

    Raises:
        UsageError: Another dim is neither a number nor a known name.
    """
    return tuple(rows if place == axis else _size(tensor, dim, batch) for place, dim in enumerate(tensor.dims))


def has_known_shape(tensor: ValueInfo, axis: int) -> bool:
    """Whether all dims of a past but its sequence axis are known."""
    try:
        shape_with_rows(tensor, axis, 1, 0)
    except UsageError:
        return False
    return True


def past_axis(tensor: ValueInfo, present: ValueInfo | None = None) -> int:
    """Return the sequence axis of a past: by its dim name, else the only named dim after the first axis.

    Of several, it is the one whose name the present output does not have. If all are numbers, it is assumed to be the
    last but one.

    Raises:
        UsageError: There are several such axes, or too few.
    """
    named = [place for place, axis in enumerate(axes_of(tensor)) if axis in ("past", "capacity", "max", "last")]
    found = named or [place for place, dim in enumerate(tensor.dims) if place and isinstance(dim, str)]
    if len(found) > 1 and present is not None and len(present.dims) == len(tensor.dims):
        found = [place for place in found if present.dims[place] != tensor.dims[place]] or found
    if not found and len(tensor.dims) > 2:
        return len(tensor.dims) - 2
    if len(found) != 1:
        raise UsageError(
            f"expected one dim called past_sequence_length, found {list(tensor.dims)} - at `{tensor.name}`"
        )
    return found[0]


def cache_mismatch(entries: Collection[CacheIO]) -> str | None:
    """Return a sentence if pasts and presents pair differently by order and by name, else None."""
    presents = {entry.present for entry in entries}
    for entry in entries:
        by_name = present_name(entry.past)
        if by_name in presents and by_name != entry.present:
            return f"`{entry.past.name}` and `{entry.present}` pair by order, but not by name"
    return None


def present_name(past: ValueInfo) -> str:
    """Return the usual name of the present output of a past input."""
    return re.sub(r"^past(?:_key_values)?", "present", past.name)


def _matches_any(tensor: ValueInfo, others: Sequence[ValueInfo]) -> bool:
    return any((tensor.dtype, len(tensor.dims)) == (other.dtype, len(other.dims)) for other in others)


def _entry(index: int, past: ValueInfo, present: ValueInfo, layouts: Mapping[str, Layout]) -> CacheIO:
    number = _INDEX.search(past.name)
    part = _part(index, past.name)
    is_fixed = part in FIXED_PARTS
    kind = "key" if part in ("key", "key_scale") else "value"  # states of tokens are like values
    layout = layouts.get(kind, ())
    if part == "recurrent_state" or len(layout) != len(past.dims):
        layout = ()
    no_tokens = part == "recurrent_state" or (is_fixed and len(past.dims) == 3)  # the latter has its rows last
    axis = len(past.dims) - 1 if no_tokens else layout.index("sequence") if layout else past_axis(past, present)
    axes = layout or axes_of(past)
    return CacheIO(
        past=past,
        present=present.name,
        layer=int(number.group(1)) if number else index // 2,
        part=part,
        axis=axis,
        present_length=present.dims[axis] if axis < len(present.dims) else None,
        batch_axis=axes.index("batch") if "batch" in axes else None,
        is_axis_known=bool(layout) or is_fixed or not isinstance(past.dims[axis], int),
    )


def _part(index: int, name: str) -> str:
    """Return the part of a past by its name, else by its index: keys and values alternate."""
    ends = (word for word in ("key", "value", "key_scale", "value_scale") if name.endswith(word))
    words = re.findall("[a-z]+", name)
    named = next((part for word, part in _WORDS_OF_PARTS.items() if word in words), None) or next(ends, None)
    return named or ("state" if "state" in words else ("key", "value")[index % 2])


def _size(tensor: ValueInfo, dim: Dim, batch: int) -> int:
    if isinstance(dim, int):
        return dim
    merged = _BATCHED.fullmatch(str(dim).replace(" ", ""))
    if merged is not None:
        return batch * int(merged.group(1) or 1) * int(merged.group(2) or 1)
    first = next(one for one in tensor.dims if not isinstance(one, int))
    if dim == first and str(dim).isidentifier():
        return batch
    raise UsageError(f"expected a number, batch_size or past_sequence_length, found dim `{dim}` - at `{tensor.name}`")
