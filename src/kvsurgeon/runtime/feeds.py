"""What a decoder is given: built once for the whole text, then sliced for each call.

An input follows the new tokens (length S), all tokens so far (length T), or both. A call that adds the tokens
`past:total` is given `[past:total]` along an axis of new tokens and `[:total]` along an axis of all tokens, so the
feeds of any chunk are views into the feeds of the whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from kvsurgeon.errors import UsageError
from kvsurgeon.runtime.axes import Axis, axes_of, is_past
from kvsurgeon.runtime.tensors import Array, Tensor

ValueKind = Literal["tokens", "embeddings", "mask", "visibility", "positions", "types", "other"]
Tokens = npt.NDArray[np.int64]  # [batch, sequence]

_FIXED: Axis = "fixed"
_EMBEDDINGS = 251  # rows of the table that stands in for a model's own embeddings


@dataclass(frozen=True, kw_only=True)
class Given:
    """One input, what it means, and what each of its axes follows."""

    tensor: Tensor
    kind: ValueKind
    axes: tuple[Axis, ...]

    @property
    def name(self) -> str:
        """Name of the input."""
        return self.tensor.name

    @property
    def unseen(self) -> float:
        """What says of a token that it is not seen, where the input is a mask; 0 elsewhere."""
        additive = self.tensor.floating and (self.kind == "visibility" or (self.kind == "mask" and len(self.axes) > 2))
        return _lowest(self.tensor) if additive else 0.0

    def part(self, whole: Array, past: int, total: int) -> Array:
        """Return what a call is given that adds the tokens `past:total`."""
        spans: dict[Axis, slice] = {"new": slice(past, total), "total": slice(0, total)}
        return whole[tuple(spans[axis] if axis in spans else slice(None) for axis in self.axes)]

    def rows(self, whole: Array, rows: Sequence[int]) -> Array:
        """Return the same for some rows of the batch only."""
        return np.take(whole, rows, axis=self.axes.index("batch")) if "batch" in self.axes else whole


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a decoder is given apart from its cache."""

    given: tuple[Given, ...]

    @property
    def tokens(self) -> Given:
        """The input that carries the text: ids, or their embeddings.

        Raises:
            UsageError: There is none.
        """
        for kind in ("tokens", "embeddings"):
            for given in self.given:
                if given.kind == kind:
                    return given
        names = ", ".join(given.name for given in self.given)
        raise UsageError(f"expected an input of token ids [batch, sequence] or of embeddings, found {names or 'none'}")

    @property
    def masked(self) -> bool:
        """Whether padding can be told to the model."""
        return any(given.kind in ("mask", "visibility") for given in self.given)

    def placing(self, other: Inputs) -> set[str]:
        """Return the inputs of positions, where another model counts these itself, padding included."""
        counts_itself = not any(given.kind == "positions" for given in other.given)
        return {given.name for given in self.given if counts_itself and given.kind == "positions"}

    def whole(
        self, tokens: Tokens, mask: Tokens, *, types: int = 1, by_place: Collection[str] = ()
    ) -> dict[str, Array]:
        """Return the feeds of the whole text.

        Args:
            tokens: Ids, `[batch, sequence]`.
            mask: 1 where a token counts, 0 at padding.
            types: How many token types to deal out where the model has such an input.
            by_place: Inputs of positions that count padding like any token, as a model without them does.
        """
        ones = np.ones_like(mask)
        return {
            given.name: _value(given, tokens, ones if given.name in by_place else mask, types) for given in self.given
        }

    def part(self, feeds: Mapping[str, Array], past: int, total: int) -> dict[str, Array]:
        """Return the feeds of the call that adds the tokens `past:total`."""
        return {given.name: given.part(feeds[given.name], past, total) for given in self.given}

    def rows(self, feeds: Mapping[str, Array], rows: Sequence[int]) -> dict[str, Array]:
        """Return the feeds of some rows of the batch."""
        return {given.name: given.rows(feeds[given.name], rows) for given in self.given}


def inputs_of(tensors: Sequence[Tensor], pasts: Collection[str] = ()) -> Inputs:
    """Return what the inputs of a model mean: by their dims, then by their names, then by their order.

    Args:
        tensors: All inputs.
        pasts: Names of those that are known to be its cache; others are told by name and dims.
    """
    own = [tensor for tensor in tensors if not is_past(tensor) and tensor.name not in pasts]
    cached = len(own) < len(tensors)
    axes = {tensor.name: _axes(tensor, cached=cached) for tensor in own}
    tokens = _token_input(own, axes)
    given = [Given(tensor=t, kind=_kind(t, axes[t.name], tokens), axes=axes[t.name]) for t in own]
    return Inputs(given=tuple(given))


def positions_of(mask: Tokens) -> Tokens:
    """Return the position of each token among those that count: padding does not advance it."""
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def _axes(tensor: Tensor, *, cached: bool) -> tuple[Axis, ...]:
    axes: list[Axis] = ["total" if axis == "room" else axis for axis in axes_of(tensor)]
    rank = len(axes)
    if not {"new", "total"} & set(axes):  # dims without a telling name: the usual places
        follows: Axis = "total" if cached and "mask" in tensor.name else "new"
        places: dict[int, tuple[Axis, ...]] = {
            1: ("new",) if isinstance(tensor.dims[0] if rank else 1, str) else ("fixed",),
            2: ("batch", follows),
            3: ("batch", "new", "fixed" if tensor.floating else "total"),
            4: ("batch", "fixed", "new", "total"),
        }
        return places[rank] if rank in places else tuple(_FIXED for _ in axes)
    if "batch" not in axes and rank > 1 and axes[0] == "fixed":
        axes[0] = "batch"
    if axes.count("new") > 1:  # queries against keys, where without a cache the two lengths are one
        axes[rank - 1 - axes[::-1].index("new")] = "total"
    return tuple(axes)


def _token_input(tensors: Sequence[Tensor], axes: Mapping[str, tuple[Axis, ...]]) -> str | None:
    able = [t.name for t in tensors if t.integer and "new" in axes[t.name] and "total" not in axes[t.name]]
    named = [name for name in able if name.endswith("input_ids")]
    unsaid = [name for name in able if not any(word in name.lower() for word in ("mask", "pos", "type", "segment"))]
    return next(iter(named + unsaid), None)


def _kind(tensor: Tensor, axes: tuple[Axis, ...], tokens: str | None) -> ValueKind:
    name = tensor.name.lower()
    if tensor.name == tokens:
        return "tokens"
    if "new" in axes and "total" in axes:
        return "visibility"
    if "total" in axes or ("new" in axes and ("mask" in name or _boolean(tensor))):
        return "mask"
    if "new" not in axes:
        return "other"
    if tensor.floating:
        return "embeddings" if len(axes) == 3 else "other"
    return "types" if "type" in name or "segment" in name else "positions"


def _boolean(tensor: Tensor) -> bool:
    return tensor.dtype is not None and tensor.dtype.kind == "b"


def _value(given: Given, tokens: Tokens, mask: Tokens, types: int) -> Array:
    tensor = given.tensor
    if given.kind == "embeddings":
        return _embeddings(given, tokens)
    if given.kind == "visibility":
        return _arranged(given, _strength(tensor, _visibility(mask), additive=True))
    if given.kind == "mask":
        return _arranged(given, _strength(tensor, mask.astype(bool), additive=len(given.axes) > 2))
    if given.kind == "other":
        sizes = [len(tokens) if axis == "batch" else dim for axis, dim in zip(given.axes, tensor.dims, strict=True)]
        return np.zeros([size if isinstance(size, int) else 1 for size in sizes], tensor.dtype)
    values = {"tokens": tokens, "positions": positions_of(mask), "types": tokens % types}[given.kind]
    return _arranged(given, values.astype(tensor.dtype))


def _visibility(mask: Tokens) -> npt.NDArray[np.bool_]:
    """Return which key each query sees: earlier ones that count, and itself even where it is padding."""
    length = mask.shape[1]
    earlier = np.tri(length, dtype=bool) & mask.astype(bool)[:, None, :]
    visible: npt.NDArray[np.bool_] = earlier | np.eye(length, dtype=bool)
    return visible


def _strength(tensor: Tensor, visible: npt.NDArray[np.bool_], *, additive: bool) -> Array:
    if not (tensor.floating and additive):
        return visible.astype(tensor.dtype)
    return np.where(visible, 0.0, _lowest(tensor)).astype(tensor.dtype)


def _lowest(tensor: Tensor) -> float:
    """A number far below any score, and finite after addition."""
    return -1e4 if tensor.dtype == np.float16 else -1e9


def _embeddings(given: Given, tokens: Tokens) -> Array:
    width = given.tensor.dims[-1]
    if not isinstance(width, int):
        raise UsageError(f"expected a number for the width, found {list(given.tensor.dims)} - at `{given.name}`")
    table = np.random.default_rng(0).standard_normal((_EMBEDDINGS, width))
    values = table[tokens % _EMBEDDINGS].astype(given.tensor.dtype)  # [batch, sequence, width]
    return values if given.axes.index("new") else values.swapaxes(0, 1)


def _arranged(given: Given, values: Array) -> Array:
    """Return `[batch, sequence]` or `[batch, query, key]` in the order and rank of the input."""
    axes = given.axes
    if "batch" not in axes:
        values = values[0]
    elif axes.index("batch") > min(place for place, axis in enumerate(axes) if axis in ("new", "total")):
        values = np.moveaxis(values, 0, 1)
    extra = [place for place, axis in enumerate(axes) if axis == "fixed"]
    values = np.expand_dims(values, extra)
    sizes = [dim if place in extra and isinstance(dim, int) else -1 for place, dim in enumerate(given.tensor.dims)]
    shape = [have if size < 0 else size for size, have in zip(sizes, values.shape, strict=True)]
    return np.broadcast_to(values, shape)


def fixed_size(inputs: Inputs, tensors: Sequence[Tensor], axis: Literal["batch", "new"]) -> int | None:
    """Return the only batch size or length that a model takes, None where it takes any.

    Args:
        inputs: What the inputs mean.
        tensors: The inputs of the model asked about, which may be another one with inputs of the same names.
        axis: The axis asked about.
    """
    tokens, dims = inputs.tokens, {tensor.name: tensor.dims for tensor in tensors}
    for given in (tokens, *inputs.given):
        for place, dim in zip(given.axes, dims.get(given.name, ()), strict=False):
            if place == axis and isinstance(dim, int):
                return dim
    return None


def padded(array: Array, axis: int, before: int, after: int, value: float | None) -> Array:
    """Return the array with more places along an axis, which hold the value; None repeats the last one."""
    if not before and not after:
        return array
    widths = [(before, after) if place == axis else (0, 0) for place in range(array.ndim)]
    if value is None:
        return np.pad(array, widths, mode="edge")
    return np.pad(array, widths, constant_values=array.dtype.type(value))
