"""Give every attention layer a past input and a present output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.token_flow import FusedAttention, SequenceState
from kvsurgeon.cache.layout import USUAL, Layout
from kvsurgeon.cache.pairs import find_buffers, find_cache_pairs
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.fusion.context import FusionContext
from kvsurgeon.fusion.fuser import AttentionFuser
from kvsurgeon.fusion.match import FusionMatch
from kvsurgeon.fusion.operators import GROUP_QUERY_ATTENTION
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.contract import Changed, Outcome, Subject
from kvsurgeon.passes.options import check_count
from kvsurgeon.proof.proof import Proof
from kvsurgeon.rewrite.cache_entries import CacheTensor
from kvsurgeon.rewrite.cache_layouts import CacheLayouts, are_rows_of
from kvsurgeon.rewrite.cache_metadata import cache_metadata_of, write_cache_metadata
from kvsurgeon.rewrite.cache_plan import Plan, find_sources, plan_cache
from kvsurgeon.rewrite.context_slices import ContextSlices
from kvsurgeon.rewrite.dimension_names import DimNames, dim_names, dim_names_of_export
from kvsurgeon.rewrite.head_grouping import HeadGrouping
from kvsurgeon.rewrite.lengths import LengthValues
from kvsurgeon.rewrite.token_data import TokenRewriter, causal_mask
from kvsurgeon.symbolic.dimension import MAX, NEW, TOTAL
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis

Choice = Callable[[Analysis, Proof], Sequence[FusionMatch]]


@dataclass(frozen=True, kw_only=True)
class Inject:
    """Give every attention layer a past input and a present output, so that a step costs one token and not all.

    Before: `input_ids [batch, length] -> logits`. After: `input_ids [batch_size, sequence_length]`, `attention_mask
    [batch_size, total_sequence_length]` and `past_key_values.{i}.key|value [batch_size, kv_heads, past_sequence_length,
    head_dim]` give `logits` and `present.{i}.key|value [..., total_sequence_length, head_dim]`. What a convolution,
    a shift or a running sum reads is remembered too, as `past_key_values.{i}.state`.

    Not handled: layers that see the future, state that is handed from token to token (scans), context that changes
    with the total length.

    Attributes:
        past: Name of an input; kind is "key", "value" or "state".
        present: Name of an output.
        cache: Whether the cache grows from call to call, is a buffer written in place, or gives out new rows only.
        past_length: Where the number of past tokens is read: the shape of the past, an input of its own, the first
            position given (for texts without padding on the left), or the attention mask's length. By default the
            shape, and in place an input.
        max_length: Rows of a buffer that is written in place; read from it at run time where it is not given.
        key_layout: Order of the axes of a key in the cache.
        value_layout: Order of the axes of a value in the cache.
        cache_dtype: Type that the cache is kept in, where it is not the one that the model computes in.
    """

    name: ClassVar[str] = "inject"

    past: str = "past_key_values.{layer}.{kind}"
    present: str = "present.{layer}.{kind}"
    cache: Literal["dynamic", "static", "new-tokens"] = "dynamic"
    past_length: Literal["shape", "input", "positions", "mask"] | None = None
    max_length: int | None = None
    key_layout: Layout = USUAL
    value_layout: Layout = USUAL
    cache_dtype: Literal["float16"] | None = None

    def __post_init__(self) -> None:
        check_count("max-length", self.max_length)

    def apply(self, subject: Subject) -> Outcome:
        """Inject the cache into `subject.model`.

        Raises:
            UnsupportedError: The model cannot be given a cache soundly; it is left as it was.
            UsageError: A template does not give each tensor a name of its own.
        """
        return inject(self, subject)


def inject(options: Inject, subject: Subject, fuse: Choice | None = None) -> Changed:
    """Inject a cache into `subject.model`.

    Args:
        options: Which.
        subject: A model without a cache.
        fuse: Which attentions one operator is to compute, cache included; none where nothing is said.

    Raises:
        UnsupportedError: The model cannot be given a cache soundly; it is left as it was.
        UsageError: Two options do not go together.
    """
    with deep_recursion():
        analysis, proof = _analyzed(subject), subject.proof()
        model = analysis.model
        subject.changed()  # the analysis refers to the graph that is edited below
        plan = plan_cache(options, analysis, proof)
        matches = () if fuse is None else fuse(analysis, proof)
        editor = Editor(model)
        _Injection(analysis, editor, plan, proof.limit, matches).operate()
        outputs = _outputs_by_row(analysis, plan)
    write_cache_metadata(
        model,
        cache_metadata_of(options.cache, plan.entries, proof.max_length, batch_chunks=not matches, outputs=outputs),
    )
    subject.model = model
    notes = [f"assumed, not proved: {what} (first at `{where}`)" for what, where in proof.assumptions.items()]
    if proof.limit is not None:
        notes.append(f"context depends on the total length beyond {proof.limit} tokens: the model ends with an error")
    return Changed(edits=editor.edits, notes=tuple(notes))


def _analyzed(subject: Subject) -> Analysis:
    """Return the analysis of the decoder; if there is none because it has a cache, say so."""
    model = subject.decomposed().model
    try:
        return subject.analysis()
    except UnsupportedError as refusal:
        joins, buffers = find_cache_pairs(model.graph), find_buffers(model.graph)
        if buffers:
            raise UnsupportedError("the model already has a cache", at=buffers[0].name) from refusal
        if not joins:
            raise
        raise UnsupportedError(
            "the model already has a cache", at=joins[0].past.name, found=f"its present `{joins[0].present.name}`",
            hint="eject takes it out, retarget gives it another form",
        ) from refusal  # fmt: skip


ROWS = (Length.TOTAL, Length.NEW)  # of a causal mask: keys, and queries


class _Injection:
    """One injection, from the first new input to the last dropped node."""

    def __init__(
        self, analysis: Analysis, editor: Editor, plan: Plan, limit: int | None, matches: Sequence[FusionMatch]
    ) -> None:
        self.analysis = analysis
        self.flow = analysis.flow
        self.graph = analysis.model.graph
        self.nodes = list(analysis.flow.order)
        self.editor = editor
        self.entries = plan.entries
        self.cache_mode = plan.cache_mode
        self.plan = plan
        self.limit = limit
        self.matches = matches

    def operate(self) -> None:
        """Do everything, in the order in which it must be done."""
        before = {node: tuple(node.inputs) for node in self.nodes}
        pasts = self._add_pasts()
        sources = find_sources(self.plan, self.analysis, self.editor, pasts[0])
        lengths = LengthValues(self.editor, sources, total=self.cache_mode.total, limit=self.limit)
        views = ContextSlices(self.flow, self.editor, lengths, self.analysis.inputs, self.analysis.same)
        tokens = TokenRewriter(self.flow, self.editor, lengths, views, before)
        grouping = HeadGrouping(flow=self.flow, tokens=tokens, layouts=CacheLayouts(self.editor, lengths))
        context = FusionContext(
            flow=self.flow, editor=self.editor, lengths=lengths, sequence=NEW, total=TOTAL, before=before
        )  # fmt: skip
        fuser = AttentionFuser(GROUP_QUERY_ATTENTION, context)
        presents = self._join(pasts, grouping, fuser.place_all(self.matches, self.entries, pasts))
        for node in self.nodes:
            if any(self.flow.kinds.get(value) is ValueKind.TOKEN for value in node.outputs):
                tokens.rewire(node)
        self._spell_masks(views, before)
        self._write_shapes()
        for recall in self.flow.states:
            self._keep_new_rows(recall, views)
        fuser.finish()
        for head in self.analysis.heads:
            grouping.regroup(head)
        self.graph.outputs.extend(presents)
        self.editor.finish()

    def _add_pasts(self) -> list[ir.Value]:
        interface = {value.name for value in (*self.graph.inputs, *self.graph.outputs)}
        pasts = []
        for entry in self.entries:
            self._give_up_rows(entry, interface)
            for name in (entry.past, entry.present):
                if name in interface:
                    raise UnsupportedError("the model already has an input or output of that name", at=name)
                self.editor.release_name(name)
            shape = ir.Shape(entry.shape(self.cache_mode.past))
            pasts.append(ir.Value(name=entry.past, type=ir.TensorType(entry.dtype), shape=shape))
        self.graph.inputs.extend(pasts)
        return pasts

    def _keep_new_rows(self, recall: SequenceState, views: ContextSlices) -> None:
        """What is computed for all tokens so far is read for the new ones."""
        value, axis = recall.result, recall.axes[0].axis
        fact = self.flow.shapes[value]
        assert fact.shape is not None
        assert fact.dtype is not None
        bounds = [views.lengths.flat(end) for end in views.lengths.span(Length.NEW)]
        whole, new = (
            dim_names(views.sizes(fact.shape, (recall.axes[0].with_role(LengthVariable(length)),))) for length in ROWS
        )
        more = [*bounds, self.editor.constant([axis], name="axes")]
        self.editor.append_to(value, "Slice", more, fact.dtype, (whole, new))

    def _give_up_rows(self, entry: CacheTensor, interface: set[str | None]) -> None:
        """An output of the present's name that gives its new rows becomes the present, which holds them too."""
        given = next((output for output in self.graph.outputs if output.name == entry.present), None)
        if given is not None and are_rows_of(given, entry.memory):
            self.graph.outputs.remove(given)
            interface.discard(entry.present)

    def _join(
        self, pasts: Sequence[ir.Value], grouping: HeadGrouping, made: Mapping[CacheTensor, ir.Value]
    ) -> list[ir.Value]:
        """Join past and new rows, where no operator has made a present of them; what is downstream reads the whole."""
        presents = []
        for entry, past in zip(self.entries, pasts, strict=True):
            if entry in made:
                whole = self.cache_mode.read(self.editor, grouping.layouts.lengths, entry, made[entry])
                grouping.remember(entry.memory, whole, entry.order)
                presents.append(made[entry])
                continue
            kept, own_type = entry.dtype, entry.memory.dtype
            rows = self._cast(
                grouping.layouts.as_cache(entry.memory, entry.order), own_type, kept, f"{entry.present}.rows"
            )
            joined = self.cache_mode.join(self.editor, grouping.layouts.lengths, entry, past, rows)
            grouping.remember(
                entry.memory, self._cast(joined.whole, kept, own_type, f"{entry.present}.wide"), entry.order
            )
            presents.append(joined.present)
        return presents

    def _cast(self, value: ir.Value, has: ir.DataType, dtype: ir.DataType, name: str) -> ir.Value:
        if has is dtype:
            return value
        cast = self.editor.node("Cast", [value], {"to": int(dtype)}, name=name, dtype=dtype)
        cast.shape = value.shape
        return cast

    def _spell_masks(self, views: ContextSlices, before: dict[ir.Node, tuple[ir.Value | None, ...]]) -> None:
        """Say as a mask what `is_causal` says: runtimes differ on where it puts the corner of a rectangle.

        Source: ONNX `Attention`, whose alignment was corrected in place after opset 24 had been released.
        """
        causal = [fused for fused in self.flow.fused if fused.causal]
        if not causal:
            return
        keys, queries = ([views.lengths.scalar(end) for end in (*views.lengths.span(length), 1)] for length in ROWS)
        mask = causal_mask(self.editor, views.lengths, keys, queries)
        mask = views.filling.as_rows(mask, (SequenceAxis(1, LengthVariable(Length.TOTAL)),))
        for fused in causal:
            self._spell_mask(fused, mask, before[fused.node])

    def _spell_mask(self, fused: FusedAttention, causal: ir.Value, before: Sequence[ir.Value | None]) -> None:
        node, place = fused.node, 3
        given = node.inputs[fused.mask] if fused.mask is not None else None
        original = before[fused.mask] if fused.mask is not None else None
        dtype = None if original is None else self.flow.shapes[original].dtype
        mask = causal
        if given is not None and dtype is ir.DataType.BOOL:
            mask = self.editor.node("And", [given, causal], name=f"{given.name}.causal", dtype=dtype)
        elif given is not None and dtype is not None:
            lowest = self.editor.constant(-np.inf, dtype.numpy(), name="masked")
            mask = self.editor.node("Where", [causal, given, lowest], name=f"{given.name}.causal", dtype=dtype)
        if len(node.inputs) <= place:
            node.resize_inputs(place + 1)
        self.editor.replace_input(node, place, mask)
        self.editor.remove_attribute(node, "is_causal")

    def _write_shapes(self) -> None:
        """Let declared shapes say which length they have."""
        for given in self.analysis.inputs:
            axes = tuple(SequenceAxis(axis, LengthVariable(length)) for axis, length in given.lengths.items())
            given.value.shape = ir.Shape(
                dim_names_of_export(given.dimensions, axes, self.analysis.length, self.cache_mode.total)
            )
        for node in self.nodes:
            for value in node.outputs:
                if value.shape is not None:
                    self._write_shape(value)

    def _write_shape(self, value: ir.Value) -> None:
        fact, axes = self.flow.shapes.facts.get(value), self.flow.axes.get(value, ())
        declared = value.shape
        if fact is None or fact.shape is None or declared is None or len(fact.shape) != len(declared):
            return
        fixed = isinstance(self.analysis.length, int) and self.analysis.length in declared
        if fixed and self.flow.kinds.get(value) is ValueKind.CONTEXT:
            value.shape = None  # of the length that was fixed, and of another now where it is made of an input
        elif axes or any(not isinstance(size, int) for size in declared):
            words = dim_names_of_export(fact.shape, _decided(axes), self.analysis.length, self.cache_mode.total)
            value.shape = ir.Shape(words)


def _outputs_by_row(analysis: Analysis, plan: Plan) -> dict[str, DimNames]:
    """The dims of outputs that have a place for each row that attention reads, where that is not one for each token."""
    if plan.cache_mode.total == TOTAL:
        return {}
    told = {}
    for value in analysis.model.graph.outputs:
        fact, axes = analysis.flow.shapes.facts.get(value), _decided(analysis.flow.axes.get(value, ()))
        by_row = any(axis.role.resolved() is Length.TOTAL for axis in axes)
        if by_row and value.name is not None and fact is not None and fact.shape is not None:
            told[value.name] = dim_names_of_export(fact.shape, axes, analysis.length, MAX)
    return told


def _decided(axes: Axes) -> Axes:
    return tuple(axis for axis in axes if axis.role.resolved() is not None)
