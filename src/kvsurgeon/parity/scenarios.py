"""Scenarios of a verification: random texts with padding, and their chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle
from typing import Literal

import numpy as np

from kvsurgeon.errors import UsageError
from kvsurgeon.runtime import Tokens

Effort = Literal["quick", "normal", "thorough"]

_RAGGED = (1, 5, 2, 7)
_STEPS = (1, 1, 9, 1, 3)  # decode steps, with chunks between them
_CHUNKS = (1, 2, 4, 8, 9, 33)  # after a past: below and above the block sizes of kernels
_BATCH = 110  # tokens of a row of two
_PADDED = 40
_RANDOM = 24  # further scenarios of a thorough verification
AFTER = 14  # tokens after a threshold
_LONGEST_PADDED = 1024  # tokens of a threshold that a text with padding passes too


@dataclass(frozen=True, kw_only=True)
class TextLengths:
    """Sizes of the texts.

    Attributes:
        short: Number of tokens of most texts.
        long: Number of tokens of the longest text; more than three times the widest sliding window is best.
        batch: Number of rows of a batch.
    """

    short: int = 14
    long: int = 171
    batch: int = 5

    def __post_init__(self) -> None:
        if min(self.short, self.long, self.batch) < 1:
            raise UsageError(f"expected lengths of at least 1, found {self}")

    @classmethod
    def of(cls, effort: Effort) -> TextLengths:
        """Return the sizes of an effort."""
        return cls(long=96, batch=3) if effort == "quick" else cls(batch=8 if effort == "thorough" else 5)


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

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the token IDs, then the mask, as rows of little-endian 64-bit integers."""
        return hashlib.sha256(self.tokens.astype("<i8").tobytes() + self.mask.astype("<i8").tobytes()).hexdigest()

    def start(self, length: int) -> Scenario:
        """Return the scenario of the first tokens, with the calls that they are in."""
        chunks = tuple(min(total, length) - past for past, total in self.spans if past < length)
        return replace(self, tokens=self.tokens[:, :length], mask=self.mask[:, :length], chunks=chunks)

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        """Past and total length of each call."""
        past = 0
        for chunk in self.chunks:
            yield past, past + chunk
            past += chunk


@dataclass(kw_only=True)
class Plan:
    """The scenarios of a verification, which are added one by one.

    Attributes:
        lengths: Sizes of the texts that both models take.
        batch: The only batch size that both models take; None for any.
        masked: Whether both models take a mask.
        in_calls: Whether a model has a cache, so that a text is run in chunks.
        vocabulary: Number of token IDs to draw from.
        random: Source of random numbers.
        scenarios: The scenarios so far.
    """

    lengths: TextLengths
    batch: int | None
    masked: bool
    in_calls: bool
    vocabulary: int
    random: np.random.Generator
    scenarios: list[Scenario] = field(default_factory=list)

    def add(self, name: str, rows: int, length: int, chunks: tuple[int, ...], mask: Tokens | None = None) -> None:
        """Add a scenario, unless there is one of equal calls and padding."""
        rows = self.batch or rows
        mask = np.ones((rows, length), np.int64) if mask is None else mask
        tokens = self.random.integers(0, self.vocabulary, (rows, length))
        made = Scenario(name=name, tokens=tokens, mask=mask, chunks=chunks if self.in_calls else (length,))
        if not any(made.chunks == one.chunks and np.array_equal(made.mask, one.mask) for one in self.scenarios):
            self.scenarios.append(made)

    def add_padded(self, name: str, rows: int, length: int, chunks: tuple[int, ...], pads: tuple[int, ...]) -> None:
        """Add scenarios with numbers of padding tokens on the left of the rows, as many as the batch size needs."""
        rows = self.batch or rows
        if rows == 1:  # a row without padding is in other scenarios; two tokens show which is the last
            pads = tuple(min(pad, chunks[0] - 2) for pad in pads if pad)
        for start in range(0, len(pads) if self.masked else 0, rows):
            mask = np.ones((rows, length), np.int64)
            for row, pad in zip(range(rows), cycle(pads[start : start + rows])):
                mask[row, :pad] = 0
            self.add(name, rows, length, chunks, mask)

    def add_padding_alone(self, rows: int, length: int, chunks: tuple[int, ...]) -> None:
        """Add a scenario in which the first call has only padding in every row, or in all rows but the first."""
        if self.masked and self.in_calls and len(chunks) > 1 and chunks[0] + 2 < length:
            mask = np.ones((self.batch or rows, length), np.int64)
            mask[-max(1, len(mask) - 1) :, : chunks[0] + 1] = 0
            self.add("first call of padding", rows, length, chunks, mask)

    def add_holes(self, name: str, rows: int, length: int, chunks: tuple[int, ...]) -> None:
        """Add a scenario with masked tokens between others; the first and the last token of a row are not masked."""
        if self.masked and length > 4:
            mask = np.ones((self.batch or rows, length), np.int64)
            mask[:, 1:-1] = self.random.random(mask[:, 1:-1].shape) > 0.2
            mask[:, length // 3] = 0
            self.add(name, rows, length, chunks, mask)


def plan_scenarios(plan: Plan, effort: Effort, thresholds: Collection[int] = ()) -> tuple[Scenario, ...]:
    """Return the scenarios of a verification.

    Args:
        plan: A plan without scenarios.
        effort: How many scenarios.
        thresholds: Lengths after which a model may compute something else.
    """
    short, long = plan.lengths.short, plan.lengths.long
    first = -(-short // 2)
    plan.add("whole prefill", 1, short, (short,))
    plan.add("token by token", 1, short, (1,) * short)
    plan.add("prefill and steps", 1, short, (first,) + (1,) * (short - first))
    plan.add("ragged chunks", 1, short, split_length(short, _RAGGED))
    _add_small(plan) if effort == "quick" else _add_usual(plan)
    if long > short:
        start = 2 * long // 3
        steps = _STEPS if effort == "quick" else _CHUNKS
        plan.add("long past", 1, long, (start, *split_length(long - start, (*steps, *steps[::-1]))))
    for threshold in sorted(thresholds):
        length = threshold + AFTER
        chunks = (threshold - 2, *split_length(AFTER + 2, (1, 1, 1, 2)))
        plan.add(f"past {threshold} tokens", 1, length, chunks)
        if effort != "quick" and threshold <= _LONGEST_PADDED:
            plan.add_padded(f"padding past {threshold} tokens", 1, length, chunks, (2,))
    if effort == "thorough":
        for _ in range(_RANDOM):
            _add_random(plan)
    return tuple(plan.scenarios)


def _add_small(plan: Plan) -> None:
    """Add a batch, and padding, of few tokens."""
    short, rows = plan.lengths.short, min(plan.lengths.batch, 3)
    first = -(-short // 2)
    chunks = split_length(short, (first, *_STEPS))
    if rows > 1:
        plan.add("batch", rows, short, chunks)
    if first > 2:
        plan.add_padded("left padding", rows, short, chunks, (0, first - 1, 2))


def _add_usual(plan: Plan) -> None:
    """Add batches of 2, 3 and 5 rows, chunks of many sizes, few and many padding tokens, and holes in the mask."""
    short, long, most = plan.lengths.short, plan.lengths.long, plan.lengths.batch
    fixed = short == long  # the models take one length only

    def up_to(length: int) -> int:
        return long if fixed else min(length, long)

    if most > 1:
        length = up_to(_BATCH)
        plan.add("batch", 2, length, split_length(length, (3, *_CHUNKS[1:], 41, *_CHUNKS)))
    length = up_to(_PADDED)
    many = 3 * length // 5  # more than half of the first tokens
    if length > 4:
        chunks = split_length(length, (many + 2, 1, 1, 4, 2, 1))
        plan.add_padded("left padding", min(most, 3), length, chunks, (1, many, 0))
        plan.add_padding_alone(min(most, 3), length, split_length(length, (4, 1, 1, 2)))
    length = up_to(24)
    first = min(length, length // 2 + 2)
    if most > 3 and length > 4:
        pads = (0, first - 1, 2, 1, length // 3)
        plan.add_padded("batch with padding", min(most, 5), length, split_length(length, (first, 1, 2, 9)), pads)
        plan.add("large batch", min(most, 5), length, split_length(length, (first, 1, 2, 9)))
    plan.add_holes("holes in the mask", min(most, 3), length, split_length(length, (5, 1, 3, 1, 8)))


def _add_random(plan: Plan) -> None:
    """Add a scenario of random size, chunks and padding."""
    random, lengths = plan.random, plan.lengths
    rows = int(random.choice([1, 2, 3, lengths.batch])) if lengths.batch > 1 else 1
    length = int(random.integers(min(lengths.short, lengths.long), lengths.long + 1))
    chunks = split_length(length, tuple(int(size) for size in random.choice([1, 2, 3, 4, 7, 8, 9, 16, 17, 33], 12)))
    kind = random.choice(["none", "padding", "holes"])
    if kind == "holes":
        plan.add_holes("random holes", rows, length, chunks)
    elif kind == "padding":
        pads = tuple(int(pad) for pad in random.integers(0, max(1, chunks[0]), rows))
        plan.add_padded("random padding", rows, length, chunks, pads)
    else:
        plan.add("random chunks", rows, length, chunks)


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
