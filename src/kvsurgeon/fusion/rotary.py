"""Match rotary embeddings that rotate one half of the features against the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product

import onnx_ir as ir

from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.graph.query import chain, is_operator, producer_of
from kvsurgeon.ops.gather import slice_bounds
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import axis_of


@dataclass(frozen=True, kw_only=True)
class RotaryMatch:
    """A rotary embedding: `x * cos + Concat(-x[half:], x[:half]) * sin` along the last axis.

    Attributes:
        result: Output of the addition, [batch, heads, sequence, head_dim].
        x: Tensor that is rotated, [batch, heads, sequence, head_dim].
        hidden: Tensor that x is a view of, [batch, sequence, heads * head_dim]; None if there is none.
        heads: Number of heads of `hidden`.
        cos: Table of cosines with two equal halves, [batch or 1, 1, sequence, head_dim].
        sin: Table of sines with two equal halves, [batch or 1, 1, sequence, head_dim].
        head_dim: Number of features of a head.
    """

    result: ir.Value
    x: ir.Value
    hidden: ir.Value | None
    heads: int | None
    cos: ir.Value
    sin: ir.Value
    head_dim: int


def match_rotary(shapes: Shapes, node: ir.Node) -> RotaryMatch | None:
    """Return the rotary embedding that ends in an `Add`; None for other nodes."""
    products = [found for value in node.inputs if (found := producer_of(value, "Mul")) is not None]
    if not is_operator(node, "Add") or len(products) != 2:
        return None
    for straight, crossed in permutations(products):
        for (rotated, sin), (x, cos) in product(permutations(crossed.inputs), permutations(straight.inputs)):
            if x is None or cos is None or sin is None:
                continue
            head_dim = _shape(shapes, x)[-1] if _rotates(shapes, x, rotated) else None
            if isinstance(head_dim, int) and all(_is_table(shapes, x, table) for table in (cos, sin)):
                hidden, heads = _hidden(shapes, x)
                return RotaryMatch(
                    result=node.outputs[0], x=x, hidden=hidden, heads=heads, cos=cos, sin=sin, head_dim=head_dim
                )
    return None


def _hidden(shapes: Shapes, x: ir.Value) -> tuple[ir.Value | None, int | None]:
    """Return h and the number of heads if x is `Transpose(Reshape(h), perm=(0, 2, 1, 3))`; None otherwise."""
    transpose = producer_of(x, "Transpose")
    reshape = None if transpose is None else producer_of(transpose.inputs[0], "Reshape")
    if transpose is None or reshape is None or tuple(transpose.attributes.get_ints("perm") or ()) != (0, 2, 1, 3):
        return None, None
    hidden, (batch, heads, sequence, head_dim) = reshape.inputs[0], _shape(shapes, x)
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        return None, None
    return (hidden, heads) if _shape(shapes, hidden) == (batch, sequence, heads * head_dim) else (None, None)


def _rotates(shapes: Shapes, x: ir.Value, rotated: ir.Value | None) -> bool:
    """Return whether a value is `Concat(-x[half:], x[:half])`."""
    concat, shape = producer_of(rotated, "Concat"), _shape(shapes, x)
    negative = None if concat is None else producer_of(concat.inputs[0], "Neg")
    head_dim = shape[-1] if len(shape) == 4 else None
    if concat is None or negative is None or len(concat.inputs) != 2 or not _is_along_last_axis(shapes, concat):
        return False
    if not isinstance(head_dim, int) or head_dim % 2:
        return False
    half = head_dim // 2
    parts = [_part(shapes, negative.inputs[0]), _part(shapes, concat.inputs[1])]
    return parts == [(x, half, head_dim), (x, 0, half)]


def _part(shapes: Shapes, value: ir.Value | None) -> tuple[ir.Value | None, Dimension | None, Dimension | None] | None:
    """Return the tensor that a value is a slice of along the last axis, and where it starts and ends."""
    slicing, split = producer_of(value, "Slice"), producer_of(value, "Split")
    if slicing is not None:
        bounds, shape = slice_bounds(shapes.call(slicing)), _shape(shapes, slicing.inputs[0])
        if bounds is None or not shape or bounds[0] != [len(shape) - 1] or bounds[3] != [1]:
            return None
        start, end = bounds[1][0], bounds[2][0]
        size = shape[-1]
        return slicing.inputs[0], start, min(end, size) if isinstance(end, int) and isinstance(size, int) else None
    if split is not None and value is not None and _is_along_last_axis(shapes, split):
        sizes = [size for one in split.outputs for size in _shape(shapes, one)[-1:] if isinstance(size, int)]
        if len(sizes) == len(split.outputs):
            index = value.index() or 0
            return split.inputs[0], sum(sizes[:index]), sum(sizes[: index + 1])
    return None


def _is_along_last_axis(shapes: Shapes, node: ir.Node) -> bool:
    rank = len(_shape(shapes, node.inputs[0]))
    return rank > 0 and axis_of(node.attributes.get_int("axis", 0), rank) == rank - 1


def _is_table(shapes: Shapes, x: ir.Value, table: ir.Value) -> bool:
    """Return whether a table is the same for all heads and has two equal halves."""
    shape, of_x = _shape(shapes, table), _shape(shapes, x)
    if len(shape) != 4 or shape[1] != 1 or shape[2:] != of_x[2:] or shape[0] not in (1, of_x[0]):
        return False
    *_, joined = chain(table, partial(_table_source, shapes))
    concat = producer_of(joined, "Concat")
    return (
        concat is not None
        and len(concat.inputs) == 2
        and concat.inputs[0] is concat.inputs[1]
        and _is_along_last_axis(shapes, concat)
    )


_TABLE_STEPS = (Trait.ROTARY, Trait.IDENTITY, Trait.SCALE, Trait.RESHAPE, Trait.SELECT, Trait.REPEAT)


def _table_source(shapes: Shapes, node: ir.Node) -> ir.Value | None:
    """Return the input of an operator that treats both halves of its last axis alike; None for other operators."""
    if not has_trait(node, *_TABLE_STEPS) or not _keeps_last_axis(shapes, node):
        return None
    source = node.inputs[0]
    if has_trait(node, Trait.SCALE):
        scalars = [_is_scalar(value) for value in node.inputs]
        if not any(scalars):
            return None
        source = node.inputs[1] if node.op_type == "Mul" and scalars[0] else source
    return source if _shape(shapes, source)[-1:] == _shape(shapes, node.outputs[0])[-1:] else None


def _keeps_last_axis(shapes: Shapes, node: ir.Node) -> bool:
    """Return whether a layout operator leaves the last axis as it is."""
    rank = len(_shape(shapes, node.inputs[0]))
    axes: Sequence[Dimension] | None = []
    if node.op_type == "Gather":
        axes = [node.attributes.get_int("axis", 0)]
    elif node.op_type == "Slice":
        bounds = slice_bounds(shapes.call(node))
        axes = None if bounds is None else bounds[0]
    elif node.op_type == "Unsqueeze":
        axes, rank = shapes.call(node).integers("axes", 1), len(_shape(shapes, node.outputs[0]))
    return axes is not None and all(isinstance(axis, int) and axis_of(axis, rank) < rank - 1 for axis in axes)


def _shape(shapes: Shapes, value: ir.Value | None) -> tuple[Dimension, ...]:
    """Return the shape of a value; empty if it is unknown."""
    return () if value is None else shapes[value].shape or ()


def _is_scalar(value: ir.Value | None) -> bool:
    constant = small_constant(value)
    return constant is not None and constant.size == 1
