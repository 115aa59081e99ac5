"""How a tensor of token data holds batch, sequence and features, each in a place of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.cache_points import cache_point_of
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.heads.head_axis import HeadAxis
from kvsurgeon.symbolic.dimension import Dimension, multiply


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A tensor's axes, cut up where they hold several things."""

    parts: tuple[Dimension, ...]  # sizes in the tensor's own order
    batch: int | None  # place of the batch among the parts
    sequence: int
    shape: tuple[Dimension, ...]  # of the tensor itself

    @property
    def feature_places(self) -> tuple[int, ...]:
        """Places of what is neither batch nor sequence."""
        return tuple(place for place in range(len(self.parts)) if place not in (self.batch, self.sequence))

    @property
    def features(self) -> tuple[int, ...]:
        """Sizes of what is neither batch nor sequence, in the tensor's own order."""
        return tuple(int(self.parts[place]) for place in self.feature_places)

    @property
    def width(self) -> int:
        """Features of one token."""
        return math.prod(self.features)

    @property
    def token_places(self) -> tuple[int, ...]:
        """Places of batch and sequence, in the tensor's own order."""
        return tuple(place for place in range(len(self.parts)) if place in (self.batch, self.sequence))


def layout_of(flow: TokenFlow, value: ir.Value) -> Layout:
    """Return how a tensor holds batch, sequence and features.

    Raises:
        UnsupportedError: It has no one sequence axis beside a fixed number of features.
    """
    found = cache_point_of(flow, value)
    if found is None:
        raise UnsupportedError(
            "heads cannot be followed here", at=value.name,
            expected="one sequence axis, and a fixed number of features for each token",
        )  # fmt: skip
    return Layout(
        parts=tuple(flow.length if size is None else size for size in found.parts),
        batch=None if found.batch == 1 else found.order[0],
        sequence=found.parts.index(None),
        shape=flow.shapes[value].shape or (),
    )


Logical = tuple[tuple[str, Dimension], ...]  # ("batch" | "sequence" | "heads" | "head_dim", its size), in order


def logical(layout: Layout, heads: int, at: ir.Value) -> Logical:
    """Return the four axes that a tensor's own make up, in its order; the batch is left out where it has no axis.

    Where the batch is fixed to 1, a first axis of 1 is the batch's: a single head then lies around its features.

    Args:
        layout: Of a tensor whose features are [heads, head_dim], row by row.
        heads: How many heads it has.
        at: The tensor, for messages.

    Raises:
        UnsupportedError: Heads or their features lie in pieces.
    """
    fixed = layout.batch is None and layout.parts[0] == 1 and layout.sequence > 0
    words = {0 if fixed else layout.batch: "batch", layout.sequence: "sequence"}
    axes: list[tuple[str, Dimension]] = []
    left = heads
    for place, size in enumerate(layout.parts):
        if place in words:
            axes.append((words[place], size))
        elif size == 1:
            axes.append(("one", 1))
        elif left > 1:
            axes += _heads_and_more(int(size), left, at)
            left = 1 if int(size) % left == 0 else left // int(size)
        else:
            axes.append(("head_dim", size))
    return _one_of_each(axes, heads, at)


def _heads_and_more(size: int, left: int, at: ir.Value) -> list[tuple[str, Dimension]]:
    if left % size == 0:
        return [("heads", size)]
    if size % left:
        raise UnsupportedError(
            "heads lie across two axes", at=at.name, expected=f"{left} heads", found=f"an axis of {size}"
        )
    return [("heads", left), ("head_dim", size // left)]


def _one_of_each(axes: list[tuple[str, Dimension]], heads: int, at: ir.Value) -> Logical:
    if heads == 1:
        place = next((place for place, (word, _) in enumerate(axes) if word == "one"), None)
        if place is not None:
            axes[place] = ("heads", 1)
        else:
            axes.insert(next(p for p, (word, _) in enumerate(axes) if word == "head_dim"), ("heads", 1))
    found: list[tuple[str, Dimension]] = []
    for word, size in axes:
        if word == "one":
            continue
        if found and found[-1][0] == word:
            found[-1] = (word, multiply(found[-1][1], size))
        else:
            found.append((word, size))
    words = [word for word, _ in found]
    if "head_dim" not in words:
        found.append(("head_dim", 1))
        words.append("head_dim")
    if len(set(words)) < len(words) or "heads" not in words:
        raise UnsupportedError("heads lie in pieces", at=at.name, found=", ".join(words))
    return tuple(found)


def head_axis(layout: Layout, axes: Logical) -> HeadAxis | None:
    """Where in a tensor its heads lie; None where they lie in pieces.

    A single head without an axis of its own lies around its features.
    """
    words, sizes = [word for word, _ in axes], [size for _, size in axes]
    count, width = int(sizes[words.index("heads")]), int(sizes[words.index("head_dim")])
    found = HeadAxis(words.index("heads"), count).before_reshape(layout.shape, sizes)
    if found is not None or count > 1:
        return found
    features = HeadAxis(words.index("head_dim"), width).before_reshape(layout.shape, sizes)
    return None if features is None else HeadAxis(features.axis, 1, features.outer, multiply(features.inner, width))


def with_heads(axes: Logical, count: int) -> Logical:
    """The axes with so many heads."""
    return tuple((word, count if word == "heads" else size) for word, size in axes)
