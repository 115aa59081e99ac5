"""Give every attention layer a past input and a present output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from kvsurgeon.errors import Refused
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject
from kvsurgeon.sequence.analysis import Analysis, Head, analyse
from kvsurgeon.sequence.axes import Axes, Length, Role, SequenceAxis
from kvsurgeon.sequence.cuts import Memory
from kvsurgeon.sequence.flow import FusedAttention
from kvsurgeon.sequence.kinds import Kind
from kvsurgeon.sequence.lengths import NEW, PAST, Lengths
from kvsurgeon.sequence.proof import prove
from kvsurgeon.sequence.views import Views
from kvsurgeon.shapes import dimension as dim
from kvsurgeon.shapes.dimension import BATCH, LENGTH, Dimension
from kvsurgeon.shapes.fact import Fact

BATCH_NAME = "batch_size"
PAST_NAME = "past_sequence_length"


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
    present: str = "present.{layer}.{kind}"

    def apply(self, subject: Subject) -> Outcome:
        """Inject the cache into `subject.model`.

        Raises:
            Refused: The model cannot be given a cache soundly; it is left as it was.
        """
        analysis = analyse(subject.model)
        proof = prove(analysis)
        surgery = _Surgery(analysis, self, proof.limit)
        surgery.operate()
        subject.changed()
        notes = [f"assumed, not proved: {what} (first at `{where}`)" for what, where in analysis.flow.assumed.items()]
        if proof.limit is not None:
            notes.append(f"context changes beyond {proof.limit} tokens, so the model stops with an error there")
        return Changed(edits=surgery.editor.edits, notes=tuple(notes))


class _Surgery:
    """One injection, from the first new input to the last dropped node."""

    def __init__(self, analysis: Analysis, options: Inject, limit: int | None) -> None:
        self.limit = limit
        self.analysis = analysis
        self.flow = analysis.flow
        self.options = options
        self.graph = analysis.model.graph
        self.editor = Editor(analysis.model)
        self.totals: dict[ir.Value, ir.Value] = {}  # token data at the total length
        self.entries = _entries(analysis.heads)
        self._causal: ir.Value | None = None

    def operate(self) -> None:
        """Do everything, in the order in which it must be done."""
        nodes = list(self.graph)
        self.before = {node: tuple(node.inputs) for node in nodes}
        pasts = self._add_pasts()
        self.lengths = Lengths(self.editor, self._sources(pasts), self.limit)
        self.views = Views(self.flow, self.editor, self.lengths, self.analysis.inputs, self.analysis.same)
        presents = [self._remember(memory, past) for (memory, _, _), past in zip(self.entries, pasts, strict=True)]
        for node in nodes:
            if any(self.flow.kinds.get(value) is Kind.TOKEN for value in node.outputs):
                self._rewire(node)
        for fused in self.flow.fused:
            if fused.causal:
                self._spell_mask(fused)
        for place, value in enumerate(self.graph.outputs):
            if self.flow.kinds.get(value) is Kind.CONTEXT:
                raise Refused("a graph output is context", at=value.name)
            del place
        self.graph.outputs.extend(presents)
        self._write_shapes(nodes)
        self.editor.finish()

    # Inputs and outputs

    def _add_pasts(self) -> list[ir.Value]:
        pasts = []
        for memory, layer, kind in self.entries:
            name = self.options.past.format(layer=layer, kind=kind)
            if any(value.name == name for value in (*self.graph.inputs, *self.graph.outputs)):
                raise Refused("the model already has an input or output of that name", at=name)
            for wish in (name, self.options.present.format(layer=layer, kind=kind)):
                self.editor.free(wish)
            past = ir.Value(
                name=name, type=ir.TensorType(memory.dtype), shape=ir.Shape(self._cache_shape(memory, PAST_NAME))
            )
            pasts.append(past)
        self.graph.inputs.extend(pasts)
        return pasts

    def _cache_shape(self, memory: Memory, length: str) -> list[int | str]:
        batch = memory.batch if isinstance(memory.batch, int) else BATCH_NAME
        return [batch, memory.heads, length, memory.head_dim]

    def _sources(self, pasts: Sequence[ir.Value]) -> dict:
        sources = {}
        for given in self.analysis.inputs:
            for axis, size in enumerate(given.dimensions):
                length = given.lengths.get(axis)
                if length is Length.NEW and NEW not in sources and given.is_token:
                    sources[NEW] = (given.value, axis)
                elif length is None and not isinstance(size, int):
                    sources.setdefault(size, (given.value, axis))
        sources[PAST] = (pasts[0], 2)
        return sources

    # The cache

    def _remember(self, memory: Memory, past: ir.Value) -> ir.Value:
        """Join past and new rows; what is downstream of the cut reads the whole."""
        index = self.graph.inputs.index(past) - (len(self.graph.inputs) - len(self.entries))
        _, layer, kind = self.entries[index]
        name = self.options.present.format(layer=layer, kind=kind)
        rows = self._as_cache(memory)
        shape = self._cache_shape(memory, Length.TOTAL.value)
        present = self.editor.node("Concat", [past, rows], {"axis": 2}, wish=name, dtype=memory.dtype, shape=shape)
        self.totals[memory.value] = self._from_cache(memory, present)
        return present

    def _as_cache(self, memory: Memory) -> ir.Value:
        """The tensor's new rows as [batch, heads, sequence, head_dim]."""
        value, name = memory.value, memory.value.name or "rows"
        sizes = [NEW if size is None else size for size in memory.parts]
        if memory.effort == 2 and len(memory.parts) != memory.rank:
            value = self._reshaped(value, sizes, f"{name}.parts", memory.dtype)
        if memory.effort == 2:
            value = self._transposed(value, memory.order, f"{name}.heads_first", memory.dtype)
        if memory.is_canonical or (memory.effort == 2 and len(memory.parts) == 4):
            return value
        sizes = [memory.batch, memory.heads, NEW, memory.head_dim]
        return self._reshaped(value, sizes, f"{name}.rows", memory.dtype)

    def _from_cache(self, memory: Memory, present: ir.Value) -> ir.Value:
        """The whole cache in the tensor's own layout."""
        if memory.is_canonical:
            return present
        value, name = present, memory.value.name or "rows"
        total = dim.add(PAST, NEW)
        sizes = [total if size is None else size for size in memory.parts]
        if memory.effort == 2:
            if len(memory.parts) != 4:
                ordered = [sizes[place] for place in memory.order]
                value = self._reshaped(value, ordered, f"{name}.parts_total", memory.dtype)
            back = [list(memory.order).index(place) for place in range(len(memory.order))]
            value = self._transposed(value, back, f"{name}.order_total", memory.dtype)
        shape = self.flow.shapes[memory.value].shape or ()
        if memory.effort == 1 or len(memory.parts) != memory.rank:
            sizes = self.views.sizes(shape, self._at(memory.value, Length.TOTAL))
            value = self._reshaped(value, sizes, f"{name}.total", memory.dtype)
        return value

    def _reshaped(self, value: ir.Value, sizes: Sequence[Dimension], wish: str, dtype: ir.DataType) -> ir.Value:
        target = self._target(sizes)
        return self.editor.node("Reshape", [value, target], wish=wish, dtype=dtype, shape=_in_words(sizes))

    def _transposed(self, value: ir.Value, order: Sequence[int], wish: str, dtype: ir.DataType) -> ir.Value:
        shape = None if value.shape is None else [value.shape[place] for place in order]
        return self.editor.node("Transpose", [value], {"perm": list(order)}, wish=wish, dtype=dtype, shape=shape)

    def _target(self, sizes: Sequence[Dimension]) -> ir.Value:
        """A reshape's target in as few numbers as possible: at most one -1, constants where all else is fixed."""
        open_places = [place for place, size in enumerate(sizes) if not isinstance(size, int)]
        if not open_places:
            return self.editor.constant([int(size) for size in sizes], wish="shape")
        widest = max(open_places, key=lambda place: not _is_batch(sizes[place]))
        return self.lengths.vector([-1 if place == widest else size for place, size in enumerate(sizes)])

    # Token data

    def _rewire(self, node: ir.Node) -> None:
        """Let a node on token data read what has the right length, at the new length."""
        for index, value in enumerate(self._inputs(node, Length.NEW)):
            self.editor.rewire(node, index, value)
        if self._clears_allowzero(node):
            self.editor.drop_attribute(node, "allowzero")

    def _spell_mask(self, fused: FusedAttention) -> None:
        """Say as a mask what `is_causal` says: runtimes differ on where it puts the corner of a rectangle.

        Source: ONNX `Attention`, whose alignment was corrected in place after opset 24 had been released.
        """
        node, dtype = fused.node, fused.node.inputs[0].dtype if fused.node.inputs[0] else None
        causal = self._causal_mask()
        given = node.inputs[fused.mask] if fused.mask is not None else None
        if given is None:
            mask = causal
        elif self.flow.shapes[self.before[node][3]].dtype is ir.DataType.BOOL:
            mask = self.editor.node("And", [given, causal], wish=f"{given.name}.causal", dtype=ir.DataType.BOOL)
        else:
            lowest = self.editor.constant(float("-inf"), _numpy_type(self.flow.shapes[self.before[node][3]].dtype))
            mask = self.editor.node("Where", [causal, given, lowest], wish=f"{given.name}.causal", dtype=dtype)
        if len(node.inputs) < 4:
            node.resize_inputs(4)
        self.editor.rewire(node, 3, mask)
        self.editor.drop_attribute(node, "is_causal")

    def _causal_mask(self) -> ir.Value:
        """[sequence, total_sequence]: whether the key is not after the query."""
        if self._causal is None:
            total, one = dim.add(PAST, NEW), self.editor.constant(1, wish="one")
            zero = self.editor.constant(0, wish="zero")
            int64 = ir.DataType.INT64
            keys = self.editor.node("Range", [zero, self.lengths.scalar(total), one], wish="keys", dtype=int64)
            ends = [self.lengths.scalar(PAST), self.lengths.scalar(total), one]
            queries = self.editor.node("Range", ends, wish="queries", dtype=int64)
            column = self.editor.constant([-1, 1], wish="shape")
            queries = self.editor.node("Reshape", [queries, column], wish="queries.column", dtype=int64)
            self._causal = self.editor.node("LessOrEqual", [keys, queries], wish="causal", dtype=ir.DataType.BOOL)
        return self._causal

    def _total(self, value: ir.Value) -> ir.Value:
        """Token data at the total length: what was remembered, or what is computed from it."""
        if value not in self.totals:
            node = value.producer()
            if node is None:
                raise Refused("an input is needed for all tokens so far", at=value.name)
            without = frozenset({"allowzero"}) if self._clears_allowzero(node) else frozenset()
            twin = self.editor.twin(node, self._inputs(node, Length.TOTAL), "total", without)
            for mine, theirs in zip(node.outputs, twin.outputs, strict=True):
                self.totals[mine] = theirs
                fact = self.flow.shapes.facts.get(mine)
                if fact is not None and fact.shape is not None and fact.dtype is not None:
                    sizes = self.views.sizes(fact.shape, self._at(mine, Length.TOTAL))
                    theirs.shape, theirs.type = ir.Shape(_in_words(sizes)), _type(fact)
        return self.totals[value]

    def _inputs(self, node: ir.Node, length: Length) -> list[ir.Value | None]:
        return [
            None if value is None else self._input(node, index, value, length)
            for index, value in enumerate(self.before[node])
        ]

    def _input(self, node: ir.Node, index: int, value: ir.Value, length: Length) -> ir.Value:
        flow = self.flow
        if flow.kinds.get(value) is Kind.TOKEN:
            role = flow.operands.get((node, index))
            wanted = length if role is None else role.resolved()
            return self._total(value) if wanted is Length.TOTAL else value
        if flow.targets.get(node) == index:
            return self._retarget(node, value, length)
        if (node, index) in flow.parameters:
            meant = flow.parameters[node, index].resolved() or Length.TOTAL
            numbers = flow.shapes[value].value
            assert numbers is not None
            sizes = [Lengths.at(number, length if meant is Length.NEW else meant) for number in numbers.reshape(-1)]
            return self.lengths.typed(self.lengths.vector(sizes), flow.shapes[value].dtype)
        axes = tuple(self._lengthened(axis, length) for axis in flow.demands.get((node, index), ()))
        return self.views.view(value, axes)

    def _lengthened(self, axis: SequenceAxis, length: Length) -> SequenceAxis:
        """The axis as a node at that length sees it: the stream's follows, the keys' is total anyway."""
        if length is Length.TOTAL and axis.role.resolved() is Length.NEW:
            return axis.with_role(_TOTAL)
        return axis

    def _at(self, value: ir.Value, length: Length) -> Axes:
        return tuple(self._lengthened(axis, length) for axis in self.flow.axes.get(value, ()))

    def _retarget(self, node: ir.Node, target: ir.Value, length: Length) -> ir.Value:
        """The target of a `Reshape` or `Expand`, derived anew from the dimensions of its result."""
        result = self.flow.shapes[node.outputs[0]].shape
        source = self.before[node][0]
        assert result is not None
        assert source is not None
        axes = self._at(node.outputs[0], length)
        if constant_tensor(target) is not None and not isinstance(self.analysis.length, int):
            return target
        sizes = self.views.sizes(result, axes)
        before = self.flow.shapes[source].shape or ()
        if node.op_type == "Expand":
            shift = len(result) - len(before)
            same = [
                place >= shift and before[place - shift] == result[place] for place in range(len(result))
            ]
            return self.lengths.vector([1 if same[place] else size for place, size in enumerate(sizes)])
        sizes_before = self.views.sizes(before, self._at(source, length))
        return self._target_after(sizes_before, sizes)

    def _target_after(self, before: Sequence[Dimension], after: Sequence[Dimension]) -> ir.Value:
        """A reshape's target with 0 where the dimension stays, and at most one -1."""
        numbers: list[Dimension] = []
        for place, size in enumerate(after):
            stays = not isinstance(size, int) and place < len(before) and before[place] == size
            numbers.append(0 if stays else size)
        open_places = [place for place, size in enumerate(numbers) if not isinstance(size, int)]
        if open_places:
            widest = max(open_places, key=lambda place: not _is_batch(after[place]))
            numbers[widest] = -1
        return self.lengths.vector(numbers)

    def _clears_allowzero(self, node: ir.Node) -> bool:
        """Whether 0 in the new target must mean "as before"."""
        if node.op_type != "Reshape" or "allowzero" not in node.attributes:
            return False
        return constant_tensor(self.before[node][1]) is None or isinstance(self.analysis.length, int)

    # Shapes in words

    def _write_shapes(self, nodes: Sequence[ir.Node]) -> None:
        for given in self.analysis.inputs:
            axes = tuple(SequenceAxis(axis, _NEW if length is Length.NEW else _TOTAL) for axis, length in given.lengths.items())
            given.value.shape = ir.Shape(self._words(given.dimensions, axes))
        outputs = set(self.graph.outputs)
        for node in nodes:
            for value in node.outputs:
                declared = value.shape
                if declared is None or (all(isinstance(size, int) for size in declared) and not isinstance(self.analysis.length, int)):
                    continue
                fact = self.flow.shapes.facts.get(value)
                if fact is None or fact.shape is None or len(fact.shape) != len(declared):
                    continue
                token = self.flow.kinds.get(value) is Kind.TOKEN
                if token or value in outputs:
                    value.shape = ir.Shape(self._words(fact.shape, self.flow.axes.get(value, ())))
                elif not isinstance(self.analysis.length, int):
                    value.shape = ir.Shape(self._words(fact.shape, ()))

    def _words(self, shape: Sequence[Dimension], axes: Axes) -> list[int | str | None]:
        words: list[int | str | None] = []
        for size in shape:
            if isinstance(size, int):
                words.append(size)
            elif size is BATCH:
                words.append(BATCH_NAME)
            elif size is LENGTH:
                words.append(Length.TOTAL.value)
            else:
                words.append(None)
        for axis in axes:
            whole = axis.is_plain and shape[axis.axis] == self.analysis.length
            words[axis.axis] = (axis.role.resolved() or Length.TOTAL).value if whole else None
        return words


def _in_words(sizes: Sequence[Dimension]) -> list[int | str | None]:
    """Dimensions as the model's reader knows them; None where they have no name of their own."""
    names = {BATCH: BATCH_NAME, NEW: Length.NEW.value, dim.add(PAST, NEW): Length.TOTAL.value}
    return [size if isinstance(size, int) else names.get(size) for size in sizes]


def _type(fact: Fact) -> ir.TensorType | None:
    return None if fact.dtype is None else ir.TensorType(fact.dtype)


def _numpy_type(dtype: ir.DataType | None) -> Any:
    return np.float32 if dtype is None else dtype.numpy()


def _is_batch(size: Dimension) -> bool:
    return not isinstance(size, int) and size is BATCH


def _entries(heads: Sequence[Head]) -> list[tuple[Memory, int, str]]:
    """The tensors to remember, each once: key 0, value 0, key 1, ..."""
    entries: list[tuple[Memory, int, str]] = []
    seen: set[ir.Value] = set()
    layer = 0
    for head in heads:
        fresh = []
        for kind, operands in (("key", head.keys), ("value", head.values)):
            for operand in operands:
                if operand.memory.value not in seen:
                    seen.add(operand.memory.value)
                    fresh.append((operand.memory, layer, kind))
        if len({kind for _, _, kind in fresh}) < len(fresh):
            raise Refused("one attention reads several tensors of keys, or of values", layer=layer, at=head.at.name)
        entries += fresh
        layer += bool(fresh)
    return entries


_NEW = Role(Length.NEW)
_TOTAL = Role(Length.TOTAL)
