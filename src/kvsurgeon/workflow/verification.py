"""Verification of a model after any passes: whether it computes what its reference model computes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import onnx

from kvsurgeon.io.json_files import parse_json
from kvsurgeon.parity import TOLERANCES, Effort, Progress, Report, TextLengths, arithmetic_of, load_graph, verify
from kvsurgeon.rewrite.cache_metadata import CONTEXT_KEY
from kvsurgeon.runtime import Source
from kvsurgeon.runtime.providers import CPU


def verify_models(
    reference: Source,
    candidate: Source,
    *,
    folder: Path | None = None,
    seed: int | None = None,
    effort: Effort = "normal",
    thresholds: Collection[int] = (),
    lengths: TextLengths | None = None,
    threads: int | None = None,
    provider: str = CPU,
    progress: Progress | None = None,
) -> Report:
    """Run both models on the same texts, and compare all outputs and the cache.

    Args:
        reference: The model before the passes.
        candidate: The model after them.
        folder: Folder of the external data of models in memory.
        seed: Random seed of the texts; None draws one.
        effort: How many texts, and of which lengths.
        thresholds: Lengths after which a model may compute something else.
        lengths: Sizes of the texts; None for those of the effort.
        threads: Number of threads per operator.
        provider: Execution provider of the candidate; the reference model runs on the CPU.
        progress: Called before each scenario.
    """
    models = load_graph(reference), load_graph(candidate)
    computed = _computed_inputs(models[1]) - _computed_inputs(models[0])
    if computed:
        arithmetic = arithmetic_of(models[0])
        reason = f"the application computes `{min(computed)}` (metadata `{CONTEXT_KEY}`), and the verifier does not"
        return replace(Report(arithmetic=arithmetic, tolerance=TOLERANCES[arithmetic]), unverifiable=reason)
    return verify(
        reference,
        candidate,
        folder=folder,
        seed=seed,
        effort=effort,
        thresholds=thresholds,
        lengths=lengths,
        threads=threads,
        provider=provider,
        progress=progress,
    )


def _computed_inputs(model: onnx.ModelProto) -> set[str]:
    """Return the inputs that an application computes by the metadata, other than masks and position numbers."""
    metadata = next((entry.value for entry in model.metadata_props if entry.key == CONTEXT_KEY), "{}")
    try:
        inputs = parse_json(metadata).get("inputs", {}).items()
        return {name for name, how in inputs if how.get("seen") != 0 and not _is_range(how.get("table"))}
    except (ValueError, AttributeError):  # another tool's metadata
        return set()


def _is_range(table: object) -> bool:
    return isinstance(table, list) and table == [*range(len(table))]
