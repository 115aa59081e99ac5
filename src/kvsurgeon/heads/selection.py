"""Selections of heads, or of the columns of weights: from which old ones each new one is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """Old indices for a block of new ones.

    Attributes:
        indices: Old index for each new one, `[size of the block]`.
        source: Number of the tensor, if a selection reads several layers; 0 is the first.
        weight: Weight in the mean of the block's terms.
    """

    indices: np.ndarray
    source: int = 0
    weight: int = 1


Terms = tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Selection:
    """New indices along an axis, block by block; each block is the weighted mean of its terms.

    Attributes:
        count: Old size of the axis.
        blocks: The terms of each block.
    """

    count: int
    blocks: tuple[Terms, ...]

    @property
    def size(self) -> int:
        """New size of the axis."""
        return sum(len(terms[0].indices) for terms in self.blocks)

    @cached_property
    def is_even(self) -> bool:
        """Whether each old index is copied equally often: the mean over the axis does not change."""
        if any(len(terms) > 1 or terms[0].source for terms in self.blocks):
            return False
        times = np.bincount(self.indices, minlength=self.count)
        return bool((times == times[0]).all())

    @property
    def indices(self) -> np.ndarray:
        """The old index of each new one, of the first term of each block."""
        return np.concatenate([terms[0].indices for terms in self.blocks])

    @cached_property
    def in_place(self) -> Selection:
        """The same selection with each new index as often as old ones are read: the size of the axis is unchanged."""
        times = self.count // self.size

        def repeated(term: Term) -> Term:
            return Term(indices=np.repeat(term.indices, times), source=term.source, weight=term.weight)

        return Selection(self.count, tuple(tuple(map(repeated, terms)) for terms in self.blocks))

    def within(self, outer: int, inner: int) -> Selection:
        """Return the same selection along an axis of `outer * count * inner` elements."""
        if outer == inner == 1:
            return self
        steps, width = np.arange(inner), self.count * inner

        def spread(term: Term, start: int) -> Term:
            indices = (term.indices[:, None] * inner + steps).reshape(-1) + start
            return Term(indices=indices, source=term.source, weight=term.weight)

        starts = range(0, outer * width, width)
        blocks = [tuple(spread(term, start) for term in terms) for start in starts for terms in self.blocks]
        return Selection(outer * width, tuple(blocks))


def repeat_heads(count: int, times: int) -> Selection:
    """Select each head several times in a row."""
    return Selection(count, ((Term(indices=np.repeat(np.arange(count), times)),),))


def merge_heads(count: int, kept: int, method: str) -> Selection:
    """Select the mean of each group of neighboring heads, or the first head of each group."""
    group = count // kept
    firsts = np.arange(kept) * group
    return Selection(count, (tuple(Term(indices=firsts + n) for n in range(group if method == "mean" else 1)),))


def average_layers(count: int, weights: Sequence[int]) -> Selection:
    """Select for each head the weighted mean of that head in several layers."""
    heads = np.arange(count)
    terms = tuple(Term(indices=heads, source=source, weight=weight) for source, weight in enumerate(weights))
    return Selection(count, (terms,))
