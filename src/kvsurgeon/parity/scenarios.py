"""Scenarios of a verification: random texts with padding, and their chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from kvsurgeon.errors import UsageError
from kvsurgeon.runtime import Tokens

_RAGGED = (1, 5, 2, 7)
_STEPS = (1, 1, 9, 1, 3)  # decode steps, with chunks between them


@dataclass(frozen=True, kw_only=True)
class TextLengths:
    """Sizes of the texts.

    Attributes:
        short: Number of tokens of most texts.
        long: Number of tokens of the longest text; more than three times the widest sliding window is best.
        batch: Number of rows of a batch.
    """

    short: int = 14
    long: int = 96
    batch: int = 3

    def __post_init__(self) -> None:
        if min(self.short, self.long, self.batch) < 1:
            raise UsageError(f"expected lengths of at least 1, found {self}")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A batch of texts, and the chunks in which the candidate model runs them.

    Attributes:
        name: Name of the scenario.
        tokens: Token IDs, `[batch, sequence]`.
        mask: 0 at padding, else 1; `[batch, sequence]`.
        chunks: Number of tokens of each call.
    """

    name: str
    tokens: Tokens
    mask: Tokens
    chunks: tuple[int, ...]

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        """Past and total length of each call."""
        past = 0
        for chunk in self.chunks:
            yield past, past + chunk
            past += chunk


def plan_scenarios(
    *, lengths: TextLengths, batch: int | None, masked: bool, vocabulary: int, seed: int
) -> tuple[Scenario, ...]:
    """Return the scenarios of a verification.

    Args:
        lengths: Sizes of the texts.
        batch: The only batch size that both models take; None for any.
        masked: Whether both models take a mask.
        vocabulary: Number of token IDs to draw from.
        seed: Random seed.
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
        text("ragged chunks", rows, short, split_length(short, _RAGGED)),
    ]
    many = batch or lengths.batch
    if many > 1:
        scenarios.append(text("batch", many, short, split_length(short, (first, *_STEPS))))
    if masked and first > 2:
        pads = (0, first - 1, 2) if many > 1 else (first - 2,)
        scenarios.append(text("left padding", many, short, split_length(short, (first, *_STEPS)), pads))
    if long > short:
        start = 2 * long // 3
        scenarios.append(text("long past", rows, long, (start, *split_length(long - start, _STEPS))))
    return tuple(scenarios)


def split_length(length: int, pattern: tuple[int, ...]) -> tuple[int, ...]:
    """Return chunks that repeat a pattern and add up to a length.

    >>> split_length(14, (1, 5, 2, 7))
    (1, 5, 2, 6)
    """
    chunks: list[int] = []
    for chunk in cycle(pattern):
        left = length - sum(chunks)
        if left <= 0:
            break
        chunks.append(min(chunk, left))
    return tuple(chunks)
