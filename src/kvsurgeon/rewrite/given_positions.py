"""Context at given positions: token i has the row of the position that an input gives for it.

Context that meets token data has a row for each token, which depends on the token's index. At given positions the rows
are gathered for each text of a batch: `[..., length, ...]` becomes `[batch, ..., length, ...]`. The gather is pushed up
through the operators that made the context until it reaches a range, which becomes the positions themselves, or a
table. If an operator has no rule its result is computed whole and gathered from, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.ops.content import is_shape_only
from kvsurgeon.ops.gather import slice_bounds
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import axis_of

Rule = Callable[["GivenPositions", ir.Node, int], "ir.Value | None"]


class GivenPositions:
    """Context at given positions, each value computed once."""

    def __init__(self, flow: TokenFlow, editor: Editor, positions: ir.Value) -> None:
        """Take the positions, int64 `[batch, length]`."""
        self.flow = flow
        self.editor = editor
        self.positions = positions
        self._made: dict[tuple[ir.Value, int], ir.Value] = {}
        self._by_input: dict[ir.Value, bool] = {}

    def at_positions(self, value: ir.Value, axis: int) -> ir.Value:
        """Return the value with a leading batch axis, and along `axis` the rows of the given positions.

        Raises:
            UnsupportedError: It depends on the text already.
        """
        if (value, axis) not in self._made:
            node = value.producer()
            rule = None if node is None or self.flow.kinds.get(value) is not ValueKind.CONTEXT else _rule(node)
            made = None if rule is None or node is None else rule(self, node, axis)
            self._made[value, axis] = made if made is not None else self._gathered(value, axis)
        return self._made[value, axis]

    def varies(self, value: ir.Value, axis: int) -> bool:
        """Return whether the value has a row for each token along an axis."""
        shape = self.shape(value)
        return 0 <= axis < len(shape) and shape[axis] == self.flow.length

    def follows_input(self, value: ir.Value) -> bool:
        """Return whether the content of the value, not only its shape, comes from a graph input."""
        if value not in self._by_input:
            node = value.producer()
            if node is None:
                self._by_input[value] = value.is_graph_input()
            else:
                inputs = () if is_shape_only(node) else node.inputs
                self._by_input[value] = any(self.follows_input(source) for source in inputs if source is not None)
        return self._by_input[value]

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

    def reshaped(self, made: ir.Value, sizes: Sequence[Dimension]) -> ir.Value | None:
        """Return a gathered value as `[batch, *sizes]`; None if a size is neither a number nor the length.

        An axis of the batch size has size 1 in `sizes`: the batch is the leading axis now.
        """
        sizes = [1 if size == self.flow.batch else size for size in sizes]
        if [size for size in sizes if not isinstance(size, int)] != [self.flow.length]:
            return None
        target = self.editor.constant([0, *(size if isinstance(size, int) else -1 for size in sizes)], name="form")
        return self.node("Reshape", [made, target], made.dtype)

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
        if any(size != self.flow.length and not isinstance(size, int) for size in shape):
            raise UnsupportedError(
                "context that depends on the text cannot be gathered by positions",
                at=value.name,
                code=Code.PASS_PRECONDITION,
            )
        dtype = self.flow.shapes[value].dtype
        rows = self.node("Gather", [value, self.positions], dtype, axis=axis)  # [..., batch, length, ...]
        order = [axis, *(place for place in range(len(shape) + 1) if place != axis)]
        return rows if axis == 0 else self.node("Transpose", [rows], dtype, perm=order)


def _range(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    call = gathering.flow.shapes.call(node)
    if call.numbers(0) != (0,) or call.numbers(2) != (1,):
        return None
    dtype = gathering.flow.shapes[node.outputs[0]].dtype
    if dtype is gathering.positions.dtype or dtype is None:
        return gathering.positions
    return gathering.node("Cast", [gathering.positions], dtype, to=int(dtype))


def _elementwise(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    rank = len(gathering.shape(node.outputs[0]))
    inputs: list[ir.Value | None] = []
    for source in node.inputs:
        shape = () if source is None else gathering.shape(source)
        shift = rank - len(shape)
        if source is None or not gathering.varies(source, axis - shift):
            if gathering.flow.batch in shape and gathering.flow.batch != 1:
                return None
            inputs.append(source)
            continue
        made = gathering.at_positions(source, axis - shift)
        inputs.append(made if shift == 0 else gathering.reshaped(made, [1] * shift + list(shape)))
        if inputs[-1] is None:
            return None
    return gathering.copied(node, inputs)


def _first_only(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    source = node.inputs[0]
    if source is None or gathering.shape(source) != gathering.shape(node.outputs[0]):
        return None
    if any(name == "axis" for name in node.attributes):
        return None  # mixes along an axis, whose index would change
    return gathering.copied(node, [gathering.at_positions(source, axis), *node.inputs[1:]])


def _form(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    """Axes are split and merged on either side of the sequence axis, never across it."""
    source, length = node.inputs[0], gathering.flow.length
    before, after = () if source is None else gathering.shape(source), gathering.shape(node.outputs[0])
    if source is None or before.count(length) != 1:
        return None
    place = before.index(length)
    sides = ((before[:place], after[:axis]), (before[place + 1 :], after[axis + 1 :]))
    if any(dim.product(one) != dim.product(other) for one, other in sides):
        return None
    return gathering.reshaped(gathering.at_positions(source, place), after)


def _expand(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    source, after = node.inputs[0], gathering.shape(node.outputs[0])
    before = () if source is None else gathering.shape(source)
    shift = len(after) - len(before)
    if source is None or not gathering.varies(source, axis - shift):
        return None
    made = gathering.at_positions(source, axis - shift)
    formed = made if shift == 0 else gathering.reshaped(made, [1] * shift + list(before))
    others = {size for size in after if not isinstance(size, int)}
    if formed is None or others - {gathering.flow.length, gathering.flow.batch}:
        return None
    target = [1, *(size if isinstance(size, int) else 1 for size in after)]
    return gathering.node("Expand", [formed, gathering.editor.constant(target, name="form")], made.dtype)


def _tile(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    source, times = node.inputs[0], gathering.flow.shapes.call(node).numbers(1)
    if source is None or times is None or times[axis] != 1 or not all(isinstance(one, int) for one in times):
        return None
    made = gathering.at_positions(source, axis)
    return gathering.node("Tile", [made, gathering.editor.constant([1, *times], name="times")], made.dtype)


def _transpose(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    source = node.inputs[0]
    if source is None:
        return None
    order = gathering.flow.shapes.call(node).attribute("perm") or range(len(gathering.shape(source)))[::-1]
    made = gathering.at_positions(source, order[axis])
    return gathering.node("Transpose", [made], made.dtype, perm=[0, *(place + 1 for place in order)])


def _concat(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    along = axis_of(gathering.flow.shapes.call(node).integer("axis", 0), len(gathering.shape(node.outputs[0])))
    sources = [source for source in node.inputs if source is not None]
    if along == axis or not all(gathering.varies(source, axis) for source in sources):
        return None
    made = [gathering.at_positions(source, axis) for source in sources]
    return gathering.node("Concat", made, made[0].dtype, axis=along + 1)


def _slice(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    bounds, source = slice_bounds(gathering.flow.shapes.call(node)), node.inputs[0]
    if bounds is None or source is None or len(node.inputs) < 3:
        return None
    axes, starts, _, steps = bounds
    if axes == [axis] and starts == [0] and steps == [1]:  # a table, or all of something longer
        return gathering._gathered(source, axis) if constant_tensor(source) is not None else None
    if axis in axes or not gathering.varies(source, axis):
        return None
    given = None if node.inputs[1] is None else gathering.flow.shapes[node.inputs[1]].dtype
    whole = (given or ir.DataType.INT64).numpy()  # all bounds of a Slice have one type
    moved = gathering.editor.constant([place + 1 for place in axes], whole, name="axes")
    rest = [node.inputs[1], node.inputs[2], moved, *node.inputs[4:]]
    return gathering.copied(node, [gathering.at_positions(source, axis), *rest])


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
    return gathering.reshaped(looked_up, [*order, *rows[1:]])


def _matmul(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    left, right = node.inputs
    if left is None or right is None:
        return None
    ranks, rank = [len(gathering.shape(left)), len(gathering.shape(right))], len(gathering.shape(node.outputs[0]))
    index = {rank - 2: 0, rank - 1: 1}.get(axis)
    if index is None or min(ranks) < 2:
        return None
    operands = [left, right]
    place = ranks[index] - (rank - axis)
    other = operands[1 - index]
    if not gathering.varies(operands[index], place) or {gathering.flow.length, gathering.flow.batch} - {1} & {
        *gathering.shape(other)
    }:
        return None
    made = gathering.at_positions(operands[index], place)
    if ranks[index] < rank:
        shaped = gathering.reshaped(made, [1] * (rank - ranks[index]) + list(gathering.shape(operands[index])))
        if shaped is None:
            return None
        made = shaped
    return gathering.copied(node, [made, other] if index == 0 else [other, made])


def _einsum(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    equation = str(gathering.flow.shapes.call(node).text("equation")).replace(" ", "")
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
        inputs.append(gathering.at_positions(source, place))
        terms[number] = fresh + term
    dtype = gathering.flow.shapes[node.outputs[0]].dtype
    return gathering.node("Einsum", inputs, dtype, equation=f"{','.join(terms)}->{fresh}{result}")


_BY_TRAIT: dict[Trait, Rule] = {
    Trait.RESHAPE: _form, Trait.TRANSPOSE: _transpose, Trait.BROADCAST: _elementwise, Trait.ELEMENTWISE: _first_only,
    Trait.IDENTITY: _first_only,
}  # fmt: skip
_BY_NAME: dict[str, Rule] = {
    "Expand": _expand, "Tile": _tile, "Concat": _concat, "Slice": _slice, "Gather": _gather, "MatMul": _matmul,
    "Einsum": _einsum, "Range": _range, "CastLike": _first_only,
}  # fmt: skip


def _rule(node: ir.Node) -> Rule | None:
    if node.op_type in _BY_NAME or node.op_type == "Trilu":
        return _BY_NAME.get(node.op_type)
    return next((rule for trait, rule in _BY_TRAIT.items() if has_trait(node, trait)), None)


ROTARY = "RotaryEmbedding"


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
        return _reshaped_if(gathering, made, shape[1:] if shape[:1] == (1,) else None) or _unbatched(gathering, made)
    if not has_trait(node, Trait.BROADCAST) and node.op_type != ROTARY:
        raise UnsupportedError(
            f"{node.op_type}: context meets token data without a batch axis", at=value.name, code=Code.PASS_PRECONDITION
        )
    trailing = len(shape) if node.op_type == ROTARY else len(result) - [*result, batch].index(batch)
    if trailing < len(shape) or trailing > len(result):
        raise UnsupportedError(
            f"{node.op_type}: context meets token data without a batch axis", at=value.name, code=Code.PASS_PRECONDITION
        )
    first = len(shape) - trailing  # axis of the context that is aligned with the batch; negative if there is none
    sizes = [1] * (-first - 1) + list(shape) if first < 0 else list(shape[1:])
    shaped = gathering.reshaped(made, sizes) if first < 0 or shape[0] in (1, batch) else None
    if shaped is None:
        raise UnsupportedError(
            "context that depends on the text cannot be gathered by positions",
            at=value.name,
            code=Code.PASS_PRECONDITION,
        )
    return shaped


def _reshaped_if(gathering: GivenPositions, made: ir.Value, sizes: Sequence[Dimension] | None) -> ir.Value | None:
    return None if sizes is None else gathering.reshaped(made, sizes)


def _unbatched(gathering: GivenPositions, made: ir.Value) -> ir.Value:
    """Return a gathered value of a single text without its batch axis."""
    zero = gathering.editor.constant(np.int64(0), name="first")
    return gathering.node("Gather", [made, zero], made.dtype, axis=0)
