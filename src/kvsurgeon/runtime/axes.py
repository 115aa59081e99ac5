"""What the axes of a model's inputs stand for, and which of its inputs and outputs are the cache.

Nothing but declared names, types and dims is looked at: the words are those of `docs/glossary.md`, and
`past_sequence_length + sequence_length` is another spelling of `total_sequence_length`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvsurgeon.errors import UsageError
from kvsurgeon.runtime.tensors import Dim, Tensor

Axis = Literal["batch", "new", "past", "total", "held", "room", "fixed"]

Layout = tuple[str, ...]  # "batch", "kv_heads", "sequence", "head_dim" in any order

_NAMED: dict[str, Axis] = {
    "batch_size": "batch",
    "sequence_length": "new",
    "past_sequence_length": "past",
    "total_sequence_length": "total",
    "past_sequence_length+sequence_length": "total",
    "sequence_length+past_sequence_length": "total",
    "cache_length": "held",
    "max_length": "room",
}
_INDEX = re.compile(r"(?<!\d)(\d+)(?!\d)")
_BATCHED = re.compile(r"(?:(\d+)\*)?batch_size(?:\*(\d+))?")  # a batch that heads were merged into


def axis_of(dim: Dim) -> Axis:
    """Return what a dim stands for by its name.

    >>> axis_of("past_sequence_length + 1"), axis_of("sequence_length"), axis_of(8)
    ('fixed', 'new', 'fixed')
    """
    return _NAMED.get(dim.replace(" ", ""), "fixed") if isinstance(dim, str) else "fixed"


def axes_of(tensor: Tensor) -> tuple[Axis, ...]:
    """Return what each axis of a tensor stands for by its name."""
    return tuple(axis_of(dim) for dim in tensor.dims)


def token_axes(output: Tensor, shape: Sequence[int], size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the axes of batch and new tokens of an output, by their names or else their usual places.

    Args:
        output: As the model declares it.
        shape: What it has in a call.
        size: Rows and new tokens of that call. Where the axes have other sizes, tokens cannot be told apart: None.
    """
    axes = axes_of(output)
    named = (axes.index("batch"), axes.index("new")) if {"batch", "new"} <= set(axes) else (0, 1)
    fits = len(shape) > max(named) and tuple(shape[axis] for axis in named) == size
    return named if fits else None


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """A past input, the present output that feeds it at the next step, and the layer they belong to."""

    past: Tensor
    present: str
    layer: int
    part: str  # "key", "value" or "state", where the name or the order says so
    axis: int  # of the sequence, in past and present alike
    returned: Dim = None  # rows of the present, as it declares them
    batch: int | None = None  # axis of the batch, where a note or the dims tell


def cache_entries(
    pasts: Sequence[Tensor], presents: Sequence[Tensor], layouts: Mapping[str, Layout] | None = None
) -> tuple[CacheEntry, ...]:
    """Pair pasts and presents in order, and give each pair its layer and part.

    Args:
        pasts: Inputs.
        presents: Outputs.
        layouts: Of keys and of values, by part, where the model notes them; else dims tell.

    Raises:
        UsageError: They cannot be paired, or a past has no axis called `past_sequence_length`.
    """
    if len(pasts) != len(presents):
        raise UsageError(f"expected as many present outputs as past inputs, found {len(presents)} and {len(pasts)}")
    return tuple(
        _entry(place, past, present, layouts or {})
        for place, (past, present) in enumerate(zip(pasts, presents, strict=True))
    )


def find_cache(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], layouts: Mapping[str, Layout] | None = None
) -> tuple[CacheEntry, ...]:
    """Return the cache of a model by its names and dims: empty for a model without one.

    Raises:
        UsageError: There are past inputs without their present outputs.
    """
    pasts = [tensor for tensor in inputs if is_past(tensor)]
    return cache_entries(pasts, find_presents(pasts, outputs), layouts) if pasts else ()


def find_presents(pasts: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs that are presents: by their names, or else those that lie as pasts do."""
    lies = {(tensor.dtype, len(tensor.dims)) for tensor in pasts}
    ways = (
        [tensor for tensor in outputs if "present" in tensor.name],
        [tensor for tensor in outputs if tensor.name.startswith("past")],
        [tensor for tensor in outputs if (tensor.dtype, len(tensor.dims)) in lies],
    )
    return next((found for found in ways if len(found) == len(pasts)), ways[0])


def may_be_past(tensor: Tensor, presents: Sequence[Tensor]) -> bool:
    """Whether an input can be fed from one of these outputs: one lies as it does, which is so of no mask.

    A mask that does lie so has rows for the tokens of the call, which a past has not.
    """
    lies = any((tensor.dtype, len(tensor.dims)) == (one.dtype, len(one.dims)) for one in presents)
    return lies and "new" not in axes_of(tensor)


def is_past(tensor: Tensor) -> bool:
    """Whether an input is a past: by its name, or because it has rows for tokens, and none for those of the call."""
    axes = set(axes_of(tensor))
    if tensor.name.startswith("past_key_values.") or {"past", "held"} & axes:
        return True
    if "room" in axes and "new" not in axes and any(isinstance(dim, int) and dim > 1 for dim in tensor.dims):
        return True
    return tensor.name.startswith("past") and len(tensor.dims) > 2


def empty_shape(tensor: Tensor, batch: int) -> tuple[int, ...]:
    """Return the shape of a past before the first token.

    Raises:
        UsageError: A dim is neither a number nor one of the known names.
    """
    return shape_with_rows(tensor, past_axis(tensor), batch, 0)


def shape_with_rows(tensor: Tensor, axis: int, batch: int, rows: int) -> tuple[int, ...]:
    """Return the shape of a past that has so many rows along its sequence axis.

    Raises:
        UsageError: Another dim is neither a number nor one of the known names.
    """
    return tuple(rows if place == axis else _size(tensor, dim, batch) for place, dim in enumerate(tensor.dims))


def is_known(tensor: Tensor, axis: int) -> bool:
    """Whether the shape of a past follows from its dims, but for the rows along its sequence axis."""
    try:
        shape_with_rows(tensor, axis, 1, 0)
    except UsageError:
        return False
    return True


def past_axis(tensor: Tensor) -> int:
    """Return the sequence axis of a past: the one called so, else the only symbol beyond the first axis.

    Raises:
        UsageError: There is no such axis, or there are several.
    """
    named = [place for place, axis in enumerate(axes_of(tensor)) if axis in ("past", "held", "room")]
    symbols = [place for place, dim in enumerate(tensor.dims) if place and isinstance(dim, str)]
    found = named or symbols
    if len(found) != 1:
        raise UsageError(
            f"expected one dim called past_sequence_length, found {list(tensor.dims)} - at `{tensor.name}`"
        )
    return found[0]


def cache_mismatch(entries: Collection[CacheEntry]) -> str | None:
    """Return what is wrong where pasts and presents pair differently by order and by name, else None."""
    presents = {entry.present for entry in entries}
    for entry in entries:
        by_name = re.sub(r"^past(?:_key_values)?", "present", entry.past.name)
        if by_name in presents and by_name != entry.present:
            return f"`{entry.past.name}` and `{entry.present}` stand at the same place but differ in name"
    return None


def _entry(place: int, past: Tensor, present: Tensor, layouts: Mapping[str, Layout]) -> CacheEntry:
    number = _INDEX.search(past.name)
    part = _part(place, past.name)
    layer = int(number.group(1)) if number else place // 2
    layout = layouts.get("key" if part == "key" else "value", ())  # a state lies as values do
    axis = layout.index("sequence") if layout else past_axis(past)
    told = layout or axes_of(past)
    return CacheEntry(
        past=past,
        present=present.name,
        layer=layer,
        part=part,
        axis=axis,
        returned=present.dims[axis] if axis < len(present.dims) else None,
        batch=told.index("batch") if "batch" in told else None,
    )


def _part(place: int, name: str) -> str:
    """What an entry holds: by its name, or else by its place, at which keys and values take turns."""
    said = next((word for word in ("key", "value") if name.endswith(word)), None)
    return said or ("state" if "state" in re.findall("[a-z]+", name) else ("key", "value")[place % 2])


def _size(tensor: Tensor, dim: Dim, batch: int) -> int:
    if isinstance(dim, int):
        return dim
    merged = _BATCHED.fullmatch(str(dim).replace(" ", ""))
    if merged is not None:
        return batch * int(merged.group(1) or 1) * int(merged.group(2) or 1)
    first = next(one for one in tensor.dims if not isinstance(one, int))
    if dim == first and str(dim).isidentifier():
        return batch
    raise UsageError(f"expected a number, batch_size or past_sequence_length, found dim `{dim}` - at `{tensor.name}`")
