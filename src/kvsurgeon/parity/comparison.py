"""One scenario, judged: outputs against the original's, the cache built in chunks against that of one prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvsurgeon.errors import RunError
from kvsurgeon.parity.chunked_run import ChunkCall, Performance, perform
from kvsurgeon.parity.difference import Difference, agreement, amplitude, error_map, expected_part, spread, worst
from kvsurgeon.parity.reference_model import Original
from kvsurgeon.parity.report import CacheFault, Position, Trial
from kvsurgeon.parity.scenarios import Scenario
from kvsurgeon.parity.tolerance import Tolerance
from kvsurgeon.runtime import Array, CachedDecoder, CacheEntry, Tensor, token_axes

Counted = npt.NDArray[np.bool_]  # [batch, sequence]


@dataclass(frozen=True, kw_only=True)
class _Outputs:
    """How far the outputs of a performance are from the original's."""

    error: float
    output: str
    at: Position
    agreement: float
    misfit: str | None = None


def judge(scenario: Scenario, original: Original, cached: CachedDecoder, tolerance: Tolerance) -> Trial:
    """Return what comes of one scenario; it never raises for a mismatch."""
    facts = Trial(
        scenario=scenario.name,
        batch=scenario.tokens.shape[0],
        length=scenario.tokens.shape[1],
        chunks=scenario.chunks,
        verdict="unknown",
    )
    try:
        expected = original.answer(scenario)
    except RunError as error:
        return replace(facts, reason=f"the original cannot be run on it: {error}")
    counted = scenario.mask.astype(bool)
    if _not_numbers(expected[original.decoder.logits], counted):
        return replace(facts, reason="the original's logits are not numbers")
    if original.steady and not original.reads_padding_alike(scenario, tolerance.error):
        return replace(facts, reason="the original reads padding before a text otherwise when other tokens follow")
    by_place = cached.inputs.placing(original.inputs)
    feeds = cached.inputs.whole(scenario.tokens, scenario.mask, types=original.types, by_place=by_place)
    whole = perform(cached, feeds, [(0, facts.length)])
    chunked = whole if len(scenario.chunks) == 1 else perform(cached, feeds, scenario.spans)
    failed = whole if whole.failure else chunked
    if failed.failure:
        return replace(facts, verdict="different", reason=failed.failure, layer=failed.layer)
    first = _outputs(whole.calls, expected, cached, counted, tolerance)
    found = _outputs(chunked.calls, expected, cached, counted, tolerance)
    faults = cache_faults(cached.cache, whole, chunked, counted, tolerance.error)
    return _sentence(facts, first, found, faults, cached, tolerance)


def _not_numbers(logits: Array, counted: Counted) -> bool:
    matters = logits[counted] if logits.shape[:2] == counted.shape else logits
    return bool(np.isnan(matters.astype(np.float64)).any())


def cache_faults(
    cache: Sequence[CacheEntry], whole: Performance, chunked: Performance, counted: Counted, allowed: float
) -> tuple[CacheFault, ...]:
    """Return the entries of the cache that differ by how it was built, lowest layer first."""
    faults = []
    for entry in cache:
        expected, found = whole.cache[entry.past.name], chunked.cache[entry.past.name]
        errors = _cache_errors(entry, expected, found)
        matters = counted if errors.shape == counted.shape else np.ones(errors.shape, bool)
        difference = worst(errors, matters)
        if difference.error > allowed:
            faults.append(_cache_fault(entry, difference, np.argwhere((errors > allowed) & matters), chunked))
    return tuple(sorted(faults, key=lambda fault: fault.layer))


def _cache_errors(entry: CacheEntry, expected: Array, found: Array) -> npt.NDArray[np.float64]:
    batch = entry.batch if entry.batch is not None else int(entry.axis == 0)
    if expected.shape != found.shape:  # a size of the cache other than its length depends on the call
        return np.full((1, found.shape[entry.axis]), np.inf)
    return error_map(expected, found, batch=batch, sequence=entry.axis, scale=amplitude(expected))


def _cache_fault(
    entry: CacheEntry, difference: Difference, wrong: npt.NDArray[np.int64], chunked: Performance
) -> CacheFault:
    row, token = (int(number) for number in wrong[wrong[:, 1].argmin()])
    return CacheFault(
        layer=entry.layer,
        part=entry.part,
        present=entry.present,
        error=difference.error,
        at=Position(row=difference.row, token=difference.position),
        first=Position(row=row, token=token),
        forgets=entry.present in chunked.forgot,
        remembers=chunked.forgot.get(entry.present),
    )


def _outputs(
    calls: Sequence[ChunkCall],
    expected: Mapping[str, Array],
    cached: CachedDecoder,
    counted: Counted,
    tolerance: Tolerance,
) -> _Outputs:
    """Return the worst of all outputs that the original has too."""
    found = _Outputs(error=0.0, output=cached.logits, at=Position(row=0, token=0), agreement=1.0)
    kept = {entry.present for entry in cached.cache}
    for output in cached.outputs:
        if not output.floating or output.name not in expected.keys() - kept:
            continue
        one = _output(output, calls, expected[output.name], cached, counted, tolerance)
        if one.misfit is not None:
            return one
        if one.error > found.error or output.name == cached.logits:
            error = max(one.error, found.error)
            better = one if one.error >= found.error else found
            found = _Outputs(
                error=error, output=better.output, at=better.at, agreement=min(one.agreement, found.agreement)
            )
    return found


def _output(
    output: Tensor,
    calls: Sequence[ChunkCall],
    whole: Array,
    cached: CachedDecoder,
    counted: Counted,
    tolerance: Tolerance,
) -> _Outputs:
    name = output.name
    logits = name == cached.logits and whole.ndim == 3 and whole.shape[:2] == counted.shape
    scale = spread(whole[counted]) if logits else amplitude(whole)
    largest, same, of = Difference(error=0.0, row=0, position=0), 0, 0
    last_only = counted.shape[1] not in whole.shape  # then the original tells of the whole text alone
    for call in calls[-1:] if last_only else calls:
        found = call.outputs[name]
        part = expected_part(whole, found.shape, call.past, call.total)
        if part is None:
            size = f"{list(found.shape)}, where the original's for the whole text is {list(whole.shape)}"
            return _Outputs(error=np.inf, output=name, at=_at(largest), agreement=0.0, misfit=f"`{name}` has {size}")
        matters = counted[:, call.past : call.total]
        axes = token_axes(output, found.shape, matters.shape)
        if axes is None:  # tokens cannot be told apart: compare all of it
            part, found, axes, matters = part.reshape(1, 1, -1), found.reshape(1, 1, -1), (0, 1), np.ones((1, 1), bool)
        errors = error_map(part, found, batch=axes[0], sequence=axes[1], scale=scale)
        largest = max(largest, worst(errors, matters, call.past), key=lambda difference: difference.error)
        if logits:
            agreed, counts = agreement(part, found, matters, tolerance.tie * scale)
            same, of = same + agreed, of + counts
    return _Outputs(error=largest.error, output=name, at=_at(largest), agreement=same / of if of else 1.0)


def _at(difference: Difference) -> Position:
    return Position(row=difference.row, token=difference.position)


def _sentence(
    facts: Trial,
    first: _Outputs,
    found: _Outputs,
    faults: tuple[CacheFault, ...],
    cached: CachedDecoder,
    tolerance: Tolerance,
) -> Trial:
    facts = replace(
        facts,
        verdict="different",
        error=found.error,
        prefill_error=first.error,
        agreement=found.agreement,
        worst=found.at,
        output=found.output,
        caches=faults,
    )
    wrong_at_once = _wrong(first, tolerance)
    if not (wrong_at_once or _wrong(found, tolerance) or faults):
        return replace(facts, verdict="same")
    said = _wrong(found, tolerance) or wrong_at_once or "the outputs agree, but the cache does not"
    if wrong_at_once and not faults:
        return replace(facts, reason=f"{said}; already when the whole text is given in one call")
    layer, culprit = blame(faults, cached.cache)
    return replace(facts, layer=layer, reason=f"{said}; {culprit}")


def _wrong(outputs: _Outputs, tolerance: Tolerance) -> str | None:
    if outputs.misfit is not None:
        return f"the output {outputs.misfit}"
    if not outputs.error <= tolerance.error:
        error, place = f"{outputs.error:.2g} of its spread", f"row {outputs.at.row}, token {outputs.at.token}"
        return f"`{outputs.output}` differs by {error} at {place} ({tolerance.error:.2g} allowed)"
    if outputs.agreement < tolerance.agreement:
        return f"the likeliest token is the same at {outputs.agreement:.0%} ({tolerance.agreement:.0%} needed)"
    return None


def blame(faults: Sequence[CacheFault], cache: Sequence[CacheEntry]) -> tuple[int, str]:
    """Return the layer at fault and why: what is wrong in a layer cannot come from a later one.

    Args:
        faults: Entries of the cache that are wrong, lowest layer first.
        cache: All entries.
    """
    layers = sorted({entry.layer for entry in cache})
    if not faults:
        last = layers[-1]
        return last, f"every key and value is right, so the attention of the last layer, {last}, is at fault"
    layer = faults[0].layer
    here = [fault for fault in faults if fault.layer == layer]
    for fault in here:
        if fault.forgets:
            instead = f" but with `{fault.remembers}`" if fault.remembers else ""
            return layer, f"`{fault.present}` does not begin with the past of layer {layer} that was given{instead}"
    since = f"wrong from token {min(fault.first.token for fault in here)} on"
    parts = {fault.part for fault in here}
    if len(parts) == 1 and sum(entry.layer == layer for entry in cache) > 1:
        return layer, f"the {parts.pop()} of layer {layer} is {since}, and only it: what makes it is at fault"
    if layer == layers[0]:
        return layer, f"key and value of the first layer, {layer}, are {since}: what enters it is at fault"
    before = layer - 1
    which = f"layer {before}" if before in layers else f"layer {before}, which has no cache of its own,"
    return before, f"key and value of layer {layer} are {since}: the attention of {which} is at fault"
