"""Proof: the obligations of a KV cache that axes alone do not show, established without weights.

Causal: no query gives weight to a later key. Prefix stable: context of a position does not depend on later tokens.
Padding: masked tokens do not affect the others. Batch: the mask of a sequence does not affect the other sequences.
Where the total length enters context as an extent only, prefix stability is proved for every length. Where it enters as
a value, and for causality, rows of context are run on either side of every threshold, up to the longest text.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.mask_patterns import left_padded, with_gaps
from kvsurgeon.analysis.regions.sequence_state import reads_masked_tokens
from kvsurgeon.analysis.token_flow import PER_CALL
from kvsurgeon.decompose import DecomposedModel
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import upstream
from kvsurgeon.proof.attention.attention_pattern import AttentionPattern, attended_keys
from kvsurgeon.proof.causality import check_causality, other_reductions
from kvsurgeon.proof.length_sweep import MAX_ATTENTION_LENGTH, LengthSweep
from kvsurgeon.proof.site_numbering import number_site
from kvsurgeon.proof.stability import find_limit

Name = Literal["causal", "prefix-stable", "padding", "batch"]


@dataclass(frozen=True, kw_only=True)
class Obligation:
    """One property that a KV cache needs, and how it was established.

    Attributes:
        name: Which property.
        status: Proved from the graph, measured by running context, or assumed.
        at: Name of the value at which it is assumed, or at which the length enters by value; None if it holds for the
            whole graph.
        lengths: The lengths in tokens at which context was run.
        rows: Positions of the attention mask that were run at the last of these lengths, if not all were.
    """

    name: Name
    status: Literal["proved", "measured", "assumed"] = "proved"
    at: str | None = None
    lengths: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The evidence that one decoder meets the obligations of a KV cache.

    Attributes:
        obligations: One entry for each, in the order causal, prefix-stable, padding, batch.
        assumptions: Statements that are not proved, each with the name of the value that first needs it.
        patterns: The attention pattern of each attention layer.
        lengths: The lengths in tokens at which context was run.
        thresholds: Numbers that context may compare a length or a position with, such as windows, and positions and
            lengths at which running showed that context changes.
        bounds: Upper bounds of the length, in tokens: rows of tables, and lengths at which the export runs.
        limit: The longest total length in tokens up to which context is prefix stable; None if there is no limit.
        limited_at: Name of a value of context that is not stable beyond the limit; None if none was found, because
            longer texts were not compared.
        max_length: The longest total length in tokens that the model supports; None if there is no limit.
    """

    obligations: tuple[Obligation, ...]
    assumptions: Mapping[str, str]
    patterns: tuple[AttentionPattern, ...]
    lengths: tuple[int, ...]
    thresholds: tuple[int, ...]
    bounds: frozenset[int]
    limit: int | None
    limited_at: str | None
    max_length: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return the proof for JSON, without the attention patterns."""
        return {
            "obligations": [asdict(obligation) for obligation in self.obligations],
            "assumptions": [{"statement": what, "at": at} for what, at in self.assumptions.items()],
            "lengths": list(self.lengths),
            "limits": {"bounds": sorted(map(int, self.bounds)), "limit": self.limit, "max_length": self.max_length},
        }


def prove(analysis: Analysis, decomposed: DecomposedModel | None = None) -> Proof:
    """Run the context of every attention, and every other value of context that token data reads.

    Args:
        analysis: The analysis of the decoder.
        decomposed: The model with what its decomposition assumes of padding, and of its length; None for nothing.

    Raises:
        UnsupportedError: An attention is not causal, or context depends on the total length.
    """
    sweep = LengthSweep(analysis)
    keys: dict[Hashable, int] = {}
    checked: dict[Hashable, AttentionPattern] = {}
    patterns: list[AttentionPattern] = []
    for layer, site in enumerate(analysis.sites):
        reductions = other_reductions(sweep, site)
        number = number_site(analysis, site, reductions, keys)
        if number not in checked:
            checked[number] = check_causality(sweep, layer, site, reductions)
        patterns.append(checked[number])
    assumed_padding = {} if decomposed is None else decomposed.assumed
    longest = None if decomposed is None else decomposed.longest
    limit = _smallest(find_limit(sweep), longest, *(pattern.limit for pattern in patterns))
    _check_padding(sweep, patterns)
    sweep.check_batch_sizes()
    assumptions = {**analysis.flow.assumed, **assumed_padding}
    return Proof(
        obligations=_obligations(sweep, patterns, assumptions, assumed_padding),
        assumptions={**assumptions, **{what: at for what, at in sweep.assumptions.items() if what not in assumptions}},
        patterns=tuple(patterns),
        lengths=sweep.lengths,
        thresholds=tuple(sorted({*sweep.numbers, *sweep.changes})),
        bounds=frozenset(sweep.bounds),
        limit=limit,
        limited_at=None if limit is None else sweep.changed_beyond.get(limit),
        max_length=_smallest(*sweep.bounds, limit, sweep.fixed),
    )


def _smallest(*bounds: int | None) -> int | None:
    return min((bound for bound in bounds if bound is not None), default=None)


def _obligations(
    sweep: LengthSweep, patterns: Sequence[AttentionPattern], assumptions: Mapping[str, str], padding: Mapping[str, str]
) -> tuple[Obligation, ...]:
    longest = max((pattern.checked for pattern in patterns), default=0)
    lengths = tuple(sorted({*sweep.lengths, *([longest] if longest else [])}))

    rows = tuple(sorted({row for pattern in patterns if pattern.checked == longest for row in pattern.rows}))

    def established(name: Name, *, measured: bool, assumed_at: str | None = None, **evidence: Any) -> Obligation:
        if assumed_at is not None:
            return Obligation(name=name, status="assumed", at=assumed_at)
        return (
            Obligation(name=name, status="measured", lengths=lengths, **evidence) if measured else Obligation(name=name)
        )

    cause = next((value.name for value in sweep.unproved.values()), None)
    has_context = any(site.fused is None or site.fused.inputs.mask is not None for site in sweep.analysis.sites)
    has_masks = any(pattern.attended for pattern in patterns)
    by_value = bool(sweep.unproved) or sweep.fixed is not None or any(pattern.reduced for pattern in patterns)
    return (
        established("causal", measured=has_context, rows=rows),
        established("prefix-stable", measured=by_value, assumed_at=assumptions.get(PER_CALL), at=cause),
        established("padding", measured=has_masks, assumed_at=next(iter(padding.values()), None)),
        established("batch", measured=has_masks),
    )


def _check_padding(sweep: LengthSweep, patterns: Sequence[AttentionPattern]) -> None:
    """Check that a masked token which later tokens change, by attention or by context, does not affect unmasked tokens.

    Raises:
        UnsupportedError: Its keys and values are attended to, or a sequence state reads it.
    """
    analysis, changed = sweep.analysis, sweep.changed_at_masked is not None
    cause = f"change with later tokens at `{sweep.changed_at_masked}`" if changed else "attend to later tokens"
    masks = {mask for pattern in patterns for mask in pattern.leaking}
    for mask in {*masks, left_padded, with_gaps} if changed else masks:
        leaking = ~mask(MAX_ATTENTION_LENGTH) & changed  # at the layers so far
        outputs: set[ir.Value] = set()  # of layers that leak
        for layer, pattern in enumerate(patterns):
            attended = pattern.attended.get(mask)
            if attended is None:  # no input masks tokens in this layer
                attended = attended_keys(pattern.weights)
            attended = attended | pattern.rows_attend
            both = min(len(attended), len(leaking))
            if (attended[:both] & leaking[:both]).any():
                raise UnsupportedError(
                    f"masked tokens {cause}, and unmasked tokens depend on them", code=Code.PADDING_LEAK,
                    layer=layer, at=analysis.sites[layer].at.name,
                )  # fmt: skip
            if mask in pattern.leaking:
                leaking = _any_of([leaking, pattern.leaking[mask] | pattern.rows_leak])
                outputs |= {analysis.sites[layer].at} if pattern.leaking[mask].any() or pattern.rows_leak else set()
        for state in analysis.flow.states if outputs or changed else ():
            reads_output = changed or not outputs.isdisjoint(
                upstream(node.inputs[index] for node, index in state.places)
            )
            if reads_output and reads_masked_tokens(analysis.flow, state, mask, sweep.assumptions):
                raise UnsupportedError(
                    f"masked tokens {cause}, and unmasked tokens depend on them outside attention",
                    code=Code.PADDING_LEAK, at=state.result.name,
                    hint="run remove-mask before inject, or set the state's input to 0 at masked tokens",
                )  # fmt: skip


def _any_of(tokens: Sequence[np.ndarray]) -> np.ndarray:
    """Return [token] of bool: the logical or of arrays, which may differ in length."""
    result = np.zeros(max(len(array) for array in tokens), dtype=bool)
    for array in tokens:
        result[: len(array)] |= array
    return result
