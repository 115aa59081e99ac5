"""Where two graphs part: the first value of the same name that differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.parity.difference import amplitude, distance, expected_part
from kvsurgeon.parity.reference_model import Original
from kvsurgeon.parity.report import Trial
from kvsurgeon.parity.scenarios import Scenario
from kvsurgeon.runtime import Array, CachedDecoder, CacheEntry, Session, UncachedDecoder, open_session


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A model that can be asked for any of its values."""

    model: onnx.ModelProto  # external weights need not be loaded
    folder: Path | None  # where they lie

    def exposing(self, names: Sequence[str], threads: int | None) -> Session:
        """Open the model with some of its values as further outputs.

        Raises:
            KvsurgeonError: It cannot be opened so.
        """
        exposed = onnx.ModelProto()
        exposed.CopyFrom(self.model)
        exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        return open_session(exposed, folder=self.folder, threads=threads, optimisation="basic", name="the graph")

    @property
    def values(self) -> tuple[str, ...]:
        """Names of all that its nodes make, but for its outputs, in order."""
        outputs = {value.name for value in self.model.graph.output}
        made = (name for node in self.model.graph.node for name in node.output if name)
        return tuple(name for name in made if name not in outputs)


def telling(scenarios: Sequence[Scenario], trials: Sequence[Trial]) -> Scenario | None:
    """Return the scenario that went wrong in the fewest calls, one without padding if there is one."""
    wrong = [
        scenario
        for scenario, trial in zip(scenarios, trials, strict=True)
        if trial.verdict == "different" and trial.error is not None
    ]
    return min(wrong, key=lambda s: (not s.mask.all(), len(s.tokens), len(s.chunks)), default=None)


def first_difference(
    before: Graph,
    after: Graph,
    scenario: Scenario,
    *,
    original: Original,
    cache: Sequence[CacheEntry],
    allowed: float,
    threads: int | None = None,
) -> str | None:
    """Return the first value, in the order of the graph with a cache, that both have and that differs.

    A surgeon keeps the names of what it does not replace, so this names the place before which something is wrong. It
    is a hint: None where the graphs share no such value, or cannot be run with all of them as outputs.

    Args:
        before: The original's graph.
        after: The graph with a cache.
        scenario: A text on which they differ.
        original: What the original is given.
        cache: The cache of the other.
        allowed: Error below which values are the same.
        threads: Threads that onnxruntime may use for one operator.
    """
    have = set(before.values)
    names = [name for name in after.values if name in have]
    if not names:
        return None
    try:
        witness = UncachedDecoder(before.exposing(names, threads), original.inputs)
        decoder = CachedDecoder(after.exposing(names, threads), cache)
        expected = witness.run(original.inputs.whole(scenario.tokens, scenario.mask, types=original.types))
        feeds = decoder.inputs.whole(scenario.tokens, scenario.mask, types=original.types)
        for past, total in scenario.spans:
            found = decoder.advance(decoder.inputs.part(feeds, past, total))
            for name in names:
                if _differs(expected.get(name), found.get(name), past, total, allowed):
                    return name
    except KvsurgeonError:  # too large to be opened twice, or a graph that runs only as a whole
        return None
    return None


def _differs(whole: Array | None, found: Array | None, past: int, total: int, allowed: float) -> bool:
    if whole is None or found is None or found.dtype.kind in "biu":
        return False
    part = expected_part(whole, found.shape, past, total)
    if part is None or not part.size:
        return False
    want, have = part.astype(np.float64), found.astype(np.float64)
    both_undefined = np.isnan(want) & np.isnan(have)
    return distance(np.where(both_undefined, 0, want), np.where(both_undefined, 0, have), amplitude(whole)) > allowed
