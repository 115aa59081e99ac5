"""Obligation (ii): no query gives weight to a key after it, however scores are made into weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import AttentionSite
from kvsurgeon.analysis.mask_patterns import (
    Pattern,
    all_seen,
    beside_border,
    border_of,
    cut_short,
    has_border,
    left_padded,
    unfolded,
    with_holes,
)
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.proof import attention_pattern
from kvsurgeon.proof.length_sweep import USEFUL, LengthSweep, check_same, first
from kvsurgeon.symbolic.sequence_axes import Axes

LOUD = (30.0, 10.0, 3.0, 1.0)  # times the usual noise: a mask must hold against scores as large as the model can take

Tokens = dict[Pattern, np.ndarray]  # for each way to mask tokens which of them: [token] of bool
Read = Callable[[Sequence[np.ndarray], int], np.ndarray]  # outputs and the length -> weights [..., query, key]


@dataclass(frozen=True, kw_only=True)
class AttentionPattern:
    """Which keys the queries of one attention were seen to give weight to."""

    weights: np.ndarray  # [..., query, key] at the longest length that was tried
    padded: np.ndarray | None = None  # the same with the first keys masked by an input
    flat: np.ndarray | None = None  # the same where all scores are equal
    peeking: Tokens = field(default_factory=dict)  # masked queries left no key, that give weight to keys after them
    looked_at: Tokens = field(default_factory=dict)  # masked keys that other queries give weight to
    limit: int | None = None  # the longest length up to which all this holds, where there is one


def check_causality(
    trial: LengthSweep, layer: int, head: AttentionSite, beside: Sequence[ir.Value]
) -> AttentionPattern:
    """Return the weights that an attention was seen to give to keys.

    Args:
        trial: The decoder.
        layer: Number of the attention, for messages.
        head: The attention.
        beside: What else is made of its scores; see `beside_weights`.

    Raises:
        UnsupportedError: It sees the future, or changes with the number of tokens that follow.
    """
    if head.fused is not None:
        return _fused(trial, layer, head)
    seen = None
    for product in head.products:
        weights = product.weights_read
        experiment = trial.experiment([*weights, *beside], head)
        axes = trial.flow.axes[weights[0]]
        read = partial(_read_weights, axes=axes)
        looked = _look(trial, layer, head, experiment, read, beside, weights[0] if has_border(axes) else None)
        seen = seen or looked
    assert seen is not None
    return seen


def _read_weights(arrays: Sequence[np.ndarray], length: int, axes: Axes) -> np.ndarray:
    """The weights, counted from their zero point where they are quantised."""
    weights, *zero_point = arrays
    if zero_point:
        if zero_point[0].size != 1:
            raise UnsupportedError(
                "attention weights are quantised row by row, so it cannot be seen which of them are 0"
            )
        weights = weights.astype(np.int64) - zero_point[0].astype(np.int64)
    return unfolded(weights, axes, length)


def _look(
    trial: LengthSweep, layer: int, head: AttentionSite, experiment: SubgraphRunner, read: Read,
    beside: Sequence[ir.Value] = (),
    bordered: ir.Value | None = None,
) -> AttentionPattern:  # fmt: skip
    """Run scores into weights, and into what else is made of them, at several lengths and with several masks.

    Weights of rows that are none of a token's, beside the others in `bordered`, are looked at as what else is made.
    """
    axes = [trial.flow.axes[value] for value in beside]
    own = () if bordered is None else trial.flow.axes[bordered]
    if bordered is not None:
        beside, axes = [*beside, bordered], [*axes, beside_border(own)]
    if beside and trial.fixed is not None:
        raise UnsupportedError(
            "scores are summed up beside the attention weights, and at a fixed length it cannot be seen whether masked",
            layer=layer,
            at=beside[0].name,
        )

    def look(
        length: int, seen: Pattern, *, through: InputRole | None = None, row: int | None = None,
        loudness: float = 1.0, places: np.ndarray | None = None,
    ) -> list[np.ndarray]:  # fmt: skip
        arrays = trial.run(experiment, length, seen, through=through, row=row, loudness=loudness, places=places)
        apart = len(arrays) - len(axes) + bool(own)
        others = [unfolded(other, at, length) for at, other in zip(axes, arrays[apart:], strict=False)]
        if own:
            others.append(border_of(arrays[0], own, length))
        return [read(arrays[:apart], length), *others]

    found = trial.as_far_as_it_runs(trial.dense(head), lambda length: look(length, all_seen))
    found, limit = _steady(layer, head, found, beside, axes)
    longest = max(found)
    padded = flat = None
    peeking: Tokens = {}
    looked_at: Tokens = {}
    for seen, through in _maskings(experiment):
        looked = {
            length: look(length, seen, through=through)[0]
            for length in found
            if seen(length).sum() > 1 or length == longest
        }
        everywhere = attention_pattern.gives_to_all(looked[longest])
        blind = {
            length: attention_pattern.blind(found[length][0], everywhere[..., :length, :], seen(length))
            for length in looked
        }
        masked = {length: np.where(blind[length], 0.0, weights) for length, weights in looked.items()}
        for length, weights in masked.items():
            _check_causal(layer, head, weights)
            check_same(layer, head.at, masked[longest][..., :length, :length], weights)
        here = seen(longest)
        peeking[seen] = attention_pattern.peeking(looked[longest], blind[longest]) | peeking.get(seen, False)
        looked_at[seen] = attention_pattern.looked_at(masked[longest]) & ~here | looked_at.get(seen, False)
        if beside:
            others = (
                look(longest, seen, through=through, places=places)[1:]
                for places in (None, attention_pattern.replaced(here))
            )
            looked_at[seen] |= ~here & (not attention_pattern.same_for(here, axes, *others))
        padded = padded if padded is not None else masked[longest]
    changed = [look(longest, with_holes, row=row)[0] != found[longest][0] for row in experiment.maskable_rows]
    _check_rows(layer, head, changed)
    if trial.fixed is not None:
        _check_fixed(layer, head, found[longest][0], look(longest, cut_short)[0] if experiment.masks else None)
    if experiment.stand_ins:
        loud = (look(longest, all_seen, loudness=loudness)[0] for loudness in LOUD)
        _check_causal(layer, head, next(weights for weights in loud if not np.isnan(weights).any()))
        flat = look(longest, all_seen, loudness=0.0)[0]
    return AttentionPattern(
        weights=found[longest][0], padded=padded, flat=flat,
        peeking=peeking, looked_at=looked_at, limit=limit,
    )  # fmt: skip


def _steady(
    layer: int,
    head: AttentionSite,
    found: dict[int, list[np.ndarray]],
    beside: Sequence[ir.Value],
    axes: Sequence[Axes],
) -> tuple[dict[int, list[np.ndarray]], int | None]:
    """What was seen at lengths up to which every prefix is the same, and the longest of them if it is not the last.

    Raises:
        UnsupportedError: They differ, or let a query see ahead, at lengths that matter.
    """
    try:
        _check_steady(layer, head, found, beside, axes)
    except UnsupportedError as refusal:
        kept = {length: arrays for length, arrays in found.items() if length < max(found)}
        if max(kept, default=0) < USEFUL:
            raise
        try:
            kept, limit = _steady(layer, head, kept, beside, axes)
        except UnsupportedError:
            raise refusal from None
        return kept, limit or max(kept)
    return found, None


def _check_steady(
    layer: int,
    head: AttentionSite,
    found: dict[int, list[np.ndarray]],
    beside: Sequence[ir.Value],
    axes: Sequence[Axes],
) -> None:
    longest = max(found)
    for weights, *_ in found.values():
        _check_causal(layer, head, weights)
    for length, (weights, *others) in found.items():
        check_same(layer, head.at, found[longest][0][..., :length, :length], weights)
        for value, at, short, whole in zip(beside, axes, others, found[longest][1:], strict=True):
            check_same(layer, value, first(whole, at, length), short)


def beside_weights(trial: LengthSweep, head: AttentionSite) -> list[ir.Value]:
    """Sums and extrema over keys that do not become weights: they must be masked as the weights are."""
    if head.fused is not None:
        return []
    role, used = head.products[0].role.root(), head.upstream_of_weights()
    nodes = [node for node, along in trial.flow.along_keys.items() if along.root() is role and node not in used]
    return [node.outputs[0] for node in nodes]


def _fused(trial: LengthSweep, layer: int, head: AttentionSite) -> AttentionPattern:
    """A fused operator states its mask outright."""
    assert head.fused is not None
    node, causal = head.fused.node, head.fused.causal
    mask = node.inputs[head.fused.mask] if head.fused.mask is not None else None
    if mask is None:
        if not causal:
            raise _sees_future(layer, head, "no mask")
        length = max(trial.dense(head))
        return AttentionPattern(weights=np.tril(np.ones((length, length))))
    axes = trial.flow.demands.get((node, head.fused.mask or 0), ())
    experiment = trial.experiment([mask])
    return _look(
        trial, layer, head, experiment, lambda arrays, length: _allowed(arrays[0], axes, length, causal=causal)
    )


def _allowed(mask: np.ndarray, axes: Axes, length: int, *, causal: bool) -> np.ndarray:
    """The weights that a fused operator's mask allows."""
    whole = len(axes) == 2
    array = unfolded(mask, axes, length) if whole else np.broadcast_to(mask, (*mask.shape[:-2], length, length))
    weights = array.astype(np.float64)
    if array.dtype != bool:
        weights = np.exp(np.minimum(weights, 0.0))
    return np.tril(weights) if causal else weights


def _maskings(experiment: SubgraphRunner) -> list[tuple[Pattern, InputRole | None]]:
    """Ways to mask tokens: through all inputs that can, and through each of them alone."""
    if not experiment.masks:
        return []
    alone = experiment.masks if len(experiment.masks) > 1 else []
    return [(left_padded, None), (with_holes, None), *((with_holes, given) for given in alone)]


def _check_causal(layer: int, head: AttentionSite, weights: np.ndarray) -> None:
    if np.isnan(weights).any():
        raise UnsupportedError("attention weights are not numbers", layer=layer, at=head.at.name)
    if (ahead := attention_pattern.ahead(weights)) > attention_pattern.SEEN:
        future = np.abs(weights) * np.triu(np.ones(weights.shape[-2:]), 1)
        query, key = np.unravel_index(int(future.argmax()), future.shape)[-2:]
        raise _sees_future(layer, head, f"query {query} gives {ahead:.2g} to key {key}")


def _check_fixed(layer: int, head: AttentionSite, weights: np.ndarray, cut: np.ndarray | None) -> None:
    """Other lengths cannot be run: no query may be without a key, and a mask that ends earlier must change nothing.

    Args:
        layer: Number of the attention.
        head: The attention.
        weights: [..., query, key] where every token is seen.
        cut: The same where an input masks the second half.
    """
    if not (np.abs(weights) > attention_pattern.SEEN).any(axis=-1).all():
        raise UnsupportedError(
            "a query gives no weight to any key, and at a fixed length it cannot be seen whether later keys are why",
            layer=layer, at=head.at.name,
        )  # fmt: skip
    if cut is not None:
        half = weights.shape[-1] // 2
        check_same(layer, head.at, weights[..., :half, :half], cut[..., :half, :half])


def _check_rows(layer: int, head: AttentionSite, changed: Sequence[np.ndarray]) -> None:
    """What masks one sequence of a batch must not mask another.

    Args:
        layer: Number of the attention.
        head: The attention.
        changed: For each sequence which weights are others where it alone is masked: none of them the same.
    """
    if changed and (np.logical_and.reduce(changed).any() or len({one.any() for one in changed}) > 1):
        raise UnsupportedError(
            "a sequence of a batch is masked by what masks another", layer=layer, at=head.at.name,
            expected="weights of a sequence that depend on its own mask", hint="export it with a batch of 1",
        )  # fmt: skip


def _sees_future(layer: int, head: AttentionSite, found: str) -> UnsupportedError:
    return UnsupportedError(
        "attention sees the future, so what is remembered of a token would depend on tokens after it",
        layer=layer, at=head.at.name, expected="no weight on keys after the query", found=found,
        hint="bidirectional and prefix models cannot have a cache",
    )  # fmt: skip
