"""The layout of token data: which parts of a tensor's axes hold batch, sequence and features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from itertools import groupby

import onnx_ir as ir

from kvsurgeon.analysis.cache_points import cache_point_of
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.heads.head_axis import HeadAxis
from kvsurgeon.symbolic.dimension import Dimension, multiply

# Names of dimensions and their sizes, in the order of a tensor: "batch", "sequence", "heads", "head_dim".
NamedDims = tuple[tuple[str, Dimension], ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The axes of a tensor, split into parts that hold one thing each.

    Attributes:
        parts: Sizes of the parts, in the order of the tensor.
        batch: Index of the part that holds the batch; None without a batch axis.
        sequence: Index of the part that holds the sequence.
        shape: Shape of the tensor.
    """

    parts: tuple[Dimension, ...]
    batch: int | None
    sequence: int
    shape: tuple[Dimension, ...]

    @property
    def token_places(self) -> tuple[int, ...]:
        """Indices of the parts that hold batch and sequence."""
        return tuple(place for place in range(len(self.parts)) if place in (self.batch, self.sequence))

    @property
    def feature_places(self) -> tuple[int, ...]:
        """Indices of the parts that hold features."""
        return tuple(place for place in range(len(self.parts)) if place not in (self.batch, self.sequence))

    @property
    def features(self) -> tuple[int, ...]:
        """Sizes of the parts that hold features."""
        return tuple(int(self.parts[place]) for place in self.feature_places)

    @property
    def width(self) -> int:
        """Number of features of one token."""
        return math.prod(self.features)


def layout_of(flow: TokenFlow, value: ir.Value) -> Layout:
    """Return the layout of a value.

    Raises:
        UnsupportedError: The value does not have exactly one sequence axis and a fixed number of features.
    """
    found = cache_point_of(flow, value)
    if found is None:
        raise UnsupportedError(
            "cannot trace the heads of this tensor", code=Code.UNTRACEABLE_HEADS, at=value.name,
            expected="one sequence axis and a fixed number of features of each token",
        )  # fmt: skip
    return Layout(
        parts=tuple(flow.length if size is None else size for size in found.parts),
        batch=None if found.batch == 1 else found.order[0],
        sequence=found.parts.index(None),
        shape=flow.shapes[value].shape or (),
    )


def named_dims(layout: Layout, heads: int, at: ir.Value) -> NamedDims:
    """Return the dimensions that the axes of a tensor hold; without "batch" if no axis holds it.

    If the batch is fixed to 1, a first axis of size 1 is the batch: a single head is next to its features.

    Args:
        layout: Layout of a tensor with features `[heads, head_dim]` in row-major order.
        heads: Number of heads.
        at: The tensor, for messages.

    Raises:
        UnsupportedError: The heads or their features are not contiguous.
    """
    fixed = layout.batch is None and layout.parts[0] == 1 and layout.sequence > 0
    names = {0 if fixed else layout.batch: "batch", layout.sequence: "sequence"}
    dims: list[tuple[str, Dimension]] = []
    left = heads  # heads per element of the parts so far
    for place, part in enumerate(layout.parts):
        if place in names:
            dims.append((names[place], part))
            continue
        size = int(part)
        if size == 1:
            dims.append(("one", 1))
        elif left == 1:
            dims.append(("head_dim", size))
        elif left % size == 0:
            dims.append(("heads", size))
            left //= size
        elif size % left == 0:
            dims += [("heads", left), ("head_dim", size // left)]
            left = 1
        else:
            raise UnsupportedError(
                "heads are split across two axes", code=Code.UNTRACEABLE_HEADS, at=at.name,
                expected=f"{left} heads", found=f"an axis of {size}",
            )  # fmt: skip
    return _contiguous(_with_single_head(dims) if heads == 1 else dims, at)


def _with_single_head(dims: list[tuple[str, Dimension]]) -> list[tuple[str, Dimension]]:
    """The dimensions with a single head: the first axis of size 1, or a new dimension before the features."""
    names = [name for name, _ in dims]
    if "one" in names:
        place = names.index("one")
        return [*dims[:place], ("heads", 1), *dims[place + 1 :]]
    place = names.index("head_dim")
    return [*dims[:place], ("heads", 1), *dims[place:]]


def _contiguous(dims: list[tuple[str, Dimension]], at: ir.Value) -> NamedDims:
    """The dimensions without axes of size 1, neighbors of one name joined."""
    groups = groupby((dim for dim in dims if dim[0] != "one"), key=lambda dim: dim[0])
    found = [(name, reduce(multiply, [size for _, size in group])) for name, group in groups]
    names = [name for name, _ in found]
    if "head_dim" not in names:
        found.append(("head_dim", 1))
    if len(set(names)) < len(names) or "heads" not in names:
        raise UnsupportedError(
            "heads are not contiguous", code=Code.UNTRACEABLE_HEADS, at=at.name, found=", ".join(names)
        )
    return tuple(found)


def head_axis(layout: Layout, dims: NamedDims, at: ir.Value) -> HeadAxis:
    """Return the axis of a tensor that holds its heads; for a single head without an axis, that of its features.

    Raises:
        UnsupportedError: No axis holds them all.
    """
    names, sizes = [name for name, _ in dims], [size for _, size in dims]
    count, width = int(sizes[names.index("heads")]), int(sizes[names.index("head_dim")])
    found = HeadAxis(names.index("heads"), count).before_reshape(layout.shape, sizes)
    if found is None and count == 1:
        features = HeadAxis(names.index("head_dim"), width).before_reshape(layout.shape, sizes)
        if features is not None:
            return HeadAxis(features.axis, 1, features.outer, multiply(features.inner, width))
    if found is None:
        raise UnsupportedError("heads are not on one axis", code=Code.UNTRACEABLE_HEADS, at=at.name)
    return found


def with_heads(dims: NamedDims, count: int) -> NamedDims:
    """Return the dimensions with another number of heads."""
    return tuple((name, count if name == "heads" else size) for name, size in dims)
