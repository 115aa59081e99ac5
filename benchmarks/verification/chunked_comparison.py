"""Compare an injected model, call by call, with the original on the same text so far.

Shares no code with kvsurgeon: the injected model is known by its inputs and outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from verification.drawn_inputs import input_for, random_ids, vocabulary_size
from verification.independent_verifier import (
    NUMPY_TYPES,
    ContractError,
    bound_of,
    empty_sizes,
    open_session,
    part_of,
    read_contract,
)

RIGHT, LIMITED, WRONG, NOT_COMPARED = "right", "limited", "WRONG", "not compared"
DrawText = Callable[[int, int, int], np.ndarray]
"""Takes batch, length and size of the vocabulary; returns token ids [batch, length]."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of an injection, or of its comparison."""

    verdict: str
    reason: str = ""
    at: int | None = None  # total length at which it stops, or is wrong
    changes: bool | None = None  # whether the original's outputs change with later tokens; None if not compared


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """Calls on one text, each with the cache of those before: total length after each, and whether it is compared."""

    batch: int
    steps: tuple[tuple[int, bool], ...]
    padding: int = 0  # masked tokens before the others, in all sequences but the first; no call of them is compared


class OriginalNotRunnableError(Exception):
    """The original cannot be run."""


class Reference:
    """The original: its outputs for the first tokens of a text."""

    def __init__(self, path: Path, *, arena: bool = True, draw_text: DrawText = random_ids) -> None:
        self.draw_text = draw_text
        try:
            self.session = open_session(path, path.parent, arena=arena)
        except Exception as error:
            raise OriginalNotRunnableError(one_line(error)) from error
        self.names = [output.name for output in self.session.get_outputs()]
        self.vocabulary = _logits_size(self.session) or vocabulary_size(onnx.load(path, load_external_data=False))
        self.kept: dict[tuple[int, int, int], list[np.ndarray] | None] = {}  # by batch, padding and length

    def text(self, batch: int, length: int) -> np.ndarray:
        """Return token ids [batch, length]."""
        return self.draw_text(batch, length, self.vocabulary)

    def feeds(self, ids: np.ndarray, padding: int = 0) -> dict[str, np.ndarray]:
        """Return the inputs for a text, whose first tokens are masked in all sequences but the first.

        Raises:
            OriginalNotRunnableError: One of them is no mask, no positions and no token ids.
        """
        feeds = {}
        for given in self.session.get_inputs():
            array, kind = input_for(given.name, ids), NUMPY_TYPES.get(given.type)
            if len(given.shape) != 2 or kind is None or (array is ids and np.dtype(kind).kind != "i"):
                raise OriginalNotRunnableError(f"input {given.name} {given.shape} {given.type}")
            feeds[given.name] = np.array(array.astype(kind), order="C")
            if "mask" in given.name and padding:
                feeds[given.name][min(1, len(ids) - 1) :, :padding] = 0
        return feeds

    def __call__(self, ids: np.ndarray, padding: int = 0) -> list[np.ndarray] | None:
        """Return the outputs; None if it cannot be run at this length."""
        key = (len(ids), padding, ids.shape[1])
        if key not in self.kept:
            feeds = self.feeds(ids, padding)
            try:
                self.kept[key] = self.session.run(self.names, feeds)
            except Exception:
                self.kept[key] = None
        return self.kept[key]


def _logits_size(session: ort.InferenceSession) -> int | None:
    last = session.get_outputs()[0].shape[-1:]
    return int(last[0]) if last and isinstance(last[0], int) and last[0] > 8 else None


@dataclass
class Candidate:
    """The injected model, called chunk by chunk."""

    path: Path
    original: onnx.ModelProto
    arena: bool = True
    cache: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.session = open_session(self.path, self.path.parent, arena=self.arena)
        self.contract = read_contract(self.session, self.original)
        self.names = [output.name for output in self.original.graph.output]

    def reset(self, batch: int) -> None:
        self.cache = {
            name: np.zeros(empty_sizes(name, dims, batch), kind) for name, (dims, kind) in self.contract.pasts.items()
        }

    def __call__(self, feeds: dict[str, np.ndarray], start: int, end: int) -> list[np.ndarray]:
        """Return the outputs of the original's names for tokens `start` to `end`."""
        given = {name: part_of(name, dims, feeds, start, end) for name, dims in self.contract.given.items()}
        wanted = [*self.names, *(name for name in self.contract.presents if name not in self.names)]
        found = dict(zip(wanted, self.session.run(wanted, {**given, **self.cache}), strict=True))
        self.cache = {name: found[present] for name, present in zip(self.cache, self.contract.presents, strict=True)}
        return [found[name] for name in self.names]


def compare(reference: Reference, candidate: Candidate, plan: Sequence[Chunking]) -> Verdict:
    """Return whether the injected model gives what the original gives for the text so far."""
    limited: Verdict | None = None
    compared = 0
    error_allowed = bound_of(candidate.original).error
    try:
        for chunking in plan:
            verdict, count = _compare_chunking(reference, candidate, chunking, error_allowed)
            compared += count
            if verdict is not None and verdict.verdict != LIMITED:
                return verdict
            limited = limited or verdict
    except OriginalNotRunnableError as error:
        return Verdict(verdict=NOT_COMPARED, reason=str(error))
    changes = changes_with_later_tokens(reference, error_allowed)
    if not compared and limited is None:
        return Verdict(verdict=NOT_COMPARED, reason="the original cannot be run at any length")
    if limited:
        return Verdict(verdict=LIMITED, reason=limited.reason, at=limited.at, changes=changes)
    return Verdict(verdict=RIGHT, changes=changes)


def _compare_chunking(
    reference: Reference, candidate: Candidate, chunking: Chunking, allowed: float
) -> tuple[Verdict | None, int]:
    if not chunking.steps:
        return None, 0
    ids = reference.text(chunking.batch, chunking.steps[-1][0])
    feeds = reference.feeds(ids, chunking.padding)
    start = compared = 0
    try:
        candidate.reset(chunking.batch)
    except Exception as error:
        return Verdict(verdict=WRONG, reason=one_line(error)), 0
    for end, is_compared in chunking.steps:
        expected = reference(ids[:, :end], chunking.padding) if is_compared else []
        if expected is None:
            return None, compared  # the original ends here too
        try:
            found = candidate(feeds, start, end)
        except ContractError as error:
            return Verdict(verdict=WRONG, reason=one_line(error), at=end), compared
        except Exception as error:
            if not expected and reference(ids[:, :end], chunking.padding) is None:
                return None, compared
            reason = f"{chunking.batch} x {start} + {end - start}: {one_line(error)}"
            stops = compared > 0 or start == 0 or chunking.padding > 0
            return Verdict(verdict=LIMITED if stops else WRONG, reason=reason, at=end), compared
        if is_compared:
            compared += 1
            if fault := _first_difference(candidate.names, found, expected, start, end, chunking.batch, allowed):
                reason = f"{chunking.batch} x {start} + {end - start}: {fault}"
                return Verdict(verdict=WRONG, reason=reason, at=end), compared
        start = end
    return None, compared


def _first_difference(
    names: Sequence[str],
    found: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    start: int,
    end: int,
    batch: int,
    allowed: float,
) -> str:
    for name, one, whole in zip(names, found, expected, strict=True):
        if fault := difference(one, whole, start, end, batch, allowed):
            return f"`{name}` {fault}"
    return ""


def difference(found: np.ndarray, whole: np.ndarray, start: int, end: int, batch: int, allowed: float) -> str:
    """Return how an output of tokens `start` to `end` differs from that of the whole text; empty if it does not."""
    if found.ndim != whole.ndim:
        return f"has shape {found.shape}, expected part of {whole.shape}"
    expected = whole
    for axis, (size, full) in enumerate(zip(found.shape, whole.shape, strict=True)):
        if size == full:
            continue
        if full == end and size == end - start:
            expected = np.take(expected, range(start, end), axis=axis)
        elif full == batch * end and size == batch * (end - start) and axis == 0:
            split = expected.reshape(batch, end, *expected.shape[1:])[:, start:]
            expected = split.reshape(-1, *expected.shape[1:])
        else:
            return f"has shape {found.shape}, expected part of {whole.shape}"
    return _numeric(found, expected, allowed)


def _numeric(found: np.ndarray, expected: np.ndarray, allowed: float) -> str:
    if not found.size:
        return ""
    if expected.dtype.kind in "iub":
        if np.array_equal(found, expected):
            return ""
        place = tuple(int(one) for one in np.argwhere(found != expected)[0])
        return f"{found[place]} instead of {expected[place]} at {place}"
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(found)):
        return "is not finite in the same places"
    values = expected[finite]
    spread = float(np.ptp(values)) if values.size else 0.0
    scale = max(spread, 1e-6 * float(np.abs(values).max(initial=0)), 1e-9)
    if expected.ndim and expected.shape[-1] > 1 and finite.all():
        rows = np.maximum(np.ptp(expected, axis=-1, keepdims=True), 0.01 * scale)
    else:
        rows = np.full((1,) * expected.ndim, max(scale, float(np.abs(values).max(initial=0)) * 0.01))
    with np.errstate(invalid="ignore"):
        error = np.nan_to_num(np.abs(found - expected) / rows)
    worst = float(error.max())
    return f"differs by {worst:.2g} of its spread" if worst > allowed else ""


def changes_with_later_tokens(reference: Reference, allowed: float) -> bool:
    """Whether an output of the original changes for tokens that both of two texts begin with."""
    kept = [(key, outputs) for key in sorted(reference.kept) if (outputs := reference.kept[key]) is not None]
    for ((batch, padding, short), few), ((*others, long), many) in itertools.pairwise(kept):
        few, many = ([array[:, padding:] if array.ndim > 1 else array for array in one] for one in (few, many))
        same = [batch, padding] == others and padding < short < long
        if same and _differs(few, many, short - padding, long - padding, batch, allowed):
            return True
    return False


def _differs(
    few: Sequence[np.ndarray], many: Sequence[np.ndarray], short: int, long: int, batch: int, allowed: float
) -> bool:
    for one, whole in zip(few, many, strict=True):
        if one.ndim != whole.ndim:
            return True
        expected = whole
        for axis, (size, full) in enumerate(zip(one.shape, whole.shape, strict=True)):
            if size == short and full == long and size != full:
                expected = np.take(expected, range(short), axis=axis)
        if one.shape != expected.shape or _numeric(one, expected, 2 * allowed):
            return True
    return False


def one_line(error: BaseException) -> str:
    """Return the first 300 characters of a message on one line."""
    return " ".join(str(error).split())[:300]
