"""The JSON documents of `--json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from kvsurgeon.cache.layout import DEFAULT_LAYOUT
from kvsurgeon.errors import PluginError
from kvsurgeon.passes.contract import Unchanged
from kvsurgeon.plugins import Catalogue, Plugin

if TYPE_CHECKING:
    from kvsurgeon.anatomy import Decoder
    from kvsurgeon.passes.contract import Outcome, Pass
    from kvsurgeon.targets import Incompatibility, Target
    from kvsurgeon.workflow.pipeline import PipelineRun


T = TypeVar("T")


def print_json(document: Any) -> None:
    """Print a document as JSON."""
    print(json.dumps(document, indent=2, default=str))


def decoder_json(decoder: Decoder) -> dict[str, Any]:
    """Return the facts about a decoder, totals included."""
    totals = {"cache_entries": decoder.cache_entries, "cache_bytes_per_token": decoder.cache_bytes_per_token}
    return {**asdict(decoder), **totals}


def run_json(run: PipelineRun) -> dict[str, Any]:
    """Return what the passes did, and the verification."""
    return {
        "output": None if run.path is None else str(run.path),
        "files": [{"path": str(one.path), "action": one.action} for one in run.files],
        "certificate": None if run.certificate is None else str(run.certificate),
        "steps": [
            {
                "pass": step.name,
                "outcome": type(step.outcome).__name__.lower(),
                **_outcome_json(step.outcome),
                "seconds": step.seconds,
            }
            for step in run.steps
        ],
        "notes": list(run.notes),
        "verified": run.verification is not None,
        "verification": None if run.verification is None else run.verification.as_dict(),
        "loss": None if run.loss is None else run.loss.as_dict(),
        "cache_bytes": run.cache_bytes,
    }


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, Unchanged):
        return asdict(outcome)
    shown = asdict(replace(outcome, equal_models=None, proof=None, companions={}))
    del shown["equal_models"]
    shown["companions"] = list(outcome.companions)
    return {**shown, "proof": None if outcome.proof is None else outcome.proof.as_dict()}


def passes_json(passes: Catalogue[type[Any]]) -> list[dict[str, Any]]:
    """Return every pass with its options; one that cannot be loaded has an `error`."""
    return [pass_json(plugin) for plugin in passes.plugins()] + [
        {"name": plugin.name, "package": plugin.package, "error": message} for plugin, message in passes.conflicts()
    ]


def pass_json(plugin: Plugin[type[Any]]) -> dict[str, Any]:
    """Return a pass with its options, or its `error` if it cannot be loaded."""
    return _plugin_json(plugin, _describe_pass)


def targets_json() -> list[dict[str, Any]]:
    """Return every target with its summary; one that cannot be loaded has an `error`."""
    from kvsurgeon.targets import TARGETS

    return [
        _plugin_json(plugin, lambda target: {"summary": target.summary, "tried": target.tested_with})
        for plugin in TARGETS.plugins()
    ]


def _plugin_json(plugin: Plugin[T], describe: Callable[[T], dict[str, Any]]) -> dict[str, Any]:
    document = {"name": plugin.name, "package": plugin.package}
    if plugin.kind == "pass":
        document["target"] = plugin.reference
    try:
        return {**document, **describe(plugin.load())}
    except PluginError as error:
        return {**document, "error": str(error)}


def _describe_pass(pass_class: type[Any]) -> dict[str, Any]:
    from kvsurgeon.passes.options import options_of, summary

    options = [
        {"name": one.name, "type": one.kind, "required": one.required, "default": one.default, "help": one.help}
        for one in options_of(pass_class)
    ]
    return {"summary": summary(pass_class), "options": options}


def target_json(target: Target) -> dict[str, Any]:
    """Return the requirements of a target, and its passes with the options that differ from their defaults."""
    from kvsurgeon.targets.compatibility import operator_name

    return {
        "name": target.name,
        "summary": target.summary,
        "tried": target.tested_with,
        "passes": [_options_json(one) for one in target.passes],
        "max_length": target.max_length,
        "files": list(target.files),
        "tokens_of_a_call": dict(target.variants),
        "data": target.data,
        "needs": list(target.required),
        "feeds": None if target.allowed_inputs is None else sorted(target.allowed_inputs),
        "dtypes": {name: sorted(dtypes) for name, dtypes in target.dtypes.items()},
        "past": target.cache.past,
        "present": target.cache.present,
        "cache_mode": target.cache.cache,
        "cache_dtypes": sorted(target.cache_dtypes),
        "cache_sizes_that_are_numbers": [DEFAULT_LAYOUT[axis] for axis in target.static_axes],
        "uniform": target.uniform,
        "opset": target.max_opset,
        "operators": None if target.operators is None else sorted(map(operator_name, target.operators)),
        "banned": sorted(map(operator_name, target.unsupported_operators)),
        "beside": list(target.required_files),
        "side_files": list(target.side_files),
    }


def incompatibilities_json(target: str, found: Iterable[Incompatibility]) -> dict[str, Any]:
    """Return the incompatibilities of a model with the target of that name."""
    listed = [{"what": one.reason, "at": one.at, "hint": one.hint, "stops": one.blocking} for one in found]
    return {"target": target, "stops": any(one["stops"] for one in listed), "obstacles": listed}


def _options_json(one: Pass) -> dict[str, Any]:
    options = {field: getattr(one, field.name) for field in fields(one)}  # type: ignore[arg-type]
    return {"pass": one.name, **{field.name: value for field, value in options.items() if value != field.default}}
