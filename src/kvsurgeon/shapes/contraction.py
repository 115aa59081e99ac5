"""Products that sum over an axis, in one notation: which axes meet, which are summed, which remain.

Every operator of the kind (`MatMul`, `Gemm`, `Einsum`, their quantised and fused twins) is read as an Einstein sum over
labelled axes, so that shapes, sequence axes and attention are decided once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.shapes import dimension as dim
from kvsurgeon.shapes.dimension import Dimension
from kvsurgeon.shapes.fact import Call, Fact

Labels = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """An Einstein sum over two operands."""

    left: int  # index of the node's input
    right: int
    left_labels: Labels
    right_labels: Labels
    result_labels: Labels

    @property
    def summed(self) -> frozenset[str]:
        """Labels that the result no longer has."""
        return (frozenset(self.left_labels) | frozenset(self.right_labels)) - frozenset(self.result_labels)


def _matrix_labels(rank_left: int, rank_right: int) -> tuple[Labels, Labels, Labels]:
    """Labels of `numpy.matmul`: batch axes are aligned from the right."""
    batch = max(rank_left, rank_right) - 2
    names = tuple(f"b{index}" for index in range(max(batch, 0)))
    left = ("k",) if rank_left == 1 else (*names[len(names) - (rank_left - 2) :], "m", "k")
    right = ("k",) if rank_right == 1 else (*names[len(names) - (rank_right - 2) :], "k", "n")
    result = (*names, *(("m",) if rank_left > 1 else ()), *(("n",) if rank_right > 1 else ()))
    return left, right, result


def _swapped(labels: Labels, swap: int) -> Labels:
    return (*labels[:-2], labels[-1], labels[-2]) if swap and len(labels) > 1 else labels


def _einsum(call: Call) -> Contraction | None:
    equation = call.text("equation").replace(" ", "")
    if len(call.inputs) != 2 or "->" not in equation:
        return None
    operands, result = equation.split("->")
    left, right = operands.split(",")
    rank_left, rank_right = call.fact(0).rank, call.fact(1).rank
    if rank_left is None or rank_right is None:
        return None
    widest = max(rank_left - len(left.replace("...", "")), rank_right - len(right.replace("...", "")))

    def labels(term: str, hidden: int) -> Labels:
        names: list[str] = []
        for part in term.replace("...", ".").split():
            for letter in part:
                names += [f".{index}" for index in range(widest - hidden, widest)] if letter == "." else [letter]
        return tuple(names)

    hidden_left = rank_left - len(left.replace("...", ""))
    hidden_right = rank_right - len(right.replace("...", ""))
    return Contraction(
        left=0,
        right=1,
        left_labels=labels(left, hidden_left),
        right_labels=labels(right, hidden_right),
        result_labels=labels(result, widest),
    )


RIGHT_OPERAND = {"QLinearMatMul": 3, "QGemm": 3}  # elsewhere the second input


def contraction_of(call: Call) -> Contraction | None:
    """Return the product that a node computes, None where a rank is unknown or the node is no product of two."""
    name = call.node.op_type
    if name == "Einsum":
        return _einsum(call)
    right = RIGHT_OPERAND.get(name, 1)
    rank_left, rank_right = call.fact(0).rank, call.fact(right).rank
    if name == "MatMulNBits":
        rank_right = 2
    if not rank_left or not rank_right:
        return None
    labels_left, labels_right, result = _matrix_labels(rank_left, rank_right)
    if name in ("Gemm", "QGemm", "FusedMatMul"):
        labels_left = _swapped(labels_left, call.integer("transA", 0))
        labels_right = _swapped(labels_right, call.integer("transB", 0))
        if call.integer("transBatchA", 0) or call.integer("transBatchB", 0):
            return None
    return Contraction(left=0, right=right, left_labels=labels_left, right_labels=labels_right, result_labels=result)


def contraction(call: Call) -> Fact:
    """The shape of a product."""
    found = contraction_of(call)
    dtype = _result_type(call)
    if found is None:
        return Fact(None, dtype)
    sizes: dict[str, Dimension] = {}
    operands = [(found.left_labels, call.fact(found.left).shape)]
    if call.node.op_type == "MatMulNBits":
        sizes["n"] = call.integer("N", 0)
    else:
        operands.append((found.right_labels, call.fact(found.right).shape))
    for labels, shape in operands:
        for label, size in zip(labels, shape or (), strict=True):
            sizes[label] = dim.broadcast(sizes.get(label, 1), size)
    return Fact(tuple(sizes[label] for label in found.result_labels), dtype)


def convolution(call: Call) -> Fact:
    """The shape of a `Conv` over [batch, channels, positions...]. Source: ONNX, `Conv`."""
    operand, weights = call.fact(0).shape, call.fact(1).shape
    dtype = _result_type(call)
    if operand is None or weights is None:
        return Fact(None, dtype)
    count = len(operand) - 2
    strides, dilations = call.attribute("strides") or [1] * count, call.attribute("dilations") or [1] * count
    pads, padding = call.attribute("pads") or [0] * 2 * count, call.text("auto_pad", "NOTSET")
    sizes: list[Dimension] = [operand[0], weights[0]]
    for place in range(count):
        if padding not in ("NOTSET", "VALID"):
            sizes.append(call.lost())
            continue
        kernel = dim.add(dim.multiply(dilations[place], dim.subtract(weights[place + 2], 1)), 1)
        room = dim.subtract(dim.add(operand[place + 2], pads[place] + pads[place + count]), kernel)
        sizes.append(dim.add(dim.floor_quotient(room, strides[place]), 1))
    return Fact(tuple(sizes), dtype)


def _result_type(call: Call) -> ir.DataType | None:
    name = call.node.op_type
    if name in ("MatMulInteger", "ConvInteger"):
        return ir.DataType.INT32
    if name in ("QLinearMatMul", "QGemm"):
        zero_point = call.given(7 if name == "QLinearMatMul" else 8)
        return zero_point.dtype if zero_point is not None else call.fact(0).dtype
    return call.fact(0).dtype
