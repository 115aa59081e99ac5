"""Relative shifts: scores for distances that are moved to scores for keys, as in Transformer-XL.

Transformer-XL multiplies queries with a row for each distance, `[query, distance]`, and moves row by row what belongs
to a key under it: it pads a column, reads the result in rows of another length, and slices. Which column is moved to a
key is found by running that on numbered columns, at short lengths and at one beyond all numbers that the shift has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import onnx
import onnx_ir as ir
import sympy

from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.execution import build_model, initializer, open_session
from kvsurgeon.graph.query import chain, is_operator, producer_of, through, upstream
from kvsurgeon.ops.gather import FAR
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, Dimension

BATCH_SIZE = 2
LARGEST_NUMBER = 48  # in the sizes and bounds of a shift, so that they cross each other at lengths that are run
LENGTHS = (1, 2, 3, 5, 8, 2 * LARGEST_NUMBER + 4)
MAX_ELEMENTS = 1 << 24  # of a tensor that is run


@dataclass(frozen=True, kw_only=True)
class RelativeShift:
    """Scores for distances that are shifted to scores for keys.

    Attributes:
        scores: Scores with an axis of queries and one of distances.
        result: The same with keys in place of distances.
        query: Index of the axis of the queries.
        distance: Index of the axis of the distances, and of the keys.
        slope: By how much the column of the query itself grows with each token of the text.
        start: That column for a text of no tokens.
        columns: The column of each query and key, on their axes counted from the end, if the graph gathers them.
    """

    scores: ir.Value
    result: ir.Value
    query: int
    distance: int
    slope: int = 0
    start: int = 0
    columns: ir.Value | None = None


class _NotShiftedError(Exception):
    """Error of nodes between scores and a result that do not run alone, or may do something else at some length."""


def may_shift(node: ir.Node) -> bool:
    """Return whether a node gathers elements, or slices what was padded and read in other rows or is read so again."""
    if is_operator(node, "GatherElements"):
        return True
    read = producer_of(node.inputs[0], "Reshape") if is_operator(node, "Slice") else None
    if read is None:
        return False
    padded = producer_of(read.inputs[0], "Concat", "Pad")
    return padded is not None or any(
        is_operator(user, "Reshape") or _takes_first_rows(user) for user, _ in node.outputs[0].uses()
    )


def find_shifts(graph: ir.Graph, shapes: Shapes) -> list[RelativeShift]:
    """Return the relative shifts of a graph, from the scores as far as nodes only move them."""
    found: dict[ir.Value, RelativeShift] = {}
    for node in graph:
        if not may_shift(node):
            continue
        if is_operator(node, "GatherElements"):
            gathered = _gathered(shapes, node)
            found |= {} if gathered is None else {gathered.result: gathered}
            continue
        *_, scores = chain(node.outputs[0], _moved_input)
        if scores in found:
            continue
        for result in reversed(list(_results(node.outputs[0]))):
            shift = _shift(graph, shapes, scores, result)
            if shift is not None:
                found[scores] = shift
                break
    return list(found.values())


def _gathered(shapes: Shapes, node: ir.Node) -> RelativeShift | None:
    """Return how the columns of scores are gathered by an index for each query and key; None if they are not."""
    scores, indices = node.inputs
    assert scores is not None
    assert indices is not None
    expand = producer_of(indices, "Expand")
    columns = indices if expand is None or expand.inputs[0] is None else expand.inputs[0]
    before, after, pairs = shapes[scores].shape, shapes[indices].shape, shapes[columns].shape
    if before is None or after is None or pairs is None or len(before) != len(after):
        return None
    distance = node.attributes.get_int("axis", 0) % len(before)
    sizes = (*[1] * (len(before) - len(pairs)), *pairs)
    queries = [axis for axis, size in enumerate(sizes) if size != 1 and axis != distance]
    others = [axis for axis in range(len(before)) if axis != distance]
    if len(queries) != 1 or before[distance] is LENGTH or any(before[axis] != after[axis] for axis in others):
        return None
    if any(size is not LENGTH for size in (before[queries[0]], sizes[queries[0]], sizes[distance])):
        return None
    return RelativeShift(scores=scores, result=node.outputs[0], query=queries[0], distance=distance, columns=columns)


def _moved_input(node: ir.Node | None) -> ir.Value | None:
    """Return the input whose elements a node moves, or joins with constants; None if it does something else."""
    if node is None or len(node.outputs) != 1:
        return None
    if is_operator(node, "Concat"):
        others = [value for value in node.inputs if value is not None and not _is_filled(value)]
        return others[0] if len(others) == 1 else None
    moves = has_trait(node, Trait.RESHAPE, Trait.TRANSPOSE, Trait.SELECT) or is_operator(node, "Pad")
    return node.inputs[0] if moves or _takes_first_rows(node) else None


def _takes_first_rows(node: ir.Node) -> bool:
    return is_operator(node, "Gather") and _is_range(node.inputs[1])


def _is_filled(value: ir.Value) -> bool:
    sources = (producer_of(value, "ConstantOfShape"), producer_of(value, "Expand"))
    return constant_tensor(value) is not None or any(
        node is not None and (node.op_type == "ConstantOfShape" or constant_tensor(node.inputs[0]) is not None)
        for node in sources
    )


def _results(value: ir.Value) -> Iterator[ir.Value]:
    """Yield a value, and what moves alone make of it, up to a value that several nodes read."""
    while True:
        yield value
        users = [node for node, _ in value.uses() if not is_operator(node, "Shape")]
        if len(users) != 1 or value.is_graph_output() or _moved_input(users[0]) is not value:
            return
        value = users[0].outputs[0]


def _shift(graph: ir.Graph, shapes: Shapes, scores: ir.Value, result: ir.Value) -> RelativeShift | None:
    """Return how scores are shifted to a result; None if it is not a shift."""
    before, after = shapes[scores].shape, shapes[result].shape
    if before is None or after is None or len(before) != len(after):
        return None
    axes = [axis for axis, size in enumerate(before) if not isinstance(size, int) and dim.contains(size, LENGTH)]
    if len(axes) != 2 or any(after[axis] is not LENGTH for axis in axes):
        return None
    try:
        runs = [_Columns(graph, shapes, scores, result, length) for length in LENGTHS]
    except _NotShiftedError:
        return None
    for query, distance in permutations(axes):
        if before[query] is not LENGTH:
            continue
        offsets = [run.offset(query, distance) for run in runs]
        if None in offsets:
            continue
        slope = offsets[1] - offsets[0]  # type: ignore[operator]
        start = offsets[0] - slope  # type: ignore[operator]
        if all(offset == slope * length + start for offset, length in zip(offsets, LENGTHS, strict=True)):
            return RelativeShift(scores=scores, result=result, query=query, distance=distance, slope=slope, start=start)
    return None


class _Columns:
    """The place in the scores of each element of a result, for a text of some length.

    Attributes:
        axes: For each axis of the scores: the index along it, counted from 1, of each element of the result.
    """

    def __init__(self, graph: ir.Graph, shapes: Shapes, scores: ir.Value, result: ir.Value, length: int) -> None:
        self._shapes, self._scores, self._length = shapes, scores, length
        shape, dtype = shapes[scores].shape or (), shapes[scores].dtype
        sizes = [size for one in shape if isinstance(size := dim.at(one, length, BATCH_SIZE), int)]
        self._static = {size for size in shape if isinstance(size, int)}
        if dtype is None or len(sizes) < len(shape) or np.prod(sizes) > MAX_ELEMENTS:
            raise _NotShiftedError
        nodes, known = self._subgraph(result)
        try:
            session = open_session(
                build_model(
                    [node for node in graph if node in nodes], inputs={scores.name or "": (dtype, len(sizes))},
                    outputs=[result.name], opsets=graph.opset_imports, initializers=known,
                )
            )  # fmt: skip
            indices = [(index + 1).astype(dtype.numpy()) for index in np.indices(sizes)]
            self.axes = [session.run(None, {scores.name: index})[0].astype(int) for index in indices]
        except Exception as error:  # whatever onnxruntime raises
            raise _NotShiftedError from error

    def _subgraph(self, result: ir.Value) -> tuple[set[ir.Node], list[onnx.TensorProto]]:
        """Return the nodes between the scores and a result, and the numbers that they read."""
        nodes: set[ir.Node] = set()
        known: list[onnx.TensorProto] = []
        for value in upstream([result], stop=self._is_known):
            node = value.producer()
            if value is self._scores:
                continue
            if self._is_known(value):
                known.append(initializer(value.name, self._numbers(value)))
            elif node is None or not (self._is_moved(value) or _is_filled(value) or _is_range(value)):
                raise _NotShiftedError
            else:
                self._check(self._shapes[value].shape or ())
                nodes.add(node)
        return nodes, known

    def _is_moved(self, value: ir.Value) -> bool:
        return self._scores in upstream([value], stop=self._is_known)

    def _is_known(self, value: ir.Value) -> bool:
        has_numbers = self._shapes[value].value is not None or constant_tensor(value) is not None
        return value is self._scores or has_numbers

    def _numbers(self, value: ir.Value) -> ir.TensorProtocol:
        fact, tensor = self._shapes[value], constant_tensor(value)
        if fact.value is None or fact.dtype is None:
            assert tensor is not None
            return tensor
        self._check(fact.value.reshape(-1).tolist())
        array = [self._at(number) for number in fact.value.reshape(-1)]
        return ir.Tensor(np.array(array, fact.dtype.numpy()).reshape(fact.value.shape), dtype=fact.dtype)

    def _at(self, number: Dimension) -> Dimension:
        return dim.at(number, self._length, BATCH_SIZE) if isinstance(number, sympy.Expr) else number

    def _check(self, sizes: Sequence[Dimension]) -> None:
        """Check that sizes and bounds cross each other at no longer text than those that are run.

        Raises:
            _NotShiftedError: One is no polynomial in length and batch, or has a larger number in it.
        """
        for size in sizes:
            if isinstance(size, sympy.Expr) and not size.is_polynomial(LENGTH, BATCH):
                raise _NotShiftedError
            numbers = sympy.Poly(size, LENGTH, BATCH).coeffs() if isinstance(size, sympy.Expr) else [size]
            if any(LARGEST_NUMBER < abs(number) < FAR and abs(number) not in self._static for number in numbers):
                raise _NotShiftedError

    def offset(self, query: int, distance: int) -> int | None:
        """Return the column of each query itself; None if keys up to the query do not have the columns before it."""
        places = [index + 1 for index in np.indices(self.axes[0].shape)]
        keys, queries = places[distance], places[query]
        causal = keys <= queries
        offset = int(self.axes[distance].flat[0]) - 1
        expected = [*places[:distance], keys - queries + offset + 1, *places[distance + 1 :]]
        same = all((one == other)[causal].all() for one, other in zip(self.axes, expected, strict=True))
        return offset if same else None


def _is_range(value: ir.Value | None) -> bool:
    """Return whether a value is a `Range`, of another type or shape perhaps."""
    if value is None:
        return False
    source = through(value, lambda node: has_trait(node, Trait.RESHAPE, Trait.IDENTITY))
    return producer_of(source, "Range") is not None
