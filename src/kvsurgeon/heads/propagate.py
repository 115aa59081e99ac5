"""Propagate other heads from an operand of a product up to the weights that compute them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.token_data import upstream_tokens
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import through
from kvsurgeon.heads.head_axis import HeadAxis
from kvsurgeon.heads.index_trace import IndexTrace
from kvsurgeon.heads.node_edit import NodeEdit, NodeInputs, Values
from kvsurgeon.heads.rules import inputs_with_heads
from kvsurgeon.heads.selection import Selection
from kvsurgeon.heads.structural_equality import expression_key
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import find_links, has_trait
from kvsurgeon.resizing.lengths import LengthValues
from kvsurgeon.weights import ComputedTensor, TensorSlice


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadRequest:
    """A value with other heads that is a part of a projection; `placeholder` is read until that is replaced."""

    values: Values
    axis: HeadAxis
    selection: Selection
    placeholder: ir.Value


class HeadPropagation:
    """Copies of nodes with other heads, each made once; the originals stay until they are dead code."""

    def __init__(
        self, analysis: Analysis, trace: IndexTrace, editor: Editor, lengths: LengthValues, *, lossy: bool
    ) -> None:
        self.analysis = analysis
        self.flow = analysis.flow
        self.trace = trace
        self.editor = editor
        self.lengths = lengths
        self.lossy = lossy
        self.region: frozenset[ir.Node] = frozenset()
        self.requests: list[HeadRequest] = []
        self.renamed: dict[
            str, ir.Value
        ] = {}  # names of replaced initializers, and the new initializers that take them over
        self._propagated: dict[tuple[ir.Value, HeadAxis, Selection], ir.Value] = {}
        self._copies: dict[tuple[ir.Node, tuple[ir.Value | None, ...]], ir.Node] = {}
        self._headed: dict[ir.Value, tuple[HeadAxis, Selection, ir.Value]] = {}
        self._replaced: dict[ir.Value, ir.Value] = {}
        self._without_heads: dict[ir.Value, ir.Value] = {}

    def propagated(self, values: Values, axis: HeadAxis, selection: Selection) -> ir.Value:
        """Return the value with the heads of `selection`, or of several layers that are averaged.

        Raises:
            UnsupportedError: It is not known which weights compute its heads.
        """
        values = tuple(through(value, {"Identity"}) for value in values)
        key = (values[0], axis, selection)
        if key not in self._propagated:
            self._propagated[key] = self._make(values, axis, selection)
            if self.flow.kinds.get(values[0]) is ValueKind.TOKEN:
                self._headed[values[0]] = (axis, selection, self._propagated[key])
        return self._propagated[key]

    def without_heads(self, value: ir.Value) -> ir.Value:
        """Return a value without a head axis, recomputed if it depends on all heads, as a mean square does."""
        if value not in self._without_heads:
            self._without_heads[value] = self._follow(value)[0] if self._depends(value) else value
        return self._without_heads[value]

    def replace_outputs(self) -> None:
        """Replace outputs of originals that must come from their copies."""
        for old, new in self._replaced.items():
            for node, index in tuple(old.uses()):
                self.editor.replace_input(node, index, new)

    def _make(self, values: Values, axis: HeadAxis, selection: Selection) -> ir.Value:
        value = values[0]
        if constant_tensor(value) is not None:
            return self._constant(values, axis, selection)
        node = value.producer()
        if node is None or self.flow.kinds.get(value) is ValueKind.CONTEXT:
            return self._gathered(value, axis, selection)
        nodes = self._nodes_of_layers(values)
        change = NodeEdit(
            propagation=self, nodes=nodes, call=self.flow.shapes.call(node), result=self.flow.shapes[value].shape or (),
            output=value.index() or 0, axis=axis, selection=selection,
        )  # fmt: skip
        made = inputs_with_heads(change)
        if made is not None:
            return self._copy(node, made).outputs[value.index() or 0]
        placeholder = ir.Value(name=f"{value.name}.stand_in", type=value.type)
        self.requests.append(HeadRequest(values=values, axis=axis, selection=selection, placeholder=placeholder))
        return placeholder

    def _copy(self, node: ir.Node, made: NodeInputs) -> ir.Node:
        key = (node, tuple(made.inputs))
        if key not in self._copies:
            copy = self.editor.copy(node, list(made.inputs), "heads", made.without)
            for name, attribute in made.attributes.items():
                copy.attributes[name] = ir.convenience.convert_attribute(name, attribute)
            self._replaced |= {node.outputs[index]: copy.outputs[index] for index in made.replaced}
            self._copies[key] = copy
        return self._copies[key]

    def _nodes_of_layers(self, values: Values) -> tuple[ir.Node, ...]:
        """The nodes that compute a value in each of several layers, which must be alike."""
        nodes = [value.producer() for value in values]
        first = nodes[0]
        assert first is not None
        found = []
        for node, value in zip(nodes, values, strict=True):
            if node is None or expression_key(node, value) != expression_key(first, values[0]):
                raise UnsupportedError(
                    "the layers to be averaged compute their heads differently", code=Code.CANNOT_AVERAGE,
                    at=value.name, expected=first.op_type, found="nothing" if node is None else node.op_type,
                )  # fmt: skip
            found.append(node)
        return tuple(found)

    def _constant(self, values: Values, axis: HeadAxis, selection: Selection) -> ir.Value:
        tensors = [tensor for value in values if (tensor := constant_tensor(value)) is not None]
        first, name = tensors[0], values[0].name or "weights"
        if not isinstance(axis.outer, int) or not isinstance(axis.inner, int):
            raise UnsupportedError("weights depend on the batch or the length", code=Code.UNTRACEABLE_HEADS, at=name)
        if len(tensors) < len(values) or any(t.dtype != first.dtype or t.shape != first.shape for t in tensors):
            raise UnsupportedError(
                "the layers to be averaged have weights of different shapes or types", code=Code.CANNOT_AVERAGE, at=name
            )
        averaged = any(len(terms) > 1 for terms in selection.blocks)
        if averaged and not first.dtype.is_floating_point():
            raise UnsupportedError(
                "quantized weights cannot be averaged", code=Code.CANNOT_AVERAGE, at=name,
                expected="floating-point weights", found=first.dtype.name.lower(), hint="use method=first",
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

    def _gathered(self, value: ir.Value, axis: HeadAxis, selection: Selection) -> ir.Value:
        """Context with a head axis, gathered at run time, and averaged if heads are."""
        alone = len(selection.blocks) == 1 and all(term.source == 0 for term in selection.blocks[0])
        if not alone or not isinstance(axis.outer, int) or not isinstance(axis.inner, int):
            raise UnsupportedError(
                "context with a head axis cannot be averaged over layers", code=Code.CANNOT_AVERAGE, at=value.name
            )
        (terms,) = selection.blocks
        wholes = [Selection(selection.count, ((term,),)).within(axis.outer, axis.inner) for term in terms]
        gathered = [
            self.editor.node(
                "Gather", [value, self.editor.constant(whole.indices, name="heads")], {"axis": axis.axis},
                name=f"{value.name}.heads", dtype=value.dtype,
            )
            for whole in wholes
        ]  # fmt: skip
        if len(gathered) == 1:
            return gathered[0]
        if value.dtype is None or not value.dtype.is_floating_point():
            raise UnsupportedError(
                "context with a head axis cannot be averaged", code=Code.CANNOT_AVERAGE, at=value.name
            )
        return self.editor.node("Mean", gathered, {}, name=f"{value.name}.mean", dtype=value.dtype)

    def _depends(self, value: ir.Value) -> bool:
        """Whether a value depends on values with other heads, with no projection in between."""
        return any(one in self._headed for one in upstream_tokens(self.flow, value))

    def _follow(self, value: ir.Value) -> tuple[ir.Value, tuple[HeadAxis, Selection] | None]:
        """The value recomputed from values with other heads, and its head axis and selection if it has one."""
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
            return self._copy(node, NodeInputs(inputs=inputs)).outputs[value.index() or 0], None
        index, (axis, selection) = found[0]
        result = self._heads_after(node, index, axis, selection)
        if result is not None:
            new = self.propagated((value,), result, selection)
            return new, (result, selection)
        return self._copy(node, NodeInputs(inputs=inputs)).outputs[value.index() or 0], None

    def _heads_after(self, node: ir.Node, index: int, axis: HeadAxis, selection: Selection) -> HeadAxis | None:
        """The head axis of the result; None if heads are reduced."""
        links = find_links(self.flow.shapes.call(node))
        trace = None if links is None else links.inputs[index]
        if links is None or trace is None or links.row_major:
            raise UnsupportedError(
                f"cannot trace heads through {node.op_type}", code=Code.UNTRACEABLE_HEADS, at=node.outputs[0].name
            )
        label = trace[axis.axis]
        if label in links.outputs[0]:
            return axis.at(links.outputs[0].index(label))
        if not has_trait(node, Trait.EXTREMUM_OR_MEAN) or not (selection.is_even or self.lossy):
            raise UnsupportedError(
                f"{node.op_type} mixes all heads", code=Code.UNTRACEABLE_HEADS, at=node.outputs[0].name
            )
        return None
