"""Inject a KV cache into a decoder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.cache.pairs import find_cache_pairs
from kvsurgeon.cache.unknown_caches import find_unknown_caches
from kvsurgeon.dataflow.input_dimensions import FIRST_CALL, GIVEN_FOR
from kvsurgeon.dataflow.input_roles import MaskForm, padding_mask
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.decompose.relative_positions import multiply_before_gathering
from kvsurgeon.errors import Code, UnsupportedError, UsageError
from kvsurgeon.fusion.context import FusionContext
from kvsurgeon.fusion.fuser import AttentionFuser
from kvsurgeon.fusion.match import FusionMatch
from kvsurgeon.fusion.operators import GROUP_QUERY_ATTENTION
from kvsurgeon.fusion.ragged_batches import length_of_all_sequences
from kvsurgeon.graph.query import downstream
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.io.gc_pause import gc_paused
from kvsurgeon.passes.cache.cross_attention_branch import compute_in_first_call, move_to_end
from kvsurgeon.passes.cache.separate_cross_attention import FILE, SeparateCrossAttention
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.options import check_count
from kvsurgeon.proof.cancelled_numbers import LONGEST, without_cancelled_numbers
from kvsurgeon.proof.proof import Proof, prove
from kvsurgeon.resizing.lengths import LengthValues
from kvsurgeon.resizing.token_data import InputsBefore
from kvsurgeon.resizing.windows import NO_WINDOWS, Windows
from kvsurgeon.rewrite.by_sequence.token_rows import with_token_rows
from kvsurgeon.rewrite.cache_injection import CacheValues, inject_cache
from kvsurgeon.rewrite.cache_metadata import read_cache_metadata, write_cache_metadata, write_first_call
from kvsurgeon.rewrite.cache_options import CacheOptions
from kvsurgeon.rewrite.cache_plan import plan_cache
from kvsurgeon.rewrite.cache_removal import with_separate_caches
from kvsurgeon.rewrite.late_repetition import with_late_repetition
from kvsurgeon.rewrite.symbolic_length import with_symbolic_length
from kvsurgeon.symbolic.dimension import BATCH, NEW, TOTAL

SelectMatches = Callable[[Analysis, Proof], Sequence[FusionMatch]]


@dataclass(frozen=True, kw_only=True)
class Inject(CacheOptions):
    """Inject a KV cache: each attention layer gets cache inputs and outputs, so a decode step computes one token only.

    Before: `input_ids [batch, length] -> logits`. After: `input_ids [batch_size, sequence_length]`, `attention_mask
    [batch_size, total_sequence_length]` and `past_key_values.{i}.key|value [batch_size, kv_heads, past_sequence_length,
    head_dim]` give `logits` and `present.{i}.key|value [..., total_sequence_length, head_dim]`. The sequence states of
    running sums are cached as `past_key_values.{i}.state`, and those of convolutions and shifts, which need the last
    rows alone, as `past_key_values.{i}.conv_state`. A linear recurrence over chunks of tokens passes on
    `past_key_values.{i}.recurrent_state`, whose size is fixed.

    Not handled: attention that is not causal, other recurrent states, context that depends on the total length.

    Attributes:
        cross_attention: Where keys and values of cross-attention are computed: inside the model, in each call; once,
            separate, by a second model; or once, in the first-call, by the input use_cache_branch. The cache is then
            called past_key_values.{layer}.decoder.{kind}.
        input: What inputs are given for, as NAME=new, NAME=total or NAME=fixed: for the new tokens, for all tokens so
            far, or the same in every call; none is decided by their use. NAME=first-call lets tokens of the first call
            attend to each other both ways: it is given for all tokens so far, 0 for those after the first call, or a
            number of tokens of that call.
    """

    name: ClassVar[str] = "inject"

    cross_attention: Literal["inside", "separate", "first-call"] = "inside"
    input: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_count("max-length", self.max_length)
        check_count("first-layer", self.first_layer, least=0)

    def apply(self, subject: Subject) -> Outcome:
        """Inject a cache into `subject.model`.

        Raises:
            UnsupportedError: The model does not support a cache; it is unchanged.
            UsageError: Two options exclude each other, or a name template does not give unique names.
        """
        with _stated(subject, self.input):
            return self._apply(subject)

    def _apply(self, subject: Subject) -> Changed:
        if self.cross_attention == "inside":
            return inject(self, subject)
        separated = SeparateCrossAttention().apply(subject)
        if isinstance(separated, Unchanged):
            raise UnsupportedError(separated.reason, code=Code.PASS_PRECONDITION, hint="use cross-attention=inside")
        subject.changed()
        done = inject(self.of_decoder, subject)
        done = replace(done, edits=separated.edits + done.edits)
        if self.cross_attention == "separate":
            return replace(done, companions=separated.companions)
        edits = compute_in_first_call(subject.model, separated.companions[FILE])
        for values, template in ((subject.model.graph.inputs, "past"), (subject.model.graph.outputs, "present")):
            templates = [getattr(one, template) for one in (self.of_decoder, SeparateCrossAttention())]
            layers = itertools.product(range(len(values)), templates, ("key", "value"))
            move_to_end(values, [name.format(layer=layer, kind=kind) for layer, name, kind in layers])
        subject.changed()
        return replace(done, edits=done.edits + edits)

    @property
    def of_decoder(self) -> Inject:
        """The pass with the names that the cache of self-attention gets."""
        if self.cross_attention == "inside":
            return self
        past, present = (name.replace("{layer}.", "{layer}.decoder.") for name in (self.past, self.present))
        return replace(self, past=past, present=present)


@contextmanager
def _stated(subject: Subject, statements: Sequence[str]) -> Iterator[None]:
    """State what inputs are given for, as metadata that the analysis reads inside the `with` statement.

    That an input opens a block in the first call remains stated in the result.

    Raises:
        UsageError: There is no such input, or it cannot be given for that.
    """
    inputs = {value.name: value for value in subject.model.graph.inputs}
    stated = [text.partition("=")[::2] for text in statements]
    for name, given_for in stated:
        if name not in inputs or given_for not in ("new", "total", "fixed", FIRST_CALL):
            names = ", ".join(str(one) for one in inputs)
            raise UsageError(
                f"expected NAME=new|total|fixed|first-call with one of the inputs {names}, found {name}={given_for}"
            )
    graphs = [subject.model.graph]
    for name, given_for in stated:
        inputs[name].metadata_props[GIVEN_FOR] = given_for
    if stated:
        subject.changed()
    kept: tuple[str, ...] = ()
    try:
        yield
        kept = (FIRST_CALL,)
    finally:
        for value in (value for graph in (*graphs, subject.model.graph) for value in graph.inputs):
            if value.metadata_props.get(GIVEN_FOR) not in kept:
                value.metadata_props.pop(GIVEN_FOR, None)


def inject(
    options: CacheOptions,
    subject: Subject,
    select: SelectMatches | None = None,
    padding: Literal["mask", "lengths"] = "mask",
    bits: int | None = None,
    windows: Windows = NO_WINDOWS,
) -> Changed:
    """Inject a cache into `subject.model`; a length that it fixes is a symbol afterwards, if nothing depends on it.

    Args:
        options: Options of the cache.
        subject: A model without a cache.
        select: Returns the attention sites to replace by operators that update the cache.
        padding: Whether these operators read a mask, or the numbers of tokens that it gives.
        bits: Bits of an integer, if keys and values are quantized.
        windows: The rows that are cached, by the index of the attention site; all of other sites.

    Raises:
        UnsupportedError: The model does not support a cache; it is unchanged.
        UsageError: Two options exclude each other, or a name template does not give unique names.
    """
    arguments = select, padding, bits, windows
    relaxed = with_symbolic_length(subject.model)
    if relaxed is not None:
        work = subject.with_model(relaxed)
        with suppress(UnsupportedError):  # something depends on the length of the export
            changed = _inject(options, work, *arguments)
            subject.become(work)
            return changed
    return _inject(options, subject, *arguments)


def _inject(
    options: CacheOptions,
    subject: Subject,
    select: SelectMatches | None,
    padding: Literal["mask", "lengths"],
    bits: int | None,
    windows: Windows,
) -> Changed:
    """Inject a cache at the length that the model declares; see `inject`."""
    with deep_recursion():
        given, decomposed = _analyzed(subject), subject.decomposed()
        opening = [one for one in given.inputs if one.opens_block]
        if opening and options.cache != "dynamic":
            raise UsageError(f"expected a dynamic cache for `{opening[0].value.name}`, found {options.cache}")
        cancelled = without_cancelled_numbers(given)
        analysis = with_late_repetition(cancelled)
        proof = subject.proof() if analysis is given else prove(analysis, decomposed)
        if cancelled is not given:
            proof = replace(proof, limit=min(proof.limit or LONGEST, LONGEST))
        subject.changed()  # the analysis refers to the graph that is edited below
        if options.past_length == "per-sequence":
            analysis = with_token_rows(analysis)
        plan = plan_cache(options, analysis, proof, bits, windows)
        matches, on_inputs = () if select is None else select(analysis, proof), _notes_on_inputs(analysis)
        with gc_paused():
            edits = inject_cache(analysis, plan, partial(_add_operators, analysis, matches, padding))
            edits += multiply_before_gathering(analysis.model)
    subject.model = analysis.model
    if opening:
        write_first_call(subject.model, {one.value.name or "": int(one.number) for one in opening})
    notes = _state_lengths(subject.model, analysis) if padding == "lengths" else []
    notes += [f"assumed, not proved: {what} (first at `{where}`)" for what, where in proof.assumptions.items()]
    notes += on_inputs
    hiding = [given.value.name for given in analysis.inputs if given.lengths and given.mask_form is MaskForm.HIDDEN]
    notes += [f"`{name}` hides the tokens that it marks with 1, and keeps those with 0" for name in hiding]
    notes += [
        f"`{one.value.name}` opens a block of tokens that attend both ways, which must all be in the first call: "
        + (f"it is {int(one.number)} for later tokens" if one.lengths else "it is at most their number")
        for one in opening
    ]
    if proof.limited_at is not None:
        notes.append(
            f"context depends on the total length beyond {proof.limit} tokens, first at `{proof.limited_at}`: all "
            "tokens of a longer text would have to be computed again, so the model ends with an error"
        )
    elif proof.limit is not None:
        notes.append(f"context was compared up to {proof.limit} tokens: the model ends with an error beyond")
    elif plan.limit is not None:
        notes.append(f"the model ends with an error if past rows and new tokens are more than {plan.limit}")
    return Changed(edits=edits, notes=tuple(notes), proof=replace(proof, patterns=()))


def _notes_on_inputs(analysis: Analysis) -> list[str]:
    """Return what a caller must know of inputs with defaults, and of those without an axis of tokens."""
    flow, notes = analysis.flow, []
    if defaults := [value.name for value in analysis.model.graph.inputs if value.is_initializer()]:
        others = f" ({len(defaults)} inputs have one)" if defaults[1:] else ""
        notes.append(f"the default of `{defaults[0]}` is taken as constant{others}: give the result no other value")
    for value in (given.value for given in analysis.inputs if not given.lengths):
        if value in flow.counts.values():
            notes.append(f"`{value.name}` is how many of the last tokens of a call are selected")
        read = downstream([value], stop=lambda node: node in flow.counts)
        if any(flow.kinds.get(one) is ValueKind.TOKEN or one.is_graph_output() for one in read):
            notes.append(f"`{value.name}` has no axis of tokens: it must be the same in every call of a text")
    return notes


def _state_lengths(model: ir.Model, analysis: Analysis) -> list[str]:
    """Write to the metadata that padding comes last, and whether batches may be ragged; return why not."""
    metadata = read_cache_metadata(model)
    if metadata is None:
        return []
    by_sequence = (given for given in analysis.inputs if BATCH in given.dimensions)
    known = {given.value for given in by_sequence if given.is_token or not given.lengths}
    shared = length_of_all_sequences(model.graph, known)
    counted = padding_mask(analysis.inputs) is not None and metadata.mode == "static"
    ragged = counted and shared is None
    write_cache_metadata(model, replace(metadata, padding=False, ragged=ragged))
    if shared is None:
        return []
    return [f"all sequences of a batch must have as many tokens: more than attention reads `{shared.name}`"]


def _add_operators(
    analysis: Analysis,
    matches: Sequence[FusionMatch],
    padding: Literal["mask", "lengths"],
    lengths: LengthValues,
    before: InputsBefore,
    pasts: CacheValues,
) -> tuple[CacheValues, Callable[[], None]]:
    """Add an operator for each match; see `AddOperators`."""
    context = FusionContext(
        flow=analysis.flow, editor=lengths.editor, lengths=lengths, sequence=NEW, total=TOTAL, before=before,
        padding=padding_mask(analysis.inputs) if padding == "lengths" else None,
    )  # fmt: skip
    fuser = AttentionFuser(GROUP_QUERY_ATTENTION, context)
    return fuser.place_all(matches, pasts), fuser.finish


def _analyzed(subject: Subject) -> Analysis:
    """Return the analysis of the decoder; if there is none because it has a cache, say so."""
    try:
        return subject.analysis()
    except UnsupportedError as error:
        graph = with_separate_caches(subject.decomposed().model).graph
        unknown, pairs = [*find_unknown_caches(graph)], find_cache_pairs(graph)
        if not unknown and not pairs:
            raise
        found = None if unknown else f"its cache output `{pairs[0].present.name}`"
        raise UnsupportedError(
            "the model already has a cache", code=Code.HAS_CACHE, found=found,
            at=unknown[0].name if unknown else pairs[0].past.name,
            hint=None if unknown else "remove-cache removes it, retarget changes it",
        ) from error  # fmt: skip
