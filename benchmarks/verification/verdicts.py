"""Results of all models of a sweep, as tables."""

from __future__ import annotations

import json
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from verification.independent_verifier import Score

VERDICTS = ("right", "wrong", "refused", "crashed", "hung", "not runnable", "not verified")
MEAN_LIMIT = 1.0  # seconds per model, in one process
BAD = frozenset({"wrong", "crashed", "hung"})


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of one model."""

    group: str
    name: str
    family: str
    exporter: str
    expected: str
    verdict: str = "right"
    reason: str = ""  # one line; empty where right
    gist: str = ""  # the reason without names and numbers, to group by
    exit_code: int = 0
    code: str = ""  # of the error
    bound: str = ""
    scores: list[Score] = field(default_factory=list)
    apply_seconds: float = 0.0

    @property
    def worst(self) -> Score | None:
        return max(self.scores, key=lambda score: score.error, default=None)


def is_bad(result: Result) -> bool:
    """Whether this must not happen, whatever was expected."""
    return result.verdict in BAD or (result.verdict == "refused" and result.exit_code not in (3, 4))


def print_groups(results: Sequence[Result]) -> None:
    """Print what became of each group: by what was expected, then by verdict."""
    columns = ["inject", "right", "refused", "either", "right", "refused", "refuse", "right", "refused"]
    columns += ["wrong", "crash", "hung", "n/run", "n/verif.", "worst"]
    width = max((len(result.group) for result in results), default=5)
    print(f"{'group':{width}}", *(f"{column:>8}" for column in columns))
    by_group: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_group[result.group].append(result)
    for group, members in [*sorted(by_group.items()), ("all", list(results))]:
        print(f"{group:{width}}", *(f"{cell:>8}" for cell in _row(members)))


def _row(members: Sequence[Result]) -> list[str]:
    counts = Counter((result.expected, result.verdict) for result in members)
    verdicts = Counter(result.verdict for result in members)
    cells = []
    for expected in ("inject", "either", "refuse"):
        cells.append(sum(result.expected == expected for result in members))
        cells += [counts[expected, "right"], counts[expected, "refused"]]
    cells += [verdicts[verdict] for verdict in VERDICTS[1:2] + VERDICTS[3:7]]
    errors = [score.error for result in members if result.verdict == "right" and (score := result.worst)]
    return [str(cell) if cell else "." for cell in cells] + [f"{max(errors):.1e}" if errors else "."]


def print_reasons(results: Sequence[Result]) -> None:
    """Print what went wrong and what was refused against expectation, the most frequent reason first."""
    for verdict in ("crashed", "hung", "wrong", "not runnable", "not verified"):
        _print_grouped(verdict, [result for result in results if result.verdict == verdict])
    refused = [result for result in results if result.verdict == "refused"]
    _print_grouped("refused, though expected to be injected", [r for r in refused if r.expected == "inject"])
    _print_grouped("refused with another exit code than 3 or 4", [r for r in refused if r.exit_code not in (3, 4)])


def _print_grouped(title: str, results: Sequence[Result]) -> None:
    if not results:
        return
    print(f"\n{title}: {len(results)}")
    grouped: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        grouped[result.gist or result.reason].append(result)
    for members in sorted(grouped.values(), key=len, reverse=True):
        labels = ", ".join(_label(result) for result in members)
        print(f"  {len(members):3} x {members[0].reason}")
        print(textwrap.fill(labels, 118, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False))


def _label(result: Result) -> str:
    worst = result.worst
    return f"{result.group}/{result.name}" + (f" ({worst.error:.2g})" if worst else "")


def print_totals(results: Sequence[Result], seconds: float) -> None:
    """Print counts and times."""
    verdicts = Counter(result.verdict for result in results)
    times = [result.apply_seconds for result in results]
    print("\n" + ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS if verdicts[verdict]))
    codes = Counter(result.exit_code for result in results if result.verdict == "refused")
    print("refused with exit code: " + (", ".join(f"{code}: {codes[code]}" for code in sorted(codes)) or "none"))
    slowest = max(results, key=lambda result: result.apply_seconds)
    print(
        f"apply: {sum(times) / len(times):.3f} s per model, {sum(times):.1f} s in all, slowest "
        f"{slowest.apply_seconds:.2f} s ({slowest.group}/{slowest.name}); whole sweep {seconds:.1f} s"
        + (f" over: {MEAN_LIMIT:g} s per model" if sum(times) / len(times) > MEAN_LIMIT else "")
    )


def as_json(results: Sequence[Result], seconds: float) -> str:
    """Return everything that is known, for a program."""
    counts = Counter(result.verdict for result in results)
    text = json.dumps({"seconds": seconds, "counts": counts, "models": [asdict(r) for r in results]}, indent=1)
    return text.replace("Infinity", "1e999")  # which is JSON, and reads as infinity
