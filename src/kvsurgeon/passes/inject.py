"""Give every attention layer a past input and a present output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import sympy

from kvsurgeon.errors import Refused, UsageError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.plain import in_plain_words
from kvsurgeon.graph.recursion import room_for_deep_graphs
from kvsurgeon.passes.contract import Changed, Outcome, Subject
from kvsurgeon.sequence.analysis import Analysis, Head, analyse
from kvsurgeon.sequence.axes import Axes, Length, Role, SequenceAxis
from kvsurgeon.sequence.cuts import Memory
from kvsurgeon.sequence.flow import FusedAttention
from kvsurgeon.sequence.kinds import Kind
from kvsurgeon.sequence.lengths import NEW, PAST, Lengths
from kvsurgeon.sequence.proof import prove
from kvsurgeon.sequence.remember import Layouts
from kvsurgeon.sequence.tokens import Tokens, causal_mask
from kvsurgeon.sequence.views import Views
from kvsurgeon.sequence.words import BATCH_NAME, PAST_NAME, spelled_from_export
from kvsurgeon.shapes import dimension as dim


@dataclass(frozen=True, kw_only=True)
class Inject:
    """Give every attention layer a past input and a present output, so that a step costs one token and not all.

    Before: `input_ids [batch, length] -> logits`. After: `input_ids [batch_size, sequence_length]`, `attention_mask
    [batch_size, total_sequence_length]` and `past_key_values.{i}.key|value [batch_size, kv_heads, past_sequence_length,
    head_dim]` give `logits` and `present.{i}.key|value [..., total_sequence_length, head_dim]`.

    Not handled: layers that see the future, state outside attention, context that changes with the total length.
    """

    name: ClassVar[str] = "inject"

    past: str = "past_key_values.{layer}.{kind}"  # name of an input; kind is "key" or "value"
    present: str = "present.{layer}.{kind}"  # name of an output

    def apply(self, subject: Subject) -> Outcome:
        """Inject the cache into `subject.model`.

        Raises:
            Refused: The model cannot be given a cache soundly; it is left as it was.
            UsageError: A template does not give each tensor a name of its own.
        """
        model = in_plain_words(subject.model)
        with room_for_deep_graphs():
            analysis = analyse(model)
            proof = prove(analysis)
            entries = _entries(analysis.heads, self)
            editor = Editor(model)
            _Injection(analysis, editor, entries, proof.limit).operate()
        subject.model = model
        notes = [f"assumed, not proved: {what} (first at `{where}`)" for what, where in analysis.flow.assumed.items()]
        if proof.limit is not None:
            notes.append(f"context changes beyond {proof.limit} tokens, so the model stops with an error there")
        return Changed(edits=editor.edits, notes=tuple(notes))


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One tensor of the cache."""

    memory: Memory
    past: str  # name of the input
    present: str  # name of the output

    def shape(self, length: str) -> list[int | str]:
        batch = self.memory.batch if isinstance(self.memory.batch, int) else BATCH_NAME
        return [batch, self.memory.heads, length, self.memory.head_dim]


def _entries(heads: Sequence[Head], options: Inject) -> list[_Entry]:
    """The tensors to remember, each once: key 0, value 0, key 1, ..."""
    entries: list[_Entry] = []
    seen: set[ir.Value] = set()
    layer = 0
    for number, head in enumerate(heads):
        fresh = []
        for kind, operands in (("key", head.keys), ("value", head.values)):
            memories = {operand.memory.value: operand.memory for operand in operands}
            fresh += [(kind, memory) for value, memory in memories.items() if value not in seen]
            seen |= set(memories)
        if len({kind for kind, _ in fresh}) < len(fresh):
            raise Refused("one attention reads several tensors of keys, or of values", layer=number, at=head.at.name)
        for kind, memory in fresh:
            past, present = (_filled(text, layer, kind) for text in (options.past, options.present))
            entries.append(_Entry(memory=memory, past=past, present=present))
        layer += bool(fresh)
    names = [name for entry in entries for name in (entry.past, entry.present)]
    if len(set(names)) < len(names):
        raise UsageError("expected names with {layer} and {kind} in them, so that each tensor has its own")
    return entries


def _filled(text: str, layer: int, kind: str) -> str:
    try:
        return text.format(layer=layer, kind=kind)
    except (KeyError, ValueError, IndexError) as error:
        raise UsageError(f"expected a name such as past.{{layer}}.{{kind}}, found {text!r}") from error


class _Injection:
    """One injection, from the first new input to the last dropped node."""

    def __init__(self, analysis: Analysis, editor: Editor, entries: Sequence[_Entry], limit: int | None) -> None:
        self.analysis = analysis
        self.flow = analysis.flow
        self.graph = analysis.model.graph
        self.nodes = list(analysis.flow.order)
        self.editor = editor
        self.entries = entries
        self.limit = limit

    def operate(self) -> None:
        """Do everything, in the order in which it must be done."""
        before = {node: tuple(node.inputs) for node in self.nodes}
        pasts = self._add_pasts()
        lengths = Lengths(self.editor, self._sources(pasts[0]), self.limit)
        views = Views(self.flow, self.editor, lengths, self.analysis.inputs, self.analysis.same)
        tokens = Tokens(self.flow, self.editor, lengths, views, before)
        presents = self._join(pasts, Layouts(self.editor, lengths), views, tokens)
        for node in self.nodes:
            if any(self.flow.kinds.get(value) is Kind.TOKEN for value in node.outputs):
                tokens.rewire(node)
        self._spell_masks(lengths, before)
        self._write_shapes()
        self.graph.outputs.extend(presents)
        self.editor.finish()

    def _add_pasts(self) -> list[ir.Value]:
        interface = {value.name for value in (*self.graph.inputs, *self.graph.outputs)}
        pasts = []
        for entry in self.entries:
            for name in (entry.past, entry.present):
                if name in interface:
                    raise Refused("the model already has an input or output of that name", at=name)
                self.editor.free(name)
            shape = ir.Shape(entry.shape(PAST_NAME))
            pasts.append(ir.Value(name=entry.past, type=ir.TensorType(entry.memory.dtype), shape=shape))
        self.graph.inputs.extend(pasts)
        return pasts

    def _sources(self, past: ir.Value) -> dict[sympy.Symbol, tuple[ir.Value, int]]:
        """Where each length can be read at run time."""
        sources: dict[sympy.Symbol, tuple[ir.Value, int]] = {PAST: (past, 2)}
        for given in sorted(self.analysis.inputs, key=lambda given: not given.is_token):
            for axis, size in enumerate(given.dimensions):
                if axis not in given.lengths and not isinstance(size, int):
                    sources.setdefault(size, (given.value, axis))
                elif axis in given.lengths and given.is_token:
                    sources.setdefault(NEW, (given.value, axis))
        return sources

    def _join(self, pasts: Sequence[ir.Value], layouts: Layouts, views: Views, tokens: Tokens) -> list[ir.Value]:
        """Join past and new rows; what is downstream of the cut reads the whole."""
        presents = []
        for entry, past in zip(self.entries, pasts, strict=True):
            memory = entry.memory
            present = self.editor.node(
                "Concat", [past, layouts.as_cache(memory)], {"axis": 2},
                wish=entry.present, dtype=memory.dtype, shape=entry.shape(Length.TOTAL.value),
            )  # fmt: skip
            shape = self.flow.shapes[memory.value].shape or ()
            own = views.sizes(shape, tokens.axes_at(memory.value, Length.TOTAL))
            tokens.remember(memory.value, layouts.from_cache(memory, present, own))
            presents.append(present)
        return presents

    def _spell_masks(self, lengths: Lengths, before: dict[ir.Node, tuple[ir.Value | None, ...]]) -> None:
        """Say as a mask what `is_causal` says: runtimes differ on where it puts the corner of a rectangle.

        Source: ONNX `Attention`, whose alignment was corrected in place after opset 24 had been released.
        """
        causal = [fused for fused in self.flow.fused if fused.causal]
        if not causal:
            return
        zero, one, total = lengths.scalar(0), lengths.scalar(1), lengths.scalar(dim.add(PAST, NEW))
        mask = causal_mask(self.editor, lengths, [zero, total, one], [lengths.scalar(PAST), total, one])
        for fused in causal:
            self._spell_mask(fused, mask, before[fused.node])

    def _spell_mask(self, fused: FusedAttention, causal: ir.Value, before: Sequence[ir.Value | None]) -> None:
        node, place = fused.node, 3
        given = node.inputs[fused.mask] if fused.mask is not None else None
        original = before[fused.mask] if fused.mask is not None else None
        dtype = None if original is None else self.flow.shapes[original].dtype
        mask = causal
        if given is not None and dtype is ir.DataType.BOOL:
            mask = self.editor.node("And", [given, causal], wish=f"{given.name}.causal", dtype=dtype)
        elif given is not None and dtype is not None:
            lowest = self.editor.constant(-np.inf, dtype.numpy(), wish="masked")
            mask = self.editor.node("Where", [causal, given, lowest], wish=f"{given.name}.causal", dtype=dtype)
        if len(node.inputs) <= place:
            node.resize_inputs(place + 1)
        self.editor.rewire(node, place, mask)
        self.editor.drop_attribute(node, "is_causal")

    def _write_shapes(self) -> None:
        """Let declared shapes say which length they have."""
        for given in self.analysis.inputs:
            axes = tuple(SequenceAxis(axis, Role(length)) for axis, length in given.lengths.items())
            given.value.shape = ir.Shape(spelled_from_export(given.dimensions, axes, self.analysis.length))
        for node in self.nodes:
            for value in node.outputs:
                if value.shape is not None:
                    self._write_shape(value)

    def _write_shape(self, value: ir.Value) -> None:
        fact, axes = self.flow.shapes.facts.get(value), self.flow.axes.get(value, ())
        declared = value.shape
        if fact is None or fact.shape is None or declared is None or len(fact.shape) != len(declared):
            return
        if axes or any(not isinstance(size, int) for size in declared):
            value.shape = ir.Shape(spelled_from_export(fact.shape, _decided(axes), self.analysis.length))


def _decided(axes: Axes) -> Axes:
    return tuple(axis for axis in axes if axis.role.resolved() is not None)
