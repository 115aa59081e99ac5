"""Comparison of a candidate with its reference on one text: outputs, and the cache of chunks and a single prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from kvsurgeon.errors import RunError
from kvsurgeon.parity.chunked_run import ChunkedRun, run_in_chunks
from kvsurgeon.parity.difference import agreement, amplitude, error_map, expected_part, spread, worst
from kvsurgeon.parity.fault_location import locate_fault
from kvsurgeon.parity.reference_model import ReferenceModel
from kvsurgeon.parity.report import CacheDifference, Comparison
from kvsurgeon.parity.scenarios import Scenario
from kvsurgeon.parity.tolerance import Tolerance
from kvsurgeon.runtime import Array, CachedDecoder, CacheIO, ValueInfo
from kvsurgeon.runtime.axes import token_axes

Counted = npt.NDArray[np.bool_]  # [batch, sequence]: tokens that are not padding


def compare(
    scenario: Scenario, reference: ReferenceModel, candidate: CachedDecoder, tolerance: Tolerance
) -> Comparison:
    """Compare both models on the text of a scenario; a difference is returned, not raised."""
    blank = Comparison.of(scenario)
    counted = scenario.mask.astype(bool)
    try:
        expected = reference.run(scenario)
    except RunError as error:
        return replace(blank, reason=f"the reference model fails: {error}")
    if _has_nan(expected[reference.decoder.logits], counted):
        return replace(blank, reason="the reference model's logits are not numbers")
    if reference.prefix_stable and not reference.padding_stable(scenario, tolerance.bound):
        return replace(blank, reason="the reference model treats left padding differently if other tokens follow")
    count_padding = candidate.inputs.positions_not_in(reference.inputs)
    feeds = candidate.inputs.feeds(
        scenario.tokens, scenario.mask, token_types=reference.token_types, count_padding=count_padding
    )
    prefill = run_in_chunks(candidate, feeds, [(0, blank.length)])
    chunked = prefill if len(scenario.chunks) == 1 else run_in_chunks(candidate, feeds, scenario.spans)
    failed = prefill if prefill.failure else chunked
    if failed.failure:
        return replace(blank, verdict="different", reason=failed.failure, layer=failed.layer)
    outputs = partial(_compare_outputs, scenario, expected, candidate, tolerance)
    differences = compare_caches(candidate.cache, prefill, chunked, counted, tolerance.bound)
    return _concluded(outputs(prefill), outputs(chunked), differences, candidate.cache)


def _has_nan(logits: Array, counted: Counted) -> bool:
    values = logits[counted] if logits.shape[:2] == counted.shape else logits
    return bool(np.isnan(values.astype(np.float64)).any())


def compare_caches(
    cache: Sequence[CacheIO], prefill: ChunkedRun, chunked: ChunkedRun, counted: Counted, bound: float
) -> tuple[CacheDifference, ...]:
    """Return the cached tensors of which a run in chunks and a single prefill differ, lowest layer first."""
    differences = []
    for entry in cache:
        errors = _cache_errors(entry, prefill.cache[entry.past.name], chunked.cache[entry.past.name])
        tokens = counted if errors.shape == counted.shape else np.ones(errors.shape, bool)
        error, row, token = worst(errors, tokens)
        if error > bound:
            difference = CacheDifference(
                layer=entry.layer,
                part=entry.part,
                present=entry.present,
                error=error,
                row=row,
                token=token,
                first_token=int(np.argwhere((errors > bound) & tokens)[:, 1].min()),
                past_changed=entry.present in chunked.changed_pasts,
                starts_with=chunked.changed_pasts.get(entry.present),
            )
            differences.append(difference)
    return tuple(sorted(differences, key=lambda difference: difference.layer))


def _cache_errors(entry: CacheIO, expected: Array, found: Array) -> npt.NDArray[np.float64]:
    batch = entry.batch_axis if entry.batch_axis is not None else int(entry.axis == 0)
    if expected.shape != found.shape:  # a size other than the length depends on the call
        return np.full((1, found.shape[entry.axis]), np.inf)
    return error_map(expected, found, batch=batch, sequence=entry.axis, scale=amplitude(expected))


def _compare_outputs(
    scenario: Scenario, expected: Mapping[str, Array], candidate: CachedDecoder, tolerance: Tolerance, run: ChunkedRun
) -> Comparison:
    """Return the comparison of all outputs that both models have: that of the worst, with the lowest agreement."""
    presents = {entry.present for entry in candidate.cache}
    result = Comparison.of(scenario, error=0.0, agreement=1.0, output=candidate.logits, row=0, token=0)
    for output in candidate.outputs:
        if not output.floating or output.name in presents or output.name not in expected:
            continue
        logits = output.name == candidate.logits
        found = _compare_output(scenario, expected[output.name], output, logits, tolerance, run)
        if found.reason is not None:
            return found
        lowest = min(found.agreement or 0.0, result.agreement or 0.0)
        largest = max(result, found, key=lambda one: (one.error or 0.0, one.output == candidate.logits))
        result = replace(largest, agreement=lowest)
    return replace(result, reason=_reason(result, tolerance))


def _compare_output(
    scenario: Scenario, whole: Array, output: ValueInfo, logits: bool, tolerance: Tolerance, run: ChunkedRun
) -> Comparison:
    """Return the comparison of one output, with a reason if its shape is wrong."""
    name, counted = output.name, scenario.mask.astype(bool)
    logits = logits and whole.ndim == 3 and whole.shape[:2] == counted.shape
    scale = spread(whole[counted]) if logits else amplitude(whole)
    largest, agreed, compared = (0.0, 0, 0), 0, 0
    calls = list(zip(run.spans, run.outputs, strict=True))
    if counted.shape[1] not in whole.shape:  # the reference gives an output for the whole text only
        calls = calls[-1:]
    for (past, total), outputs in calls:
        found = outputs[name]
        part = expected_part(whole, found.shape, past, total)
        if part is None:
            reason = f"output `{name}` has shape {list(found.shape)}, expected a part of {list(whole.shape)}"
            return Comparison.of(scenario, error=np.inf, agreement=0.0, output=name, row=0, token=past, reason=reason)
        tokens = counted[:, past:total]
        axes = token_axes(output, found.shape, tokens.shape)
        if axes is None:  # no axes of tokens: compare the array as that of one token
            part, found, axes, tokens = part.reshape(1, 1, -1), found.reshape(1, 1, -1), (0, 1), np.ones((1, 1), bool)
        errors = error_map(part, found, batch=axes[0], sequence=axes[1], scale=scale)
        largest = max(largest, worst(errors, tokens, past), key=lambda found: found[0])
        if logits:
            counts = agreement(part, found, tokens, tolerance.tie * scale)
            agreed, compared = agreed + counts[0], compared + counts[1]
    error, row, token = largest
    fraction = agreed / compared if compared else 1.0
    return Comparison.of(scenario, error=error, agreement=fraction, output=name, row=row, token=token)


def _reason(result: Comparison, tolerance: Tolerance) -> str | None:
    """Return the reason why outputs differ too much, else None."""
    error, agreed = result.error or 0.0, result.agreement or 0.0
    if not error <= tolerance.bound:
        place = f"row {result.row}, token {result.token}"
        return f"error of `{result.output}` is {error:.2g} of its spread at {place} (bound {tolerance.bound:.2g})"
    if agreed < tolerance.agreement:
        return f"the most likely token agrees at {agreed:.0%} of the tokens ({tolerance.agreement:.0%} required)"
    return None


def _concluded(
    prefill: Comparison, chunked: Comparison, differences: tuple[CacheDifference, ...], cache: Sequence[CacheIO]
) -> Comparison:
    """Return the comparison of the run in chunks, with a verdict, the faulty layer and a reason."""
    result = replace(chunked, verdict="different", prefill_error=prefill.error, cache_differences=differences)
    if not (prefill.reason or chunked.reason or differences):
        return replace(result, verdict="same")
    reason = chunked.reason or prefill.reason or "the outputs agree, the cache does not"
    if prefill.reason and not differences:
        return replace(result, reason=f"{reason}; already in a single prefill")
    layer, cause = locate_fault(differences, cache)
    return replace(result, layer=layer, reason=f"{reason}; {cause}")
