"""Causality of attention: no query gives weight to a later key, however the weights are computed from the scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.attention.attention_weights import weights_of_mask, weights_of_product
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.mask_patterns import first_half
from kvsurgeon.analysis.probe_inputs import AMPLIFIED
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.proof.attention.attention_conditions import check_conditions
from kvsurgeon.proof.attention.attention_inputs import check_batches, check_numbers
from kvsurgeon.proof.attention.attention_masks import check_content_masks, check_masks
from kvsurgeon.proof.attention.attention_pattern import MIN_WEIGHT, AttentionPattern, is_attended
from kvsurgeon.proof.attention.attention_probe import AttentionProbe, not_causal
from kvsurgeon.proof.attention.attention_rows import RowResults, check_rows
from kvsurgeon.proof.first_call import check_first_call
from kvsurgeon.proof.key_reductions import check_key_reductions, normalizes_before_mask
from kvsurgeon.proof.length_sweep import MIN_USEFUL_LENGTH, LengthSweep


def check_causality(
    sweep: LengthSweep, layer: int, site: AttentionSite, reductions: Sequence[ir.Value]
) -> AttentionPattern:
    """Return the attention pattern of an attention that is causal and prefix stable.

    Args:
        sweep: The length sweep of the decoder.
        layer: Index of the attention layer, for messages.
        site: The attention.
        reductions: Other values reduced from the scores over keys; see `other_reductions`.

    Raises:
        UnsupportedError: A query attends to a later key, or the pattern depends on the total length.
    """
    if site.fused is not None:
        return _check_fused(sweep, layer, site)
    if (other := site.read_otherwise()) is not None:
        raise UnsupportedError(
            "the mask compares tokens with each other and with numbers, which would have to be the right ones",
            code=Code.TOKEN_DEPENDENT_MASK, layer=layer, at=other.name, expected="comparisons of tokens alone",
        )  # fmt: skip
    patterns = []
    for product in site.products:
        values, read = weights_of_product(sweep.flow, product)
        has_rows = any(axis.learned_rows for axis in sweep.flow.axes[values[0]])
        probe = AttentionProbe(
            sweep, layer, site, values, read, reductions=reductions, learned=values[0] if has_rows else None
        )
        patterns.append(_check_probe(probe))
    check_key_reductions(sweep, layer, site)
    return patterns[0]


def other_reductions(sweep: LengthSweep, site: AttentionSite) -> list[ir.Value]:
    """Return sums and extrema of the scores over keys that are not weights; they must be masked as weights are."""
    if site.fused is not None:
        return []
    variable, nodes = site.products[0].variable.root(), site.upstream_of_weights
    return [
        node.outputs[0] for node, keys in sweep.flow.mixes_keys.items() if keys.root() is variable and node not in nodes
    ]


def _check_fused(sweep: LengthSweep, layer: int, site: AttentionSite) -> AttentionPattern:
    """Check the mask of a fused operator."""
    assert site.fused is not None
    mask, read, _ = weights_of_mask(sweep.flow, site)
    if not mask:
        if not site.fused.inputs.causal:
            raise not_causal(layer, site, "it has no mask")
        length = max(sweep.attention_lengths(site))
        return AttentionPattern(weights=np.tril(np.ones((length, length))))
    return _check_probe(AttentionProbe(sweep, layer, site, mask, read))


def _check_probe(probe: AttentionProbe) -> AttentionPattern:
    """Return the attention pattern after checking it at all lengths and with all masks.

    Raises:
        UnsupportedError: A query attends to a later key, or the pattern depends on the total length.
    """
    lengths = probe.sweep.attention_lengths(probe.site)
    check_content_masks(probe, lengths)
    check_conditions(probe, max(lengths))
    outputs, limit = _prefix_stable(probe, probe.sweep.run(lengths, probe.run))
    rows = RowResults(checked=max(outputs), limit=limit)
    if limit is None and probe.sweep.fixed is None:
        rows = check_rows(probe, rows.checked)
    weights = {length: arrays[0] for length, arrays in outputs.items()}
    longest = max(weights)
    padded_weights, leaking, attended, reach = check_masks(probe, weights)
    _check_amplified_keys(probe, weights[longest])
    check_batches(probe, longest)
    opens_block = check_first_call(probe, lengths)
    check_numbers(probe, longest)
    if probe.sweep.fixed is not None:
        _check_fixed_length(probe, weights[longest])
    return AttentionPattern(
        weights=weights[longest], padded_weights=padded_weights, uniform_weights=_check_scales(probe, longest),
        leaking=leaking, attended=attended, reach=reach, limit=rows.limit, rows=rows.weights,
        reduced=bool(probe.others), checked=rows.checked, rows_leak=rows.leak, rows_attend=rows.attend,
        opens_block=opens_block,
    )  # fmt: skip


def _prefix_stable(
    probe: AttentionProbe, outputs: dict[int, list[np.ndarray]]
) -> tuple[dict[int, list[np.ndarray]], int | None]:
    """Return the outputs at the lengths at which every prefix is the same, and the longest if others were dropped.

    Raises:
        UnsupportedError: The outputs differ at lengths below the minimum useful length.
    """
    refusal: UnsupportedError | None = None
    while True:
        try:
            probe.check_lengths(outputs)
        except UnsupportedError as error:
            refusal = refusal or error
            outputs = {length: arrays for length, arrays in outputs.items() if length < max(outputs)}
            if max(outputs, default=0) < MIN_USEFUL_LENGTH:
                raise refusal from None
        else:
            probe.sweep.add_failure(max(outputs), refusal)
            return outputs, None if refusal is None else max(outputs)


def _check_amplified_keys(probe: AttentionProbe, weights: np.ndarray) -> None:
    """Check that the weights of queries are the same if the scores of later keys are much larger."""
    if not probe.runner.probed:
        return
    length, scale = weights.shape[-1], 1.0
    if normalizes_before_mask(probe.sweep.flow, probe.site):
        scale = 0.01  # at which the weights of earlier keys do not underflow
        weights = probe.run(length, scale=scale)[0]
    for count in (1, length // 2):
        tokens = np.arange(length)
        amplified_tokens = np.where(tokens < count, tokens, tokens + AMPLIFIED)
        amplified = probe.run(length, tokens=amplified_tokens, scale=scale)[0][..., :count, :]
        later = np.abs(amplified[..., count:]).max(initial=0.0)
        if not np.isnan(amplified).any() and later <= MIN_WEIGHT:  # the mask holds
            probe.check_stable(weights[..., :count, :count], amplified[..., :count])


def _check_fixed_length(probe: AttentionProbe, weights: np.ndarray) -> None:
    """Check what a sweep would: every query has a key, and masking the second half does not change the first."""
    if not is_attended(weights).any(axis=-1).all():
        reason = "a query gives no weight to any key, and a fixed length hides whether later keys are the cause"
        raise probe.unsupported(reason, Code.FIXED_LENGTH, hint="export with a dynamic length")
    if probe.runner.masks:
        length = weights.shape[-1]
        half = length // 2
        masked = probe.run(length, first_half)[0]
        probe.check_stable(weights[..., :half, :half], masked[..., :half, :half])


def _check_scales(probe: AttentionProbe, length: int) -> np.ndarray | None:
    """Check causality with the largest scores that give finite weights; return the weights for equal scores."""
    if not probe.runner.probed:
        return None
    for scale in (probe.largest_scale(length), *probe.scales_of_compared):
        probe.check_causal(probe.run(length, scale=scale)[0])
    equal = probe.run(length, scale=0.0)[0]
    probe.check_causal(np.nan_to_num(equal))  # a bound or a sum of equal scores may be 0, and divide by it
    return equal
