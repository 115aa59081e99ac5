"""Facts for a program: what `--json` prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvsurgeon import registry
from kvsurgeon.errors import PluginError

if TYPE_CHECKING:
    from kvsurgeon.anatomy import Decoder
    from kvsurgeon.surgery import Surgery


def show(facts: Any) -> None:
    """Print `facts` as JSON."""
    print(json.dumps(facts, indent=2, default=str))


def anatomy(decoder: Decoder) -> dict[str, Any]:
    """Return a decoder's facts, totals included."""
    totals = {"cache_entries": decoder.cache_entries, "cache_bytes_per_token": decoder.cache_bytes_per_token}
    return {**asdict(decoder), **totals}


def surgery(done: Surgery) -> dict[str, Any]:
    """Return what was done to a model, and what the judge said."""
    judged = done.sameness
    return {
        "output": None if done.path is None else str(done.path),
        "steps": [
            {
                "pass": step.name,
                "outcome": type(step.outcome).__name__.lower(),
                **asdict(step.outcome),
                "seconds": step.seconds,
            }
            for step in done.steps
        ],
        "notes": list(done.notes),
        "verified": judged is not None,
        "verification": None if done.report is None else done.report.as_dict(),
    }


def passes() -> list[dict[str, Any]]:
    """Return every pass with its options; one that cannot be had says why in `error`."""
    found = [_described(entry) for entry in registry.entries()]
    return found + [
        {"name": clash.name, "package": clash.second.package, "error": str(clash)} for clash in registry.clashes()
    ]


def _described(entry: registry.Entry) -> dict[str, Any]:
    from kvsurgeon.passes.options import options_of, summary

    facts = {"name": entry.name, "package": entry.package, "target": entry.target}
    try:
        pass_class = entry.load()
    except PluginError as error:
        return {**facts, "error": str(error)}
    options = [
        {"name": one.spelled, "type": one.kind, "required": one.required, "default": one.default, "help": one.help}
        for one in options_of(pass_class)
    ]
    return {**facts, "summary": summary(pass_class), "options": options}
