"""Products with weights above or below an attention, and their weights after a linear change of features."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.token_data import is_token, token_inputs, upstream_tokens
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import downstream, producers
from kvsurgeon.heads.index_trace import IndexTrace
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import contraction_of, has_trait, operator_of
from kvsurgeon.weights.mapped import mapped_elements
from kvsurgeon.weights.transposed_tensor import TransposedTensor


@dataclass(frozen=True, kw_only=True)
class FeatureChange:
    """New features as linear combinations of old ones: `new[target] = old[source] @ matrix`; others are unchanged.

    Attributes:
        target: Indices of the new features.
        source: Indices of the old ones.
        matrix: `[source, target]`.
    """

    target: np.ndarray
    source: np.ndarray
    matrix: np.ndarray


@dataclass(frozen=True, kw_only=True)
class WeightOperand:
    """Weights or a bias, and their axis of features.

    Attributes:
        node: The node that reads them.
        index: Index of the input.
        axis: The axis of features.
    """

    node: ir.Node
    index: int
    axis: int


@dataclass(frozen=True, kw_only=True)
class WeightProduct:
    """A product of token data with weights, with the biases that are added to it.

    Attributes:
        node: The product.
        features: The token data whose features are the columns of the weights, biases added; or the operand whose
            features are their rows.
        operands: The weights, and the biases if there are any.
    """

    node: ir.Node
    features: ir.Value
    operands: tuple[WeightOperand, ...]


def product_above(trace: IndexTrace, value: ir.Value) -> WeightProduct:
    """Return the one product with weights that a value is computed from, biases included.

    Raises:
        UnsupportedError: There are several or none, or their weights are not stored floating-point numbers.
    """
    nodes = producers(upstream_tokens(trace.flow, value))
    products = [node for node in nodes if has_trait(node, Trait.PROJECTION) and trace.sums_features(node)]
    if len(products) != 1:
        raise _unsupported(value, "one product with weights", f"{len(products)} of them")
    (node,) = products
    weights = _weights(trace.flow, node, columns=True)
    parameters = operator_of(node).column_parameters  # type: ignore[union-attr]
    biases = [WeightOperand(node=node, index=index, axis=-1) for index in parameters if _given(node, index)]
    output = node.outputs[0]
    while (bias := _added_bias(trace.flow, output)) is not None:
        biases.append(bias)
        output = bias.node.outputs[0]
    return WeightProduct(node=node, features=output, operands=(weights, *biases))


def product_below(trace: IndexTrace, value: ir.Value) -> WeightProduct:
    """Return the one product with weights that reads a value, possibly rearranged.

    Raises:
        UnsupportedError: Something else reads it, or the weights are not stored floating-point numbers.
    """
    current = value
    while True:
        readers = _token_readers(trace.flow, current)
        if len(readers) != 1 or current.is_graph_output():
            raise _unsupported(value, "one reader", f"{len(readers)} of `{current.name}`")
        (node,) = readers
        if has_trait(node, Trait.PROJECTION) and trace.sums_features(node):
            break
        if len(node.outputs) != 1:
            raise _unsupported(value, "one reader", f"a {node.op_type}")
        current = node.outputs[0]
    return WeightProduct(node=node, features=current, operands=(_weights(trace.flow, node, columns=False),))


def check_readers(flow: TokenFlow, product: WeightProduct, ends: Collection[ir.Node]) -> None:
    """Check that features of a product are only read by the nodes `ends`, through whatever is in between.

    Raises:
        UnsupportedError: Something else reads them too.
    """

    def is_end(node: ir.Node) -> bool:
        return node in ends or not any(is_token(flow, value) for value in node.outputs)  # such as Shape

    for value in downstream([product.features], stop=is_end):
        if value.is_graph_output():
            raise _unsupported(value, "features that only attention reads", "a graph output")
        product_node = value.producer()
        if value is not product.features and has_trait(product_node, Trait.PROJECTION):
            raise _unsupported(value, "features that only attention reads", f"a {product_node.op_type}")  # type: ignore[union-attr]


def change_features(editor: Editor, product: WeightProduct, changes: Sequence[FeatureChange]) -> None:
    """Give a product the weights, and biases, that compute changed features."""
    for operand in product.operands:
        stored = stored_weights(operand)
        assert stored is not None
        shape = ir.Shape(stored.shape.numpy())

        def changed(stored: ir.TensorProtocol = stored, axis: int = operand.axis) -> ir.TensorProtocol:
            return ir.Tensor(_changed(np.asarray(mapped_elements(stored)), axis, changes))

        name = editor.unique_name(f"{stored.name or 'weights'}.calibrated")
        tensor = ir.LazyTensor(changed, dtype=stored.dtype, shape=shape, name=name)
        editor.replace_input(operand.node, operand.index, editor.initializer(tensor))


def combined(editor: Editor, operand: WeightOperand, blocks: Sequence[tuple[np.ndarray, np.ndarray]]) -> ir.LazyTensor:
    """Return weights or a bias with other features: `old[indices] @ matrix` for each block of indices and a matrix.

    Features of all blocks follow each other.
    """
    stored = stored_weights(operand)
    assert stored is not None
    shape = list(stored.shape.numpy())
    shape[operand.axis] = sum(matrix.shape[1] for _, matrix in blocks)

    def computed() -> ir.TensorProtocol:
        old = np.moveaxis(np.asarray(mapped_elements(stored)), operand.axis, -1)
        new = np.concatenate([old[..., source].astype(np.float64) @ matrix for source, matrix in blocks], axis=-1)
        return ir.Tensor(np.ascontiguousarray(np.moveaxis(new, -1, operand.axis).astype(old.dtype)))

    name = editor.unique_name(f"{stored.name or 'weights'}.latent")
    return ir.LazyTensor(computed, dtype=stored.dtype, shape=ir.Shape(shape), name=name)


def stored_weights(operand: WeightOperand) -> ir.TensorProtocol | None:
    """Return the stored tensor of weights, transposed if the graph transposes it; None if they are computed."""
    value = operand.node.inputs[operand.index]
    tensor = constant_tensor(value)
    node = None if value is None else value.producer()
    if tensor is None and node is not None and node.op_type == "Transpose":
        matrix = constant_tensor(node.inputs[0])
        if matrix is not None and len(matrix.shape) == 2 and matrix.dtype.bitwidth >= 8:
            tensor = TransposedTensor(matrix, name=f"{matrix.name}.transposed")
    return tensor if tensor is not None and tensor.dtype.is_floating_point() else None


def _changed(array: np.ndarray, axis: int, changes: Sequence[FeatureChange]) -> np.ndarray:
    old = np.moveaxis(array, axis, -1)
    new = old.copy()
    for change in changes:
        new[..., change.target] = (old[..., change.source].astype(np.float64) @ change.matrix).astype(array.dtype)
    return np.ascontiguousarray(np.moveaxis(new, -1, axis))


def _weights(flow: TokenFlow, node: ir.Node, *, columns: bool) -> WeightOperand:
    """Return the weights of a product, with the axis of their columns or of their rows."""
    found = contraction_of(flow.shapes.call(node))
    result = node.outputs[0]
    if found is None:
        raise _unsupported(result, "a product of token data with weights", node.op_type)
    index, labels = found.right, found.right_labels
    if is_token(flow, node.inputs[index]):
        index, labels = found.left, found.left_labels
    wanted = [label for label in labels if (label in found.result_labels) is columns]
    operand = WeightOperand(node=node, index=index, axis=labels.index(wanted[0]) if len(wanted) == 1 else 0)
    if len(wanted) != 1 or stored_weights(operand) is None:
        raise UnsupportedError(
            "cannot change the features of these weights", code=Code.CANNOT_AVERAGE, at=result.name,
            expected="stored floating-point weights with one axis of features", found=node.op_type,
            hint="run the pass before weights are quantized, or merge or share heads by method=first",
        )  # fmt: skip
    return operand


def _added_bias(flow: TokenFlow, value: ir.Value) -> WeightOperand | None:
    """Return the bias that the only reader of a value adds to it; None if there is none."""
    readers = _token_readers(flow, value)
    if len(readers) != 1 or readers[0].op_type != "Add" or len(token_inputs(flow, readers[0])) != 1:
        return None
    (node,) = readers
    index = 1 if node.inputs[0] is value else 0
    operand = WeightOperand(node=node, index=index, axis=-1)
    tensor = stored_weights(operand)
    width = (flow.shapes[value].shape or (None,))[-1]
    return operand if tensor is not None and len(tensor.shape) and tensor.shape[-1] == width else None


def _token_readers(flow: TokenFlow, value: ir.Value) -> list[ir.Node]:
    nodes = dict.fromkeys(node for node, _ in value.uses() if node in flow.order)
    return [node for node in nodes if any(is_token(flow, one) for one in node.outputs)]


def _given(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def _unsupported(value: ir.Value, expected: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        "cannot find the weights of these features", code=Code.UNTRACEABLE_HEADS, at=value.name, expected=expected,
        found=found,
    )  # fmt: skip
