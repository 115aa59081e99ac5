"""Products with weights: other heads in the result are other columns of what is stored, quantized or not."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from kvsurgeon.heads.node_edit import NodeEdit, NodeInputs
from kvsurgeon.ops.table import contraction_of
from kvsurgeon.symbolic import dimension as dim


def product(change: NodeEdit, column_parameters: tuple[int, ...]) -> NodeInputs:
    """`MatMul`, `Gemm`, `Einsum` and their kin: each operand that has the heads' label is given the new heads."""
    found = contraction_of(change.call)
    if found is None:
        raise change.refusal("a product of more than two tensors, or of tensors of unknown rank")
    if change.is_token(found.left) and change.is_token(found.right):
        raise change.refusal("heads are made by a product of tokens with tokens")
    label = found.result_labels[change.axis.axis]
    inputs = change.inputs
    for index, labels in ((found.left, found.left_labels), (found.right, found.right_labels)):
        if label in labels and (change.shape(index)[labels.index(label)] != 1 or change.axis.size == 1):
            inputs[index] = change.propagated(index, change.axis.at(labels.index(label)))
    if change.axis.axis == len(change.result) - 1:
        _give_parameters(change, inputs, column_parameters)
    return NodeInputs(inputs=inputs)


def _give_parameters(change: NodeEdit, inputs: list[ir.Value | None], column_parameters: tuple[int, ...]) -> None:
    for index in column_parameters:
        if change.given(index) and change.shape(index) and change.shape(index)[-1] != 1:
            inputs[index] = change.propagated(index, change.axis.at(len(change.shape(index)) - 1))


def packed_product(change: NodeEdit) -> NodeInputs:
    """`MatMulNBits`: weights, scales and zero points lie row by row, each row a column of the result."""
    inputs, rows = change.inputs, change.call.integer("N", 0)
    for index in (1, 2, 3, 5):
        if change.given(index):
            each = dim.exact_quotient(change.shape(index)[0], rows)
            if each is None:
                raise change.refusal("its parameters do not lie row by row")
            axis = replace(change.axis, axis=0, inner=dim.multiply(change.axis.inner, each))
            inputs[index] = change.propagated(index, axis)
    return NodeInputs(inputs=inputs, attributes={"N": change.axis.sized(change.selection.size)})
