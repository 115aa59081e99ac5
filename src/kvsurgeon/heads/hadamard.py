"""Hadamard rotation of heads: large features are spread over all features of a head, so that rows quantize better.

A Hadamard matrix H of n rows is symmetric, and H H = n. With scales a b = 1 / n, (q bH)(k aH)^T = q k^T, and
(w (v aH)) bH = w v: the model computes the same. Keys are rotated where they are cached, after any rotary embedding.
Source: Ashkboos et al., "QuaRot", 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.attention_sites import AttentionSite, CachedOperand
from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.analysis.token_flow import Place, TokenFlow
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.ops.content import is_shape_only
from kvsurgeon.ops.table import contraction_of
from kvsurgeon.resizing.token_data import InputsBefore
from kvsurgeon.rewrite.cache_layouts import is_canonical_view
from kvsurgeon.rewrite.layout_trace import HEAD_DIM, LayoutTrace, trace_layout


@dataclass(frozen=True, kw_only=True)
class _HeadRotation:
    """A cached tensor to rotate, and the other tensor that is rotated so that the product does not change.

    Attributes:
        operand: The operand of a product that is computed from the cached tensor.
        trace: The moves in between.
        other: The operand that holds queries; None if the output of the product is rotated.
        axis: The axis of queries or output that has the features of a head: the last one, or that before it.
    """

    operand: CachedOperand
    trace: LayoutTrace
    other: Place | None
    axis: int

    @property
    def point(self) -> CachePoint:
        return self.operand.cache_point


def rotate_heads(analysis: Analysis) -> None:
    """Rotate queries, keys, values and outputs of all attention layers by a Hadamard matrix, in the analyzed graph.

    Raises:
        UnsupportedError: Keys or values change between cache and product other than by moves and scalars, or something
            else reads them; the graph is unchanged.
    """
    before: InputsBefore = {node: tuple(node.inputs) for node in analysis.flow.order}
    rotations = [one for site in analysis.sites for one in _rotations(analysis.flow, site, before)]
    _check_readers(analysis, rotations)
    editor, done = Editor(analysis.model), set[ir.Value]()
    for one in rotations:
        rows, others = (matrix.astype(one.point.dtype.numpy()) for matrix in hadamard(one.point.head_dim))
        op = NodeBuilder(editor, f"{one.point.value.name}.rotated")
        if one.point.value not in done:
            done.add(one.point.value)
            _rotate_rows(op, analysis.flow, one.point, rows)
        _rotate_other(op, analysis.flow, one, others)
    editor.before = None
    editor.finish()


def hadamard(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two symmetric matrices whose product is the identity: one for cached rows, one for what multiplies them.

    Both are Hadamard matrices, the largest that fit, in the blocks of their diagonals. Their scales are powers of two,
    which 16 bits hold exactly: 1 / sqrt(8) would be rounded, and scores with it.

    >>> rows, others = hadamard(12)
    >>> rows.max().item(), hadamard(8)[0].max().item(), hadamard(8)[1].max().item(), (rows @ others).trace().item()
    (0.5, 0.5, 0.25, 12.0)
    """
    block, power = np.ones((1, 1)), 0
    while size % (2 * len(block)) == 0:
        block, power = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), block), power + 1
    matrix = np.kron(np.eye(size // len(block)), block)
    return matrix / 2 ** (power // 2), matrix / 2 ** (power - power // 2)


def _rotations(flow: TokenFlow, site: AttentionSite, before: InputsBefore) -> Iterator[_HeadRotation]:
    """Yield the rotations of the keys and of the values of an attention.

    Raises:
        UnsupportedError: They cannot be rotated.
    """
    if len(site.scores) != 1 or len(site.products) != 1 or site.other_inputs:
        expected = "one product of queries with keys, and one of weights with values"
        raise _not_rotatable(site.at, expected, site.products_found())
    for operand, other in ((site.keys[0], site.scores[0].query_index()), (site.values[0], None)):
        node, index = operand.place
        value, found = before[node][index], contraction_of(flow.shapes.call(node))
        assert value is not None
        trace = trace_layout(flow, before, value, operand.cache_point)
        axis = None if trace is None or found is None else _feature_axis(trace)
        if trace is None or found is None or axis is None:
            expected = "keys and values that are moved and scaled only"
            raise _not_rotatable(operand.cache_point.value, expected, value.name)
        label = (found.left_labels if index == found.left else found.right_labels)[axis]
        labels = found.result_labels
        if other is not None:
            labels = found.left_labels if other == found.left else found.right_labels
        if label not in labels[-2:]:
            raise _not_rotatable(node.outputs[0], "features of a head on one of the last two axes", str(labels))
        axis = labels.index(label) - len(labels)
        yield _HeadRotation(operand=operand, trace=trace, other=None if other is None else (node, other), axis=axis)


def _feature_axis(trace: LayoutTrace) -> int | None:
    """Return the axis that has the features of a head and nothing else; None if there is none."""
    return next((axis for axis, labels in enumerate(trace.axes) if labels == (HEAD_DIM,)), None)


def _check_readers(analysis: Analysis, rotations: Sequence[_HeadRotation]) -> None:
    """Check that only products, through the moves of a rotation, read what is rotated.

    Raises:
        UnsupportedError: Something else does.
    """
    places = {one.operand.place for one in rotations}
    steps = {node for one in rotations for node in one.trace.steps}

    def is_other(node: ir.Node, index: int) -> bool:
        return node not in steps and (node, index) not in places and not is_shape_only(node)

    for one in rotations:
        point = one.point
        returned = next((output for output in analysis.model.graph.outputs if is_canonical_view(output, point)), None)
        for value in (point.value, *(node.outputs[0] for node in one.trace.steps)):
            other = next((node for node, index in value.uses() if is_other(node, index)), None)
            if other is not None or returned is not None or value.is_graph_output():
                found = value if other is None else other.outputs[0]
                raise _not_rotatable(value, "keys and values that only attention reads", (returned or found).name)
        if point.head_dim % 2 or _own_axis(point) is None:
            raise _not_rotatable(point.value, "an even number of features on one axis", str(point.head_dim))


def _own_axis(point: CachePoint) -> int | None:
    """Return the axis of a cached tensor with the features of a head, from the end, if heads are split.

    None is returned if it is not one of the last two, or if another axis has to be split.
    """
    axis, extra = point.order[-1] - len(point.parts), len(point.parts) - point.rank
    return axis if (axis == -1 and extra <= 1) or (axis == -2 and not extra) else None


def _rotate_rows(op: NodeBuilder, flow: TokenFlow, point: CachePoint, matrix: np.ndarray) -> None:
    """Rotate a cached tensor for all that reads it."""
    users, rotated, rank = list(point.value.uses()), point.value, point.rank
    op.editor.before = min((node for node, _ in users), key=flow.order.__getitem__)
    is_merged = len(point.parts) > rank
    if is_merged:
        rotated = op.Reshape(rotated, op.int64([0] * (rank - 1) + [point.heads, point.head_dim]))
    rotated = _product(op, rotated, _own_axis(point) or -1, matrix)
    if is_merged:
        rotated = op.Reshape(rotated, op.int64([0] * (rank - 1) + [point.elements]))
    for node, index in users:
        op.editor.replace_input(node, index, rotated)


def _rotate_other(op: NodeBuilder, flow: TokenFlow, one: _HeadRotation, matrix: np.ndarray) -> None:
    """Rotate the queries of a product, or the output of a product with values."""
    if one.other is not None:
        node, index = one.other
        queries = node.inputs[index]
        assert queries is not None
        op.editor.before = node
        op.editor.replace_input(node, index, _product(op, queries, one.axis, matrix))
        return
    output = one.operand.place[0].outputs[0]
    users = list(output.uses())
    op.editor.before = min((node for node, _ in users), key=flow.order.__getitem__, default=None)
    rotated = _product(op, output, one.axis, matrix)
    if output.is_graph_output():
        rotated = op.editor.replace_output(output, rotated)
    for node, index in users:
        op.editor.replace_input(node, index, rotated)


def _product(op: NodeBuilder, value: ir.Value, axis: int, matrix: np.ndarray) -> ir.Value:
    """Multiply an axis of a value, the last one or that before it, with a symmetric matrix."""
    constant = op.constant(matrix)
    return op.MatMul(value, constant) if axis == -1 else op.MatMul(constant, value)


def _not_rotatable(value: ir.Value, expected: str, found: str | None) -> UnsupportedError:
    return UnsupportedError(
        "keys and values cannot be rotated", code=Code.UNTRACEABLE_HEADS, at=value.name, expected=expected,
        found=found, hint="use hadamard=false",
    )  # fmt: skip
