"""Compute tensors anew with other heads, from the product's operand up to the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import through
from kvsurgeon.heads.change import Change, Made, Values
from kvsurgeon.heads.head_axis import HeadAxis
from kvsurgeon.heads.index_trace import Labels
from kvsurgeon.heads.rules import inputs_with_heads
from kvsurgeon.heads.selection import Selection
from kvsurgeon.ops.operator import Trait, UntraceableAxesError
from kvsurgeon.ops.table import axis_links, has_trait
from kvsurgeon.rewrite.lengths import LengthValues
from kvsurgeon.weights import ComputedTensor, TensorSlice


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A value that is a part of another one, wanted with other heads: `stand_in` is read until it is made."""

    values: Values
    axis: HeadAxis
    selection: Selection
    stand_in: ir.Value


class Carrier:
    """Makes twins of nodes, each once; the originals stay until nobody reads them."""

    def __init__(
        self, analysis: Analysis, labels: Labels, editor: Editor, lengths: LengthValues, *, lossy: bool
    ) -> None:
        self.analysis = analysis
        self.flow = analysis.flow
        self.labels = labels
        self.editor = editor
        self.lengths = lengths
        self.lossy = lossy
        self.region: frozenset[ir.Node] = frozenset()
        self.requests: list[Request] = []
        self.renamed: dict[str, ir.Value] = {}  # names of old initializers, and the new ones that want them
        self._carried: dict[tuple[ir.Value, HeadAxis, Selection], ir.Value] = {}
        self._twins: dict[tuple[ir.Node, tuple[ir.Value | None, ...]], ir.Node] = {}
        self._headed: dict[ir.Value, tuple[HeadAxis, Selection, ir.Value]] = {}
        self._replaced: dict[ir.Value, ir.Value] = {}
        self._beside: dict[ir.Value, ir.Value] = {}

    def carried(self, values: Values, axis: HeadAxis, selection: Selection) -> ir.Value:
        """The value with the heads of `selection`; of several layers made alike, of all of them.

        Raises:
            UnsupportedError: It cannot be proved which weights make its heads.
        """
        values = tuple(through(value, {"Identity"}) for value in values)
        key = (values[0], axis, selection)
        if key not in self._carried:
            self._carried[key] = self._make(values, axis, selection)
            if self.flow.kinds.get(values[0]) is ValueKind.TOKEN:
                self._headed[values[0]] = (axis, selection, self._carried[key])
        return self._carried[key]

    def beside(self, value: ir.Value) -> ir.Value:
        """A value without heads, computed anew where it is made of all heads at once, as a mean square is."""
        if value not in self._beside:
            self._beside[value] = self._follow(value)[0] if self._depends(value) else value
        return self._beside[value]

    def replace_outputs(self) -> None:
        """Let everybody read from a twin what must not come from its original any more."""
        for old, new in self._replaced.items():
            for node, index in tuple(old.uses()):
                self.editor.replace_input(node, index, new)

    def _make(self, values: Values, axis: HeadAxis, selection: Selection) -> ir.Value:
        value = values[0]
        if constant_tensor(value) is not None:
            return self._constant(values, axis, selection)
        node = value.producer()
        if node is None or self.flow.kinds.get(value) is ValueKind.CONTEXT:
            return self._picked(value, axis, selection)
        nodes = self._alike(values)
        change = Change(
            carrier=self, nodes=nodes, call=self.flow.shapes.call(node), result=self.flow.shapes[value].shape or (),
            output=value.index() or 0, axis=axis, selection=selection,
        )  # fmt: skip
        made = inputs_with_heads(change)
        if made is not None:
            return self._twin(node, made).outputs[value.index() or 0]
        stand_in = ir.Value(name=f"{value.name}.stand_in", type=value.type)
        self.requests.append(Request(values=values, axis=axis, selection=selection, stand_in=stand_in))
        return stand_in

    def _twin(self, node: ir.Node, made: Made) -> ir.Node:
        key = (node, tuple(made.inputs))
        if key not in self._twins:
            twin = self.editor.copy(node, list(made.inputs), "heads", made.without)
            for name, attribute in made.attributes.items():
                twin.attributes[name] = ir.convenience.convert_attribute(name, attribute)
            self._replaced |= {node.outputs[index]: twin.outputs[index] for index in made.replaced}
            self._twins[key] = twin
        return self._twins[key]

    def _alike(self, values: Values) -> tuple[ir.Node, ...]:
        """The makers of values that are made alike in several layers."""
        nodes = [value.producer() for value in values]
        first = nodes[0]
        assert first is not None
        found = []
        for node, value in zip(nodes, values, strict=True):
            if node is None or _kind(node) != _kind(first) or value.index() != values[0].index():
                raise UnsupportedError(
                    "layers that are to be averaged do not make their heads alike", at=value.name,
                    expected=first.op_type, found="nothing" if node is None else node.op_type,
                )  # fmt: skip
            found.append(node)
        return tuple(found)

    def _constant(self, values: Values, axis: HeadAxis, selection: Selection) -> ir.Value:
        tensors = [tensor for value in values if (tensor := constant_tensor(value)) is not None]
        first, name = tensors[0], values[0].name or "weights"
        if not isinstance(axis.outer, int) or not isinstance(axis.inner, int):
            raise UnsupportedError("weights vary with the batch or the length", at=name)
        if len(tensors) < len(values) or any(t.dtype != first.dtype or t.shape != first.shape for t in tensors):
            raise UnsupportedError("layers that are to be averaged do not have weights of one shape and type", at=name)
        averaged = any(len(terms) > 1 for terms in selection.blocks)
        if averaged and not first.dtype.is_floating_point():
            raise UnsupportedError(
                "quantised weights have no mean", at=name, expected="floating-point weights",
                found=first.dtype.name.lower(), hint="method=first takes stored values as they are",
            )  # fmt: skip
        places = selection.within(axis.outer, axis.inner)
        blocks = [
            [TensorSlice(tensor=tensors[term.source], indices=term.indices, weight=term.weight) for term in terms]
            for terms in places.blocks
        ]
        tensor = ComputedTensor(blocks, axis=axis.axis, name=self.editor.unique_name(f"{name}.heads"))
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.editor.graph.register_initializer(value)
        self.editor.edits += 1
        self.renamed.setdefault(values[0].name or "", value)
        return value

    def _picked(self, value: ir.Value, axis: HeadAxis, selection: Selection) -> ir.Value:
        """Context that differs from head to head, picked at run time, and averaged where heads are."""
        alone = len(selection.blocks) == 1 and all(term.source == 0 for term in selection.blocks[0])
        if not alone or not isinstance(axis.outer, int) or not isinstance(axis.inner, int):
            raise UnsupportedError("what is computed for each head cannot be averaged over layers", at=value.name)
        (terms,) = selection.blocks
        wholes = [Selection(selection.count, ((term,),)).within(axis.outer, axis.inner) for term in terms]
        picked = [
            self.editor.node(
                "Gather", [value, self.editor.constant(whole.indices, name="heads")], {"axis": axis.axis},
                name=f"{value.name}.heads", dtype=value.dtype,
            )
            for whole in wholes
        ]  # fmt: skip
        if len(picked) == 1:
            return picked[0]
        if value.dtype is None or not value.dtype.is_floating_point():
            raise UnsupportedError("what is computed for each head has no mean", at=value.name)
        return self.editor.node("Mean", picked, {}, name=f"{value.name}.mean", dtype=value.dtype)

    def _depends(self, value: ir.Value) -> bool:
        """Whether a value is made of values that have other heads now, with no product with weights in between."""
        pending, seen = [value], set[ir.Value]()
        while pending:
            one = pending.pop()
            if one in self._headed:
                return True
            node = one.producer()
            if one in seen or node is None or has_trait(node, Trait.PROJECTION):
                continue
            seen.add(one)
            pending += [v for v in node.inputs if v is not None and self.flow.kinds.get(v) is ValueKind.TOKEN]
        return False

    def _follow(self, value: ir.Value) -> tuple[ir.Value, tuple[HeadAxis, Selection] | None]:
        """The value made of values with other heads, and its own heads if it has any."""
        if value in self._headed:
            axis, selection, new = self._headed[value]
            return new, (axis, selection)
        node = value.producer()
        if node is None or not self._depends(value):
            return value, None
        made = [(None, None) if one is None else self._follow(one) for one in node.inputs]
        found = [(index, heads) for index, (_, heads) in enumerate(made) if heads is not None]
        inputs: Sequence[ir.Value | None] = [new for new, _ in made]
        if not found:
            return self._twin(node, Made(inputs=inputs)).outputs[value.index() or 0], None
        index, (axis, selection) = found[0]
        result = self._heads_after(node, index, axis, selection)
        if result is not None:
            new = self.carried((value,), result, selection)
            return new, (result, selection)
        return self._twin(node, Made(inputs=inputs)).outputs[value.index() or 0], None

    def _heads_after(self, node: ir.Node, index: int, axis: HeadAxis, selection: Selection) -> HeadAxis | None:
        """Where the heads of an input are in the result; None where all of them are reduced to one number."""
        try:
            links = axis_links(self.flow.shapes.call(node))
        except UntraceableAxesError:
            links = None
        labels = None if links is None else links.inputs[index]
        if links is None or labels is None or links.row_major:
            raise UnsupportedError(
                f"{node.op_type}: it is not known whether it keeps heads apart", at=node.outputs[0].name
            )
        label = labels[axis.axis]
        if label in links.outputs[0]:
            return axis.at(links.outputs[0].index(label))
        if not has_trait(node, Trait.EXTREMUM_OR_MEAN) or not (selection.is_even or self.lossy):
            raise UnsupportedError(f"{node.op_type}: it works on all heads at once", at=node.outputs[0].name)
        return None


def _kind(node: ir.Node) -> tuple[object, ...]:
    attributes = sorted((name, repr(attribute.value)) for name, attribute in node.attributes.items())
    return node.domain, node.op_type, len(node.inputs), attributes
