"""Comparison of a candidate with its reference on one text: outputs, and the cache of chunks and a single prefill.

A candidate that declares to take sequences of different lengths in one batch is also compared on such a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvsurgeon.errors import RunError
from kvsurgeon.parity.arithmetic.rounding import ReferenceNoise
from kvsurgeon.parity.arithmetic.tolerance import Tolerance
from kvsurgeon.parity.chunked_run import ChunkedRun, run_in_chunks
from kvsurgeon.parity.difference import distance, error_map, scale_of, spread, worst
from kvsurgeon.parity.fault_location import locate_fault
from kvsurgeon.parity.output_comparison import Counted, OutputComparer, ReferenceRuns
from kvsurgeon.parity.reference_model import ReferenceModel
from kvsurgeon.parity.report import CacheDifference, Comparison
from kvsurgeon.parity.scenarios import Scenario
from kvsurgeon.runtime import AnyDecoder, Array, CachedDecoder, CacheIO, ContinuousBatch

UNSTABLE = "the reference model's outputs differ between one call and several"
_PREFILL = 200  # tokens of a text that is also run in a single prefill, to compare the caches
SUMS = 8  # largest error of all texts, of the noise that a few runs show
_CANCELLED = 0.1  # error up to which a token may be one at which sums cancel out
_MOST = 0.75  # of the tokens of a text, which must be stable
_PROMPTS = (5, 1, 9)  # tokens of each sequence of a ragged batch in its first call
_RAGGED_CALLS = ((1, 1, 1), (3, 1, 2), (1, 4, 1))  # new tokens of each in one call
_BACK = 2  # tokens by which the first sequence goes back before the last call
_RAGGED = 16  # tokens of each, with room for the padding of chunks
_NEXT = (1, 15, 16, 17)  # differences of the next numbers of 8 bits, or of 4 in either or both halves of a byte
_ROUNDED_OTHERWISE = 0.01  # of the elements of an integer cache: sums in another order are rounded to the next number


def compare(
    scenario: Scenario,
    noise: ReferenceNoise,
    candidate: AnyDecoder,
    tolerance: Tolerance,
    tokens: Counted | None = None,
) -> Comparison:
    """Compare both models on the text of a scenario, or on some tokens of it; a difference is returned, not raised."""
    reference, blank = noise.reference, Comparison.of(scenario)
    try:
        expected = reference.run(scenario, in_calls=bool(candidate.cache))
        counted = expected.numbers(reference.main) & scenario.mask.astype(bool)
        counted = counted if tokens is None else counted & tokens
        if not counted.any():
            return replace(blank, reason=f"the reference model's `{reference.main}` are not numbers")
        if not reference.padding_stable(expected):
            return replace(blank, reason="the reference model treats padding differently if other tokens follow")
        outputs = OutputComparer(
            scenario=scenario,
            counted=counted,
            runs=ReferenceRuns(noise=noise, whole=expected),
            candidate=candidate,
            tolerance=tolerance,
        )
        result = _Comparer(outputs=outputs, reference=reference, candidate=candidate).run()
        if result.verdict == "different" and expected.in_calls and not reference.call_stable(expected):
            return replace(blank, reason=UNSTABLE)
    except RunError as error:
        return replace(blank, reason=f"the reference model fails: {error}")
    return result


def without_unstable_tokens(
    found: Comparison, scenario: Scenario, noise: ReferenceNoise, candidate: AnyDecoder, tolerance: Tolerance
) -> Comparison:
    """Return a comparison, or one of the stable tokens of its text, if the models differ at a few others only.

    At an unstable token, rounding alone moves the logits of the reference by an eighth of the bound or more.
    """
    if found.verdict != "different" or found.error is None or found.error > _CANCELLED:
        return found
    stable = noise.stable_tokens(scenario, tolerance.bound / SUMS)
    if stable is None or not _MOST <= stable.mean() < 1:
        return found
    again = compare(scenario, noise, candidate, tolerance, stable)
    return replace(again, left_out=int((~stable).sum())) if again.verdict == "same" else found


def ragged_scenario(reference: ReferenceModel, candidate: AnyDecoder, random: np.random.Generator) -> Scenario | None:
    """Return the text of sequences of different lengths that share a batch; None if they cannot share one."""
    if not isinstance(candidate, CachedDecoder) or not candidate.takes_ragged_batches or reference.single_row:
        return None
    if candidate.batch is not None or reference.lengths.long < _RAGGED:
        return None
    tokens = random.integers(0, reference.vocabulary, (len(_PROMPTS), _RAGGED))
    chunks = (max(_PROMPTS), *map(max, _RAGGED_CALLS))
    return Scenario(name="ragged batch", tokens=tokens, mask=np.ones_like(tokens), chunks=chunks)


def compare_ragged(scenario: Scenario, reference: ReferenceModel, candidate: CachedDecoder, bound: float) -> Comparison:
    """Compare the logits of sequences that share a batch with those of each alone."""
    try:
        error = _ragged_error(reference, candidate, scenario)
    except RunError as failure:
        return Comparison.of(scenario, verdict="different", reason=f"a batch of different lengths failed: {failure}")
    found = Comparison.of(scenario, verdict="same", error=error)
    reason = f"sequences of different lengths in one batch differ by {error:.2g} from each alone"
    return found if error <= bound else replace(found, verdict="different", reason=reason)


def _ragged_error(reference: ReferenceModel, candidate: CachedDecoder, scenario: Scenario) -> float:
    """Return the largest difference of logits, divided by the spread of the reference's."""
    batch = ContinuousBatch(candidate.session, rows=len(_PROMPTS), capacity=_RAGGED)
    whole = np.concatenate([reference.outputs(row[None]) for row in scenario.tokens])
    scale, errors, takes_chunks = spread(whole), [], candidate.takes_ragged_chunks
    for number, count in enumerate(_PROMPTS):
        _, logits = batch.start(scenario.tokens[number, :count].tolist())
        errors.append(distance(whole[number, count - len(logits) : count], logits, scale))
        takes_chunks = takes_chunks and len(logits) == count  # the last token of a chunk may be padding
    for call, counts in enumerate(_RAGGED_CALLS):
        if call == len(_RAGGED_CALLS) - 1 and batch.lengths[0] <= batch.shortenable:
            batch.shorten(0, batch.lengths[0] - _BACK)
        parts = {}
        for number, count in enumerate(counts if takes_chunks else (1,) * len(counts)):
            start = batch.lengths[number]
            parts[number] = scenario.tokens[number, start : start + count].tolist()
        for number, logits in batch.advance(parts).items():
            end = batch.lengths[number]
            errors.append(distance(whole[number, end - len(logits) : end], logits, scale))
    return max(errors)


def compare_caches(
    cache: Sequence[CacheIO], prefill: ChunkedRun, chunked: ChunkedRun, counted: Counted, bound: float
) -> tuple[CacheDifference, ...]:
    """Return the cached tensors that differ, lowest layer first.

    They differ between a run in chunks and a single prefill, or a present does not start with its past: cached keys and
    values are copied, not computed.
    """
    differences = []
    for entry in cache:
        errors = _cache_errors(entry, prefill.cache[entry.past.name], chunked.cache[entry.past.name])
        tokens = np.ones(errors.shape, bool) if entry.is_fixed else _counted_rows(counted, errors.shape)
        error, row, token = worst(errors, tokens)
        changed = entry.present in chunked.changed_pasts
        if error > bound or (changed and entry.part != "state"):
            wrong = (errors > bound) & tokens
            difference = CacheDifference(
                layer=entry.layer,
                part=entry.part,
                present=entry.present,
                error=error,
                row=row,
                token=token,
                first_token=int(np.argwhere(wrong)[:, 1].min()) if wrong.any() else 0,
                past_changed=changed,
                starts_with=chunked.changed_pasts.get(entry.present),
            )
            differences.append(difference)
    return tuple(sorted(differences, key=lambda difference: difference.layer))


def _counted_rows(counted: Counted, shape: tuple[int, ...]) -> Counted:
    """Return which rows of a cache to compare, `[batch, rows]`: of fewer rows than tokens, the last ones are kept.

    Before these there may be rows of the first tokens, so both tokens that a row may hold must be counted.
    """
    if len(counted) != shape[0] or shape[1] > counted.shape[1]:
        return np.ones(shape, bool)
    return counted[:, : shape[1]] & counted[:, counted.shape[1] - shape[1] :]


def _cache_errors(entry: CacheIO, expected: Array, found: Array) -> npt.NDArray[np.float64]:
    batch = entry.batch_axis if entry.batch_axis is not None else int(entry.axis == 0)
    if expected.shape != found.shape:  # a size other than the length depends on the call
        return np.full((1, found.shape[entry.axis]), np.inf)
    if expected.dtype.kind in "iu":
        is_next = np.isin(np.abs(expected.astype(np.int64) - found), _NEXT)
        found = np.where(is_next, expected, found) if is_next.mean() <= _ROUNDED_OTHERWISE else found
    scale = scale_of(expected, (batch, entry.axis))
    if entry.part == "recurrent_state":  # sums over all tokens, which cancel out: rounding is that of the largest
        largest = np.abs(np.where(np.isfinite(expected), expected, 0)).max(
            axis=(-2, -1)[-expected.ndim + 1 :], keepdims=True
        )
        scale = np.maximum(scale, largest)
    return error_map(expected, found, batch=batch, sequence=entry.axis, scale=scale)


@dataclass(frozen=True, kw_only=True)
class _Comparer:
    """A comparison of both models on one text.

    Attributes:
        outputs: The comparison of outputs.
        reference: The reference model.
        candidate: The candidate model.
    """

    outputs: OutputComparer
    reference: ReferenceModel
    candidate: AnyDecoder

    def run(self) -> Comparison:
        """Return the comparison of the run in chunks and, if need be, of a single prefill."""
        scenario, candidate = self.outputs.scenario, self.candidate
        count_padding = candidate.inputs.positions_not_in(self.reference.inputs)
        feeds = candidate.inputs.feeds(
            scenario.tokens, scenario.mask, token_types=self.reference.token_types, count_padding=count_padding,
            block=scenario.chunks[0],
        )  # fmt: skip
        chunked = run_in_chunks(candidate, feeds, scenario.spans)
        if chunked.failure:
            return self._failed(chunked)
        found = self.outputs.compare(chunked)
        suspicious = found.reason or chunked.changed_pasts or scenario.tokens.size <= _PREFILL
        if not candidate.cache or len(scenario.chunks) == 1 or not suspicious:
            single = "; already in a single prefill" if len(scenario.chunks) == 1 else ""
            reason = found.reason and f"{found.reason}{single}"
            return replace(found, verdict="different" if reason else "same", reason=reason, prefill_error=found.error)
        prefill = run_in_chunks(candidate, feeds, [(0, scenario.tokens.shape[1])])
        if prefill.failure:
            return self._failed(prefill)
        whole = found if self.outputs.runs.whole.in_calls else self.outputs.compare(prefill)
        differences = compare_caches(
            candidate.cache, prefill, chunked, self.outputs.counted, self.outputs.tolerance.bound
        )
        return _concluded(whole, found, differences, candidate.cache)

    def _failed(self, run: ChunkedRun) -> Comparison:
        return Comparison.of(self.outputs.scenario, verdict="different", reason=run.failure, layer=run.layer)


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
