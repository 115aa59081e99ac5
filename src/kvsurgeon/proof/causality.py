"""Causality of attention: no query gives weight to a later key, however the weights are computed from the scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.attention.attention_weights import ReadWeights, weights_of_mask, weights_of_product
from kvsurgeon.analysis.attention.mask_forms import MANY
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.mask_patterns import (
    MaskPattern,
    first_half,
    is_close,
    learned_rows_first,
    left_padded,
    sequence_last,
    unmasked,
    with_gaps,
)
from kvsurgeon.analysis.probe_inputs import AMPLIFIED, Rows
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.proof.attention_pattern import (
    MIN_WEIGHT,
    AttentionPattern,
    attended_keys,
    attends_to_all,
    is_attended,
    largest_weight_on_later_key,
    leaking_queries,
    queries_without_key,
)
from kvsurgeon.proof.content_masks import hiding_feeds
from kvsurgeon.proof.context_scan import changing_lengths, changing_positions
from kvsurgeon.proof.key_reductions import check_key_reductions, normalizes_before_mask
from kvsurgeon.proof.length_sweep import MIN_USEFUL_LENGTH, LengthSweep, check_prefix_stable, first_tokens
from kvsurgeon.proof.row_checks import affordable, blocks, longest_passing, spans
from kvsurgeon.proof.row_runner import RowRunner
from kvsurgeon.symbolic.dimension import BATCH
from kvsurgeon.symbolic.sequence_axes import Axes, Length, SequenceAxis

SCALES = (30.0, 10.0, 3.0, 1.0)  # of the probed scores: a mask must hold for the largest that give finite weights
MIN_PROVED_LENGTH = 1024  # tokens: rows of a shorter text, if longer ones are too large to run, prove nothing beyond it
NUMBERS = (-1.0, 0.0, 1.0, 2.0, 3.0)  # that an input without tokens may hold
HAS_A_KEY = "inputs that are not given for each token leave every query a key"
BATCHES = (3, 5)  # sequences, in addition to two


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
        patterns.append(probe.check())
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
            raise _not_causal(layer, site, "it has no mask")
        length = max(sweep.attention_lengths(site))
        return AttentionPattern(weights=np.tril(np.ones((length, length))))
    return AttentionProbe(sweep, layer, site, mask, read).check()


class AttentionProbe:
    """Computes the weights of one attention, and other reductions of its scores, on probe inputs.

    Args:
        sweep: The length sweep of the decoder.
        layer: Index of the attention layer, for messages.
        site: The attention.
        weights: The weights, and their zero point if they are quantized.
        read: Returns the weights from the computed arrays.
        reductions: Other values that are reduced from the scores over keys.
        learned: The weights if they have learned rows, which are compared like other reductions.
    """

    def __init__(
        self, sweep: LengthSweep, layer: int, site: AttentionSite, weights: Sequence[ir.Value], read: ReadWeights,
        *, reductions: Sequence[ir.Value] = (), learned: ir.Value | None = None,
    ) -> None:  # fmt: skip
        self.sweep = sweep
        self.layer = layer
        self.site = site
        self.runner = sweep.runner([*weights, *reductions], site if site.fused is None else None)
        self._read = read
        self._count = len(weights)
        axes = sweep.flow.axes
        self._axes = [axes.get(value, ()) for value in (*weights, *reductions)]
        if site.fused is not None:
            self._axes = [weights_of_mask(sweep.flow, site)[2]]
        self._learned_axes = () if learned is None else axes[learned]
        self.others = [(value, axes[value]) for value in reductions]  # compared in addition to the weights
        if learned is not None:
            self.others.append((learned, tuple(axis for axis in self._learned_axes if not axis.learned_rows)))
        if self.others and sweep.fixed is not None:
            raise UnsupportedError(
                "scores are reduced outside the attention weights, and a fixed length hides whether they are masked",
                code=Code.FIXED_LENGTH, layer=layer, at=self.others[0][0].name, hint="export with a dynamic length",
            )  # fmt: skip

    def run(self, length: int, mask: MaskPattern = unmasked, **options: Any) -> list[np.ndarray]:
        """Return the weights [..., query, key], then the other reductions; see `SubgraphRunner.run`."""
        return self._compared(self.runner.run(length, mask, **options), Rows.of_text(length))

    def _compared(self, arrays: Sequence[np.ndarray], rows: Rows) -> list[np.ndarray]:
        weights, reduced = arrays[: self._count], arrays[self._count :]
        others = [sequence_last(array, axes, rows) for array, (_, axes) in zip(reduced, self.others, strict=False)]
        if self._learned_axes:
            others.append(learned_rows_first(arrays[0], self._learned_axes, rows))
        return [self._read(weights, rows), *others]

    def check(self) -> AttentionPattern:
        """Return the attention pattern after checking it at all lengths and with all masks.

        Raises:
            UnsupportedError: A query attends to a later key, or the pattern depends on the total length.
        """
        lengths = self.sweep.attention_lengths(self.site)
        self._check_content_masks(lengths)
        outputs, limit = self._prefix_stable(self.sweep.run(lengths, self.run))
        checked, rows = max(outputs), dict[int, np.ndarray]()
        if limit is None and self.sweep.fixed is None:
            checked, limit, rows = self._check_rows(checked)
        weights = {length: arrays[0] for length, arrays in outputs.items()}
        longest = max(weights)
        padded_weights = None
        leaking: dict[MaskPattern, np.ndarray] = {}
        attended: dict[MaskPattern, np.ndarray] = {}
        for mask, only_input in self._maskings():
            masked, leaks = self._masked_weights(weights, mask, only_input)
            leaking[mask] = leaks | leaking.get(mask, False)
            keys = self._attended_masked_keys(masked, mask, only_input)
            attended[mask] = keys | attended.get(mask, False)
            padded_weights = masked if padded_weights is None else padded_weights
        self._check_amplified_keys(weights[longest])
        self._check_sequences(weights[longest])
        self._check_batches(longest)
        self._check_numbers(longest)
        if self.sweep.fixed is not None:
            self._check_fixed_length(weights[longest])
        return AttentionPattern(
            weights=weights[longest], padded_weights=padded_weights, uniform_weights=self._check_scales(longest),
            leaking=leaking, attended=attended, limit=limit, rows=rows, reduced=bool(self.others), checked=checked,
        )  # fmt: skip

    def _check_rows(self, passed: int) -> tuple[int, int | None, dict[int, np.ndarray]]:
        """Check rows of the weights at the lengths that are too long to compute all rows.

        Args:
            passed: The longest length at which all rows were checked.

        Returns:
            The longest length at which rows were checked, the longest at which they are right if that is a limit, and
            the weights that some queries give to equal scores at that length, [..., key], by query.
        """
        nodes = self.site.upstream_of_weights | self.site.upstream_of(value for value, _ in self.others)
        if self.site.fused is not None:
            nodes |= {self.site.fused.node}
        proved = not any(node in nodes for node, _ in self.sweep.unproved)
        thresholds, changing = self._thresholds(nodes, proved=proved) if self.sweep.longest > passed else ([], [])
        totals = self.sweep.totals(passed, thresholds, proved=proved)
        try:
            runner = RowRunner(self.sweep.analysis, self.runner, self._axes, self.site)
        except UnsupportedError:
            return passed, passed, {}
        if not totals:
            return passed, None, {}
        totals = affordable(totals, runner.elements, any_length=proved)
        needed = min(self.sweep.longest, max([MIN_PROVED_LENGTH, *(length + 1 for length in thresholds)]))
        scales = sorted({0.0, 1.0, self._largest_scale(passed)})
        reach = min((total for total in totals if changing and total > changing[-1]), default=max(totals, default=0))

        def check(total: int) -> None:
            for rows in spans(total, thresholds, runner.elements, len(totals)):
                self._check_span(runner, rows, scales, stable=proved and not self.others)
            for rows in blocks(changing if total <= reach else (), total, runner.elements):
                self._check_causal(self._compared(runner.run(rows, scale=0.0), rows)[0], rows.start)

        checked, failed = longest_passing(check, totals, passed)
        self.sweep.add_failure(checked, failed)
        found = {}
        for query in (checked // 2, checked - 2, checked - 1):
            row = Rows(query, query + 1, checked)
            found[query] = self._compared(runner.run(row, scale=0.0), row)[0][..., 0, :]
        return checked, None if proved and failed is None and checked >= needed else checked, found

    def _thresholds(self, nodes: Iterable[ir.Node], *, proved: bool) -> tuple[list[int], list[int]]:
        """Return the positions and the lengths at which the weights that these nodes compute may change.

        Also return all queries for which context is not what it is for the query before.
        """
        flow, demands = self.sweep.flow, self.sweep.flow.demands
        values: list[ir.Value] = []
        by_query: dict[ir.Value, Axes] = {}
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value is None or is_token(flow, value):
                    continue
                values.append(value)
                axes = demands.get((node, index), ())
                if flow.kinds.get(value) is ValueKind.CONTEXT and any(_is_of_queries(axis) for axis in axes):
                    by_query[value] = axes
        places, differs = changing_positions(self.sweep, by_query)
        lengths = set() if proved else changing_lengths(self.sweep, values)
        thresholds = {*self.sweep.thresholds(values), *places, *lengths}
        return sorted(thresholds), [int(query) for query in np.flatnonzero(differs)]

    def _check_span(self, runner: RowRunner, rows: Rows, scales: Sequence[float], *, stable: bool) -> None:
        """Check that rows attend to no later key and, unless they are stable, are the same without later tokens.

        Args:
            runner: Computes the rows.
            rows: The rows.
            scales: Scales of the scores.
            stable: Whether the rows are known to be the same without later tokens.
        """
        longer = [self._compared(runner.run(rows, scale=scale), rows) for scale in scales]
        for weights, *_ in longer:
            self._check_causal(weights, rows.start)
        alone = Rows(rows.start, rows.stop, rows.stop)
        shorter = [] if stable else [self._compared(runner.run(alone, scale=scale), alone) for scale in scales]
        for (weights, *others), (same, *without) in zip(longer, shorter, strict=False):
            self._check_stable(weights[..., : rows.stop], same)
            for (value, axes), long, short in zip(self.others, others, without, strict=True):
                first = first_tokens(long, axes, rows.stop, keys_only=True)
                check_prefix_stable("reductions of attention scores", first, short, at=value, layer=self.layer)

    def _prefix_stable(self, outputs: dict[int, list[np.ndarray]]) -> tuple[dict[int, list[np.ndarray]], int | None]:
        """Return the outputs at the lengths at which every prefix is the same, and the longest if others were dropped.

        Raises:
            UnsupportedError: The outputs differ at lengths below the minimum useful length.
        """
        refusal: UnsupportedError | None = None
        while True:
            try:
                self._check_lengths(outputs)
            except UnsupportedError as error:
                refusal = refusal or error
                outputs = {length: arrays for length, arrays in outputs.items() if length < max(outputs)}
                if max(outputs, default=0) < MIN_USEFUL_LENGTH:
                    raise refusal from None
            else:
                self.sweep.add_failure(max(outputs), refusal)
                return outputs, None if refusal is None else max(outputs)

    def _check_lengths(self, outputs: Mapping[int, list[np.ndarray]]) -> None:
        longest = outputs[max(outputs)]
        for weights, *_ in outputs.values():
            self._check_causal(weights)
        for length, (weights, *others) in outputs.items():
            self._check_stable(longest[0][..., :length, :length], weights)
            for (value, axes), longer, shorter in zip(self.others, longest[1:], others, strict=True):
                check_prefix_stable(
                    "reductions of attention scores",
                    first_tokens(longer, axes, length),
                    shorter,
                    at=value,
                    layer=self.layer,
                )

    def _maskings(self) -> Iterator[tuple[MaskPattern, InputRole | None]]:
        """Yield mask patterns for all mask inputs together (None), and for each alone."""
        masks = [given for given in self.runner.masks if given.lengths]
        if masks:
            yield from ((left_padded, None), (with_gaps, None))
        if len(masks) > 1:
            yield from ((with_gaps, given) for given in masks)

    def _masked_weights(
        self, weights: Mapping[int, np.ndarray], mask: MaskPattern, only_input: InputRole | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Check the weights with masked tokens.

        Returns:
            The weights at the longest length, 0 for queries without a key, and [query] of bool: those that leak.
        """
        longest = max(weights)
        masked = {
            length: self.run(length, mask, only_input=only_input)[0]
            for length in weights
            if mask(length).sum() > 1 or length == longest
        }
        to_all = attends_to_all(masked[longest])
        without_key = {
            length: queries_without_key(weights[length], to_all[..., :length, :], mask(length)) for length in masked
        }
        leaks = leaking_queries(masked[longest], without_key[longest])
        masked = {length: np.where(without_key[length], 0.0, array) for length, array in masked.items()}
        for length, array in masked.items():
            self._check_causal(array)
            self._check_stable(masked[longest][..., :length, :length], array)
        return masked[longest], leaks

    def _attended_masked_keys(self, weights: np.ndarray, mask: MaskPattern, only_input: InputRole | None) -> np.ndarray:
        """Return [token] of bool: masked tokens that attention gives weight to, or that another reduction reads."""
        length = weights.shape[-1]
        visible = mask(length)
        attended = attended_keys(weights) & ~visible
        if self.others:
            replaced = np.where(visible, np.arange(length), np.arange(length) + length)
            before, after = (
                self.run(length, mask, only_input=only_input, tokens=tokens)[1:] for tokens in (None, replaced)
            )
            for (_, axes), *arrays in zip(self.others, before, after, strict=True):
                for place in range(1, len(axes) + 1):
                    arrays = [array.take(np.flatnonzero(visible), axis=-place) for array in arrays]
                if not is_close(*arrays):
                    return attended | ~visible
        return attended

    def _check_causal(self, weights: np.ndarray, first_query: int = 0) -> None:
        weight, query, key = largest_weight_on_later_key(weights, first_query)
        if math.isnan(weight):
            hint = "a query without any unmasked key is a common cause"
            raise self._unsupported("attention weights are NaN", Code.NOT_CAUSAL, hint=hint)
        if weight > MIN_WEIGHT:
            raise _not_causal(self.layer, self.site, f"query {query} attends to key {key} with weight {weight:.2g}")

    def _check_stable(self, longer: np.ndarray, shorter: np.ndarray) -> None:
        check_prefix_stable("attention weights", longer, shorter, at=self.site.at, layer=self.layer)

    def _check_amplified_keys(self, weights: np.ndarray) -> None:
        """Check that the weights of queries are the same if the scores of later keys are much larger."""
        if not self.runner.probed:
            return
        length, scale = weights.shape[-1], 1.0
        if normalizes_before_mask(self.sweep.flow, self.site):
            scale = 0.01  # at which the weights of earlier keys do not underflow
            weights = self.run(length, scale=scale)[0]
        for count in (1, length // 2):
            tokens = np.arange(length)
            amplified_tokens = np.where(tokens < count, tokens, tokens + AMPLIFIED)
            amplified = self.run(length, tokens=amplified_tokens, scale=scale)[0][..., :count, :]
            later = np.abs(amplified[..., count:]).max(initial=0.0)
            if not np.isnan(amplified).any() and later <= MIN_WEIGHT:  # the mask holds
                self._check_stable(weights[..., :count, :count], amplified[..., :count])

    def _check_sequences(self, weights: np.ndarray) -> None:
        """Check that a mask of one sequence of a batch does not change the weights of another."""
        length = weights.shape[-1]
        changed = [
            self.run(length, with_gaps, only_sequence=sequence)[0] != weights
            for sequence in self.runner.maskable_sequences
        ]
        if changed and (np.logical_and.reduce(changed).any() or len({one.any() for one in changed}) > 1):
            reason = "the mask of one sequence changes another sequence of the batch"
            raise self._unsupported(reason, Code.BATCH_LEAK, hint="export with a batch of 1")

    def _check_batches(self, length: int) -> None:
        """Check that the sequences of larger batches are causal too: a mask may count sequences."""
        for batch in BATCHES if self.sweep.flow.batch is BATCH else ():
            arrays = self.runner.run(length, batch=batch)
            self._check_causal(self._compared(arrays, Rows(0, length, length, batch))[0])

    def _check_numbers(self, length: int) -> None:
        """Check that attention is causal whatever inputs without tokens hold, such as a count of tokens.

        Queries that attend to no key, for which weights are NaN or equal, may depend on all of them: it is
        assumed that there are none.
        """
        given_once = [given.value for given in self.runner.masks if not given.lengths]
        half, counts = length // 2, self.sweep.numbers
        numbers = {*NUMBERS, half, length - 1, length, *counts, *(count + 1 for count in counts)}
        if all(value.dtype is not None and not value.dtype.is_floating_point() for value in given_once):
            numbers |= {-MANY, MANY}  # as a factor of scores, it would outweigh a mask
        for number in sorted(numbers) if given_once else ():
            try:
                longer, shorter = (self.run(count, number=number)[0] for count in (length, half))
            except UnsupportedError:  # no row of a table has this index
                continue
            without_key = _attends_to_none(longer) & is_attended(np.nan_to_num(longer, nan=1.0))
            if without_key[..., :-1, :].any():
                self.sweep.assumptions.setdefault(HAS_A_KEY, given_once[0].name or "")
            longer, shorter = (np.where(_attends_to_none(weights), 0.0, weights) for weights in (longer, shorter))
            self._check_causal(longer)
            rows = half - 1  # the last query of a text may attend to all keys equally
            self._check_stable(longer[..., :rows, :half], shorter[..., :rows, :])

    def _check_content_masks(self, lengths: Sequence[int]) -> None:
        """Check that attention is causal whichever tokens hide their keys by their content.

        Raises:
            UnsupportedError: A query without a key attends to later keys, or to another number of them.
        """
        feeds = dict(self.runner.feeds)
        for hiding in hiding_feeds(self.sweep.flow, self.site):
            for name, feed in hiding.items():
                self.runner.inputs.give(name, feed)
            longest, *others = (np.nan_to_num(self.run(length)[0]) for length in sorted(lengths, reverse=True)[:2])
            weight, query, _ = largest_weight_on_later_key(longest)
            if weight > MIN_WEIGHT or not all(is_close(longest[..., : o.shape[-2], : o.shape[-1]], o) for o in others):
                raise UnsupportedError(
                    "the mask is computed from the tokens, and a query may have no key that it leaves",
                    code=Code.TOKEN_DEPENDENT_MASK, layer=self.layer, at=next(iter(hiding)),
                    expected="no weight on keys after the query", found=f"{weight:.2g} of query {query}",
                    hint="export with the mask as an input",
                )  # fmt: skip
        for name, feed in feeds.items():
            self.runner.inputs.give(name, feed)

    def _check_fixed_length(self, weights: np.ndarray) -> None:
        """Check what a sweep would: every query has a key, and masking the second half does not change the first."""
        if not is_attended(weights).any(axis=-1).all():
            reason = "a query gives no weight to any key, and a fixed length hides whether later keys are the cause"
            raise self._unsupported(reason, Code.FIXED_LENGTH, hint="export with a dynamic length")
        if self.runner.masks:
            length = weights.shape[-1]
            half = length // 2
            masked = self.run(length, first_half)[0]
            self._check_stable(weights[..., :half, :half], masked[..., :half, :half])

    def _check_scales(self, length: int) -> np.ndarray | None:
        """Check causality with the largest scores that give finite weights; return the weights for equal scores."""
        if not self.runner.probed:
            return None
        self._check_causal(self.run(length, scale=self._largest_scale(length))[0])
        equal = self.run(length, scale=0.0)[0]
        self._check_causal(np.nan_to_num(equal))  # a bound or a sum of equal scores may be 0, and divide by it
        return equal

    def _largest_scale(self, length: int) -> float:
        """Return the largest scale of the scores that gives finite weights."""
        if not self.runner.probed:
            return 1.0
        return next((scale for scale in SCALES if not np.isnan(self.run(length, scale=scale)[0]).any()), SCALES[-1])

    def _unsupported(self, reason: str, code: Code, hint: str) -> UnsupportedError:
        return UnsupportedError(reason, code=code, layer=self.layer, at=self.site.at.name, hint=hint)


def _attends_to_none(weights: np.ndarray) -> np.ndarray:
    """Return [..., query, 1] of bool: whether the weights are NaN, or equal although the scores differ."""
    is_equal = np.ptp(weights, axis=-1, keepdims=True) == 0
    return np.asarray(np.isnan(weights).all(axis=-1, keepdims=True) | is_equal)


def _is_of_queries(axis: SequenceAxis) -> bool:
    return axis.variable.resolved() is Length.NEW


def _not_causal(layer: int, site: AttentionSite, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"attention is not causal: {found}, so a KV cache would change the result", code=Code.NOT_CAUSAL,
        layer=layer, at=site.at.name, expected="no weight on keys after the query",
        hint="bidirectional models cannot use a KV cache; if a prefix or an image attends both ways, "
        "its mask must be an input",
    )  # fmt: skip
