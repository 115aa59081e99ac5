"""Memory tokens: a prefix of the model itself before the text, whose rows are queries too and are cut off at the end.

If no token before the text attends to one of it, memory tokens are the same in every call: their keys and values are
those of a text without tokens. Here they become learned rows of keys and values, computed from weights alone, and the
queries are those of the text. That is correct if the part of the model between the two ends is a decoder of memory
tokens and text for which the obligations of a cache hold: that part alone is analyzed and proved first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir
import sympy

from kvsurgeon.analysis.analysis import Analysis, analyze
from kvsurgeon.dataflow.input_dimensions import GraphInputs, read_inputs, required_length
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.decompose import DecomposedModel
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.graph.query import all_inputs, downstream, find_live, is_operator, through, uses_of
from kvsurgeon.ops.content import depends_on_input, is_shape_only
from kvsurgeon.ops.gather import FAR
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import find_links, has_trait
from kvsurgeon.proof.proof import prove
from kvsurgeon.resizing.lengths import LengthValues, sources_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dim_names import dim_names
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, Dimension
from kvsurgeon.symbolic.fact import Fact
from kvsurgeon.symbolic.sequence_axes import Axes, Length

_MOVES = (Trait.IDENTITY, Trait.RESHAPE, Trait.TRANSPOSE, Trait.REPEAT)


class _NotConstantError(Exception):
    """Error of a model whose memory tokens cannot become learned rows of keys and values."""


@dataclass(frozen=True, kw_only=True)
class _Ends:
    """The ends of the memory tokens of a model: their joins with the text, and the nodes that cut them off.

    Attributes:
        count: Number of memory tokens.
        joined: Values with a row for each memory token and token: hidden states, and inputs such as a padding mask.
        cuts: Nodes that leave the rows of the text.
    """

    count: int
    joined: tuple[ir.Value, ...]
    cuts: tuple[ir.Node, ...]

    @property
    def length(self) -> Dimension:
        """The number of memory tokens and tokens."""
        return dim.add(LENGTH, self.count)

    def of_all(self, number: Dimension) -> Dimension:
        """Return a number with the length of memory tokens and text in place of that of the text."""
        return dim.substitute(number, ((LENGTH, dim.subtract(LENGTH, self.count)),))


def with_constant_prefix(decomposed: DecomposedModel) -> DecomposedModel:
    """Return a model whose memory tokens are learned rows of keys and values; the given one if it has none.

    The original is not changed.

    Raises:
        UnsupportedError: Memory tokens attend to the text, or depend on its length; or the graph runs at one length
            only.
    """
    model = decomposed.model
    if not any(_may_join(node) for node in model.graph):
        return decomposed
    given = read_inputs(model.graph)
    ends = _find(model.graph, given)
    if ends is None:
        return decomposed
    try:
        analysis = analyze(_decoder_of_all(model, given, ends))
        proof = prove(analysis)
        if proof.limited_at is not None:
            return decomposed
        longest = None if proof.limit is None else proof.limit - ends.count
        changed = replace(decomposed, model=_Constant(model, given, ends, analysis).result())
        return changed if longest is None else changed.limited_to(longest)
    except _NotConstantError:
        return decomposed
    except UnsupportedError as error:
        if error.code not in (Code.NOT_CAUSAL, Code.LENGTH_DEPENDENT):
            return decomposed
        raise UnsupportedError(
            error.reason, code=error.code, layer=error.layer, at=error.at, expected=error.expected, found=error.found,
            hint="positions count from the first memory token: rows of the model itself, concatenated before the text",
        ) from error  # fmt: skip


def _may_join(node: ir.Node) -> bool:
    """Return whether a node may join weights with tokens, each of some rows."""
    first = node.inputs[0] if is_operator(node, "Concat") and len(node.inputs) > 1 else None
    if first is None or node.attributes.get_int("axis", 0) == 0:
        return False
    return constant_tensor(through(first, lambda one: has_trait(one, *_MOVES))) is not None


def _find(graph: ir.Graph, given: GraphInputs) -> _Ends | None:
    live = find_live(graph)
    nodes = [node for node in graph if node in live]
    rows = {node.outputs[0]: count for node in nodes if (count := _rows_before(given.shapes, node))}
    starts = [value for value in rows if _may_join(value.producer())]  # type: ignore[arg-type]
    if not starts:
        return None
    count = rows[starts[0]]
    inside = set(downstream(starts, stop=is_shape_only))
    joined = [value for value in rows if rows[value] == count and (value in starts or value not in inside)]
    cuts = [node for node in nodes if node.inputs and node.inputs[0] in inside and _cuts(given.shapes, node, count)]
    left = downstream(starts, stop=lambda node: is_shape_only(node) or node in cuts)
    if any(value.is_graph_output() for value in left):
        _check_length(nodes, given.shapes)
        return None
    return _Ends(count=count, joined=tuple(joined), cuts=tuple(cuts))


def _check_length(nodes: Sequence[ir.Node], shapes: Shapes) -> None:
    if (fixed := required_length(nodes, shapes)) is not None:
        node, length = fixed
        raise UnsupportedError(
            f"{node.op_type}: it runs at a length of {length} only, although the inputs declare a dynamic one",
            code=Code.FIXED_LENGTH, at=node.outputs[0].name, hint="export with dynamic axes",
        )  # fmt: skip


def _rows_before(shapes: Shapes, node: ir.Node) -> int:
    """Return how many rows that depend on no input a node adds before the tokens; 0 if it does something else."""
    if not is_operator(node, "Concat", "Pad"):
        return 0
    links, after = find_links(shapes.call(node)), shapes[node.outputs[0]].shape
    if links is None or after is None:
        return 0
    others, tokens = node.inputs[:-1], node.inputs[-1]
    if isinstance(links.joined, int):
        axis = links.joined
    elif node.attributes.get_string("mode", "constant") == "constant" and len(links.padded) == 1:
        ((label, (_, behind)),) = links.padded.items()
        axis, tokens, others = label if isinstance(label, int) and behind == 0 else -1, node.inputs[0], node.inputs[1:]
    else:
        return 0
    if axis < 0 or any(one is not None and depends_on_input(one) for one in others):
        return 0
    before = None if tokens is None else shapes[tokens].shape
    if tokens is None or before is None or before[axis] is not LENGTH or not depends_on_input(tokens):
        return 0
    count = dim.subtract(after[axis], LENGTH)
    return count if isinstance(count, int) and count > 0 else 0


def _cuts(shapes: Shapes, node: ir.Node, count: int) -> bool:
    """Return whether a node leaves the rows of the text."""
    assert node.inputs[0] is not None
    links, before, after = find_links(shapes.call(node)), shapes[node.inputs[0]].shape, shapes[node.outputs[0]].shape
    if links is None or len(links.selected) != 1 or before is None or after is None:
        return False
    ((label, (start, _, step)),) = links.selected.items()
    axis = label if isinstance(label, int) else -1
    return start == count and step == 1 and after[axis] is LENGTH and dim.subtract(before[axis], LENGTH) == count


def _decoder_of_all(model: ir.Model, given: GraphInputs, ends: _Ends) -> ir.Model:
    """Return the part of a model between the ends of the memory tokens, whose text is memory tokens and tokens."""
    copy = copy_model(model)
    editor, values, entries = Editor(copy), _by_name(copy), dict[ir.Value, tuple[Dimension, ...]]()
    for value in ends.joined:
        sizes = tuple(ends.of_all(size) for size in _shape(given.shapes, value))
        dtype = given.shapes[value].dtype or ir.DataType.FLOAT
        entry = ir.Value(name=editor.unique_name("joined"), type=ir.TensorType(dtype), shape=ir.Shape(dim_names(sizes)))
        copy.graph.inputs.insert(len(entries), entry)
        editor.replace(values[value.name or ""], entry)
        entries[entry] = sizes
    symbols = {values[one.name or ""]: sizes for one, sizes in given.dimensions.items()}
    lengths = LengthValues(editor, sources_of({**entries, **symbols}))
    for node in model.graph:
        numbers = given.shapes[node.outputs[0]].value if is_shape_only(node) else None
        if numbers is not None:
            of_all = np.array([ends.of_all(one) for one in numbers.flat], dtype=object).reshape(numbers.shape)
            values[node.outputs[0].name or ""].replace_all_uses_with(lengths.array(of_all))
    left = dict.fromkeys(node.inputs[0].name for node in ends.cuts if node.inputs[0] is not None)
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name or ""] for name in left)
    editor.finish()
    for one, sizes in given.dimensions.items():
        value = values[one.name or ""]
        if not uses_of(value):
            copy.graph.inputs.remove(value)
        elif LENGTH in sizes:
            raise _NotConstantError  # another length than that of the part
    return copy


class _Constant:
    """Writes a model whose memory tokens are learned rows of keys and values.

    Args:
        model: The model.
        given: Its inputs and shapes.
        ends: Where its memory tokens are joined and cut off.
        analysis: The analysis of the part of the model that they are tokens of.
    """

    def __init__(self, model: ir.Model, given: GraphInputs, ends: _Ends, analysis: Analysis) -> None:
        self.flow, self.ends, self.given = analysis.flow, ends, given
        flow = self.flow
        further = (flow.states, flow.routed_regions, flow.diagonals, flow.addresses, flow.per_call, flow.last)
        causal = any(fused.inputs.causal for fused in flow.fused)
        if causal or any(further):
            raise _NotConstantError
        self.model = copy_model(model)
        self.editor, self.values, self.original = Editor(self.model), _by_name(self.model), _by_name(model)
        dimensions = {self.values[value.name or ""]: sizes for value, sizes in given.dimensions.items()}
        self.lengths = LengthValues(self.editor, sources_of(dimensions))
        self.op, self.live = NodeBuilder(self.editor, "memory"), find_live(model.graph)
        self.rows: dict[ir.Value, ir.Value] = {}  # of the memory tokens alone, by value of the model

    def result(self) -> ir.Model:
        """Return the model."""
        for (node, index), variable in self.flow.operands.items():
            if variable.resolved() is Length.TOTAL:
                self._add_rows(node, index)
        for (node, index), axes in self.flow.demands.items():
            self._take_rows_of_text(node, index, axes)
        for (node, index), variable in self.flow.parameters.items():
            if variable.resolved() is Length.NEW:
                self._replace_input(node, index, self._numbers(self.flow.shapes, node.inputs[index]))
        for value in self.flow.axes:
            self._resize(value)
        tokens = {value.name for value in self.flow.axes if value.is_graph_input()}
        for value in self.ends.joined:
            if value.name in tokens:
                self._same(value).replace_all_uses_with(_tokens(self._same(value)))
        for cut in self.ends.cuts:
            left = self._same(cut.outputs[0])
            rows = self.op.Identity(left.producer().inputs[0])  # type: ignore[union-attr]
            rows.type, rows.shape = left.type, left.shape
            self.editor.replace(left, rows)
        self.editor.finish()
        return self.model

    def _same(self, value: ir.Value) -> ir.Value:
        """Return the value of the result that has the name of a value of the model, or of its part."""
        return self.values[value.name or ""]

    def _replace_input(self, node: ir.Node, index: int, value: ir.Value) -> None:
        self.editor.replace_input(self._same(node.outputs[0]).producer(), index, value)  # type: ignore[arg-type]

    def _numbers(self, shapes: Shapes, value: ir.Value | None) -> ir.Value:
        numbers = None if value is None else shapes[value].value
        if numbers is None:
            raise _NotConstantError
        return self.lengths.array(numbers)

    def _add_rows(self, node: ir.Node, index: int) -> None:
        """Add the rows of the memory tokens to keys or values."""
        value = node.inputs[index]
        axes = self.flow.axes.get(value, ()) if value is not None else ()
        if value is None or len(axes) != 1 or not axes[0].is_plain:
            raise _NotConstantError
        original, current = self.original[value.name or ""], self._same(value)
        sizes = [dim.substitute(size, ((LENGTH, 0),)) for size in _shape(self.given.shapes, original)]
        if any(not isinstance(size, int) and size is not BATCH for size in sizes):
            raise _NotConstantError
        rows = self._alone(original)
        if BATCH in sizes:
            rows = self.op.Expand(rows, self.lengths.vector(sizes))
        self._replace_input(node, index, self.op.Concat(rows, current, axis=axes[0].axis))

    def _take_rows_of_text(self, node: ir.Node, index: int, axes: Axes) -> None:
        """Take the rows of the text where context meets queries."""
        value = node.inputs[index]
        assert value is not None
        places = [axis for axis in axes if axis.variable.resolved() is Length.NEW]
        if any(not axis.is_plain or _shape(self.flow.shapes, value)[axis.axis] is not LENGTH for axis in places):
            raise _NotConstantError
        result = self._same(value)
        for axis in places:
            bounds = [self.op.int64([number]) for number in (self.ends.count, FAR, axis.axis)]
            result = self.lengths.once(("of the text", result, axis.axis), partial(self.op.Slice, result, *bounds))
        self._replace_input(node, index, result)

    def _resize(self, value: ir.Value) -> None:
        """Give a value rows of the text alone, and context the shape that it had."""
        result, node = self._same(value), value.producer()
        result.shape = None
        for user, _ in self.original[value.name or ""].uses():
            if is_shape_only(user) and user in self.live:
                numbers = self._numbers(self.given.shapes, user.outputs[0])
                self._same(user.outputs[0]).replace_all_uses_with(numbers)
        if node is None or node not in self.flow.targets:
            return
        sizes = list(_shape(self.flow.shapes, value))
        for axis in self.flow.axes[value]:
            if axis.variable.resolved() is Length.TOTAL:
                sizes[axis.axis] = dim.substitute(sizes[axis.axis], ((LENGTH, self.ends.length),))
        make = self.lengths.reshape_target if is_operator(node, "Reshape") else self.lengths.vector
        self._replace_input(node, self.flow.targets[node], make(sizes))

    def _alone(self, value: ir.Value) -> ir.Value:
        """Return a value for a batch of one text without tokens."""
        if value not in self.rows:
            self._compute_alone(value)
        return self.rows[value]

    def _compute_alone(self, value: ir.Value) -> None:
        fact, node = self.given.shapes[value], value.producer()
        if constant_tensor(value) is not None:
            self.rows[value] = self._same(value)
        elif fact.value is not None:
            self.rows[value] = self._constant(
                fact, np.array([_empty(one) for one in fact.value.flat]), fact.value.shape
            )
        elif node is None:
            raise _NotConstantError  # memory tokens depend on an input
        elif len(all_inputs(node)) != len([one for one in node.inputs if one is not None]):
            raise _NotConstantError  # a subgraph
        else:
            if value in self.ends.joined:
                self._empty(_tokens(value))
            inputs = [None if one is None else self._alone(one) for one in node.inputs]
            copy = self.editor.copy(self._same(value).producer(), inputs, "memory")  # type: ignore[arg-type]
            self.rows |= dict(zip(node.outputs, copy.outputs, strict=True))

    def _empty(self, tokens: ir.Value) -> None:
        """Use no rows for the text that memory tokens are joined with."""
        sizes = [_empty(size) for size in _shape(self.given.shapes, tokens)]
        self.rows[tokens] = self._constant(self.given.shapes[tokens], np.zeros(0), sizes)

    def _constant(self, fact: Fact, numbers: np.ndarray, sizes: Sequence[int]) -> ir.Value:
        if fact.dtype is None or any(isinstance(one, sympy.Expr) for one in (*numbers, *sizes)):
            raise _NotConstantError
        return self.op.constant(numbers.astype(fact.dtype.numpy()).reshape(sizes))


def _empty(number: Dimension) -> Dimension:
    """Return a number for a batch of one text without tokens."""
    return dim.at(number, 0, 1) if isinstance(number, sympy.Expr) else number


def _shape(shapes: Shapes, value: ir.Value) -> tuple[Dimension, ...]:
    shape = shapes[value].shape
    if shape is None:
        raise _NotConstantError
    return shape


def _tokens(joined: ir.Value) -> ir.Value:
    """Return the rows of the text that a node joins with others."""
    node = joined.producer()
    tokens = None if node is None else node.inputs[-1 if is_operator(node, "Concat") else 0]
    assert tokens is not None
    return tokens


def _by_name(model: ir.Model) -> dict[str, ir.Value]:
    graph = model.graph
    made = (value for node in graph for value in node.outputs)
    return {value.name or "": value for value in (*graph.inputs, *graph.initializers.values(), *made)}
