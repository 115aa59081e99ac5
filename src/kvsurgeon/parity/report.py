"""Reports of verifications."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kvsurgeon.parity.arithmetic.tolerance import Tolerance
from kvsurgeon.parity.scenarios import Effort, Scenario

Verdict = Literal["same", "different", "unknown"]
Progress = Callable[[int, int, str], None]  # steps done, steps in all, name of the next


@dataclass(frozen=True, kw_only=True)
class CacheDifference:
    """A cached tensor that differs between a run in chunks and a single prefill.

    Attributes:
        layer: Index of the layer.
        part: "key", "value" or "state".
        present: Name of the present output.
        error: Largest difference, divided by the spread.
        row: Row of the largest difference.
        token: Token of the largest difference.
        first_token: First token that differs.
        past_changed: Whether the present does not start with its past.
        starts_with: The past input that the present starts with instead, if any.
    """

    layer: int
    part: str
    present: str
    error: float
    row: int
    token: int
    first_token: int
    past_changed: bool
    starts_with: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison of both models on one text.

    Attributes:
        scenario: Name of the scenario.
        batch: Number of rows.
        length: Number of tokens of a row, padding included.
        chunks: Number of tokens of each call.
        padding: Number of masked tokens of each row.
        holes: Whether masked tokens have others before them.
        digest: SHA-256 of the text; see `Scenario.digest`.
        verdict: "unknown" if the reference model fails on the text.
        error: Largest difference of an output, divided by the spread of the reference's values; None if not compared.
        prefill_error: The same for the text in a single prefill.
        agreement: Fraction of the tokens whose most likely next token agrees.
        output: Output with the largest error.
        row: Row of the largest error.
        token: Token of the largest error.
        layer: Faulty layer, if it can be located.
        cache_differences: Cached tensors that differ, lowest layer first.
        left_out: Number of tokens that were not compared, since rounding alone moves the reference's outputs further.
        reason: Reason for a verdict other than "same".
    """

    scenario: str
    batch: int
    length: int
    chunks: tuple[int, ...]
    padding: tuple[int, ...] = ()
    holes: bool = False
    digest: str = ""
    verdict: Verdict = "unknown"
    error: float | None = None
    prefill_error: float | None = None
    agreement: float | None = None
    output: str | None = None
    row: int | None = None
    token: int | None = None
    layer: int | None = None
    cache_differences: tuple[CacheDifference, ...] = ()
    left_out: int = 0
    reason: str | None = None

    @classmethod
    def of(cls, scenario: Scenario, **results: Any) -> Comparison:
        """Return a comparison on the text of a scenario."""
        batch, length = scenario.tokens.shape
        mask = scenario.mask
        return cls(
            scenario=scenario.name, batch=batch, length=length, chunks=scenario.chunks,
            padding=tuple(int(count) for count in (mask == 0).sum(axis=1)),
            holes=bool((mask[:, 1:] < mask[:, :-1]).any()), digest=scenario.digest, **results,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Coverage of a verification.

    Attributes:
        batches: Numbers of rows.
        longest: Number of tokens of the longest text.
        prefills: Numbers of tokens of calls without a past, in ascending order.
        chunks: Numbers of tokens of calls after a past, in ascending order.
        longest_past: Largest number of tokens before a call.
        padding: Numbers of padding tokens of rows, in ascending order.
        holes: Whether tokens between others were masked.
        tokens: Number of tokens of all texts.
    """

    batches: tuple[int, ...]
    longest: int
    prefills: tuple[int, ...]
    chunks: tuple[int, ...]
    longest_past: int
    padding: tuple[int, ...]
    holes: bool
    tokens: int

    @classmethod
    def of(cls, comparisons: Iterable[Comparison]) -> Coverage:
        """Return the coverage of comparisons; those without a result are skipped."""
        compared = [one for one in comparisons if one.verdict != "unknown"]

        def ascending(sizes: Iterable[int]) -> tuple[int, ...]:
            return tuple(sorted(set(sizes)))

        return cls(
            batches=ascending(one.batch for one in compared),
            longest=max((one.length for one in compared), default=0),
            prefills=ascending(one.chunks[0] for one in compared),
            chunks=ascending(chunk for one in compared for chunk in one.chunks[1:]),
            longest_past=max((one.length - one.chunks[-1] for one in compared), default=0),
            padding=ascending(count for one in compared if not one.holes for count in one.padding if count),
            holes=any(one.holes for one in compared),
            tokens=sum(one.batch * one.length for one in compared),
        )

    def __str__(self) -> str:
        """Return the coverage in one line."""

        def listed(sizes: tuple[int, ...]) -> str:
            return ", ".join(map(str, sizes[:12])) + (f" to {sizes[-1]}" if sizes[12:] else "")

        parts = [f"batches {listed(self.batches)}", f"texts of up to {self.longest} tokens"]
        if self.chunks:
            parts.append(f"calls of {listed(self.chunks)} tokens after up to {self.longest_past}")
        parts.append(f"left padding of {listed(self.padding)}" if self.padding else "no padding")
        if self.holes:
            parts.append("masked tokens between others")
        return f"{'; '.join(parts)}; {self.tokens} tokens in all"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of verifying a candidate model against its reference model.

    Attributes:
        arithmetic: Arithmetic of the models, which sets the tolerance.
        tolerance: Allowed difference.
        comparisons: A comparison for each text, in order.
        faults: Faults that no text is needed for: a candidate that cannot be opened, or lacks outputs.
        unverifiable: Reason why the models cannot be compared.
        first_difference: Name of the first value of both graphs that differs, if searched for.
        notes: Further remarks.
        seed: Random seed of the texts.
        effort: How many scenarios were planned.
        seconds: Time of the verification.
    """

    arithmetic: str
    tolerance: Tolerance
    comparisons: tuple[Comparison, ...] = ()
    faults: tuple[str, ...] = ()
    unverifiable: str | None = None
    first_difference: str | None = None
    notes: tuple[str, ...] = ()
    seed: int = 0
    effort: Effort = "normal"
    seconds: float = 0.0

    def __repr__(self) -> str:
        """Return the verdict and the largest error, or the first problem."""
        shown = f"error {self.error:.1e}, " if self.error is not None else ""
        problem = f", {self.problems[0]}" if self.problems else ""
        return f"Report({self.verdict}: {shown}{len(self.comparisons)} texts{problem})"

    @property
    def verdict(self) -> Verdict:
        """Whether both models compute the same; "unknown" if the reference model cannot be run."""
        verdicts = {comparison.verdict for comparison in self.comparisons}
        if self.faults or "different" in verdicts:
            return "different"
        return "unknown" if self.unverifiable is not None or "same" not in verdicts else "same"

    @property
    def coverage(self) -> Coverage:
        """The calls and texts that were compared."""
        return Coverage.of(self.comparisons)

    @property
    def ok(self) -> bool:
        """Whether the verdict is "same"."""
        return self.verdict == "same"

    @property
    def bound(self) -> float:
        """The largest error that is allowed."""
        return self.tolerance.bound

    @property
    def error(self) -> float | None:
        """The largest error of all comparisons; None if nothing was compared."""
        return max((one.error for one in self.comparisons if one.error is not None), default=None)

    @property
    def agreement(self) -> float | None:
        """The lowest agreement of all comparisons; None if nothing was compared."""
        return min((one.agreement for one in self.comparisons if one.agreement is not None), default=None)

    @property
    def layer(self) -> int | None:
        """The lowest faulty layer; None if none is located."""
        return min((one.layer for one in self.comparisons if one.layer is not None), default=None)

    @property
    def problems(self) -> tuple[str, ...]:
        """Reasons for a verdict other than "same", a sentence each."""
        problems = [*self.faults]
        problems += [f"{one.scenario}: {one.reason}" for one in self.comparisons if one.verdict == "different"]
        if self.first_difference is not None:
            problems.append(f"the first value that differs is `{self.first_difference}`")
        if self.verdict == "unknown":
            problems.append(self.unverifiable or "the reference model fails on all texts")
        return tuple(problems)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON; a number that is not finite becomes a string."""
        computed = ("ok", "verdict", "error", "bound", "agreement", "layer", "problems")
        fields = {name: getattr(self, name) for name in computed} | asdict(self) | {"coverage": asdict(self.coverage)}
        plain: dict[str, Any] = _plain(fields)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
