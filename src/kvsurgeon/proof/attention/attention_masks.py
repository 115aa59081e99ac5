"""Masked tokens: what attention weights are if inputs mask tokens, and if tokens hide their keys by their content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np

from kvsurgeon.analysis.mask_patterns import (
    LEFT_PADDING,
    MaskPattern,
    all_masked,
    is_close,
    left_padded,
    padded_until,
    unmasked,
    with_gaps,
)
from kvsurgeon.analysis.probe_inputs import Rows
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.proof.attention.attention_pattern import (
    MIN_WEIGHT,
    attended_keys,
    attends_to_all,
    largest_weight_on_later_key,
    leaking_queries,
    longest_reach,
    queries_without_key,
)
from kvsurgeon.proof.attention.attention_probe import AttentionProbe
from kvsurgeon.proof.content_masks import hiding_feeds
from kvsurgeon.proof.row_runner import RowRunner


def check_masks(
    probe: AttentionProbe, weights: Mapping[int, np.ndarray]
) -> tuple[np.ndarray | None, dict[MaskPattern, np.ndarray], dict[MaskPattern, np.ndarray], int]:
    """Check the weights with every input that masks tokens, and that sequences do not mask each other.

    Args:
        probe: The probe of the attention.
        weights: For each length: [..., query, key], the weights with no token masked.

    Returns:
        The parts of an `AttentionPattern`: the weights with left padding, the tokens that leak, those attended,
        and the reach.
    """
    padded_weights, reach = None, 0
    leaking: dict[MaskPattern, np.ndarray] = {}
    attended: dict[MaskPattern, np.ndarray] = {}
    for mask, only_input in _maskings(probe):
        masked, leaks = _masked_weights(probe, weights, mask, only_input)
        leaking[mask] = leaks | leaking.get(mask, False)
        keys = _attended_masked_keys(probe, masked, mask, only_input)
        attended[mask] = keys | attended.get(mask, False)
        padded_weights = masked if padded_weights is None else padded_weights
        reach = max(reach, longest_reach(masked, mask(masked.shape[-1])))
    _check_sequences(probe, weights[max(weights)])
    return padded_weights, leaking, attended, reach


def _maskings(probe: AttentionProbe) -> Iterator[tuple[MaskPattern, InputRole | None]]:
    """Yield mask patterns for all mask inputs together (None), and for each alone."""
    masks = [given for given in probe.runner.masks if given.lengths]
    if masks:
        yield from ((left_padded, None), (with_gaps, None))
    if len(masks) > 1:
        yield from ((with_gaps, given) for given in masks)


def _masked_weights(
    probe: AttentionProbe, weights: Mapping[int, np.ndarray], mask: MaskPattern, only_input: InputRole | None
) -> tuple[np.ndarray, np.ndarray]:
    """Check the weights with masked tokens.

    Returns:
        The weights at the longest length, 0 for queries without a key, and [query] of bool: those that leak.
    """
    longest = max(weights)
    masked = {length: probe.run(length, mask, only_input=only_input)[0] for length in weights}
    _check_finite(probe, masked)
    masked = {length: array for length, array in masked.items() if mask(length).sum() > 1 or length == longest}
    to_all = attends_to_all(masked[longest])
    without_key = {
        length: queries_without_key(weights[length], to_all[..., :length, :], mask(length)) for length in masked
    }
    leaks = leaking_queries(masked[longest], without_key[longest])
    masked = {length: np.where(without_key[length], 0.0, array) for length, array in masked.items()}
    for length, array in masked.items():
        probe.check_causal(array)
        probe.check_stable(masked[longest][..., :length, :length], array)
    return masked[longest], leaks


def check_masked_rows(
    probe: AttentionProbe, runner: RowRunner, rows: Rows, weights: np.ndarray, *, stable: bool
) -> tuple[bool, bool]:
    """Check rows of the weights of a long text with masked tokens, as `check_masks` checks all rows of short texts.

    Args:
        probe: The probe of the attention.
        runner: Computes the rows.
        rows: The rows.
        weights: [..., query, key], the weights of the rows for equal scores with no token masked.
        stable: Whether the rows are known to be the same without later tokens.

    Returns:
        Whether a masked query without a key attends to later keys, and whether masked keys are attended to.
    """

    def weights_of(
        of_rows: Rows, mask: MaskPattern = unmasked, sequence: int | None = None, scale: float = 0.0
    ) -> np.ndarray:
        return probe.compared(runner.run(of_rows, mask, scale=scale, only_sequence=sequence), of_rows)[0]

    alone = Rows(rows.start, rows.stop, rows.stop)
    leaks = attends = False
    before = {max(2, rows.start - 1), max(2, rows.start)}  # leave each row a key
    padding = {*before, rows.stop + 2, *([] if stable else [2])}  # little of it leaves most tokens
    for mask in (with_gaps, *map(padded_until, sorted(padding))):
        visible = mask(rows.total)
        masked = weights_of(rows, mask)
        to_all = attends_to_all(masked, rows.start)
        without_key = queries_without_key(weights, to_all, visible, rows.start)
        leaks |= bool(leaking_queries(masked, without_key, rows.start).any())
        masked = np.where(without_key, 0.0, masked)
        probe.check_causal(masked, rows.start)
        attends |= bool((attended_keys(masked) & ~visible).any())
        if not stable:
            for scale in (0.0, 1.0):
                longer, shorter = (
                    np.where(without_key, 0.0, weights_of(one, mask, scale=scale)) for one in (rows, alone)
                )
                probe.check_stable(longer[..., : rows.stop], shorter)
    padded = (left_padded, *map(padded_until, sorted(before))) if rows.start >= LEFT_PADDING else ()
    for sequence, mask in product(probe.runner.maskable_sequences, padded):  # tokens of a padded sequence alone
        longer = weights_of(rows, mask, sequence, scale=1.0)
        probe.check_causal(longer, rows.start)
        if not stable:
            probe.check_stable(longer[..., : rows.stop], weights_of(alone, mask, sequence, scale=1.0))
    return leaks, attends


def _check_finite(probe: AttentionProbe, masked: Mapping[int, np.ndarray]) -> None:
    """Check that no query has weights that are NaN unless later tokens follow, masked queries included.

    Their keys and values would be NaN in the cache, which unmasked tokens read with a weight of 0.
    """
    invalid = {length: np.isnan(array).any(axis=-1) for length, array in masked.items()}  # [..., query]
    whole = invalid[max(invalid)]
    for length, of_queries in invalid.items():
        if (of_queries & ~whole[..., :length]).any():
            raise UnsupportedError(
                "attention weights of masked tokens are NaN unless later tokens follow", code=Code.PADDING_LEAK,
                layer=probe.layer, at=probe.site.at.name, expected="numbers for padding alone",
                found=f"NaN in a text of {length} tokens", hint="a mask that later rows are added to is a common cause",
            )  # fmt: skip


def _attended_masked_keys(
    probe: AttentionProbe, weights: np.ndarray, mask: MaskPattern, only_input: InputRole | None
) -> np.ndarray:
    """Return [token] of bool: masked tokens that attention gives weight to, or that another reduction reads."""
    length = weights.shape[-1]
    visible = mask(length)
    attended = attended_keys(weights) & ~visible
    if probe.others:
        replaced = np.where(visible, np.arange(length), np.arange(length) + length)
        before, after = (
            probe.run(length, mask, only_input=only_input, tokens=tokens)[1:] for tokens in (None, replaced)
        )
        for (_, axes), *arrays in zip(probe.others, before, after, strict=True):
            for place in range(1, len(axes) + 1):
                arrays = [array.take(np.flatnonzero(visible), axis=-place) for array in arrays]
            if not is_close(*arrays):
                return attended | ~visible
    return attended


def _check_sequences(probe: AttentionProbe, weights: np.ndarray) -> None:
    """Check that a mask of one sequence of a batch does not change the weights of another."""
    length = weights.shape[-1]
    changed = [
        probe.run(length, with_gaps, only_sequence=sequence)[0] != weights
        for sequence in probe.runner.maskable_sequences
    ]
    if changed and (np.logical_and.reduce(changed).any() or len({one.any() for one in changed}) > 1):
        reason = "the mask of one sequence changes another sequence of the batch"
        raise probe.unsupported(reason, Code.BATCH_LEAK, hint="export with a batch of 1")


def check_content_masks(probe: AttentionProbe, lengths: Sequence[int]) -> None:
    """Check that attention is causal whichever tokens hide their keys by their content.

    Raises:
        UnsupportedError: A query without a key attends to later keys, or to another number of them.
    """
    feeds = dict(probe.runner.feeds)
    for hiding in hiding_feeds(probe.sweep.flow, probe.site):
        for name, feed in hiding.items():
            probe.runner.inputs.give(name, feed)
        longest, *others = (probe.run(length)[0] for length in sorted(lengths, reverse=True)[:2])
        _check_hidden(probe, next(iter(hiding)), longest, *others)
    for name, feed in feeds.items():
        probe.runner.inputs.give(name, feed)


def check_content_masks_in_rows(probe: AttentionProbe, runner: RowRunner, rows: Rows) -> None:
    """Check that rows of a long text are causal if all tokens hide their keys by their content.

    Raises:
        UnsupportedError: A query without a key attends to later keys, or to another number of them.
    """
    feeds, alone = dict(runner.inputs.feeds), Rows(rows.start, rows.stop, rows.stop)
    for hiding in hiding_feeds(probe.sweep.flow, probe.site, [all_masked]):
        for name, feed in hiding.items():
            runner.inputs.give(name, feed)
        longer, shorter = (probe.compared(runner.run(one), one)[0] for one in (rows, alone))
        _check_hidden(probe, next(iter(hiding)), longer, shorter, first_query=rows.start)
    for name, feed in feeds.items():
        runner.inputs.give(name, feed)


def _check_hidden(
    probe: AttentionProbe, mask: str, longest: np.ndarray, *others: np.ndarray, first_query: int = 0
) -> None:
    """Check the weights with keys that are hidden by the tokens' content, at some lengths."""
    weights, *shorter = (np.nan_to_num(one) for one in (longest, *others))
    weight, query, _ = largest_weight_on_later_key(weights, first_query)
    if weight > MIN_WEIGHT or not all(is_close(weights[..., : o.shape[-2], : o.shape[-1]], o) for o in shorter):
        raise UnsupportedError(
            "the mask is computed from the tokens, and a query may have no key that it leaves",
            code=Code.TOKEN_DEPENDENT_MASK, layer=probe.layer, at=mask, expected="no weight on keys after the query",
            found=f"{weight:.2g} of query {query}", hint="export with the mask as an input",
        )  # fmt: skip
