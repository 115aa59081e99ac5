"""Facts for a program: what `--json` prints."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from kvsurgeon.cache.layout import DEFAULT_LAYOUT
from kvsurgeon.errors import PluginError
from kvsurgeon.plugins import Plugin
from kvsurgeon.workflow.registry import PASSES

if TYPE_CHECKING:
    from kvsurgeon.anatomy import Decoder
    from kvsurgeon.targets import Obstacle, Target
    from kvsurgeon.targets.facts import Operator
    from kvsurgeon.workflow.surgery import Surgery
    from kvsurgeon.workflow.verification import Sameness


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
        "loss": None if done.loss is None else done.loss.as_dict(),
    }


def sameness(judged: Sameness) -> dict[str, Any]:
    """Return what the judge said: all that it tried, where a cache came in."""
    if judged.report is not None:
        return judged.report.as_dict()
    return {"ok": judged.verdict == "same", "verdict": judged.verdict, "problems": list(judged.problems)}


def passes() -> list[dict[str, Any]]:
    """Return every pass with its options; one that cannot be had says why in `error`."""
    found = [_described(plugin) for plugin in PASSES.plugins()]
    return found + [
        {"name": plugin.name, "package": plugin.package, "error": message} for plugin, message in PASSES.conflicts()
    ]


def targets() -> list[dict[str, Any]]:
    """Return every target with what it says of itself; one that cannot be had says why in `error`."""
    from kvsurgeon.targets import TARGETS

    found = []
    for plugin in TARGETS.plugins():
        facts = {"name": plugin.name, "package": plugin.package}
        try:
            loaded = plugin.load()
        except PluginError as error:
            found.append({**facts, "error": str(error)})
        else:
            found.append({**facts, "summary": loaded.summary, "tried": loaded.tried})
    return found


def target(described: Target) -> dict[str, Any]:
    """Return all that a target says, its passes with their options where these are not the usual ones."""
    return {
        "name": described.name,
        "summary": described.summary,
        "tried": described.tried,
        "passes": [_options(one) for one in (*described.passes, *described.finish)],
        "max_length": described.max_length,
        "files": list(described.files),
        "tokens_of_a_call": {one.file: one.tokens for one in described.variants},
        "data": described.data,
        "needs": list(described.needs),
        "feeds": None if described.feeds is None else sorted(described.feeds),
        "dtypes": {name: sorted(dtypes) for name, dtypes in (described.dtypes or {}).items()},
        "past": described.cache.past,
        "present": described.cache.present,
        "cache_mode": described.cache.cache,
        "cache_dtypes": sorted(described.cache_dtypes),
        "cache_sizes_that_are_numbers": [DEFAULT_LAYOUT[axis] for axis in described.fixed_axes],
        "uniform": described.uniform,
        "opset": described.opset,
        "operators": None if described.operators is None else sorted(map(_operator, described.operators)),
        "banned": sorted(map(_operator, described.banned)),
        "beside": list(described.beside),
        "side_files": [side_file.name for side_file in described.side_files],
    }


def obstacles(name: str, found: Iterable[Obstacle]) -> dict[str, Any]:
    """Return what stands between a model and the target of that name."""
    listed = [asdict(obstacle) for obstacle in found]
    return {"target": name, "stops": any(one["stops"] for one in listed), "obstacles": listed}


def _options(one: Any) -> dict[str, Any]:
    said = {field.name: getattr(one, field.name) for field in fields(one)}
    return {
        "pass": one.name,
        **{field.name: said[field.name] for field in fields(one) if said[field.name] != field.default},
    }


def _operator(found: Operator) -> str:
    domain, operator = found
    return f"{domain}.{operator}" if domain else operator


def _described(plugin: Plugin[type[Any]]) -> dict[str, Any]:
    from kvsurgeon.passes.options import options_of, summary

    facts = {"name": plugin.name, "package": plugin.package, "target": plugin.reference}
    try:
        pass_class = plugin.load()
    except PluginError as error:
        return {**facts, "error": str(error)}
    options = [
        {"name": one.dim_names, "type": one.kind, "required": one.required, "default": one.default, "help": one.help}
        for one in options_of(pass_class)
    ]
    return {**facts, "summary": summary(pass_class), "options": options}
