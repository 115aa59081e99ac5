"""What the judge says, as facts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kvsurgeon.parity.tolerance import Tolerance

Verdict = Literal["same", "different", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Position:
    """One token of a scenario."""

    row: int
    token: int


@dataclass(frozen=True, kw_only=True)
class CacheFault:
    """An entry of the cache that holds something else when it was built in chunks.

    Attributes:
        layer: Index of the layer that the entry belongs to.
        part: "key" or "value".
        present: Name of the output.
        error: Largest difference from the cache of one whole prefill, over its spread.
        at: The token where it is largest.
        first: The earliest token that is wrong.
        forgets: The present does not begin with the past that was given; `remembers` says with what it does.
        remembers: The past input that it begins with instead, if it is another one.
    """

    layer: int
    part: str
    present: str
    error: float
    at: Position
    first: Position
    forgets: bool
    remembers: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One scenario and what came of it.

    Attributes:
        scenario: Its name.
        batch: Rows.
        length: Tokens of a row, padding included.
        chunks: Tokens of each call.
        verdict: "unknown" where the original cannot be run on it.
        error: Largest difference from the original over the spread of its values; None where nothing was compared.
        prefill_error: The same when the whole text is given in one call.
        agreement: Part of the positions at which the likeliest token is the same.
        worst: Where the error is.
        output: Name of the output that it is in.
        layer: Layer at fault, where it can be told.
        caches: Entries of the cache that are wrong, lowest layer first.
        reason: Why it is not the same, in a sentence.
    """

    scenario: str
    batch: int
    length: int
    chunks: tuple[int, ...]
    verdict: Verdict
    error: float | None = None
    prefill_error: float | None = None
    agreement: float | None = None
    worst: Position | None = None
    output: str | None = None
    layer: int | None = None
    caches: tuple[CacheFault, ...] = ()
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Whether a model with a cache computes what the original computes.

    Attributes:
        arithmetic: What the models compute in, which sets the tolerance.
        tolerance: What was allowed.
        trials: One for each scenario, in the order in which they were run.
        faults: What is wrong apart from any scenario: a model that cannot be opened, outputs that are missing.
        unknown: Why nothing could be judged, where that is so.
        first_difference: Name of the first value that both graphs have and that differs, where one was looked for.
        notes: What a reader should know besides.
        seconds: Time taken.
    """

    arithmetic: str
    tolerance: Tolerance
    trials: tuple[Trial, ...] = ()
    faults: tuple[str, ...] = ()
    unknown: str | None = None
    first_difference: str | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """Whether they are the same: "unknown" where the original cannot be run."""
        if self.faults or any(trial.verdict == "different" for trial in self.trials):
            return "different"
        if self.unknown is not None or not any(trial.verdict == "same" for trial in self.trials):
            return "unknown"
        return "same"

    @property
    def ok(self) -> bool:
        """Whether the model was run and computes what the original computes."""
        return self.verdict == "same"

    @property
    def error(self) -> float | None:
        """The largest error of all trials, None where nothing was compared."""
        return max((trial.error for trial in self.trials if trial.error is not None), default=None)

    @property
    def agreement(self) -> float | None:
        """The least agreement of all trials, None where nothing was compared."""
        return min((trial.agreement for trial in self.trials if trial.agreement is not None), default=None)

    @property
    def layer(self) -> int | None:
        """The lowest layer found at fault, None where none can be named."""
        return min((trial.layer for trial in self.trials if trial.layer is not None), default=None)

    @property
    def problems(self) -> tuple[str, ...]:
        """What stands against the model, a sentence each."""
        return tuple(self._problems())

    def as_dict(self) -> dict[str, Any]:
        """Return all of it in types that JSON knows; a number that is not finite becomes a string."""
        facts = {
            "ok": self.ok,
            "verdict": self.verdict,
            "error": self.error,
            "agreement": self.agreement,
            "layer": self.layer,
            "problems": list(self.problems),
            **asdict(self),
        }
        plain: dict[str, Any] = _plain(facts)
        return plain

    def _problems(self) -> Iterator[str]:
        yield from self.faults
        for trial in self.trials:
            if trial.verdict == "different":
                yield f"{trial.scenario}: {trial.reason}"
        if self.first_difference is not None:
            yield f"the first value of the same name that differs is `{self.first_difference}`"
        if self.verdict == "unknown":
            yield self.unknown or "the original cannot be run on any of the texts tried"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
