"""Gather relative positions before their product with queries, where scores are shifted or gathered after it, and back.

The result of a relative shift has at a query and a key the score of the column `key - query + offset`; others gather
the column of each query and key. Queries are
multiplied with rows that are gathered for each query and key instead, which is plain attention with a bias. After the
query, where causal attention has no weight, they are those of distance 0. Once the model has a cache the columns are
gathered from the product again: a row for each query and key would take as much memory as all heads' scores times the
size of a head.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import GraphInputs, read_inputs
from kvsurgeon.decompose.relative_shifts import RelativeShift, find_shifts, may_shift
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.graph.patterns import Replacement, rewrite
from kvsurgeon.graph.query import is_operator, producer_of
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import contraction_of, has_trait
from kvsurgeon.symbolic.dimension import LENGTH, Dimension

OF_PAIRS = "kvsurgeon.of_pairs"  # metadata of a product with rows that are gathered for each query and key
OPSET = 13  # the axes of `Unsqueeze` are an input


class _NotGatheredError(Exception):
    """The scores are not computed by a product whose rows can be gathered."""


def gather_relative_positions(model: ir.Model) -> ir.Model:
    """Return a model that gathers relative positions before their product, or the model itself without need.

    The original is not changed.
    """
    if model.graph.opset_imports.get("", 1) < OPSET or not any(may_shift(one) for one in model.graph):
        return model
    copy = copy_model(model)
    given = read_inputs(copy.graph)
    shifts = find_shifts(copy.graph, given.shapes) if given.length is LENGTH else []
    editor = Editor(copy)
    replaced = [_replace(editor, given, shift) for shift in shifts]
    if not any(replaced):
        return model
    editor.finish()
    return copy


def multiply_before_gathering(model: ir.Model) -> int:
    """Gather the scores of pairs from products with all rows, and return the number of edits."""
    return rewrite(model, _columns_of_product)


def _columns_of_product(node: ir.Node) -> Replacement | None:
    if node.metadata_props.pop(OF_PAIRS, None) is None or producer_of(node.inputs[1], "Gather") is None:
        return None
    return Replacement(value=node.outputs[0], build=lambda editor: _gather_columns(editor, node))


def _gather_columns(editor: Editor, node: ir.Node) -> ir.Value:
    """Return the scores of a product with gathered rows, as columns of the product with all rows."""
    editor.before = node
    op = NodeBuilder(editor, node.outputs[0].name or node.op_type, like=node)
    gather = node.inputs[1].producer()  # type: ignore[union-attr]
    rows, columns = gather.inputs  # type: ignore[union-attr]
    operands, result = node.attributes.get_string("equation", "").split("->")
    queries, pairs = operands.split(",")
    query, key, rest = pairs[0], pairs[1], pairs[2:]
    product = op.Einsum(node.inputs[0], rows, equation=f"{queries},{key}{rest}->{result}")
    places = result.index(query), result.index(key)
    if places[0] > places[1]:
        columns = op.Transpose(columns, perm=[1, 0])
    wide = op.Unsqueeze(columns, op.int64([axis for axis in range(len(result)) if axis not in places]))
    keys = op.constant(np.arange(len(result)) == places[1])
    sizes = op.Where(keys, op.int64(1), op.Shape(product))
    return op.GatherElements(product, op.Expand(wide, sizes), axis=places[1])


def _replace(editor: Editor, given: GraphInputs, shift: RelativeShift) -> bool:
    """Compute the result of a shift by products with gathered rows; return whether that can be done."""
    node = shift.result.producer()
    assert node is not None
    editor.before = node
    try:
        result = _Gathered(editor, given, shift).value(shift.scores, shift.query, shift.distance)
    except _NotGatheredError:
        return False
    result.type, result.shape = shift.result.type, shift.result.shape
    editor.replace(shift.result, result)
    return True


class _Gathered:
    """Values with keys in place of distances."""

    def __init__(self, editor: Editor, given: GraphInputs, shift: RelativeShift) -> None:
        self.shapes = given.shapes
        self.op = NodeBuilder(editor, f"{shift.result.name}.relative", like=shift.result.producer())
        self.columns = self._columns(given, shift) if shift.columns is None else self._of_pairs(shift, shift.columns)

    def _of_pairs(self, shift: RelativeShift, columns: ir.Value) -> ir.Value:
        """Return the columns that the graph gathers, [query, key]."""
        single = [axis for axis, size in enumerate(self._shape(columns)) if size == 1]
        pairs = self.op.Squeeze(columns, self.op.int64(single)) if single else columns  # of no axes would be of all
        return pairs if shift.query < shift.distance else self.op.Transpose(pairs, perm=[1, 0])

    def _columns(self, given: GraphInputs, shift: RelativeShift) -> ir.Value:
        """Return the column of each query and key, [query, key]."""
        tokens, sizes = next((value, sizes) for value, sizes in given.dimensions.items() if LENGTH in sizes)
        op = self.op
        length = op.Gather(op.Shape(tokens), op.int64(sizes.index(LENGTH)), axis=0)
        places = op.Range(op.int64(0), length, op.int64(1))
        back = op.Sub(op.Unsqueeze(places, op.int64([0])), op.Unsqueeze(places, op.int64([1])))
        column = op.Add(op.Mul(length, op.int64(shift.slope)), op.int64(shift.start))
        return op.Add(op.Min(back, op.int64(0)), column)

    def value(self, value: ir.Value, query: int, distance: int) -> ir.Value:
        """Return a value with queries and distances, with keys in place of distances."""
        node = value.producer()
        if node is None:
            raise _NotGatheredError
        if is_operator(node, "MatMul", "Einsum"):
            return self._product(node, query, distance)
        if is_operator(node, "Transpose"):
            order = list(node.attributes.get_ints("perm", range(len(self._shape(value)))[::-1]))
            source = node.inputs[0]
            assert source is not None
            return self.op.Transpose(self.value(source, order[query], order[distance]), perm=order)
        if not has_trait(node, Trait.BROADCAST, Trait.ELEMENTWISE):
            raise _NotGatheredError
        rank = len(self._shape(value))
        inputs = [None if one is None else self._operand(one, query - rank, distance - rank) for one in node.inputs]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        return self.op.add(node.op_type, *inputs, **attributes)

    def _operand(self, value: ir.Value, query: int, distance: int) -> ir.Value:
        """Return an operand of a broadcast, whose axes are counted from the end."""
        rank = len(self._shape(value))
        if rank + distance < 0 or self._shape(value)[distance] == 1:
            return value
        if rank + query >= 0 and self._shape(value)[query] != 1:
            return self.value(value, rank + query, rank + distance)
        return self._bias(value, query, rank + distance)

    def _bias(self, value: ir.Value, query: int, distance: int) -> ir.Value:
        """Return what is added to each distance, for each query and key."""
        op, rank = self.op, len(self._shape(value))
        place = rank + query
        if place < 0:
            value, place, distance, rank = op.Unsqueeze(value, op.int64([0])), 0, distance + 1, rank + 1
            if place - rank != query:
                raise _NotGatheredError
        rest = [axis for axis in range(rank) if axis not in (place, distance)]
        rows = op.Squeeze(op.Transpose(value, perm=[distance, *rest, place]), op.int64([rank - 1]))
        order = [place, distance, *rest]
        return op.Transpose(op.Gather(rows, self.columns, axis=0), perm=[order.index(axis) for axis in range(rank)])

    def _product(self, node: ir.Node, query: int, distance: int) -> ir.Value:
        """Return a product with the rows of each query and key."""
        found = contraction_of(self.shapes.call(node))
        if found is None or self.shapes[node.outputs[0]].dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            raise _NotGatheredError
        row, column = found.result_labels[query], found.result_labels[distance]
        sides = [(node.inputs[found.left], found.left_labels), (node.inputs[found.right], found.right_labels)]
        (queries, labels), (table, its) = sides if column in found.right_labels else sides[::-1]
        if queries is None or table is None or column in labels or row in its or row not in labels:
            raise _NotGatheredError
        sizes = self._shape(table)
        single = [axis for axis, size in enumerate(sizes) if size == 1 and its[axis] in labels]
        kept = [label for axis, label in enumerate(its) if axis not in single and label != column]
        shared = [axis for axis, label in enumerate(labels) if label in kept]
        if any(self._shape(queries)[axis] == 1 for axis in shared):
            raise _NotGatheredError
        op, place = self.op, its.index(column)
        order = [place, *(axis for axis in range(len(its)) if axis != place and axis not in single), *single]
        rows = op.Transpose(table, perm=order)
        if single:
            rows = op.Squeeze(rows, op.int64(list(range(len(its) - len(single), len(its)))))
        letters = {label: chr(ord("a") + index) for index, label in enumerate(dict.fromkeys((*labels, *its)))}
        terms = ["".join(letters[one] for one in part) for part in (labels, (row, column, *kept), found.result_labels)]
        gathered = op.Gather(rows, self.columns, axis=0)
        product = op.Einsum(queries, gathered, equation=f"{terms[0]},{terms[1]}->{terms[2]}")
        product.producer().metadata_props[OF_PAIRS] = ""  # type: ignore[union-attr]
        return product

    def _shape(self, value: ir.Value) -> tuple[Dimension, ...]:
        shape = self.shapes[value].shape
        if shape is None:
            raise _NotGatheredError
        return shape
