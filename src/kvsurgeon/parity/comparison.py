"""Comparison of a candidate with its reference on one text: outputs, and the cache of chunks and a single prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvsurgeon.errors import RunError
from kvsurgeon.parity.chunked_run import ChunkedRun, run_in_chunks
from kvsurgeon.parity.difference import agreement, error_map, scale_of, worst
from kvsurgeon.parity.fault_location import locate_fault
from kvsurgeon.parity.reference_model import ReferenceModel
from kvsurgeon.parity.reference_outputs import ReferenceOutputs
from kvsurgeon.parity.report import CacheDifference, Comparison
from kvsurgeon.parity.scenarios import Scenario
from kvsurgeon.parity.tolerance import Tolerance
from kvsurgeon.runtime import AnyDecoder, Array, CachedDecoder, CacheIO, ValueInfo
from kvsurgeon.runtime.axes import axes_of, token_axes

Counted = npt.NDArray[np.bool_]  # [batch, sequence]: tokens that are no padding and have numbers

UNSTABLE = "the reference model's outputs differ between one call and several"
_PREFILL = 200  # tokens of a text that is also run in a single prefill, to compare the caches


def compare(scenario: Scenario, reference: ReferenceModel, candidate: AnyDecoder, tolerance: Tolerance) -> Comparison:
    """Compare both models on the text of a scenario; a difference is returned, not raised."""
    blank = Comparison.of(scenario)
    try:
        expected = reference.run(scenario, in_calls=isinstance(candidate, CachedDecoder))
        counted = expected.numbers(reference.main) & scenario.mask.astype(bool)
        if not counted.any():
            return replace(blank, reason=f"the reference model's `{reference.main}` are not numbers")
        if not reference.padding_stable(expected):
            return replace(blank, reason="the reference model treats padding differently if other tokens follow")
        comparer = _Comparer(
            scenario=scenario,
            counted=counted,
            expected=expected,
            reference=reference,
            candidate=candidate,
            tolerance=tolerance,
        )
        result = comparer.run()
        if result.verdict == "different" and expected.in_calls and not reference.call_stable(expected):
            return replace(blank, reason=UNSTABLE)
    except RunError as error:
        return replace(blank, reason=f"the reference model fails: {error}")
    return result


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
        tokens = counted if errors.shape == counted.shape else np.ones(errors.shape, bool)
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


def _cache_errors(entry: CacheIO, expected: Array, found: Array) -> npt.NDArray[np.float64]:
    batch = entry.batch_axis if entry.batch_axis is not None else int(entry.axis == 0)
    if expected.shape != found.shape:  # a size other than the length depends on the call
        return np.full((1, found.shape[entry.axis]), np.inf)
    scale = scale_of(expected, (batch, entry.axis))
    return error_map(expected, found, batch=batch, sequence=entry.axis, scale=scale)


@dataclass(frozen=True, kw_only=True)
class _Comparer:
    """A comparison of both models on one text.

    Attributes:
        scenario: The text.
        counted: Tokens to compare.
        expected: Outputs of the reference.
        reference: The reference model.
        candidate: The candidate model.
        tolerance: Allowed difference.
    """

    scenario: Scenario
    counted: Counted
    expected: ReferenceOutputs
    reference: ReferenceModel
    candidate: AnyDecoder
    tolerance: Tolerance

    def run(self) -> Comparison:
        """Return the comparison of the run in chunks and, if need be, of a single prefill."""
        scenario, candidate = self.scenario, self.candidate
        count_padding = candidate.inputs.positions_not_in(self.reference.inputs)
        feeds = candidate.inputs.feeds(
            scenario.tokens, scenario.mask, token_types=self.reference.token_types, count_padding=count_padding
        )
        chunked = run_in_chunks(candidate, feeds, scenario.spans)
        if chunked.failure:
            return self._failed(chunked)
        found = self._outputs(chunked)
        suspicious = found.reason or chunked.changed_pasts or scenario.tokens.size <= _PREFILL
        if not isinstance(candidate, CachedDecoder) or len(scenario.chunks) == 1 or not suspicious:
            single = "; already in a single prefill" if len(scenario.chunks) == 1 else ""
            reason = found.reason and f"{found.reason}{single}"
            return replace(found, verdict="different" if reason else "same", reason=reason, prefill_error=found.error)
        prefill = run_in_chunks(candidate, feeds, [(0, scenario.tokens.shape[1])])
        if prefill.failure:
            return self._failed(prefill)
        whole = found if self.expected.in_calls else self._outputs(prefill)
        differences = compare_caches(candidate.cache, prefill, chunked, self.counted, self.tolerance.bound)
        return _concluded(whole, found, differences, candidate.cache)

    def _failed(self, run: ChunkedRun) -> Comparison:
        return Comparison.of(self.scenario, verdict="different", reason=run.failure, layer=run.layer)

    def _outputs(self, run: ChunkedRun) -> Comparison:
        """Return the comparison of all outputs that both models have: that of the worst, with the lowest agreement."""
        main = self.reference.main
        result = Comparison.of(self.scenario, error=0.0, agreement=1.0, output=main, row=0, token=0)
        declared = {output.name: output for output in self.reference.decoder.outputs}
        for output in self.candidate.outputs:
            if output.name not in self.expected.names or output.dtype is None:
                continue
            other = declared[output.name]
            found = self._output(output, _last_token_axis(output, other), run)
            if found.reason is not None:
                return found
            lowest = min(found.agreement or 0.0, result.agreement or 0.0)
            largest = max(result, found, key=lambda one: (one.error or 0.0, one.output == main))
            result = replace(largest, agreement=lowest)
        return replace(result, reason=_reason(result, self.tolerance))

    def _output(self, output: ValueInfo, last: int | None, run: ChunkedRun) -> Comparison:
        """Return the comparison of one output, with a reason if it is wrong already."""
        name, basis = output.name, self.expected.basis(output.name)
        scale = scale_of(basis, _feature_axes(output, basis.shape, self.expected.size))
        logits = name == self.reference.main and output.floating and basis.ndim == 3
        largest, agreed, compared = (0.0, 0, 0), 0, 0
        calls = list(enumerate(zip(run.spans, run.outputs, strict=True)))
        for call, ((past, total), outputs) in calls if self.expected.follows_calls(name) else calls[-1:]:
            found = self.expected.by_rows(name, outputs[name], total - past, total)
            is_last = last is not None and found.shape[last] == 1 < min(total - past, basis.shape[last])
            part = self.expected.part(name, call, found.shape, (past, total), last if is_last else None)
            if part is None:
                whole = list(self.expected.basis(name).shape)
                reason = f"output `{name}` has shape {list(found.shape)}, expected a part of {whole}"
                return self._wrong(name, past, reason)
            tokens = self.counted[:, total - 1 if is_last else past : total]
            axes = token_axes(output, found.shape, tokens.shape)
            if axes is None:  # no axes of tokens: compare the array as that of one token
                part, found, axes, tokens = (
                    part.reshape(1, 1, -1),
                    found.reshape(1, 1, -1),
                    (0, 1),
                    np.ones((1, 1), bool),
                )
            by_feature = scale if part.ndim == basis.ndim else float(np.max(scale))
            errors = error_map(part, found, batch=axes[0], sequence=axes[1], scale=by_feature)
            largest = max(largest, worst(errors, tokens, past), key=lambda found: found[0])
            if logits:
                counts = agreement(part, found, tokens, self.tolerance.tie * float(np.min(scale)))
            else:
                counts = int(((errors == 0) & tokens).sum()), int(tokens.sum())
            agreed, compared = agreed + counts[0], compared + counts[1]
        error, row, token = largest
        fraction = agreed / compared if compared else 1.0
        if not output.floating:
            if fraction < self.tolerance.agreement or (error and compared <= len(run.spans)):
                reason = f"`{name}` differs at {1 - fraction:.0%} of the tokens, such as row {row}, token {token}"
                return self._wrong(name, token, reason)
            return Comparison.of(self.scenario, error=0.0, agreement=fraction, output=name, row=row, token=token)
        agreement_of = fraction if logits else 1.0
        return Comparison.of(self.scenario, error=error, agreement=agreement_of, output=name, row=row, token=token)

    def _wrong(self, name: str, token: int, reason: str) -> Comparison:
        return Comparison.of(self.scenario, error=np.inf, agreement=0.0, output=name, row=0, token=token, reason=reason)


def _last_token_axis(output: ValueInfo, reference: ValueInfo) -> int | None:
    """Return the axis along which the candidate declares one element, and the reference one for each token."""
    pairs = list(zip(output.dims, reference.dims, strict=False))[1:]
    return next((axis for axis, (own, other) in enumerate(pairs, 1) if own == 1 and other != 1), None)


def _feature_axes(output: ValueInfo, shape: Sequence[int], size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the batch and the sequence axis of an output whose other axes are features."""
    axes = token_axes(output, shape, size)
    keys = {"total", "max", "past"} & set(axes_of(output))
    return axes if axes is not None and output.floating and not keys and size[1] not in shape[2:] else None


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
