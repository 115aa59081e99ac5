"""The first value of the same name that differs in two graphs."""

from __future__ import annotations

from collections.abc import Sequence

from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.parity.difference import distance, expected_part, scale_of
from kvsurgeon.parity.model_source import ModelSource
from kvsurgeon.parity.reference_model import ReferenceModel
from kvsurgeon.parity.report import Comparison
from kvsurgeon.parity.scenarios import Scenario
from kvsurgeon.runtime import Array, CachedDecoder, CacheIO


def simplest_difference(scenarios: Sequence[Scenario], comparisons: Sequence[Comparison]) -> Scenario | None:
    """Return the scenario with a difference that has the least padding, the fewest rows and the fewest calls."""
    different = [
        scenario
        for scenario, comparison in zip(scenarios, comparisons, strict=True)
        if comparison.verdict == "different" and comparison.error is not None
    ]
    return min(different, key=lambda s: (not s.mask.all(), len(s.tokens), len(s.chunks)), default=None)


def first_difference(
    models: tuple[ModelSource, ModelSource],
    scenario: Scenario,
    *,
    reference: ReferenceModel,
    cache: Sequence[CacheIO],
    bound: float,
) -> str | None:
    """Return the first value, in the order of the candidate's graph, that both graphs have and that differs.

    Rewrites keep the names of values that they do not replace, so this locates a fault. None is returned if the graphs
    share no such value, or cannot be run with all of them as outputs.

    Args:
        models: Reference and candidate.
        scenario: Scenario on which they differ.
        reference: The reference model.
        cache: Cache inputs and outputs of the candidate.
        bound: Largest error that is allowed.
    """
    shared = set(models[0].inner_values)
    names = [name for name in models[1].inner_values if name in shared]
    if not names or reference.decoder.cache:
        return None
    try:
        sessions = [model.open("basic", names) for model in models]
        decoder = CachedDecoder(sessions[1], cache)
        expected = reference.on(sessions[0]).run(scenario, in_calls=False).calls[0]
        feeds = decoder.inputs.feeds(
            scenario.tokens, scenario.mask, token_types=reference.token_types, block=scenario.chunks[0]
        )
        for past, total in scenario.spans:
            found = decoder.advance(decoder.inputs.part(feeds, past, total))
            for name in names:
                if _differs(expected.get(name), found.get(name), past, total, bound):
                    return name
    except KvsurgeonError:  # too large to be opened twice, or a graph that runs only as a whole
        return None
    return None


def _differs(whole: Array | None, found: Array | None, past: int, total: int, bound: float) -> bool:
    if whole is None or found is None or found.dtype.kind in "biu":
        return False
    part = expected_part(whole, found.shape, past, total)
    if part is None or not part.size:
        return False
    is_hidden = found.ndim == 3 and found.shape[1] == total - past and found.shape[2] == whole.shape[2]
    features = (0, 1) if is_hidden else None
    return distance(part, found, scale_of(whole, features)) > bound
