"""Products that sum over an axis, in one notation: which axes meet, which are summed, which remain.

Every operator of the kind (`MatMul`, `Gemm`, `Einsum`, their quantised and fused twins) is read as an Einstein sum over
labelled axes, so that shapes, sequence axes and attention are decided once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import Fact, OperatorCall

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


def _rotated(labels: Labels, rotate: int) -> Labels:
    """The rows before the batch, as `transBatchA` and `transBatchB` ask. Source: onnxruntime, `FusedMatMul`."""
    return (labels[-2], *labels[:-2], labels[-1]) if rotate and len(labels) > 2 else labels


def _einsum(call: OperatorCall) -> Contraction | None:
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


# fmt: off
PACKED = frozenset({"MatMulNBits", "MatMulBnb4"})  # products with weights in a form of their own, N columns wide
PRODUCTS = PACKED | {
    "MatMul", "Gemm", "Einsum", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul",
    "QGemm", "FusedMatMul", "TransposeMatMul", "FusedGemm",
}
# fmt: on
RIGHT_OPERAND = {"QLinearMatMul": 3, "QGemm": 3}  # elsewhere the second input
_TRANSPOSING = frozenset({"Gemm", "QGemm", "FusedGemm", "FusedMatMul", "TransposeMatMul"})
_ZERO_POINTS = {"MatMulInteger": (2, 3), "QLinearMatMul": (2, 5), "QGemm": (2, 5), "MatMulIntegerToFloat": (4, 5)}


def zero_points_of(node: ir.Node) -> tuple[int, int] | None:
    """Return the inputs that say which numbers mean 0 in a product's left and right operand; None of a float one."""
    return _ZERO_POINTS.get(node.op_type)


def contraction_of(call: OperatorCall) -> Contraction | None:
    """Return the product that a node computes, None where a rank is unknown or the node is no product of two."""
    name = call.node.op_type
    if name == "Einsum":
        return _einsum(call)
    right = RIGHT_OPERAND.get(name, 1)
    rank_left, rank_right = call.fact(0).rank, call.fact(right).rank
    if name in PACKED:
        rank_right = 2
    if not rank_left or not rank_right:
        return None
    labels_left, labels_right, result = _matrix_labels(rank_left, rank_right)
    if name in _TRANSPOSING:
        labels_left = _rotated(_swapped(labels_left, call.integer("transA", 0)), call.integer("transBatchA", 0))
        labels_right = _rotated(_swapped(labels_right, call.integer("transB", 0)), call.integer("transBatchB", 0))
    return Contraction(left=0, right=right, left_labels=labels_left, right_labels=labels_right, result_labels=result)


def contraction(call: OperatorCall) -> Fact:
    """The shape of a product."""
    found = contraction_of(call)
    dtype = _result_type(call)
    if found is None:
        return Fact(None, dtype)
    sizes: dict[str, Dimension] = {}
    operands = [(found.left_labels, call.fact(found.left).shape)]
    if call.node.op_type in PACKED:
        sizes["n"] = call.integer("N", 0)
    else:
        operands.append((found.right_labels, call.fact(found.right).shape))
    for labels, shape in operands:
        for label, size in zip(labels, shape or (), strict=True):
            sizes[label] = dim.broadcast(sizes.get(label, 1), size)
    return Fact(tuple(sizes[label] for label in found.result_labels), dtype)


def convolution(call: OperatorCall) -> Fact:
    """The shape of a `Conv` over [batch, channels, positions...]. Source: ONNX, `Conv`."""
    weights = call.fact(3 if call.node.op_type == "QLinearConv" else 1).shape
    operand, dtype = call.fact(0).shape, _result_type(call)
    if operand is None or weights is None:
        return Fact(None, dtype)
    return Fact((operand[0], weights[0], *_windows(call, operand[2:], weights[2:])), dtype)


def pool(call: OperatorCall) -> list[Fact]:
    """The shape of an `AveragePool`, a `MaxPool` over [batch, channels, positions...]. Source: ONNX, `AveragePool`."""
    operand, sizes = call.fact(0).shape, call.attribute("kernel_shape")
    if operand is None or sizes is None:
        return [Fact(None, call.fact(0).dtype)] * len(call.node.outputs)
    places = _windows(call, operand[2:], tuple(sizes))
    if call.integer("ceil_mode", 0) or call.integer("channels_last", 0):
        places = tuple(call.lost() for _ in places)
    return [Fact((*operand[:2], *places), call.fact(0).dtype), Fact((*operand[:2], *places), ir.DataType.INT64)]


def _windows(call: OperatorCall, sizes: tuple[Dimension, ...], kernel: tuple[Dimension, ...]) -> tuple[Dimension, ...]:
    """How often a window fits along each of several axes."""
    count = len(sizes)
    strides, dilations = call.attribute("strides") or [1] * count, call.attribute("dilations") or [1] * count
    pads = call.attribute("pads") or [0] * 2 * count
    if call.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return tuple(call.lost() for _ in sizes)
    found: list[Dimension] = []
    for place, size in enumerate(sizes):
        width = dim.add(dim.multiply(dilations[place], dim.subtract(kernel[place], 1)), 1)
        room = dim.subtract(dim.add(size, pads[place] + pads[place + count]), width)
        found.append(dim.add(dim.floor_quotient(room, strides[place]), 1))
    return tuple(found)


def _result_type(call: OperatorCall) -> ir.DataType | None:
    name = call.node.op_type
    if name in ("MatMulInteger", "ConvInteger"):
        return ir.DataType.INT32
    if name == "MatMulIntegerToFloat":
        return call.fact(2).dtype
    if name in ("QLinearMatMul", "QGemm"):
        zero_point = call.given(7 if name == "QLinearMatMul" else 8)
        if name == "QGemm" and zero_point is None:
            return ir.DataType.FLOAT
        return zero_point.dtype if zero_point is not None else call.fact(0).dtype
    return call.fact(0).dtype
