"""Products that sum over an axis, in one notation: which axes meet, which are summed, which remain.

Every operator of the kind (`MatMul`, `Gemm`, `Einsum`, their quantized and fused twins) is read as an Einstein sum over
labeled axes, so that shapes, sequence axes and attention are decided once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir

from kvsurgeon.ops.operator import (
    AxisLinks,
    Label,
    Labels,
    Operator,
    Trait,
    UntraceableAxesError,
    entries,
    identity_links,
    kept,
    parameters,
    rank_of,
)
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import Fact, OperatorCall

Notation = Callable[["OperatorCall"], "Contraction | None"]
ProductLabels = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """An Einstein sum over two operands."""

    left: int  # index of the node's input
    right: int
    left_labels: ProductLabels
    right_labels: ProductLabels
    result_labels: ProductLabels

    @property
    def summed(self) -> frozenset[str]:
        """ProductLabels that the result no longer has."""
        return (frozenset(self.left_labels) | frozenset(self.right_labels)) - frozenset(self.result_labels)


def _matrix_labels(rank_left: int, rank_right: int) -> tuple[ProductLabels, ProductLabels, ProductLabels]:
    """ProductLabels of `numpy.matmul`: batch axes are aligned from the right."""
    batch = max(rank_left, rank_right) - 2
    names = tuple(f"b{index}" for index in range(max(batch, 0)))
    left = ("k",) if rank_left == 1 else (*names[len(names) - (rank_left - 2) :], "m", "k")
    right = ("k",) if rank_right == 1 else (*names[len(names) - (rank_right - 2) :], "k", "n")
    result = (*names, *(("m",) if rank_left > 1 else ()), *(("n",) if rank_right > 1 else ()))
    return left, right, result


def _swapped(labels: ProductLabels, swap: int) -> ProductLabels:
    return (*labels[:-2], labels[-1], labels[-2]) if swap and len(labels) > 1 else labels


def _rotated(labels: ProductLabels, rotate: int) -> ProductLabels:
    """The rows before the batch, as `transBatchA` and `transBatchB` ask. Source: onnxruntime, `FusedMatMul`."""
    return (labels[-2], *labels[:-2], labels[-1]) if rotate and len(labels) > 2 else labels


def einsum_notation(call: OperatorCall) -> Contraction | None:
    """`Einsum` of two tensors; None of one, of more, or if a rank is unknown."""
    equation = call.text("equation").replace(" ", "")
    if len(call.inputs) != 2 or "->" not in equation:
        return None
    operands, result = equation.split("->")
    left, right = operands.split(",")
    rank_left, rank_right = call.fact(0).rank, call.fact(1).rank
    if rank_left is None or rank_right is None:
        return None
    widest = max(rank_left - len(left.replace("...", "")), rank_right - len(right.replace("...", "")))

    def labels(term: str, hidden: int) -> ProductLabels:
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


def matrix_notation(call: OperatorCall, *, right: int = 1, transposable: bool = False) -> Contraction | None:
    """`MatMul` and its kind as a sum over labeled axes; None if a rank is unknown."""
    rank_left, rank_right = call.fact(0).rank, call.fact(right).rank
    if not rank_left or not rank_right:
        return None
    left_labels, right_labels, result = _matrix_labels(rank_left, rank_right)
    if transposable:
        left_labels = _rotated(_swapped(left_labels, call.integer("transA", 0)), call.integer("transBatchA", 0))
        right_labels = _rotated(_swapped(right_labels, call.integer("transB", 0)), call.integer("transBatchB", 0))
    return Contraction(left=0, right=right, left_labels=left_labels, right_labels=right_labels, result_labels=result)


def packed_notation(call: OperatorCall) -> Contraction | None:
    """`MatMulNBits` and its kind: weights in packed blocks stand for a matrix."""
    rank = call.fact(0).rank
    if not rank:
        return None
    left, right, result = _matrix_labels(rank, 2)
    return Contraction(left=0, right=1, left_labels=left, right_labels=right, result_labels=result)


def contraction(call: OperatorCall, *, notation: Notation) -> Fact:
    """The shape of a product."""
    found = notation(call)
    dtype = _result_type(call)
    if found is None:
        return Fact(None, dtype)
    sizes: dict[str, Dimension] = {}
    operands = [(found.left_labels, call.fact(found.left).shape)]
    if notation is packed_notation:
        sizes["n"] = call.integer("N", 0)
    else:
        operands.append((found.right_labels, call.fact(found.right).shape))
    for labels, shape in operands:
        for label, size in zip(labels, shape or (), strict=True):
            sizes[label] = dim.broadcast(sizes.get(label, 1), size)
    return Fact(tuple(sizes[label] for label in found.result_labels), dtype)


def product_links(
    call: OperatorCall, *, notation: Notation, bias: int | None = None, dynamic: bool = False
) -> AxisLinks:
    """The axes of a product are the labels of its notation; a bias is aligned with the result from the right."""
    found = notation(call)
    if found is None:
        raise UntraceableAxesError("a product of more than two tensors, or of tensors of unknown rank")
    inputs: list[Labels | None] = [None] * len(call.inputs)
    inputs[found.left] = found.left_labels
    if notation is not packed_notation:
        inputs[found.right] = found.right_labels
    if bias is not None and call.given(bias):
        inputs[bias] = found.result_labels[len(found.result_labels) - rank_of(call, bias) :]
    return AxisLinks(inputs=tuple(inputs), outputs=(found.result_labels,), summed=found.summed, dynamic_range=dynamic)


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
        places = tuple(call.unknown() for _ in places)
    return [Fact((*operand[:2], *places), call.fact(0).dtype), Fact((*operand[:2], *places), ir.DataType.INT64)]


def _windows(call: OperatorCall, sizes: tuple[Dimension, ...], kernel: tuple[Dimension, ...]) -> tuple[Dimension, ...]:
    """The number of positions of a window along each of several axes."""
    count = len(sizes)
    strides, dilations = call.attribute("strides") or [1] * count, call.attribute("dilations") or [1] * count
    pads = call.attribute("pads") or [0] * 2 * count
    if _is_padded_to_size(call):
        return tuple(dim.floor_quotient(dim.add(size, one - 1), one) for size, one in zip(sizes, strides, strict=True))
    found: list[Dimension] = []
    for place, size in enumerate(sizes):
        width = dim.add(dim.multiply(dilations[place], dim.subtract(kernel[place], 1)), 1)
        space = dim.subtract(dim.add(size, pads[place] + pads[place + count]), width)
        found.append(dim.add(dim.floor_quotient(space, strides[place]), 1))
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


def convolution_links(call: OperatorCall, *, kernel: int = 1) -> AxisLinks:
    """`Conv` over [batch, channels, positions...]: element by element along axes on which the kernel is one wide."""
    labels, sizes = identity_links(call), call.fact(kernel).shape
    if sizes is None:
        raise UntraceableAxesError("the rank of a tensor is unknown")
    blocked, windows = _wide_axes(call, sizes[2:])
    measured = 2 if call.node.op_type == "ConvInteger" else 0  # the zero point of tokens quantized in this call
    constants = tuple(index for index in range(1, len(call.inputs)) if index != measured)
    outputs = ((labels[0], None, *labels[2:]),)
    return AxisLinks(
        inputs=parameters(call, labels), outputs=outputs, blocked={1: None, **blocked}, windows=windows,
        constant_inputs=constants,
    )  # fmt: skip


def pool_links(call: OperatorCall) -> AxisLinks:
    """`AveragePool`, `MaxPool` over [batch, channels, positions...]: as a convolution, channel by channel."""
    if call.integer("channels_last", 0):
        raise UntraceableAxesError("its channels are the last axis, for which there is no rule")
    if len(call.node.outputs) > 1 and call.node.outputs[1].uses():
        raise UntraceableAxesError("the indices of its maxima depend on the number of tokens")
    blocked, windows = _wide_axes(call, call.attribute("kernel_shape"))
    return kept(call, blocked=blocked, windows=windows)


def _wide_axes(
    call: OperatorCall, kernel: Sequence[Dimension]
) -> tuple[dict[Label, None], dict[Label, tuple[float, float]]]:
    """The position axes along which a window is wider than one element, and the window of each if it is known."""
    wide: dict[Label, None] = {}
    windows: dict[Label, tuple[float, float]] = {}
    for place, size in enumerate(kernel):
        if not _is_pointwise(call, place, size):
            wide[place + 2] = None
            window = _window(call, place, size)
            windows |= {} if window is None else {place + 2: window}
    return wide, windows


def _window(call: OperatorCall, place: int, kernel: Dimension) -> tuple[int, int] | None:
    """The offsets of the first and the last element of a window; None if it moves by more than one element."""
    strides, dilations, pads = (call.attribute(name) for name in ("strides", "dilations", "pads"))
    if not isinstance(kernel, int) or _is_padded_to_size(call):
        return None
    if (strides and strides[place] != 1) or call.integer("ceil_mode", 0):
        return None
    before = pads[place] if pads else 0
    return -before, (kernel - 1) * (dilations[place] if dilations else 1) - before


def _is_pointwise(call: OperatorCall, place: int, kernel: Dimension) -> bool:
    """Whether a window along a position axis sees one element at a time, and each of them."""
    strides, pads = call.attribute("strides"), call.attribute("pads") or ()
    count = len(pads) // 2
    padded = any(pads[end] for end in (place, place + count)) if pads else False
    return kernel == 1 and (not strides or strides[place] == 1) and not padded


def _is_padded_to_size(call: OperatorCall) -> bool:
    """Whether padding gives one window for each step of the stride: none is added to windows of one element."""
    return call.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID")


def _product(names: str, notation: Notation, *, bias: int | None = None, dynamic: bool = False,
             traits: tuple[Trait, ...] = (), **fields: Any) -> list[Operator]:  # fmt: skip
    return entries(
        names, partial(contraction, notation=notation),
        partial(product_links, notation=notation, bias=bias, dynamic=dynamic),
        Trait.PRODUCT, Trait.PROJECTION, *traits, notation=notation, **fields,
    )  # fmt: skip


_GEMM, _QUANTIZED = partial(matrix_notation, transposable=True), partial(matrix_notation, right=3)
_QUANTIZED_GEMM = partial(matrix_notation, right=3, transposable=True)

OPERATORS: list[Operator] = [
    *_product("MatMul", matrix_notation, traits=(Trait.BATCHED_MATMUL, Trait.ANALYTIC)),
    *_product("Einsum", einsum_notation, traits=(Trait.EINSUM, Trait.ANALYTIC)),
    *_product("FusedMatMul TransposeMatMul", _GEMM, traits=(Trait.BATCHED_MATMUL,)),
    *_product("Gemm FusedGemm", _GEMM, bias=2, column_parameters=(2,)),
    *_product(
        "MatMulInteger", matrix_notation, traits=(Trait.BATCHED_MATMUL,), column_parameters=(3,), zero_points=(2, 3)
    ),
    *_product(
        "MatMulIntegerToFloat",
        matrix_notation,
        traits=(Trait.BATCHED_MATMUL,),
        column_parameters=(3, 5, 6),
        zero_points=(4, 5),
    ),
    *_product(
        "DynamicQuantizeMatMul",
        matrix_notation,
        traits=(Trait.BATCHED_MATMUL,),
        column_parameters=(2, 3, 4),
        dynamic=True,
    ),
    *_product(
        "QLinearMatMul", _QUANTIZED, traits=(Trait.BATCHED_MATMUL,), column_parameters=(4, 5), zero_points=(2, 5)
    ),
    *_product("QGemm", _QUANTIZED_GEMM, column_parameters=(4, 5, 6), zero_points=(2, 5)),
    *_product("MatMulNBits MatMulBnb4", packed_notation, traits=(Trait.PACKED_WEIGHTS,)),
    *entries("Conv FusedConv", convolution, convolution_links, Trait.CONVOLUTION, Trait.PROJECTION),
    *entries("ConvInteger", convolution, convolution_links, Trait.CONVOLUTION),
    *entries("QLinearConv", convolution, partial(convolution_links, kernel=3), Trait.CONVOLUTION, Trait.PROJECTION),
    *entries("AveragePool MaxPool LpPool QLinearAveragePool", pool, pool_links),
]
