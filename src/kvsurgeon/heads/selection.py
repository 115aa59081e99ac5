"""Which old heads, or columns, the new ones are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """Old places that a block of new ones is made of, alone or with others."""

    places: np.ndarray  # [places in the block]
    source: int = 0  # of several tensors made alike, which; 0 is the layer's own
    weight: int = 1


Members = tuple[Member, ...]


@dataclass(frozen=True, eq=False)
class Selection:
    """New places along an axis: blocks side by side, each the weighted mean of its members."""

    count: int  # old places
    blocks: tuple[Members, ...]

    @property
    def size(self) -> int:
        """New places."""
        return sum(len(members[0].places) for members in self.blocks)

    @cached_property
    def is_exact(self) -> bool:
        """Whether nothing is averaged, and nothing comes from another tensor."""
        return all(len(members) == 1 and members[0].source == 0 for members in self.blocks)

    @cached_property
    def is_even(self) -> bool:
        """Whether each old place is taken equally often: then a mean over all of them stays what it is."""
        if not self.is_exact:
            return False
        times = np.bincount(self.places, minlength=self.count)
        return bool((times == times[0]).all())

    @property
    def places(self) -> np.ndarray:
        """The old place of each new one; of several members the first one's."""
        return np.concatenate([members[0].places for members in self.blocks])

    def within(self, outer: int, inner: int) -> Selection:
        """The same along an axis of `outer * count * inner` places."""
        if outer == inner == 1:
            return self
        steps = np.arange(inner)

        def spread(places: np.ndarray) -> np.ndarray:
            return (places[:, None] * inner + steps).reshape(-1)

        width = self.count * inner
        blocks = [
            tuple(
                Member(places=spread(member.places) + start * width, source=member.source, weight=member.weight)
                for member in members
            )
            for start in range(outer)
            for members in self.blocks
        ]
        return Selection(outer * width, tuple(blocks))


def replicated(count: int, times: int) -> Selection:
    """Each head so many times in a row."""
    return Selection(count, ((Member(places=np.repeat(np.arange(count), times)),),))


def merged(count: int, kept: int, method: str) -> Selection:
    """Heads side by side made into one: their mean, or the first of them."""
    group = count // kept
    firsts = np.arange(kept) * group
    members = [Member(places=firsts + place) for place in range(group if method == "mean" else 1)]
    return Selection(count, (tuple(members),))


def blended(count: int, weights: Sequence[int]) -> Selection:
    """Each head the mean of the same head of several layers, the first of which is the layer's own."""
    members = tuple(
        Member(places=np.arange(count), source=source, weight=weight) for source, weight in enumerate(weights)
    )
    return Selection(count, (members,))


def joined(count: int, blocks: Iterable[Members]) -> Selection:
    """Blocks of columns, side by side."""
    return Selection(count, tuple(blocks))
