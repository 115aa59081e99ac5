"""Where queries and keys are turned by their positions, half against half."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.ops.slicing import slice_bounds
from kvsurgeon.symbolic.fact import axis_of


@dataclass(frozen=True, kw_only=True)
class Turn:
    """`x * cosines + Concat(-x[half:], x[:half]) * sines`, along the last axis of [batch, heads, sequence, width]."""

    result: ir.Value
    x: ir.Value
    rows: ir.Value | None  # [batch, sequence, heads * width], of which x is the heads laid apart
    heads: int | None
    cosines: ir.Value  # [batch or 1, 1, sequence, width], its two halves alike
    sines: ir.Value
    width: int


def find_turn(shapes: Shapes, node: ir.Node) -> Turn | None:
    """Return what a node that adds two products turns; None where it does something else."""
    if not _is(node, "Add"):
        return None
    products = [maker for value in node.inputs if (maker := _maker(value, "Mul")) is not None]
    if len(products) != 2:
        return None
    for straight, crossed in (products, products[::-1]):
        for swapped, sines in _ways(crossed):
            source = _source(shapes, swapped)
            for x, cosines in _ways(straight):
                if source is not None and x is source[0] and _are_tables(shapes, x, cosines, sines):
                    rows, heads = _rows(shapes, x)
                    return Turn(
                        result=node.outputs[0], x=x, rows=rows, heads=heads, cosines=cosines, sines=sines,
                        width=source[1],
                    )  # fmt: skip
    return None


def _rows(shapes: Shapes, x: ir.Value) -> tuple[ir.Value | None, int | None]:
    """What x is made of by laying heads apart, and how many there are; nothing where it is made otherwise."""
    moved = _maker(x, "Transpose")
    apart = None if moved is None else _maker(moved.inputs[0], "Reshape")
    rows = None if apart is None else apart.inputs[0]
    shape, mine = shapes[x].shape, None if rows is None else shapes[rows].shape
    if moved is None or shape is None or mine is None or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        return None, None
    wanted = shape[0], shape[2], shape[1] * shape[3]
    if tuple(moved.attributes.get_ints("perm") or ()) != (0, 2, 1, 3) or tuple(mine) != wanted:
        return None, None
    return rows, shape[1]


def _ways(product: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    first, second = product.inputs
    if first is not None and second is not None:
        yield first, second
        yield second, first


def _source(shapes: Shapes, value: ir.Value) -> tuple[ir.Value, int] | None:
    """The x and its width, of which a value is `Concat(-x[half:], x[:half])`."""
    joined = _maker(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or not _is_last(shapes, joined):
        return None
    negative = _maker(joined.inputs[0], "Neg")
    pieces = (None if negative is None else _piece(shapes, negative.inputs[0]), _piece(shapes, joined.inputs[1]))
    if pieces[0] is None or pieces[1] is None or pieces[0][0] is not pieces[1][0]:
        return None
    x = pieces[0][0]
    shape = shapes[x].shape
    if shape is None or len(shape) != 4 or not isinstance(shape[3], int) or shape[3] % 2:
        return None
    width = shape[3]
    whole = (pieces[0][1], min(pieces[0][2], width)), (pieces[1][1], pieces[1][2])
    return (x, width) if whole == ((width // 2, width), (0, width // 2)) else None


def _piece(shapes: Shapes, value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """The value along whose last axis this one is cut out, and where it begins and ends."""
    node = None if value is None else value.producer()
    if node is None or node.inputs[0] is None or shapes[node.inputs[0]].shape is None:
        return None
    rank = len(shapes[node.inputs[0]].shape or ())
    if _is(node, "Slice"):
        bounds = slice_bounds(shapes.call(node))
        if bounds is None or bounds[0] != [rank - 1] or bounds[3] != [1]:
            return None
        start, end = bounds[1][0], bounds[2][0]
        return (node.inputs[0], start, end) if isinstance(start, int) and isinstance(end, int) else None
    if _is(node, "Split") and _is_last(shapes, node):
        sizes = [(shapes[one].shape or (None,))[-1] for one in node.outputs]
        before = sizes[: value.index() or 0] if value is not None else []
        mine = sizes[len(before)]
        whole = [size for size in before if isinstance(size, int)]
        if isinstance(mine, int) and len(whole) == len(before):
            return node.inputs[0], sum(whole), sum(whole) + mine
    return None


def _is_last(shapes: Shapes, node: ir.Node) -> bool:
    """Whether a node works along the last axis."""
    shape = shapes[node.inputs[0]].shape if node.inputs[0] is not None else None
    axis = node.attributes.get_int("axis", 0)
    return shape is not None and axis_of(axis, len(shape)) == len(shape) - 1


def _are_tables(shapes: Shapes, x: ir.Value, *tables: ir.Value) -> bool:
    """Whether these turn every head alike, and one half of each row as the other."""
    mine = shapes[x].shape or ()
    for table in tables:
        shape = shapes[table].shape
        if shape is None or len(shape) != 4 or shape[1] != 1 or shape[2:] != mine[2:] or shape[0] not in (1, mine[0]):
            return False
        if not _has_like_halves(shapes, table):
            return False
    return True


_ELEMENTWISE = frozenset({"Cos", "Sin", "Cast", "Identity", "Mul", "Div"})
_AROUND = frozenset({"Unsqueeze", "Slice", "Gather", "Expand"})  # which leave rows whole, if the last axis stays


def _has_like_halves(shapes: Shapes, value: ir.Value) -> bool:
    """Whether a row is the same twice: it is joined of one value twice, and what follows is done to both alike."""
    node, width = value.producer(), (shapes[value].shape or (None,))[-1]
    while node is not None and not _is(node, "Concat"):
        sources = [one for one in node.inputs if one is not None]
        scaled = node.op_type not in ("Mul", "Div") or _is_single(sources[-1]) or _is_single(sources[0])
        if not _is(node, *_ELEMENTWISE, *_AROUND) or not scaled:
            return False
        value = sources[1] if node.op_type == "Mul" and _is_single(sources[0]) else sources[0]
        if (shapes[value].shape or (None,))[-1] != width or not _keeps_rows(shapes, node):
            return False
        node = value.producer()
    return node is not None and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and _is_last(shapes, node)


def _keeps_rows(shapes: Shapes, node: ir.Node) -> bool:
    """Whether what moves numbers leaves the last axis as it is."""
    if node.op_type == "Gather":
        rank = len(shapes[node.inputs[0]].shape or ())  # type: ignore[index]
        return axis_of(node.attributes.get_int("axis", 0), rank) < rank - 1
    if node.op_type == "Slice":
        bounds = slice_bounds(shapes.call(node))
        rank = len(shapes[node.inputs[0]].shape or ())  # type: ignore[index]
        return bounds is not None and rank - 1 not in bounds[0]
    if node.op_type == "Unsqueeze":
        axes = shapes.call(node).integers("axes", 1)
        rank = len(shapes[node.outputs[0]].shape or ())
        return axes is not None and all(isinstance(axis, int) and axis_of(axis, rank) < rank - 1 for axis in axes)
    return True


def _is_single(value: ir.Value) -> bool:
    constant = small_constant(value)
    return constant is not None and constant.size == 1


def _maker(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and _is(node, operator) else None


def _is(node: ir.Node, *operators: str) -> bool:
    return node.op_type in operators and node.domain in ("", "ai.onnx")
