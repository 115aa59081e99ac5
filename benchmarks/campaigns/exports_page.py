"""The docs page about a campaign of exports: which decoders are right, and why the others are not."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from campaigns.rows import EXPORTERS, NOT_TRIED, REFUSED, RIGHT, Row, best_outcomes, by_name, text_of

SPELLED = {"torchscript": "TorchScript"}
COLUMNS = 118


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a docs page says besides the rows of a campaign.

    Attributes:
        title: The heading.
        text: Paragraph below it, before the totals.
        command: The command that writes the page.
        causes: What keeps decoders from a cache or from being exported, found by reading their code: name to cause.
    """

    title: str
    text: str
    command: str
    causes: Mapping[str, str] = field(default_factory=dict)


OPENING = '```sh skip="needs torch and the packages"'


def as_markdown(page: Page, rows: Sequence[Row]) -> str:
    """Return the page: totals, the decoders that are right, and why the others are not."""
    found = by_name(rows)
    best = best_outcomes(rows)
    totals = ", ".join(f"{count} {outcome}" for outcome, count in Counter(best.values()).most_common())
    lines = [f"# {page.title}", "", *_wrapped(page.text), "", OPENING, page.command, "```", ""]
    lines += _wrapped(f"Of {len(found)} decoders, by the better of both exporters: {totals}.")
    lines += ["", "## Right", ""]
    for exporter in EXPORTERS:
        names = [name for name, by in sorted(found.items()) if by.get(exporter, NOT_TRIED).outcome == RIGHT]
        if names:
            lines += [*_wrapped(f"By {SPELLED.get(exporter, exporter)} ({len(names)}): {', '.join(names)}."), ""]
    lines += ["## Refused", "", "| decoder | reason | what its code does |", "| --- | --- | --- |"]
    lines += [_row(name, _reason(found[name], REFUSED), page.causes.get(name, "")) for name in _with(best, REFUSED)]
    neither = sorted(name for name, outcome in best.items() if outcome not in (RIGHT, REFUSED))
    if not neither:
        return "\n".join(lines) + "\n"
    heads = (SPELLED.get(one, one) for one in EXPORTERS)
    lines += ["", "## Neither", "", _row("decoder", *heads, "what its code does")]
    lines += ["| --- |" + " --- |" * (len(EXPORTERS) + 1)]
    for name in neither:
        outcomes = (text_of(found[name].get(one, NOT_TRIED)) for one in EXPORTERS)
        lines.append(_row(name, *outcomes, page.causes.get(name, "")))
    return "\n".join(lines) + "\n"


def _with(best: Mapping[str, str], outcome: str) -> Iterable[str]:
    return sorted(name for name, one in best.items() if one == outcome)


def _reason(found: Mapping[str, Row], outcome: str) -> str:
    """Return the reason of the first row with an outcome, without the name of the value."""
    reason = next(row.reason for row in found.values() if row.outcome == outcome)
    return reason.partition(": ")[2].partition(" - at `")[0]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, break_long_words=False, break_on_hyphens=False)
