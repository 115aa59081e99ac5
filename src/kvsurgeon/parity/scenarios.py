"""What is tried: texts with their padding, and how each is cut into calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from kvsurgeon.errors import UsageError
from kvsurgeon.runtime import Tokens

_RAGGED = (1, 5, 2, 7)
_STEPS = (1, 1, 9, 1, 3)  # single tokens, with chunks between them


@dataclass(frozen=True, kw_only=True)
class TextLengths:
    """How much is tried.

    Attributes:
        short: Tokens of most texts.
        long: Tokens of the longest; take more than three times the widest window for a model that has one.
        batch: Rows of a batch.
    """

    short: int = 14
    long: int = 96
    batch: int = 3

    def __post_init__(self) -> None:
        if min(self.short, self.long, self.batch) < 1:
            raise UsageError(f"expected lengths of at least 1, found {self}")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One text (or a batch of them), and the chunks in which a decoder with a cache is given it."""

    name: str
    tokens: Tokens  # [batch, sequence]
    mask: Tokens  # 1 where a token counts
    chunks: tuple[int, ...]

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        """The past and the total length of each call."""
        past = 0
        for chunk in self.chunks:
            yield past, past + chunk
            past += chunk


def plan(*, lengths: TextLengths, batch: int | None, masked: bool, vocabulary: int, seed: int) -> tuple[Scenario, ...]:
    """Return what is tried.

    Args:
        lengths: How long the texts are.
        batch: The only batch size that both models take; None where they take any.
        masked: Whether the models can be told of padding.
        vocabulary: Number of ids to draw from.
        seed: Where the texts come from.
    """
    rows, short, long = batch or 1, lengths.short, lengths.long
    random = np.random.default_rng(seed)

    def text(name: str, rows: int, length: int, chunks: tuple[int, ...], pads: tuple[int, ...] = (0,)) -> Scenario:
        tokens = random.integers(0, vocabulary, (rows, length))
        mask = np.ones((rows, length), np.int64)
        for row, pad in zip(range(rows), cycle(pads)):
            mask[row, :pad] = 0
        return Scenario(name=name, tokens=tokens, mask=mask, chunks=chunks)

    first = -(-short // 2)
    scenarios = [
        text("whole prefill", rows, short, (short,)),
        text("token by token", rows, short, (1,) * short),
        text("prefill and steps", rows, short, (first,) + (1,) * (short - first)),
        text("ragged chunks", rows, short, cut(short, _RAGGED)),
    ]
    many = batch or lengths.batch
    if many > 1:
        scenarios.append(text("batch", many, short, cut(short, (first, *_STEPS))))
    if masked and first > 2:
        pads = (0, first - 1, 2) if many > 1 else (first - 2,)
        scenarios.append(text("left padding", many, short, cut(short, (first, *_STEPS)), pads))
    if long > short:
        start = 2 * long // 3
        scenarios.append(text("long past", rows, long, (start, *cut(long - start, _STEPS))))
    return tuple(scenarios)


def cut(length: int, pattern: tuple[int, ...]) -> tuple[int, ...]:
    """Return chunks that follow the pattern, over and over, and sum to the length.

    >>> cut(14, (1, 5, 2, 7))
    (1, 5, 2, 6)
    """
    chunks: list[int] = []
    for chunk in cycle(pattern):
        left = length - sum(chunks)
        if left <= 0:
            break
        chunks.append(min(chunk, left))
    return tuple(chunks)
