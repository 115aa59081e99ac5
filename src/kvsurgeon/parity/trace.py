"""Where two graphs part: the first value of the same name that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.parity.difference import amplitude, expected_part
from kvsurgeon.parity.original import Original
from kvsurgeon.parity.report import Trial
from kvsurgeon.parity.scenario import Scenario
from kvsurgeon.runtime import Array, CachedDecoder, UncachedDecoder, open_session

Folders = Sequence[Path | None]


def first_difference(
    graphs: tuple[onnx.ModelProto, onnx.ModelProto],
    folders: Folders,
    scenarios: Sequence[Scenario],
    trials: Sequence[Trial],
    original: Original,
    cached: CachedDecoder,
    allowed: float,
) -> str | None:
    """Return the first value, in the order of the graph with a cache, that both have and that differs.

    A surgeon keeps the names of what it does not replace, so this names the place behind which something is wrong. It
    is a hint: None where the graphs share no such value, or where they cannot be run with it as an output.
    """
    scenario = _shortest(scenarios, trials)
    names = _shared(*graphs)
    if scenario is None or not names:
        return None
    try:
        return _search(graphs, folders, scenario, names, original, cached, allowed)
    except KvsurgeonError:  # a model that fails only as a whole, or one too large to open twice
        return None


def _shortest(scenarios: Sequence[Scenario], trials: Sequence[Trial]) -> Scenario | None:
    """Return the scenario that fails in the fewest calls; one without padding, where there is one."""
    failed = [
        scenario
        for scenario, trial in zip(scenarios, trials, strict=True)
        if trial.verdict == "different" and trial.error is not None
    ]
    return min(failed, key=lambda s: (not s.mask.all(), len(s.tokens), len(s.chunks)), default=None)


def _shared(original: onnx.ModelProto, injected: onnx.ModelProto) -> list[str]:
    have = {name for node in original.graph.node for name in node.output}
    have -= {value.name for model in (original, injected) for value in model.graph.output}
    return [name for node in injected.graph.node for name in node.output if name and name in have]


def _search(
    graphs: tuple[onnx.ModelProto, onnx.ModelProto],
    folders: Folders,
    scenario: Scenario,
    names: Sequence[str],
    original: Original,
    cached: CachedDecoder,
    allowed: float,
) -> str | None:
    sessions = [
        open_session(_exposed(graph, names), folder=folder, optimisation="basic", name="the graph")
        for graph, folder in zip(graphs, folders, strict=True)
    ]
    feeds = original.inputs.whole(scenario.tokens, scenario.mask, types=original.types)
    expected = UncachedDecoder(sessions[0], original.inputs).run(feeds)
    decoder = CachedDecoder(sessions[1], cached.cache)
    feeds = decoder.inputs.whole(scenario.tokens, scenario.mask, types=original.types)
    for past, total in scenario.spans:
        found = decoder.advance(decoder.inputs.part(feeds, past, total))
        for name in names:
            if _differs(expected, found, name, past, total, allowed):
                return name
    return None


def _exposed(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return exposed


def _differs(
    expected: Mapping[str, Array], found: Mapping[str, Array], name: str, past: int, total: int, allowed: float
) -> bool:
    if name not in expected or name not in found or found[name].dtype.kind in "biu":
        return False
    part = expected_part(expected[name], found[name].shape, past, total)
    if part is None or not part.size:
        return False
    want, have = part.astype(np.float64), found[name].astype(np.float64)
    with np.errstate(invalid="ignore"):
        distance = np.where((want == have) | (np.isnan(want) & np.isnan(have)), 0.0, np.abs(want - have))
    return bool(np.nan_to_num(distance, nan=np.inf).max() / amplitude(expected[name]) > allowed)
