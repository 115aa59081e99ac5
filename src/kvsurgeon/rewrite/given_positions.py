"""Context by given positions: the row of each token is that of the position which it is said to have.

Context that meets tokens has a row for each of them, and what is in it depends on the token's place. To place it is to
pick, for each text of a batch, the rows of other places: `[..., length, ...]` becomes `[batch, ..., length, ...]`. The
picking is pushed up through the operators that made the context until it reaches a range, which becomes the positions
themselves, or a table. Where an operator has no rule its result is made whole, and picked from: always right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.operators import SHAPE_ONLY
from kvsurgeon.ops.gather import slice_bounds
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait, names_with
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import axis_of

Rule = Callable[["GivenPositions", ir.Node, int], "ir.Value | None"]


class GivenPositions:
    """Places context, each value once."""

    def __init__(self, flow: TokenFlow, editor: Editor, positions: ir.Value) -> None:
        """Take the positions, int64 `[batch, length]`."""
        self.flow = flow
        self.editor = editor
        self.positions = positions
        self._made: dict[tuple[ir.Value, int], ir.Value] = {}
        self._by_input: dict[ir.Value, bool] = {}

    def placed(self, value: ir.Value, axis: int) -> ir.Value:
        """Return the value with a batch axis in front, and along `axis` the rows of the given positions.

        Raises:
            UnsupportedError: It differs from text to text already.
        """
        if (value, axis) not in self._made:
            node = value.producer()
            rule = (
                None if node is None or self.flow.kinds.get(value) is not ValueKind.CONTEXT else RULES.get(node.op_type)
            )
            made = None if rule is None or node is None else rule(self, node, axis)
            self._made[value, axis] = made if made is not None else self._picked(value, axis)
        return self._made[value, axis]

    def varies(self, value: ir.Value, axis: int) -> bool:
        """Whether the value has a row for each token along an axis."""
        shape = self.shape(value)
        return 0 <= axis < len(shape) and shape[axis] == self.flow.length

    def follows_input(self, value: ir.Value) -> bool:
        """Whether what is in the value, and not only its shape, comes from an input of the graph."""
        if value not in self._by_input:
            node = value.producer()
            if node is None:
                self._by_input[value] = value.is_graph_input()
            else:
                inputs = () if node.op_type in SHAPE_ONLY else node.inputs
                self._by_input[value] = any(self.follows_input(source) for source in inputs if source is not None)
        return self._by_input[value]

    def shape(self, value: ir.Value) -> tuple[Dimension, ...]:
        """Return the value's dimensions.

        Raises:
            UnsupportedError: Their number is unknown.
        """
        shape = self.flow.shapes[value].shape
        if shape is None:
            raise UnsupportedError("context of unknown rank cannot be placed", at=value.name)
        return shape

    def formed(self, made: ir.Value, sizes: Sequence[Dimension]) -> ir.Value | None:
        """Return a placed value in another form, `[batch, *sizes]`; None where a size is no number but the length.

        What was the same for all texts of a batch has one row for them all, in front of which the batch now stands.
        """
        sizes = [1 if size == self.flow.batch else size for size in sizes]
        if [size for size in sizes if not isinstance(size, int)] != [self.flow.length]:
            return None
        target = self.editor.constant([0, *(size if isinstance(size, int) else -1 for size in sizes)], name="form")
        return self.node("Reshape", [made, target], made.dtype)

    def node(
        self, operator: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None, **attributes: object
    ) -> ir.Value:
        """Add a node, and return what it makes."""
        return self.editor.node(operator, inputs, attributes, name=f"placed.{operator}", dtype=dtype)

    def again(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """Add a node like another one, and return what it makes."""
        twin = self.editor.copy(node, inputs, "placed")
        dtype = self.flow.shapes[node.outputs[0]].dtype
        twin.outputs[0].type = None if dtype is None else ir.TensorType(dtype)
        return twin.outputs[0]

    def _picked(self, value: ir.Value, axis: int) -> ir.Value:
        shape = self.shape(value)
        if any(size != self.flow.length and not isinstance(size, int) for size in shape):
            raise UnsupportedError("context that differs from text to text cannot be placed", at=value.name)
        dtype = self.flow.shapes[value].dtype
        rows = self.node("Gather", [value, self.positions], dtype, axis=axis)  # [..., batch, length, ...]
        order = [axis, *(place for place in range(len(shape) + 1) if place != axis)]
        return rows if axis == 0 else self.node("Transpose", [rows], dtype, perm=order)


def _range(placing: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    call = placing.flow.shapes.call(node)
    if call.numbers(0) != (0,) or call.numbers(2) != (1,):
        return None
    dtype = placing.flow.shapes[node.outputs[0]].dtype
    if dtype is placing.positions.dtype or dtype is None:
        return placing.positions
    return placing.node("Cast", [placing.positions], dtype, to=int(dtype))


def _elementwise(placing: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    rank = len(placing.shape(node.outputs[0]))
    inputs: list[ir.Value | None] = []
    for source in node.inputs:
        shape = () if source is None else placing.shape(source)
        shift = rank - len(shape)
        if source is None or not placing.varies(source, axis - shift):
            if placing.flow.batch in shape and placing.flow.batch != 1:
                return None
            inputs.append(source)
            continue
        made = placing.placed(source, axis - shift)
        inputs.append(made if shift == 0 else placing.formed(made, [1] * shift + list(shape)))
        if inputs[-1] is None:
            return None
    return placing.again(node, inputs)


def _first_only(placing: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    source = node.inputs[0]
    if source is None or placing.shape(source) != placing.shape(node.outputs[0]):
        return None
    if any(name == "axis" for name in node.attributes):
        return None  # works along an axis, which would be another one
    return placing.again(node, [placing.placed(source, axis), *node.inputs[1:]])


def _form(placing: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    """Axes are split and joined on either side of the tokens' own, never across it."""
    source, length = node.inputs[0], placing.flow.length
    before, after = () if source is None else placing.shape(source), placing.shape(node.outputs[0])
    if source is None or before.count(length) != 1:
        return None
    place = before.index(length)
    sides = ((before[:place], after[:axis]), (before[place + 1 :], after[axis + 1 :]))
    if any(dim.product(one) != dim.product(other) for one, other in sides):
        return None
    return placing.formed(placing.placed(source, place), after)


def _expand(placing: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    source, after = node.inputs[0], placing.shape(node.outputs[0])
    before = () if source is None else placing.shape(source)
    shift = len(after) - len(before)
    if source is None or not placing.varies(source, axis - shift):
        return None
    made = placing.placed(source, axis - shift)
    formed = made if shift == 0 else placing.formed(made, [1] * shift + list(before))
    others = {size for size in after if not isinstance(size, int)}
    if formed is None or others - {placing.flow.length, placing.flow.batch}:
        return None
    target = [1, *(size if isinstance(size, int) else 1 for size in after)]
    return placing.node("Expand", [formed, placing.editor.constant(target, name="form")], made.dtype)


def _tile(placing: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    source, times = node.inputs[0], placing.flow.shapes.call(node).numbers(1)
    if source is None or times is None or times[axis] != 1 or not all(isinstance(one, int) for one in times):
        return None
    made = placing.placed(source, axis)
    return placing.node("Tile", [made, placing.editor.constant([1, *times], name="times")], made.dtype)


def _transpose(placing: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    source = node.inputs[0]
    if source is None:
        return None
    order = placing.flow.shapes.call(node).attribute("perm") or range(len(placing.shape(source)))[::-1]
    made = placing.placed(source, order[axis])
    return placing.node("Transpose", [made], made.dtype, perm=[0, *(place + 1 for place in order)])


def _concat(placing: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    along = axis_of(placing.flow.shapes.call(node).integer("axis", 0), len(placing.shape(node.outputs[0])))
    sources = [source for source in node.inputs if source is not None]
    if along == axis or not all(placing.varies(source, axis) for source in sources):
        return None
    made = [placing.placed(source, axis) for source in sources]
    return placing.node("Concat", made, made[0].dtype, axis=along + 1)


def _slice(placing: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    bounds, source = slice_bounds(placing.flow.shapes.call(node)), node.inputs[0]
    if bounds is None or source is None or len(node.inputs) < 3:
        return None
    axes, starts, _, steps = bounds
    if axes == [axis] and starts == [0] and steps == [1]:  # a table, or all of something longer
        return placing._picked(source, axis) if constant_tensor(source) is not None else None
    if axis in axes or not placing.varies(source, axis):
        return None
    given = None if node.inputs[1] is None else placing.flow.shapes[node.inputs[1]].dtype
    whole = (given or ir.DataType.INT64).numpy()  # all bounds of a Slice are of one type
    moved = placing.editor.constant([place + 1 for place in axes], whole, name="axes")
    rest = [node.inputs[1], node.inputs[2], moved, *node.inputs[4:]]
    return placing.again(node, [placing.placed(source, axis), *rest])


def _gather(placing: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    table, picked = node.inputs[0], node.inputs[1]
    if table is None or picked is None or placing.flow.shapes.call(node).integer("axis", 0) != 0:
        return None
    if not placing.varies(picked, axis):
        return None
    if placing.flow.kinds.get(table) is not ValueKind.CONTEXT:
        return placing.again(node, [table, placing.placed(picked, axis)])
    return _looked_up(placing, table, picked, axis)


def _looked_up(placing: GivenPositions, table: ir.Value, picked: ir.Value, axis: int) -> ir.Value | None:
    """Rows of context that has one for each token, such as a table cut to the length: those of the places picked."""
    rows, order = placing.shape(table), placing.shape(picked)
    if not placing.varies(table, 0) or dim.product(order) != placing.flow.length:
        return None
    flat = placing.editor.constant([0, -1], name="form")
    made = placing.placed(picked, axis)
    places = placing.node("Reshape", [made, flat], made.dtype)  # [batch, length]
    looked_up = GivenPositions(placing.flow, placing.editor, places).placed(table, 0)
    return placing.formed(looked_up, [*order, *rows[1:]])


def _matmul(placing: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    left, right = node.inputs
    if left is None or right is None:
        return None
    ranks, rank = [len(placing.shape(left)), len(placing.shape(right))], len(placing.shape(node.outputs[0]))
    index = {rank - 2: 0, rank - 1: 1}.get(axis)
    if index is None or min(ranks) < 2:
        return None
    operands = [left, right]
    place = ranks[index] - (rank - axis)
    other = operands[1 - index]
    if not placing.varies(operands[index], place) or {placing.flow.length, placing.flow.batch} - {1} & {
        *placing.shape(other)
    }:
        return None
    made = placing.placed(operands[index], place)
    if ranks[index] < rank:
        shaped = placing.formed(made, [1] * (rank - ranks[index]) + list(placing.shape(operands[index])))
        if shaped is None:
            return None
        made = shaped
    return placing.again(node, [made, other] if index == 0 else [other, made])


def _einsum(placing: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    equation = str(placing.flow.shapes.call(node).text("equation")).replace(" ", "")
    if "." in equation or "->" not in equation:
        return None
    terms, result = equation.split("->")[0].split(","), equation.split("->")[1]
    fresh = next(letter for letter in "bzyxwvu" if letter not in equation)
    inputs: list[ir.Value | None] = []
    for number, (term, source) in enumerate(zip(terms, node.inputs, strict=True)):
        place = term.find(result[axis])
        if source is None or place < 0:
            inputs.append(source)
            continue
        inputs.append(placing.placed(source, place))
        terms[number] = fresh + term
    dtype = placing.flow.shapes[node.outputs[0]].dtype
    return placing.node("Einsum", inputs, dtype, equation=f"{','.join(terms)}->{fresh}{result}")


RULES: dict[str, Rule] = {
    **dict.fromkeys(names_with(Trait.BROADCAST), _elementwise),
    **dict.fromkeys(names_with(Trait.ELEMENTWISE) - {"Trilu"}, _first_only),
    "Cast": _first_only,
    "CastLike": _first_only,
    **dict.fromkeys(("Unsqueeze", "Squeeze", "Reshape"), _form),
    "Expand": _expand,
    "Tile": _tile,
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "Range": _range,
}

ROTARY = "RotaryEmbedding"


def at_tokens(placing: GivenPositions, node: ir.Node, index: int, axis: int) -> ir.Value:
    """Return an input of a node on tokens, placed, with the batch where the tokens have theirs.

    Raises:
        UnsupportedError: The node has no such place.
    """
    value = node.inputs[index]
    assert value is not None
    shape, result, batch = placing.shape(value), placing.shape(node.outputs[0]), placing.flow.batch
    made = placing.placed(value, axis)
    if batch == 1:
        return _whole_form(placing, made, shape[1:] if shape[:1] == (1,) else None) or _unbatched(placing, made)
    if not has_trait(node, Trait.BROADCAST) and node.op_type != ROTARY:
        raise UnsupportedError(f"{node.op_type}: context meets tokens where no batch can be told apart", at=value.name)
    rows_after = len(shape) if node.op_type == ROTARY else len(result) - [*result, batch].index(batch)
    if rows_after < len(shape) or rows_after > len(result):
        raise UnsupportedError(f"{node.op_type}: context meets tokens where no batch can be told apart", at=value.name)
    first = len(shape) - rows_after  # of the context's own axes the one that faces the batch; before it there is none
    sizes = [1] * (-first - 1) + list(shape) if first < 0 else list(shape[1:])
    shaped = placing.formed(made, sizes) if first < 0 or shape[0] in (1, batch) else None
    if shaped is None:
        raise UnsupportedError("context that differs from text to text cannot be placed", at=value.name)
    return shaped


def _whole_form(placing: GivenPositions, made: ir.Value, sizes: Sequence[Dimension] | None) -> ir.Value | None:
    return None if sizes is None else placing.formed(made, sizes)


def _unbatched(placing: GivenPositions, made: ir.Value) -> ir.Value:
    """Return what is placed for the only text there is, without its batch axis."""
    zero = placing.editor.constant(np.int64(0), name="first")
    return placing.node("Gather", [made, zero], made.dtype, axis=0)
