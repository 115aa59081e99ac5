"""Regions of a fixed length that compute a tensor from tensors which they divide into chunks of tokens.

Chunked forms of linear attention sum up the logarithms of decays along each chunk, so a region is found from there. The
tensors that it depends on are those that are padded to whole chunks, or else divided into them. Of these it computes
sums, products and exponentials only, so it is an analytic function: two of these are the same everywhere if they are
the same at random points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.query import downstream, is_operator
from kvsurgeon.ops.content import is_zero
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic.fact import Fact

_SAME_ELEMENTS = (Trait.RESHAPE, Trait.TRANSPOSE, Trait.IDENTITY)
_MOVES = (*_SAME_ELEMENTS, Trait.REPEAT, Trait.SELECT, Trait.LOOKUP, Trait.MOVE)
NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOATS = (ir.DataType.FLOAT, *NARROW)  # of tensors that are computed in float32
_MAX_NODES = 20_000
_MAX_ELEMENTS = 1 << 22  # of a constant in a region: masks and tables, not weights


@dataclass(frozen=True, kw_only=True)
class Source:
    """A tensor that is divided into chunks.

    Attributes:
        value: The tensor.
        axis: Its sequence axis.
        sizes: Its sizes without that axis.
        dtype: Its type.
    """

    value: ir.Value
    axis: int
    sizes: tuple[int, ...]
    dtype: ir.DataType


@dataclass(frozen=True, kw_only=True)
class Region:
    """Nodes that compute a tensor from tensors that are divided into chunks."""

    result: ir.Value
    axis: int
    shape: tuple[int, ...]
    dtype: ir.DataType
    sources: tuple[Source, ...]
    nodes: tuple[ir.Node, ...]
    constants: Mapping[ir.Value, ir.TensorProtocol]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.shape[self.axis]

    @property
    def row(self) -> tuple[int, ...]:
        """Sizes of the result of one token."""
        return _without(self.shape, self.axis)


def may_be_chunked(graph: ir.Graph) -> bool:
    """Return whether a graph has sums of decays, and a fixed length."""
    fixed = all(isinstance(size, int) for value in graph.inputs for size in value.shape or ())
    return fixed and any(is_operator(node, "CumSum") and node.outputs[0].dtype in (None, *FLOATS) for node in graph)


def find_regions(shapes: Shapes, node: ir.Node) -> Iterator[tuple[Region, ir.Value]]:
    """Yield the regions that the sums of decays may belong to, smallest first, each with the decays."""
    made = _first_of_chunks(shapes, node)
    if made is None:
        return
    divided, decay = made
    for value in downstream(node.outputs):
        axis = _joined_axis(shapes, value, divided)
        region = None if axis is None else _Walk(shapes, divided).region(value, axis)
        if region is not None and len(region.sources) in (4, 5):
            yield region, decay


@dataclass(frozen=True)
class _Chunks:
    """Division of a tensor into chunks: its tokens, these with rows that fill the last chunk, and those of a chunk."""

    tokens: int
    padded: int
    size: int

    def axis(self, shapes: Shapes, node: ir.Node | None) -> int | None:
        """Return the sequence axis of the input of a node that divides it in this way; None if it does not."""
        found = _divided(shapes, node, self.size)
        return found[0] if found is not None and found[1] == self else None


def _divided(shapes: Shapes, node: ir.Node | None, size: int) -> tuple[int, _Chunks] | None:
    """Return the axis that a node pads at its end, or divides into chunks of a size, with its sizes; else None."""
    if not is_operator(node, "Pad", "Reshape"):
        return None
    assert node is not None
    assert node.inputs[0] is not None
    before, after = _static(shapes[node.inputs[0]]), _static(shapes[node.outputs[0]])
    if before is None or after is None:
        return None
    if node.op_type == "Pad":
        pads = shapes.call(node).numbers(1)
        axes = [axis for axis, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
        if pads is None or len(axes) != 1 or any(pads[: len(before)]):
            return None
        return axes[0], _Chunks(before[axes[0]], after[axes[0]], size)
    for axis, tokens in enumerate(before):
        is_moved = after[:axis] == before[:axis] and after[axis + 2 :] in (before[axis + 1 :], (*before[axis + 1 :], 1))
        if is_moved and after[axis : axis + 2] == (tokens // size, size) and tokens % size == 0:
            return axis, _Chunks(tokens, tokens, size)
    return None


def _first_of_chunks(shapes: Shapes, sums: ir.Node) -> tuple[_Chunks, ir.Value] | None:
    """Return how the numbers that are summed up are divided into chunks, and what is: before it is padded, if it is."""
    axis, shape = shapes.call(sums).numbers(1), _static(shapes[sums.outputs[0]])
    if axis is None or len(axis) != 1 or sums.inputs[0] is None or not shape or not -len(shape) <= axis[0] < len(shape):
        return None
    size, node, found = max(1, shape[axis[0]]), sums.inputs[0].producer(), None
    while node is not None and _keeps_elements(node) and node.inputs[0] is not None:
        divided = _divided(shapes, node, size)
        if divided is not None and (found is None or divided[1].padded == found[0].padded):
            found = divided[1], node.inputs[0]
        if found is not None and node.op_type == "Pad":
            break
        node = node.inputs[0].producer()
    return found


def _joined_axis(shapes: Shapes, value: ir.Value, chunks: _Chunks) -> int | None:
    """Return the sequence axis of a value that joins chunks, without the tokens that fill the last one."""
    node, shape = value.producer(), _static(shapes[value])
    operator = "Slice" if chunks.padded != chunks.tokens else "Reshape"
    if shape is None or not is_operator(node, operator) or node is None or node.inputs[0] is None:
        return None
    before = _static(shapes[node.inputs[0]]) or ()
    if operator == "Slice":
        cut = [axis for axis, (one, other) in enumerate(zip(before, shape, strict=True)) if one != other]
        is_joined = len(cut) == 1 and (before[cut[0]], shape[cut[0]]) == (chunks.padded, chunks.tokens)
        return cut[0] if is_joined else None
    axes = [axis for axis, size in enumerate(shape) if size == chunks.tokens]
    return next((axis for axis in axes if len(before) == len(shape) + 1 and before[:axis] == shape[:axis]), None)


class _Walk:
    """Walks from a result to the tensors that are divided into chunks."""

    def __init__(self, shapes: Shapes, chunks: _Chunks) -> None:
        self.shapes, self.chunks = shapes, chunks
        self.sources: dict[ir.Value, int] = {}
        self.constants: dict[ir.Value, ir.TensorProtocol] = {}
        self._zeros: dict[ir.Value, bool] = {}
        self.nodes: dict[ir.Node, bool] = {}  # with whether it depends on a source

    def region(self, result: ir.Value, axis: int) -> Region | None:
        """Return the region of a result; None if it reads something else, or computes what is not analytic."""
        shape, dtype = _static(self.shapes[result]), self.shapes[result].dtype
        if shape is None or dtype not in FLOATS or not self._reaches_sources(result):
            return None
        order = {node: number for number, node in enumerate(result.producer().graph or ())}  # type: ignore[union-attr]
        sources = []
        for value, place in self.sources.items():
            sizes, source_dtype = _static(self.shapes[value]), self.shapes[value].dtype
            if sizes is None or source_dtype not in FLOATS:
                return None
            sources.append(Source(value=value, axis=place, sizes=_without(sizes, place), dtype=source_dtype))
        return Region(
            result=result, axis=axis, shape=shape, dtype=dtype, sources=tuple(sources), constants=self.constants,
            nodes=tuple(sorted(self.nodes, key=lambda node: order[node])),
        )  # fmt: skip

    def _reaches_sources(self, result: ir.Value) -> bool:
        pending = [result]
        while pending:
            value = pending.pop()
            node = value.producer()
            if self._is_constant(value) or node in self.nodes:
                continue
            if node is None or len(self.nodes) == _MAX_NODES or not _is_standard(node):
                return False
            self.nodes[node] = True
            axis = self.chunks.axis(self.shapes, node)
            for index, source in enumerate(node.inputs):
                if source is None:
                    continue
                if axis is not None and index == 0 and not self._is_constant(source):
                    self.sources[source] = axis
                else:
                    pending.append(source)
        return self._is_analytic()

    def _is_constant(self, value: ir.Value) -> bool:
        """Return whether the numbers of a value are known."""
        if value in self.constants:
            return True
        fact, tensor = self.shapes[value], constant_tensor(value)
        if tensor is None and fact.value is not None and fact.dtype is not None:
            tensor = _tensor(fact)
        if tensor is None and fact.dtype in FLOATS and (sizes := _static(fact)) and self._is_zero(value):
            tensor = ir.Tensor(np.zeros(sizes, fact.dtype.numpy()))
        if tensor is None or tensor.size > _MAX_ELEMENTS:
            return False
        self.constants[value] = tensor
        return True

    def _is_zero(self, value: ir.Value) -> bool:
        """Return whether a value is a product with zeros, as with the state before a text in a quantized model."""
        node = value.producer()
        if node is None or value in self._zeros:
            return self._zeros.get(value, False) or is_zero(value)
        if is_operator(node, "Cast", "Identity", "Mul", "MatMul"):
            found = any(one is not None and self._is_zero(one) for one in node.inputs)
        else:  # its inputs are two tensors and their zero points
            found = is_operator(node, "MatMulInteger") and all(map(is_zero, node.inputs[1::2]))
        self._zeros[value] = found or is_zero(value)
        return self._zeros[value]

    def _is_analytic(self) -> bool:
        """Return whether all nodes that depend on sources compute sums, products and exponentials, or move elements."""
        varying = set(self.sources)
        changed = True
        while changed:
            nodes = [node for node in self.nodes if any(value in varying for value in node.inputs)]
            fresh = {value for node in nodes for value in node.outputs} - varying
            varying |= fresh
            changed = bool(fresh)
        return all(_is_analytic(node, varying) for node in self.nodes if any(one in varying for one in node.outputs))


def _is_analytic(node: ir.Node, varying: set[ir.Value]) -> bool:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes.get_int("to", 0)).is_floating_point()
    if has_trait(node, Trait.SCATTER) and node.attributes.get_string("reduction", "none") != "none":
        return False
    return has_trait(node, Trait.ANALYTIC, *_MOVES) and not (node.op_type == "Where" and node.inputs[0] in varying)


def _keeps_elements(node: ir.Node) -> bool:
    """Return whether a node gives the elements of its first input another shape, or adds others around them."""
    return has_trait(node, *_SAME_ELEMENTS) or is_operator(node, "Pad")


def _is_standard(node: ir.Node) -> bool:
    has_graph = any(one.type is ir.AttributeType.GRAPH for one in node.attributes.values())
    return node.domain in ("", "ai.onnx") and not has_graph


def _static(fact: Fact) -> tuple[int, ...] | None:
    """Return the sizes of a value if all are numbers."""
    sizes = tuple(size for size in fact.shape or () if isinstance(size, int))
    return sizes if fact.shape is not None and len(sizes) == len(fact.shape) else None


def _tensor(fact: Fact) -> ir.TensorProtocol | None:
    assert fact.value is not None
    assert fact.dtype is not None
    try:
        return ir.Tensor(fact.value.astype(fact.dtype.numpy()))
    except TypeError:  # symbolic
        return None


def _without(sizes: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*sizes[:axis], *sizes[axis + 1 :])
