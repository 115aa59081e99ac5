"""Compute several products with one input as one product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import is_operator, uses_of
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.weights.computed_tensor import ComputedTensor, TensorSlice

_QUERY_KEY_VALUE = (0, 1, 2)  # inputs of GroupQueryAttention


@dataclass(frozen=True, kw_only=True)
class PackProjections:
    """Join the weights of products that read the same tensor, such as those of queries, keys and values.

    Before: `MatMul(x, Wq)`, `MatMul(x, Wk)`, `MatMul(x, Wv)`. After: `Split(MatMul(x, [Wq, Wk, Wv]))`, or the product
    alone if `GroupQueryAttention` reads all three. Biases and the blocks of `MatMulNBits` are joined too. The joined
    weights are computed when the model is saved.

    Not handled: weights that several products read, or that are computed from others.
    """

    name: ClassVar[str] = "pack-projections"

    def apply(self, subject: Subject) -> Outcome:
        """Join products of `subject.model`."""
        graph, groups = subject.model.graph, defaultdict[Hashable, list[_Product]](list)
        for node in graph:
            product = _product(node)
            if product is not None:
                groups[product.key].append(product)
        found = [group for group in groups.values() if len(group) > 1]
        if not found:
            return Unchanged(reason="no two products with weights read the same tensor")
        editor = Editor(subject.model)
        for group in found:
            editor.before = group[0].node
            attention = _attention(group)
            _pack(editor, sorted(group, key=_place) if attention is not None else group, attention)
        editor.before = None
        editor.finish()
        return Changed(edits=editor.edits)


@dataclass(frozen=True, kw_only=True)
class _Product:
    """A product with weights that no other node reads.

    Attributes:
        node: The product.
        axis: Axis of the weights that holds the columns; 0 for all tensors of `MatMulNBits`.
        columns: Number of columns.
        bias: The node that adds a constant to each column; None if there is none.
    """

    node: ir.Node
    axis: int
    columns: int
    bias: ir.Node | None

    @property
    def weights(self) -> tuple[ir.Value, ...]:
        """The weights, with scales and zero points if they are quantized."""
        return tuple(value for value in self.node.inputs[1:] if value is not None)

    @property
    def result(self) -> ir.Value:
        """The product with its bias."""
        return (self.bias or self.node).outputs[0]

    @property
    def key(self) -> Hashable:
        """Properties that joined products share."""
        attributes = ((name, attribute.value) for name, attribute in self.node.attributes.items() if name != "N")
        dtypes = tuple(value.dtype for value in self.weights)
        places = tuple(value is not None for value in self.node.inputs)
        return self.node.inputs[0], self.node.op_type, repr(sorted(attributes)), dtypes, places, self.bias is not None


def _product(node: ir.Node) -> _Product | None:
    """Return a node as a product whose weights can be joined; None for other nodes."""
    is_quantized = (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits")
    if not (is_quantized or is_operator(node, "MatMul")) or node.inputs[0] is None:
        return None
    weights = [value for value in node.inputs[1:] if value is not None]
    tensors = [constant_tensor(value) for value in weights]
    if any(tensor is None or len(uses_of(value)) > 1 for value, tensor in zip(weights, tensors, strict=True)):
        return None
    if any(value.is_graph_output() or value.is_graph_input() or value.producer() for value in weights):
        return None
    shape = weights[0].shape
    if shape is None or (len(shape) != 2 and not is_quantized) or (is_quantized and len(node.inputs) > 4):
        return None
    axis = 0 if is_quantized else 1
    columns = node.attributes.get_int("N", 0) if is_quantized else shape[1]
    if not isinstance(columns, int) or not columns or node.outputs[0].is_graph_output():
        return None
    return _Product(node=node, axis=axis, columns=columns, bias=_bias(node.outputs[0], columns))


def _bias(value: ir.Value, columns: int) -> ir.Node | None:
    """Return the only reader of a product if it adds a constant to each column, which no other node reads."""
    users = uses_of(value)
    if len(users) != 1 or not is_operator(users[0][0], "Add"):
        return None
    node, index = users[0]
    other = node.inputs[1 - index]
    tensor = constant_tensor(other)
    if other is None or tensor is None or len(uses_of(other)) > 1 or other.producer() is not None:
        return None
    return node if tuple(tensor.shape.numpy()) == (columns,) and not node.outputs[0].is_graph_output() else None


def _pack(editor: Editor, group: Sequence[_Product], attention: ir.Node | None) -> None:
    """Replace products by one, which an attention operator reads as a whole if there is one."""
    first = group[0]
    weights = [
        _joined(editor, [product.weights[place] for product in group], first, [product.columns for product in group])
        for place in range(len(first.weights))
    ]
    given = iter(weights)
    inputs = [first.node.inputs[0], *(None if value is None else next(given) for value in first.node.inputs[1:])]
    attributes = {name: attribute.value for name, attribute in first.node.attributes.items()}
    if "N" in attributes:
        attributes["N"] = sum(product.columns for product in group)
    output = ir.Value(name=editor.unique_name(f"{first.node.outputs[0].name}.packed"), type=first.node.outputs[0].type)
    editor.operator(first.node.domain, first.node.op_type, inputs, attributes, [output], first.node)
    if first.bias is not None:
        biases = [_constant_input(product) for product in group]
        bias = _concatenated(editor, biases, axis=0, view=(-1,), shape=None)
        output = editor.node("Add", [output, bias], name=f"{output.name}.biased", dtype=output.dtype)
    if attention is not None:
        for place, value in zip(_QUERY_KEY_VALUE, (output, None, None), strict=True):
            editor.replace_input(attention, place, value)
        return
    sizes = [product.columns for product in group]
    for product, part in zip(group, editor.split(output, sizes, -1, name=f"{output.name}.parts"), strict=True):
        editor.replace(product.result, part)


def _constant_input(product: _Product) -> ir.Value:
    assert product.bias is not None
    found = next(value for value in product.bias.inputs if value is not None and value is not product.node.outputs[0])
    return found


def _joined(editor: Editor, values: Sequence[ir.Value], first: _Product, columns: Sequence[int]) -> ir.Value:
    """Return the joined weights of products, or their joined scales or zero points."""
    shape = tuple(size for size in values[0].shape or () if isinstance(size, int))
    if first.axis:
        return _concatenated(editor, values, axis=1, view=(shape[0], -1), shape=None)
    total = sum(columns)
    row = int(np.prod(shape)) // columns[0]  # elements of one column
    new = (total, *shape[1:]) if len(shape) > 1 else (total * row,)
    return _concatenated(editor, values, axis=0, view=(-1, row), shape=new)


def _concatenated(
    editor: Editor, values: Sequence[ir.Value], *, axis: int, view: tuple[int, ...], shape: tuple[int, ...] | None
) -> ir.Value:
    """Return an initializer of several constants along an axis of a view of them."""
    tensors = [tensor for value in values if (tensor := constant_tensor(value)) is not None]
    rest = -int(np.prod(view))  # elements along the other axes
    blocks = [[TensorSlice(tensor=tensor, indices=np.arange(tensor.size // rest))] for tensor in tensors]
    name = editor.unique_name(f"{values[0].name}.packed")
    return editor.initializer(ComputedTensor(blocks, axis=axis, name=name, view=view, shape=shape))


def _attention(group: Sequence[_Product]) -> ir.Node | None:
    """Return the `GroupQueryAttention` that reads the products as queries, keys and values, and nothing else does."""
    readers = [use for product in group for use in uses_of(product.result)]
    node, places = readers[0][0] if readers else None, sorted(index for _, index in readers)
    if node is None or any(other is not node for other, _ in readers) or tuple(places) != _QUERY_KEY_VALUE:
        return None
    return node if (node.domain, node.op_type) == ("com.microsoft", "GroupQueryAttention") else None


def _place(product: _Product) -> int:
    """Return which input of its only reader a product is."""
    return uses_of(product.result)[0][1]
