"""The outcomes of a campaign of exports: one row for each decoder and exporter."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

EXPORTERS = ("torchscript", "dynamo")
RIGHT, REFUSED, WRONG = "right", "refused", "wrong"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One export of one decoder, and what became of it."""

    name: str
    exporter: str
    outcome: str  # right, refused, wrong, not built, not run, not exported, not causal
    reason: str = ""


NOT_TRIED = Row(name="", exporter="", outcome="not tried")


def by_name(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Return the rows by decoder and exporter."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.name, {})[row.exporter] = row
    return found


def best_outcomes(rows: Sequence[Row]) -> dict[str, str]:
    """Return the outcome of each decoder: wrong if any is, right if one is, refused if one is."""
    return {name: _best([row.outcome for row in found.values()]) for name, found in by_name(rows).items()}


def text_of(row: Row) -> str:
    """Return the outcome with the start of its reason, without codes of terminals."""
    reason = textwrap.shorten(re.sub(r"\x1b\[\d+m", "", row.reason), 100, placeholder=" ...")
    return f"{row.outcome}: {reason}" if reason else row.outcome


def _best(outcomes: Sequence[str]) -> str:
    return next((one for one in (WRONG, RIGHT, REFUSED) if one in outcomes), outcomes[-1])
