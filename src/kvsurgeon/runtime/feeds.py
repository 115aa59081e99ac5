"""Values for a decoder's inputs: built once for the whole text, then sliced for each call.

An axis of an input follows the query length S (the tokens of a call), the total length T (all tokens so far), or
neither. The call on the tokens `past:total` takes `[past:total]` along an axis of length S and `[:total]` along an axis
of length T.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal
from zlib import crc32

import numpy as np
import numpy.typing as npt

from kvsurgeon.errors import UsageError
from kvsurgeon.runtime.axes import Axis, axes_of, axis_of, is_past, slice_axes
from kvsurgeon.runtime.tensors import Array, Dim, ValueInfo

InputKind = Literal[
    "tokens", "embeddings", "padding_mask", "query_key_mask", "positions", "token_types", "block", "other"
]
MaskForm = Literal["kept", "hidden", "added"]  # what hides a token in a mask: 0, 1, or a large negative number
Tokens = npt.NDArray[np.int64]  # [batch, sequence]

_SMALLEST_SIZE = 5  # of axes that are neither batch nor tokens
_EMBEDDINGS = 251  # rows of the random table that replaces a model's embeddings


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """An input, its kind, and the length that each of its axes follows.

    Attributes:
        tensor: The input as the model declares it.
        kind: What it is given for.
        axes: The length that each axis follows.
        form: If it is a mask, what hides a token; None for the form that is usual for its type.
        closed: If it opens a block, 0 or 1: what it holds for other tokens.
    """

    tensor: ValueInfo
    kind: InputKind
    axes: tuple[Axis, ...]
    form: MaskForm | None = None
    closed: int = 0

    @property
    def name(self) -> str:
        """Name of the input."""
        return self.tensor.name

    @property
    def masked_value(self) -> float:
        """Value of a mask at a masked token; 0 for other inputs."""
        return self.mask_values[1]

    @property
    def is_mask(self) -> bool:
        """Whether it masks tokens."""
        return self.kind in ("padding_mask", "query_key_mask")

    @property
    def mask_values(self) -> tuple[float, float]:
        """Values of a mask at a token that is attended to, and at a masked one."""
        matrix = self.kind == "query_key_mask" or (self.kind == "padding_mask" and len(self.axes) > 2)
        form = self.form or ("added" if self.tensor.floating and matrix else "kept")
        values = {"kept": (1.0, 0.0), "hidden": (0.0, 1.0), "added": (0.0, _lowest(self.tensor))}
        return values[form]


@dataclass(frozen=True, kw_only=True)
class DecoderInputs:
    """All inputs of a decoder but its cache.

    Attributes:
        specs: The inputs.
        sizes: Sizes of the axes that are neither batch nor tokens, by their dim name; 1 if missing.
        seed: Seed of the values of inputs that are neither tokens, masks nor positions; None for zeros.
        number: Value of integer inputs without tokens, such as an index or a count.
    """

    specs: tuple[InputSpec, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    seed: int | None = None
    number: int = 0

    @property
    def tokens(self) -> InputSpec:
        """The input of token IDs, else that of embeddings.

        Raises:
            UsageError: There is neither.
        """
        for kind in ("tokens", "embeddings"):
            for spec in self.specs:
                if spec.kind == kind:
                    return spec
        names = ", ".join(spec.name for spec in self.specs)
        raise UsageError(f"expected an input of token ids [batch, sequence] or of embeddings, found {names or 'none'}")

    @property
    def masked(self) -> bool:
        """Whether the model takes a mask, and so padding."""
        return any(spec.is_mask for spec in self.specs)

    def fed(self, *, by_name: bool, seed: int | None, capacity: int | None = None) -> DecoderInputs:
        """Return the inputs with other values for those that are neither tokens, masks nor positions.

        Args:
            by_name: Whether an axis of another name or size than those of tokens and cache has a separate size.
            seed: Seed of random values; None for zeros.
            capacity: Number of rows of the cache, if it is fixed.
        """
        if not by_name:
            return replace(self, seed=seed)
        tokens = self.tokens
        dims = dict(zip(tokens.axes, tokens.tensor.dims, strict=True))
        length = dims.get("sequence")
        lengths = {
            capacity,
            length,
            capacity + length if isinstance(capacity, int) and isinstance(length, int) else None,
        }
        known: dict[Dim, Axis] = {dims.get("batch"): "batch", length: "sequence"}
        specs = tuple(_by_name(spec, known, lengths) for spec in self.specs)
        names = {
            dim for spec in specs for axis, dim in zip(spec.axes, spec.tensor.dims, strict=True)
            if axis == "fixed" and isinstance(dim, str)
        }  # fmt: skip
        sizes = {name: _SMALLEST_SIZE + place for place, name in enumerate(sorted(names))}
        return DecoderInputs(specs=specs, sizes=sizes, seed=seed)

    def positions_not_in(self, other: DecoderInputs) -> set[str]:
        """Return the names of the position inputs, if the other model has none and computes positions itself."""
        if any(spec.kind == "positions" for spec in other.specs):
            return set()
        return {spec.name for spec in self.specs if spec.kind == "positions"}

    def size(self, feeds: Mapping[str, Array], axis: Literal["batch", "sequence"]) -> int:
        """Return the batch size or the number of tokens of some feeds; 1 if there is no such axis."""
        tokens = self.tokens
        return feeds[tokens.name].shape[tokens.axes.index(axis)] if axis in tokens.axes else 1

    def feeds(
        self, tokens: Tokens, mask: Tokens, *, token_types: int = 1, count_padding: Collection[str] = (), block: int = 0
    ) -> dict[str, Array]:
        """Return the feeds of the whole text.

        Args:
            tokens: Token IDs, `[batch, sequence]`.
            mask: 0 at padding, else 1; `[batch, sequence]`.
            token_types: Number of token types to use, if the model takes them.
            count_padding: Position inputs in which padding advances the position, as in a model that computes them.
            block: Number of tokens of the first call, for inputs that let them attend to each other both ways.
        """
        ones = np.ones_like(mask)
        return {
            spec.name: self._other_value(spec, len(tokens))
            if spec.kind == "other"
            else _block_value(spec, mask, block)
            if spec.kind == "block"
            else _value(spec, tokens, ones if spec.name in count_padding else mask, token_types)
            for spec in self.specs
        }

    def _other_value(self, spec: InputSpec, batch: int) -> Array:
        """Return a value for an input that is neither tokens, a mask nor positions."""
        tensor = spec.tensor
        sizes = [batch if axis == "batch" else dim for axis, dim in zip(spec.axes, tensor.dims, strict=True)]
        shape = [size if isinstance(size, int) else self.sizes.get(str(size), 1) for size in sizes]
        dtype = np.dtype(np.float32) if tensor.dtype is None else tensor.dtype
        if "mask" in spec.name:  # nothing is masked: 1, or 0 in a mask that is added
            return np.full(shape, not (tensor.floating and len(shape) > 2)).astype(dtype)
        if not tensor.floating and len(shape) < 2:
            return np.full(shape, self.number, dtype)
        if self.seed is None:
            return np.zeros(shape, dtype)
        random = np.random.default_rng([self.seed, crc32(spec.name.encode())])
        if tensor.floating:
            values = random.standard_normal(shape) if len(shape) > 1 else random.uniform(0.5, 1.5, shape)
            return np.asarray(values).astype(dtype)
        return random.integers(0, 2, shape).astype(dtype)

    def with_blocks(self, closed: Mapping[str, int]) -> DecoderInputs:
        """Return the inputs with some that open a block in the first call: by name, what they hold for other tokens."""
        specs = tuple(
            replace(spec, kind="block", closed=closed[spec.name]) if spec.name in closed else spec
            for spec in self.specs
        )
        return replace(self, specs=specs)

    def part(self, feeds: Mapping[str, Array], past: int, total: int) -> dict[str, Array]:
        """Return the feeds of the call on the tokens `past:total`."""
        spans = {"sequence": slice(past, total), "total": slice(0, total)}
        return {spec.name: slice_axes(feeds[spec.name], spec.axes, spans) for spec in self.specs}

    def rows(self, feeds: Mapping[str, Array], rows: Sequence[int]) -> dict[str, Array]:
        """Return the feeds of some rows of the batch."""
        axes = {spec.name: spec.axes.index("batch") for spec in self.specs if "batch" in spec.axes}
        return {name: array.take(rows, axis=axes[name]) if name in axes else array for name, array in feeds.items()}


def inputs_of(tensors: Sequence[ValueInfo], pasts: Collection[str] = ()) -> DecoderInputs:
    """Return the inputs with their kinds: by dims, then by name, then by order.

    Args:
        tensors: All inputs.
        pasts: Names of the cache inputs; if there are none, those that names or dims show.
    """
    own = [tensor for tensor in tensors if tensor.name not in pasts and (pasts or not is_past(tensor))]
    axes = {tensor.name: _axes(tensor, cached=len(own) < len(tensors)) for tensor in own}
    tokens = _token_input(own, axes)
    specs = [InputSpec(tensor=t, kind=_kind(t, axes[t.name], tokens), axes=axes[t.name]) for t in own]
    return DecoderInputs(specs=tuple(specs))


def fixed_size(inputs: DecoderInputs, tensors: Sequence[ValueInfo], axis: Literal["batch", "sequence"]) -> int | None:
    """Return the only batch size or query length that a model takes; None if it takes any.

    Args:
        inputs: The inputs with their kinds.
        tensors: The inputs as the model declares them.
        axis: The axis in question.
    """
    dims = {tensor.name: tensor.dims for tensor in tensors}
    for spec in (inputs.tokens, *inputs.specs):
        for follows, dim in zip(spec.axes, dims.get(spec.name, ()), strict=False):
            if follows == axis and isinstance(dim, int):
                return dim
    return None


def pad_axis(array: Array, axis: int, before: int, after: int, value: float | None) -> Array:
    """Return the array padded along an axis with a value; None repeats the last element."""
    if not before and not after:
        return array
    widths = [(before, after) if place == axis else (0, 0) for place in range(array.ndim)]
    if value is None:
        return np.pad(array, widths, mode="edge")
    return np.pad(array, widths, constant_values=array.dtype.type(value))


def _axes(tensor: ValueInfo, *, cached: bool) -> tuple[Axis, ...]:
    axes: list[Axis] = ["total" if axis == "max" else axis for axis in axes_of(tensor)]
    rank = len(axes)
    if not {"sequence", "total"} & set(axes):  # dim names say nothing: assume the usual axes
        length: Axis = "total" if cached and "mask" in tensor.name else "sequence"
        usual: dict[int, tuple[Axis, ...]] = {
            1: ("sequence",) if isinstance(tensor.dims[0] if rank else 1, str) else ("fixed",),
            2: ("batch", length),
            3: ("batch", "sequence", "fixed" if tensor.floating else "total"),
            4: ("batch", "fixed", "sequence", "total"),
        }
        several: tuple[Axis, ...] = ("fixed", "batch", "sequence")
        return several if _has_several_numbers(tensor) else usual.get(rank, tuple("fixed" for _ in axes))
    if "batch" not in axes and rank > 1 and axes[0] == "fixed":
        axes[0] = "batch"
    if axes.count("sequence") > 1:  # queries and keys: their lengths are equal without a cache
        axes[rank - 1 - axes[::-1].index("sequence")] = "total"
    return tuple(axes)


def _has_several_numbers(tensor: ValueInfo) -> bool:
    """Return whether an input is `[3, batch, sequence]`, such as the positions of a text with images."""
    dims = tensor.dims
    is_named = len(dims) == 3 and all(isinstance(dim, str) for dim in dims[1:]) and dims[1] != dims[2]
    return tensor.integer and is_named and isinstance(dims[0], int) and dims[0] > 1


def _by_name(spec: InputSpec, known: Mapping[Dim, Axis], lengths: Collection[Dim]) -> InputSpec:
    """Return an input with the axes that its dims say.

    Args:
        spec: The input.
        known: Names of the tokens' dims, with their axes.
        lengths: Sizes that an axis of tokens may have.
    """

    def axis_by_name(dim: Dim, axis: Axis) -> Axis:
        if isinstance(dim, int):
            return axis if dim in lengths or axis not in ("sequence", "total") else "fixed"
        if dim is None or (axis == "total" and dim in known):  # keys of a mask may have the dim of its queries
            return axis
        named = axis_of(dim)
        return known.get(dim, axis if named not in ("fixed", "batch") else named)

    axes = tuple(axis_by_name(dim, axis) for dim, axis in zip(spec.tensor.dims, spec.axes, strict=True))
    if axes == spec.axes or (spec.kind in ("tokens", "embeddings") and "sequence" in axes):
        return spec
    followed = len({"sequence", "total"} & set(axes))
    return replace(spec, axes=axes, kind=spec.kind if followed >= 1 + (spec.kind == "query_key_mask") else "other")


def _token_input(tensors: Sequence[ValueInfo], axes: Mapping[str, tuple[Axis, ...]]) -> str | None:
    names = [t.name for t in tensors if t.integer and "sequence" in axes[t.name] and "total" not in axes[t.name]]
    named = [name for name in names if name.endswith("input_ids")]
    others = [name for name in names if not any(word in name.lower() for word in ("mask", "pos", "type", "segment"))]
    if any({"batch", "sequence"} <= set(found) for found in axes.values()):  # positions are given for all sequences
        others = [name for name in others if "batch" in axes[name]]
    return next(iter(named + others), None)


def _kind(tensor: ValueInfo, axes: tuple[Axis, ...], tokens: str | None) -> InputKind:
    name = tensor.name.lower()
    boolean = tensor.dtype is not None and tensor.dtype.kind == "b"
    if tensor.name == tokens:
        return "tokens"
    if "sequence" in axes and "total" in axes:
        return "query_key_mask"
    if "total" in axes or ("sequence" in axes and ("mask" in name or boolean)):
        return "padding_mask"
    if "sequence" not in axes:
        return "other"
    if tensor.floating:
        return "embeddings" if len(axes) == 3 else "other"
    return "token_types" if "type" in name or "segment" in name else "positions"


def _value(spec: InputSpec, tokens: Tokens, mask: Tokens, token_types: int) -> Array:
    if spec.kind == "embeddings":
        return _embeddings(spec, tokens)
    if spec.is_mask:
        visible = mask.astype(bool) if spec.kind == "padding_mask" else _visible_keys(mask)
        return _arranged(spec, np.where(visible, *spec.mask_values))
    if "batch" not in spec.axes:
        mask = np.ones_like(mask)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)  # padding does not advance those of its sequence
    return _arranged(spec, {"tokens": tokens, "positions": positions, "token_types": tokens % token_types}[spec.kind])


def _block_value(spec: InputSpec, mask: Tokens, block: int) -> Array:
    """Return one number for the tokens of a block but padding, and another for others; or the number of tokens."""
    if not {"sequence", "total"} & set(spec.axes):
        shape = [len(mask) if axis == "batch" else 1 for axis in spec.axes]
        return np.full(shape, block, spec.tensor.dtype)
    is_open = mask.astype(bool) & (np.arange(mask.shape[1]) < block)
    return _arranged(spec, np.where(is_open, 1 - spec.closed, spec.closed))


def _visible_keys(mask: Tokens) -> npt.NDArray[np.bool_]:
    """Return which keys each query attends to, `[batch, query, key]`: itself, and earlier tokens but padding."""
    length = mask.shape[1]
    visible: npt.NDArray[np.bool_] = np.tri(length, dtype=bool) & mask.astype(bool)[:, None, :]
    return visible | np.eye(length, dtype=bool)


def _lowest(tensor: ValueInfo) -> float:
    """Return a number far below any score that stays finite after an addition."""
    return -1e4 if tensor.dtype == np.float16 else -1e9


def _embeddings(spec: InputSpec, tokens: Tokens) -> Array:
    width = spec.tensor.dims[-1]
    if not isinstance(width, int):
        raise UsageError(f"expected a number for the width, found {list(spec.tensor.dims)} - at `{spec.name}`")
    table = np.random.default_rng(0).standard_normal((_EMBEDDINGS, width))
    values = table[tokens % _EMBEDDINGS].astype(spec.tensor.dtype)  # [batch, sequence, width]
    return values if spec.axes.index("sequence") else values.swapaxes(0, 1)


def _arranged(spec: InputSpec, values: Array) -> Array:
    """Return `[batch, sequence]` or `[batch, query, key]` with the type, the axes and the rank of an input."""
    axes, values = spec.axes, values.astype(spec.tensor.dtype)
    if "batch" not in axes:
        values = values[0]
    elif axes.index("batch") > min(place for place, axis in enumerate(axes) if axis in ("sequence", "total")):
        values = np.moveaxis(values, 0, 1)
    extra = [place for place, axis in enumerate(axes) if axis == "fixed"]
    values = np.expand_dims(values, extra)
    dims = spec.tensor.dims
    shape = [
        dim if place in extra and isinstance(dim, int) else size
        for place, (dim, size) in enumerate(zip(dims, values.shape, strict=True))
    ]
    return np.broadcast_to(values, shape)
