"""Context at given positions: token i has the row of the position that an input gives for it.

Context that meets token data has a row for each token, which depends on the token's index. At given positions the rows
are gathered for each text of a batch: `[..., length, ...]` becomes `[batch, ..., length, ...]`, and a batch axis that
the context has already becomes 1. The gather is pushed up through the operators that made the context until it reaches
a range, which becomes the positions themselves, or a table. If an operator has no rule its result is computed whole and
gathered from, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.ops.gather import slice_bounds
from kvsurgeon.ops.operator import AxisLinks, Label, Trait
from kvsurgeon.ops.table import find_links, has_trait, operator_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import Length, LengthVariable, SequenceAxis, reshape_axes

ROTARY = "RotaryEmbedding"
ATTENTION = "Attention"
MASK_RANK = 4  # of a mask of Attention: [batch, heads, queries, keys]
BATCHED_GATHER = 12  # first opset of GatherND with batch_dims

Use = tuple[ir.Node, int, int]  # a node on tokens, the index of its context input, the sequence axis of that
Rule = Callable[["GivenPositions", ir.Node, int], "ir.Value | None"]


class GivenPositions:
    """Context at given positions, each value computed once."""

    def __init__(self, flow: TokenFlow, editor: Editor, positions: ir.Value) -> None:
        """Take the positions, int64 `[batch, length]`."""
        self.flow = flow
        self.editor = editor
        self.positions = positions
        self._made: dict[tuple[ir.Value, int], ir.Value] = {}

    def at_positions(self, value: ir.Value, axis: int) -> ir.Value:
        """Return the value with a leading batch axis, and along `axis` the rows of the given positions.

        Raises:
            UnsupportedError: It depends on the text already.
        """
        if (value, axis) not in self._made:
            node = value.producer()
            is_computed = node is not None and self.flow.kinds.get(value) is ValueKind.CONTEXT
            made = _rule(node)(self, node, axis) if node is not None and is_computed else None
            self._made[value, axis] = made if made is not None else self._gathered(value, axis)
        return self._made[value, axis]

    def varies(self, value: ir.Value, axis: int) -> bool:
        """Return whether the value has a row for each token along an axis."""
        shape = self.shape(value)
        return 0 <= axis < len(shape) and shape[axis] == self.flow.length

    def shape(self, value: ir.Value) -> tuple[Dimension, ...]:
        """Return the value's dimensions.

        Raises:
            UnsupportedError: The rank is unknown.
        """
        shape = self.flow.shapes[value].shape
        if shape is None:
            raise UnsupportedError(
                "context of unknown rank cannot be gathered by positions", at=value.name, code=Code.PASS_PRECONDITION
            )
        return shape

    def reshaped(self, made: ir.Value, before: Sequence[Dimension], after: Sequence[Dimension]) -> ir.Value | None:
        """Return a gathered value `[batch, *before]` as `[batch, *after]`; None if that is not known to be the same.

        An axis of the batch size has size 1 in both: the batch is the leading axis now.
        """
        before, after = (tuple(1 if size == self.flow.batch else size for size in sizes) for sizes in (before, after))
        if before == after:
            return made
        if [size for size in after if not isinstance(size, int)] == [self.flow.length]:
            target = self.editor.constant([0, *(size if isinstance(size, int) else -1 for size in after)], name="form")
            return self.node("Reshape", [made, target], made.dtype)
        if [size for size in before if size != 1] != [size for size in after if size != 1]:
            return None
        dropped, added = ([place + 1 for place, size in enumerate(sizes) if size == 1] for sizes in (before, after))
        made = self.with_axes("Squeeze", made, dropped) if dropped else made
        return self.with_axes("Unsqueeze", made, added) if added else made

    def sizes_at_positions(self, sizes: ir.Value | None, after: Sequence[Dimension], axis: int) -> ir.Value | None:
        """Return `[batch, *after]` as a vector, with as many rows along an axis as there are positions.

        Args:
            sizes: The sizes that the graph gives, aligned with the last ones of `after`.
            after: The dimensions; a leading one of the batch size becomes 1.
            axis: The axis of the rows.
        """
        op, given = NodeBuilder(self.editor, "placed"), None if sizes is None else self.shape(sizes)
        if sizes is None or given is None or not isinstance(given[0], int):
            return None
        counts = op.Shape(self.positions)
        pieces = [op.Gather(counts, op.int64([0]))]
        for place, size in enumerate(after):
            index = place - (len(after) - given[0])
            if place == axis:
                pieces.append(op.Gather(counts, op.int64([1])))
            elif isinstance(size, int) or (place == 0 and size == self.flow.batch):
                pieces.append(op.int64([size if isinstance(size, int) else 1]))
            elif size == self.flow.batch or index < 0:
                return None
            else:
                pieces.append(op.Gather(sizes, op.int64([index])))
        return op.Concat(*pieces, axis=0)

    def with_axes(self, operator: str, made: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Add a `Squeeze` or an `Unsqueeze`."""
        result = NodeBuilder(self.editor, "placed").with_axes(operator, made, axes)
        result.type = made.type
        return result

    def node(
        self, operator: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None, **attributes: object
    ) -> ir.Value:
        """Add a node and return its output."""
        return self.editor.node(operator, inputs, attributes, name=f"placed.{operator}", dtype=dtype)

    def copied(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """Add a copy of a node and return its output."""
        twin = self.editor.copy(node, inputs, "placed")
        dtype = self.flow.shapes[node.outputs[0]].dtype
        twin.outputs[0].type = None if dtype is None else ir.TensorType(dtype)
        return twin.outputs[0]

    def _gathered(self, value: ir.Value, axis: int) -> ir.Value:
        shape = self.shape(value)
        batched = self.flow.batch != 1 and shape[0] == self.flow.batch and self.editor.opset >= BATCHED_GATHER
        if any(size != self.flow.length and not isinstance(size, int) for size in shape[batched:]):
            raise UnsupportedError(
                "context that depends on the text cannot be gathered by positions",
                at=value.name,
                code=Code.PASS_PRECONDITION,
            )
        dtype = self.flow.shapes[value].dtype
        if batched:
            return self._gathered_by_sequence(value, axis, len(shape))
        return self.rows_of(value, axis, len(shape), dtype)

    def rows_of(self, value: ir.Value, axis: int, rank: int, dtype: ir.DataType | None = None) -> ir.Value:
        """Return the rows of a value without a batch axis."""
        rows = self.node(
            "Gather", [value, self.positions], dtype or value.dtype, axis=axis
        )  # [..., batch, length, ...]
        return self._transposed(rows, [axis, *(place for place in range(rank + 1) if place != axis)])

    def _gathered_by_sequence(self, value: ir.Value, axis: int, rank: int) -> ir.Value:
        """Return the rows of context that each sequence of the batch has for itself."""
        order = [0, axis, *(place for place in range(1, rank) if place != axis)]
        places = self.with_axes("Unsqueeze", self.positions, [2])
        rows = self.node("GatherND", [self._transposed(value, order), places], value.dtype, batch_dims=1)
        back = self._transposed(rows, [order.index(place) for place in range(rank)])  # of [batch, length, ...]
        return self.with_axes("Unsqueeze", back, [1])

    def _transposed(self, value: ir.Value, order: list[int]) -> ir.Value:
        return value if order == sorted(order) else self.node("Transpose", [value], value.dtype, perm=order)


def _range(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    call = gathering.flow.shapes.call(node)
    if call.numbers(0) != (0,) or call.numbers(2) != (1,):
        return None
    dtype = gathering.flow.shapes[node.outputs[0]].dtype
    if dtype is gathering.positions.dtype or dtype is None:
        return gathering.positions
    return gathering.node("Cast", [gathering.positions], dtype, to=int(dtype))


def _linked(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    """The operator on inputs at the positions, by the links of its axes; the batch is one more axis of all."""
    call = gathering.flow.shapes.call(node)
    links = find_links(call)
    label = None if links is None else links.outputs[0][axis]
    if links is None or label is None or not _takes_batch(node, links, label):
        return None
    inputs = [_at_label(gathering, node, links, index, label) for index in range(len(node.inputs))]
    if any(made is None and source is not None for made, source in zip(inputs, node.inputs, strict=True)):
        return None
    attributes: dict[str, object] = {}
    if has_trait(node, Trait.TRANSPOSE):
        attributes["perm"] = [0, *(1 + place for place in map((links.inputs[0] or ()).index, links.outputs[0]))]
    elif links.joined is not None:
        attributes["axis"] = links.outputs[0].index(links.joined) + 1
    elif has_trait(node, Trait.EINSUM):
        attributes["equation"] = _equation(links, label)
    elif has_trait(node, Trait.REPEAT):
        sizes = list(links.repeated.values()) if links.repeated else _sizes(gathering, node)
        if not all(isinstance(size, int) for size in sizes):
            return None
        inputs[1] = gathering.editor.constant([1, *sizes], name="times" if links.repeated else "form")
    else:
        return gathering.copied(node, inputs)
    return gathering.node(node.op_type, inputs, inputs[0].dtype if inputs[0] is not None else None, **attributes)


def _takes_batch(node: ir.Node, links: AxisLinks, label: Label) -> bool:
    """Return whether a batch may be put before the axes of all inputs, and rows along a label taken from each."""
    mixed = {*links.mixed, *links.blocked, *links.padded, *links.selected, *links.ranked, *(links.diagonal or ())}
    if label in mixed or label == links.joined or links.repeated.get(label, 1) != 1 or links.dynamic_range:
        return False
    if links.joined is not None:
        return None not in links.inputs
    if has_trait(node, Trait.EINSUM):
        return all(len(str(one)) == 1 for labels in links.inputs for one in labels or ())
    if has_trait(node, Trait.BATCHED_MATMUL):
        return not node.attributes
    return has_trait(node, *_LINKED) and "axis" not in node.attributes


def _at_label(gathering: GivenPositions, node: ir.Node, links: AxisLinks, index: int, label: Label) -> ir.Value | None:
    """Return an input of a node with the rows of the positions along a label; None if that has no rule."""
    source, places = node.inputs[index], links.inputs[index]
    if source is None:
        return None
    shape = gathering.shape(source)
    if places is None or (index > 0 and has_trait(node, Trait.ELEMENTWISE)):
        operator = operator_of(node)
        is_read = operator is None or index not in operator.type_only
        has_rows = is_read and not has_trait(node, Trait.PARAMETERIZED) and dim.product(shape) != 1
        return None if has_rows else source
    is_aligned = has_trait(node, Trait.BROADCAST, Trait.REPEAT, Trait.BATCHED_MATMUL)
    shift = len(links.outputs[0]) - len(places) if is_aligned else 0
    is_alone = sum(one is not None for one in links.inputs) == 1
    if label in places and (is_alone or gathering.varies(source, places.index(label))):
        made = gathering.at_positions(source, places.index(label))
        return gathering.reshaped(made, shape, [*[1] * shift, *shape])
    batch = gathering.flow.batch
    if links.joined is not None:
        return None
    if batch == 1 or batch not in shape:
        return source
    if shift or not is_aligned or shape.index(batch) != 0 or shape.count(batch) > 1:
        return None
    return gathering.with_axes("Unsqueeze", source, [1])


def _equation(links: AxisLinks, label: Label) -> str:
    """Return an equation of whose operands those with a label, and the result, have the batch as first axis."""
    terms = ["".join(map(str, labels or ())) for labels in (*links.inputs, links.outputs[0])]
    batch = next(letter for letter in "bzyxwvu" if letter not in "".join(terms))
    *operands, result = [batch + term if str(label) in term else term for term in terms]
    return f"{','.join(operands)}->{result}"


def _form(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    """Axes are split and merged on either side of the sequence axis, never across it."""
    source, length = node.inputs[0], gathering.flow.length
    before, after = () if source is None else gathering.shape(source), gathering.shape(node.outputs[0])
    found = reshape_axes((SequenceAxis(axis, LengthVariable()),), after, before, length)
    if source is None or not found or not found[0].is_plain:
        return None
    return gathering.reshaped(gathering.at_positions(source, found[0].axis), before, after)


def _expand(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    source, after = node.inputs[0], gathering.shape(node.outputs[0])
    if source is None or gathering.varies(source, axis - len(after) + len(gathering.shape(source))):
        return _linked(gathering, node, axis)
    return _repeated(gathering, source, node.inputs[1], after, axis)


def _sizes(gathering: GivenPositions, node: ir.Node) -> list[Dimension]:
    """Return the target of an `Expand` at the positions: 1 for axes of the text, which keep their size."""
    source, after = node.inputs[0], gathering.shape(node.outputs[0])
    before = () if source is None else gathering.shape(source)
    sides = zip((*[1] * (len(after) - len(before)), *before), after, strict=True)
    return [1 if new in (old, gathering.flow.batch) and not isinstance(new, int) else new for old, new in sides]


def _repeated(
    gathering: GivenPositions, source: ir.Value, sizes: ir.Value | None, after: Sequence[Dimension], axis: int
) -> ir.Value | None:
    """One row that is repeated for all tokens: it is repeated for those at the positions."""
    before, batch = gathering.shape(source), gathering.flow.batch
    shift = len(after) - len(before)
    by_sequence = batch != 1 and shift == 0 and before[:1] == (batch,)
    kept = [place >= shift and before[place - shift] == size for place, size in enumerate(after)]
    target = gathering.sizes_at_positions(
        sizes, [1 if same else size for same, size in zip(kept, after, strict=True)], axis
    )
    if target is None or (batch != 1 and batch in before[by_sequence:]):
        return None
    lifted = gathering.with_axes("Unsqueeze", source, [1]) if by_sequence else source
    return gathering.node("Expand", [lifted, target], source.dtype)


def _constant_of_shape(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    target = gathering.sizes_at_positions(node.inputs[0], gathering.shape(node.outputs[0]), axis)
    return None if target is None else gathering.copied(node, [target])


def _trilu(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    """Rows of a triangle: their positions are compared with the indices of the columns."""
    call, source, rank = gathering.flow.shapes.call(node), node.inputs[0], len(gathering.shape(node.outputs[0]))
    offset = call.numbers(1) if len(node.inputs) > 1 and node.inputs[1] is not None else (0,)
    dtype = call.result.dtype
    if source is None or dtype is None or offset is None or not isinstance(offset[0], int) or axis < rank - 2:
        return None
    made, other = gathering.at_positions(source, axis), 2 * rank - 3 - axis
    places = gathering.with_axes(
        "Unsqueeze", gathering.positions, [one for one in range(1, rank + 1) if one != axis + 1]
    )
    counted = NodeBuilder(gathering.editor, "placed")
    count = counted.Gather(counted.Shape(made), counted.int64(other + 1))
    indices = counted.Range(counted.int64(0), count, counted.int64(1))
    indices = indices if other == rank - 1 else counted.with_axes("Unsqueeze", indices, [1])
    rows, columns = (places, indices) if axis == rank - 2 else (indices, places)
    cut = counted.Less if call.integer("upper", 1) else counted.Greater
    hidden = cut(counted.Sub(columns, rows), counted.int64(offset[0]))
    if dtype is ir.DataType.BOOL:  # onnxruntime has no Where of it
        return gathering.node("And", [counted.Not(hidden), made], dtype)
    return gathering.node("Where", [hidden, counted.number(0, dtype), made], dtype)


def _slice(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    call, source = gathering.flow.shapes.call(node), node.inputs[0]
    bounds, before, after = slice_bounds(call), call.fact(0).shape, gathering.shape(node.outputs[0])
    if bounds is None or source is None or before is None or len(node.inputs) < 3:
        return None
    axes, starts, _, steps = bounds
    moved = [(start, step) != (0, 1) for start, step in zip(starts, steps, strict=True)]
    cut = [
        index for index, place in enumerate(axes) if place != axis and (moved[index] or before[place] != after[place])
    ]
    if any(moved[index] and after[place] == gathering.flow.length for index, place in enumerate(axes)):
        return None
    table = _table(gathering, node, axis)
    if any(after[axes[index]] == gathering.flow.length for index in cut):  # columns, which are those of all tokens
        return None if table is None else gathering.rows_of(_cut(gathering, node, table, axes, cut), axis, len(after))
    if not gathering.varies(source, axis) and table is None:
        return None
    rows = gathering.at_positions(source, axis) if table is None else gathering.rows_of(table, axis, len(after))
    return _cut(gathering, node, rows, [place + 1 for place in axes], cut) if cut else rows


def _table(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    """Return the constant of which a `Slice`, and perhaps one before, keeps a row for each token along an axis."""
    source = node.inputs[0]
    bounds = slice_bounds(gathering.flow.shapes.call(node))
    if source is None or bounds is None or constant_tensor(source) is not None:
        return source if bounds is not None and axis in bounds[0] else None
    above = source.producer()
    if above is None or above.op_type != node.op_type:
        return None
    rows = slice_bounds(gathering.flow.shapes.call(above))
    return (
        _table(gathering, above, axis)
        if rows is not None and (rows[0], rows[1], rows[3]) == ([axis], [0], [1])
        else None
    )


def _cut(
    gathering: GivenPositions, node: ir.Node, value: ir.Value, axes: Sequence[int], cut: Sequence[int]
) -> ir.Value:
    """Return a value with some of the bounds of a `Slice`, given by their indices."""
    op, given = NodeBuilder(gathering.editor, "placed"), node.inputs[1]
    bounds = [None if one is None else op.Gather(one, op.int64(cut)) for one in node.inputs[1:]]
    dtype = None if given is None else gathering.flow.shapes[given].dtype
    places = op.constant(np.array([axes[index] for index in cut], (dtype or ir.DataType.INT64).numpy()))
    return gathering.copied(node, [value, *bounds[:2], places, *bounds[3:]])


def _gather(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    table, picked = node.inputs[0], node.inputs[1]
    if table is None or picked is None or gathering.flow.shapes.call(node).integer("axis", 0) != 0:
        return None
    if not gathering.varies(picked, axis):
        return None
    if gathering.flow.kinds.get(table) is not ValueKind.CONTEXT:
        return gathering.copied(node, [table, gathering.at_positions(picked, axis)])
    return _looked_up(gathering, table, picked, axis)


def _looked_up(gathering: GivenPositions, table: ir.Value, picked: ir.Value, axis: int) -> ir.Value | None:
    """Rows of context that has one for each token, such as a table cut to the length."""
    rows, order = gathering.shape(table), gathering.shape(picked)
    if not gathering.varies(table, 0) or dim.product(order) != gathering.flow.length:
        return None
    flat = gathering.editor.constant([0, -1], name="form")
    made = gathering.at_positions(picked, axis)
    places = gathering.node("Reshape", [made, flat], made.dtype)  # [batch, length]
    looked_up = GivenPositions(gathering.flow, gathering.editor, places).at_positions(table, 0)
    return gathering.reshaped(looked_up, rows, [*order, *rows[1:]])


_LINKED = (
    Trait.TRANSPOSE, Trait.BROADCAST, Trait.ELEMENTWISE, Trait.IDENTITY, Trait.ARITHMETIC, Trait.REPEAT,
)  # fmt: skip
_RULES: dict[str, Rule] = {
    "Expand": _expand, "Slice": _slice, "Gather": _gather, "Range": _range, "ConstantOfShape": _constant_of_shape,
    "Trilu": _trilu,
}  # fmt: skip


def _rule(node: ir.Node) -> Rule:
    return _form if has_trait(node, Trait.RESHAPE) else _RULES.get(node.op_type, _linked)


def shape_of_tokens(analysis: Analysis) -> ir.Shape:
    """Return `[batch, length]`, with the declared dimensions of the token input."""
    tokens = next(given for given in analysis.inputs if given.is_token)
    (length,) = tokens.lengths
    sizes = list(tokens.value.shape or ())
    batch = next((size for axis, size in enumerate(sizes[:length]) if axis not in tokens.lengths), 1)
    return ir.Shape([batch, sizes[length]])


def context_of_new_tokens(analysis: Analysis, *, masks: bool) -> list[Use]:
    """Return where token data is combined with context that has a row for each new token.

    Args:
        analysis: Analysis of a model without a cache.
        masks: Whether to return the uses inside attention too.
    """
    flow, found = analysis.flow, []
    inside = {node for site in analysis.sites for node in site.upstream_of_weights | site.ends}
    for (node, index), axes in flow.demands.items():
        value = node.inputs[index]
        if value is None or flow.kinds.get(value) is not ValueKind.CONTEXT or (node in inside and not masks):
            continue
        if flow.targets.get(node) == index or (node, index) in flow.parameters:
            continue
        rows = [axis for axis in axes if axis.variable.resolved() is Length.NEW]
        if len(rows) == 1 and rows[0].is_plain and (masks or len(axes) == 1):
            found.append((node, index, rows[0].axis))
    return found


def at_tokens(gathering: GivenPositions, node: ir.Node, index: int, axis: int) -> ir.Value:
    """Return an input of a node at the given positions, with its batch axis aligned with that of the token data.

    Raises:
        UnsupportedError: The node has no batch axis.
    """
    value = node.inputs[index]
    assert value is not None
    shape, result, batch = gathering.shape(value), gathering.shape(node.outputs[0]), gathering.flow.batch
    made = gathering.at_positions(value, axis)
    if batch == 1:
        is_batched = shape[:1] == (1,)
        return gathering.with_axes("Squeeze", made, [1]) if is_batched else _unbatched(gathering, made)
    aligned = {ROTARY: len(shape), ATTENTION: MASK_RANK}.get(node.op_type)
    if has_trait(node, Trait.BROADCAST):
        aligned = len(result) - [*result, batch].index(batch)
    if aligned is None or len(shape) > aligned:
        raise UnsupportedError(
            f"{node.op_type}: context meets token data without a batch axis", at=value.name, code=Code.PASS_PRECONDITION
        )
    if len(shape) < aligned:
        ones = list(range(1, aligned - len(shape)))
        return gathering.with_axes("Unsqueeze", made, ones) if ones else made
    if shape[0] not in (1, batch):
        raise UnsupportedError(
            "context that depends on the text cannot be gathered by positions",
            at=value.name,
            code=Code.PASS_PRECONDITION,
        )
    return gathering.with_axes("Squeeze", made, [1])


def _unbatched(gathering: GivenPositions, made: ir.Value) -> ir.Value:
    """Return a gathered value of a single text without its batch axis."""
    zero = gathering.editor.constant(np.int64(0), name="first")
    return gathering.node("Gather", [made, zero], made.dtype, axis=0)
