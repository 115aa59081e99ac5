"""Replace `Einsum` of two tensors by `MatMul`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import shapes_of
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.graph.patterns import Replacement, rewrite
from kvsurgeon.graph.query import is_operator
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.ops.contraction import Contraction, einsum_notation
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension

Labels = Sequence[object]  # one for each axis of a tensor


@dataclass(frozen=True, kw_only=True)
class EinsumToMatmul:
    """Replace `Einsum` of two tensors by `Transpose` and `MatMul`, which onnxruntime computes faster.

    Before: `Einsum("bzch,bzhpn->bchpn")`, whose axes onnxruntime moves one element at a time. After: the operands are
    transposed and their axes merged, one `MatMul` multiplies them, and its axes are split again.

    Not handled: a label that occurs in one tensor alone, and axes of unknown size that would have to be merged.
    """

    name: ClassVar[str] = "einsum-to-matmul"

    def apply(self, subject: Subject) -> Outcome:
        """Rewrite `subject.model`."""
        with deep_recursion():
            shapes = shapes_of(subject.model.graph)
        edits = rewrite(subject.model, partial(_product, shapes))
        return Changed(edits=edits) if edits else Unchanged(reason="no Einsum is a product of matrices of known sizes")


def _product(shapes: Shapes, node: ir.Node) -> Replacement | None:
    dtype = shapes[node.outputs[0]].dtype
    is_product = is_operator(node, "Einsum") and dtype is not None and dtype.is_floating_point()
    contraction = einsum_notation(shapes.call(node)) if is_product else None
    axes = None if contraction is None else _axes(contraction, shapes, node)
    if axes is None or not axes.with_last_columns_merged().is_possible():
        return None
    return Replacement(value=node.outputs[0], build=lambda editor: _build(editor, node, axes))


def _build(editor: Editor, node: ir.Node, axes: _Axes) -> ir.Value:
    """Add the nodes before a node, and return the result."""
    editor.before = node
    op, merged = NodeBuilder(editor, node.outputs[0].name or "product", like=node), axes.with_last_columns_merged()
    left, right = node.inputs
    assert left is not None
    assert right is not None
    if merged is axes:
        return axes.build(op, left, right)
    # merged before they are moved: onnxruntime copies the elements of one last axis at once
    right = op.Reshape(right, op.int64([*[0] * (len(merged.right) - 1), int(merged.sizes[merged.right[-1]])]))
    product = merged.build(op, left, right)
    sizes = [axes.sizes[label] for label in axes.columns]
    return op.Reshape(product, op.int64([*[0] * (len(merged.result) - 1), *(int(size) for size in sizes)]))


def _axes(contraction: Contraction, shapes: Shapes, node: ir.Node) -> _Axes | None:
    """Return the axes of a product by their part in it; None if it is no product of matrices."""
    left, right, result = contraction.left_labels, contraction.right_labels, contraction.result_labels
    if any(len(set(labels)) < len(labels) for labels in (left, right, result)):
        return None
    both, kept = set(left) & set(right), set(result)
    if not set(left) ^ set(right) <= kept:
        return None
    sizes: dict[object, Dimension] = {}
    for labels, value in zip((left, right), node.inputs, strict=True):
        for label, size in zip(labels, shapes[value].shape or () if value is not None else (), strict=True):
            if label not in kept and not dim.is_equal(sizes.setdefault(label, size), size):
                return None
            sizes[label] = size
    return _Axes(
        left=left, right=right, result=result, sizes=sizes,
        batch=[label for label in result if label in both], summed=[label for label in left if label not in kept],
        rows=[label for label in left if label not in both], columns=[label for label in right if label not in both],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """The labels of a product of two tensors, by their part in a product of matrices.

    Attributes:
        left: Labels of the left tensor.
        right: Labels of the right tensor.
        result: Labels of the result.
        sizes: Size of each label.
        batch: Labels of both tensors and of the result.
        summed: Labels of both tensors alone.
        rows: Labels of the left tensor and of the result.
        columns: Labels of the right tensor and of the result.
    """

    left: Labels
    right: Labels
    result: Labels
    sizes: dict[object, Dimension]
    batch: Labels
    summed: Labels
    rows: Labels
    columns: Labels

    def is_possible(self) -> bool:
        """Return whether there are rows or columns, and the sizes of all axes that are merged or split are known."""
        pairs = ((self.rows, self.summed), (self.summed, self.columns), (self.rows, self.columns))
        is_known = all(self._merged(*pair) is not None for pair in pairs) and self._split() is not None
        return is_known and bool(self.rows or self.columns)

    def build(self, op: NodeBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
        """Add the nodes, and return the result."""
        swapped = replace(self, left=self.right, right=self.left, rows=self.columns, columns=self.rows)
        if swapped._moved() < self._moved():
            return swapped.product(op, right, left)
        return self.product(op, left, right)

    def product(self, op: NodeBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
        """Add the nodes for a product in this order, and return the result."""
        left = _transposed(op, left, self.left, [*self.batch, *self.rows, *self.summed])
        right = _transposed(op, right, self.right, [*self.batch, *self.summed, *self.columns])
        left = self._reshaped(op, left, self._merged(self.rows, self.summed))
        right = self._reshaped(op, right, self._merged(self.summed, self.columns))
        product = self._reshaped(op, op.MatMul(left, right), self._split())
        return _transposed(op, product, [*self.batch, *self.rows, *self.columns], self.result)

    def _moved(self) -> int:
        """Return how many elements `Transpose` moves, with 1 for each size that is not known."""
        orders = (
            (self.left, [*self.batch, *self.rows, *self.summed]),
            (self.right, [*self.batch, *self.summed, *self.columns]),
            (self.result, [*self.batch, *self.rows, *self.columns]),
        )
        moved = (labels for labels, order in orders if list(labels) != order)
        return sum(math.prod(size for one in labels if isinstance(size := self.sizes[one], int)) for labels in moved)

    def with_last_columns_merged(self) -> _Axes:
        """Return the axes with one label for all columns if the right tensor and the result end with them."""
        count, columns = len(self.columns), tuple(self.columns)
        ends = {tuple(labels[-count:]) for labels in (self.right, self.result)} if count > 1 else set()
        size = self._count(columns)
        if ends != {columns} or not isinstance(size, int):
            return self
        return replace(
            self, right=[*self.right[:-count], columns], result=[*self.result[:-count], columns], columns=[columns],
            sizes={**self.sizes, columns: size},
        )  # fmt: skip

    def _reshaped(self, op: NodeBuilder, value: ir.Value, sizes: Sequence[int] | None) -> ir.Value:
        assert sizes is not None
        return op.Reshape(value, op.int64([*[0] * len(self.batch), *sizes])) if sizes else value

    def _merged(self, first: Labels, second: Labels) -> list[int] | None:
        """Return the target of a `Reshape` that makes one axis of each group; empty if they are single axes already.

        A size of 0 keeps the size there, which the first axis of a group has if no axis before it was merged.
        """
        if len(first) == len(second) == 1:
            return []
        return _known([0] if len(first) == 1 else [self._count(first)], [self._count(second)])

    def _split(self) -> list[int] | None:
        """Return the target of a `Reshape` that gives rows and columns back their axes; empty if they are single."""
        if len(self.rows) == len(self.columns) == 1:
            return []
        rows = [0] if len(self.rows) == 1 else [self.sizes[label] for label in self.rows]
        return _known(rows, [self.sizes[label] for label in self.columns])

    def _count(self, labels: Labels) -> Dimension:
        return math.prod(self.sizes[label] for label in labels)


def _known(*groups: Sequence[Dimension]) -> list[int] | None:
    """Return sizes that are numbers; None if one is not."""
    sizes = [size for group in groups for size in group]
    numbers = [size for size in sizes if isinstance(size, int)]
    return numbers if len(numbers) == len(sizes) else None


def _transposed(op: NodeBuilder, value: ir.Value, before: Labels, after: Labels) -> ir.Value:
    """Add a `Transpose` from one order of labels to another, if they differ."""
    order = [list(before).index(label) for label in after]
    return value if order == sorted(order) else op.Transpose(value, perm=order)
