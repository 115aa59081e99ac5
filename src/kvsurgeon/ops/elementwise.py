"""Operators that work element by element, with broadcasting: their shapes, and the arithmetic of lengths."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

from kvsurgeon.graph.value_numbering import NONDETERMINISTIC
from kvsurgeon.ops.operator import (
    AxisLinks,
    Label,
    Labels,
    Operator,
    Trait,
    UntraceableAxesError,
    broadcast_links,
    entries,
    identity_links,
    kept,
)
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import NOTHING, WIDEST_VALUE, Fact, OperatorCall, axis_of

_MAX_BITS = 128  # of a power

Scalar = Any  # int, float, bool or sympy expression
Arithmetic = Callable[..., Scalar]


class Undecided(Exception):  # noqa: N818 - not an error: a number that depends on more than is known
    """Arithmetic whose answer depends on the symbols' values."""


def _decided(answer: bool | None) -> bool:
    if answer is None:
        raise Undecided
    return answer


def _is_symbolic(*operands: Scalar) -> bool:
    return any(isinstance(operand, sympy.Basic) for operand in operands)


def _either(symbolic: Arithmetic, plain: Arithmetic) -> Arithmetic:
    """Return arithmetic on numbers, of which some may be symbolic."""
    return lambda *operands: (symbolic if _is_symbolic(*operands) else plain)(*operands)


_minus, _times = _either(dim.subtract, operator.sub), _either(dim.multiply, operator.mul)
_less = _either(lambda left, right: _decided(dim.is_less(left, right)), operator.lt)


def _divided(left: Scalar, right: Scalar) -> Scalar:
    """The quotient of floating-point numbers."""
    if right == 0:
        raise Undecided
    return dim.plain(sympy.sympify(left) / right) if _is_symbolic(left, right) else left / right


def _whole_quotient(left: Scalar, right: Scalar) -> Scalar:
    """The quotient of integers, which rounds towards zero."""
    if right == 0:
        raise Undecided
    if _is_symbolic(left, right):
        return dim.floor_quotient(_not_negative(left), _not_negative(right))
    quotient = abs(left) // abs(right)
    return -quotient if (left < 0) != (right < 0) else quotient


def _not_negative(operand: Scalar) -> Scalar:
    """The operand, where rounding towards zero is rounding down."""
    if dim.is_less(operand, 0) is not False:
        raise Undecided
    return operand


def _modulo(left: Scalar, right: Scalar) -> Scalar:
    if not _is_symbolic(left, right):
        return left % right
    is_exact = isinstance(right, int) and right > 0 and not isinstance(left, float)
    return dim.remainder(left, int(right)) if is_exact else _remainder(left, right)


def _remainder(left: Scalar, right: Scalar) -> Scalar:
    """The remainder of a division that rounds towards zero."""
    if isinstance(left, float) or isinstance(right, float):
        if _is_symbolic(left, right):
            raise Undecided
        return math.fmod(left, right)
    return _minus(left, _times(_whole_quotient(left, right), right))


def _power(left: Scalar, right: Scalar) -> Scalar:
    if _is_symbolic(left, right):
        raise Undecided
    whole = isinstance(left, int) and isinstance(right, int)
    if whole and not 0 <= right * left.bit_length() <= _MAX_BITS:  # no integer, or too large a one
        raise Undecided
    return left**right


def _square_root(operand: Scalar) -> Scalar:
    if _is_symbolic(operand):
        raise Undecided
    return math.sqrt(operand)


ARITHMETIC: dict[str, Arithmetic] = {
    "Add": _either(dim.add, operator.add),
    "Sub": _minus,
    "Mul": _times,
    "Div": _divided,
    "WholeQuotient": _whole_quotient,
    "Mod": _modulo,
    "Remainder": _remainder,
    "Pow": _power,
    "Min": _either(dim.minimum, min),
    "Max": _either(dim.maximum, max),
    "Neg": lambda operand: _times(-1, operand),
    "Abs": _either(sympy.Abs, abs),
    "Sqrt": _square_root,
    "Reciprocal": lambda operand: _divided(1.0, operand),
    "Floor": _either(lambda operand: dim.plain(sympy.floor(operand)), lambda operand: float(math.floor(operand))),
    "Ceil": _either(lambda operand: dim.plain(sympy.ceiling(operand)), lambda operand: float(math.ceil(operand))),
    "Not": lambda operand: not operand,
    "And": lambda left, right: left and right,
    "Or": lambda left, right: left or right,
    "Equal": _either(lambda left, right: _decided(dim.is_equal(left, right)), operator.eq),
    "Less": _less,
    "Greater": lambda left, right: _less(right, left),
    "LessOrEqual": lambda left, right: not _less(right, left),
    "GreaterOrEqual": lambda left, right: not _less(left, right),
    "Where": lambda condition, left, right: left if condition else right,
}

# fmt: off
COMPARISONS = frozenset({
    "And", "Or", "Xor", "Not", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "IsNaN", "IsInf",
})
# fmt: on


def _typed(number: Scalar, dtype: ir.DataType | None) -> Scalar:
    """The number as a tensor of `dtype` holds it."""
    if dtype is None:
        return number
    if dtype is ir.DataType.BOOL:
        return _decided(not dim.is_equal(number, 0)) if _is_symbolic(number) else bool(number)
    if _is_symbolic(number):
        whole = dtype.is_floating_point() or number.is_integer
        return number if whole else dim.plain(sympy.floor(_not_negative(number)))
    return float(number) if dtype.is_floating_point() else int(number)


def _numbers(arithmetic: Arithmetic, operands: tuple[Fact | None, ...]) -> np.ndarray | None:
    given = [operand for operand in operands if operand is not None]
    arrays = [operand.value for operand in given if operand.value is not None]
    if not arrays or len(arrays) < len(given):
        return None
    function = np.frompyfunc(arithmetic, len(arrays), 1)
    try:
        result = function(*arrays)
    except (Undecided, ZeroDivisionError, OverflowError, ValueError, TypeError):
        return None
    array = np.asarray(result, dtype=object)
    return array if array.size <= WIDEST_VALUE else None


def _variadic(arithmetic: Arithmetic, operands: tuple[Fact | None, ...], name: str) -> Arithmetic:
    if name not in ("Min", "Max") or len(operands) == 2:
        return arithmetic

    def fold(*terms: Scalar) -> Scalar:
        result = terms[0]
        for term in terms[1:]:
            result = arithmetic(result, term)
        return result

    return fold


def shape_of_broadcast(operands: tuple[Fact | None, ...]) -> tuple[Dimension, ...] | None:
    """Return the shape that several tensors are broadcast to; None where one rank is unknown."""
    shapes = [operand.shape for operand in operands if operand is not None]
    if any(shape is None for shape in shapes):
        return None
    rank = max((len(shape) for shape in shapes if shape is not None), default=0)
    result: list[Dimension] = [1] * rank
    for shape in shapes:
        assert shape is not None
        for axis, size in enumerate(shape, start=rank - len(shape)):
            result[axis] = dim.broadcast(result[axis], size)
    return tuple(result)


def binary(call: OperatorCall) -> Fact:
    """Two tensors or more, broadcast."""
    name = call.node.op_type
    shape = shape_of_broadcast(call.inputs)
    operand = call.fact(1) if name in ("Where", "QLinearWhere") else call.fact(0)
    dtype = ir.DataType.BOOL if name in COMPARISONS else operand.dtype
    value = None
    if (arithmetic := ARITHMETIC.get(_name_of(call, dtype))) is not None:
        value = _numbers(_variadic(arithmetic, call.inputs, name), call.inputs)
    return Fact(shape, dtype, value)


def _name_of(call: OperatorCall, dtype: ir.DataType | None) -> str:
    """Return the name of what the operator computes for this type and these attributes."""
    name = call.node.op_type
    if name == "Mod" and call.integer("fmod", 0):
        return "Remainder"
    return "WholeQuotient" if name == "Div" and not (dtype is not None and dtype.is_floating_point()) else name


def unary(call: OperatorCall) -> Fact:
    """One tensor; its shape is kept."""
    operand = call.fact(0)
    name = call.node.op_type
    dtype = ir.DataType.BOOL if name in COMPARISONS else operand.dtype
    arithmetic = ARITHMETIC.get(name)
    value = None if arithmetic is None else _numbers(arithmetic, call.inputs[:1])
    return Fact(operand.shape, dtype, value)


def identity(call: OperatorCall) -> Fact:
    """`Identity`: its input."""
    return call.fact(0)


def cast(call: OperatorCall) -> Fact:
    """`Cast`, `CastLike`: the numbers as the new type holds them."""
    operand = call.fact(0)
    to = call.fact(1).dtype if call.node.op_type == "CastLike" else ir.DataType(call.integer("to", 1))
    return Fact(operand.shape, to, _numbers(lambda number: _typed(number, to), call.inputs[:1]))


def quantize(call: OperatorCall) -> Fact:
    """`QuantizeLinear`: the type of the zero point, uint8 without one."""
    zero_point = call.given(2)
    declared = call.integer("output_dtype", 0)
    dtype = ir.DataType(declared) if declared else zero_point.dtype if zero_point else ir.DataType.UINT8
    return Fact(call.fact(0).shape, dtype)


def dequantize(call: OperatorCall) -> Fact:
    """`DequantizeLinear`: the type of the scale."""
    return Fact(call.fact(0).shape, call.fact(1).dtype)


def dynamic_quantize(call: OperatorCall) -> list[Fact]:
    """`DynamicQuantizeLinear`: uint8, with the scale and the zero point of this call."""
    operand = call.fact(0)
    return [Fact(operand.shape, ir.DataType.UINT8), Fact((), ir.DataType.FLOAT), Fact((), ir.DataType.UINT8)]


def same_as_first(call: OperatorCall) -> list[Fact]:
    """Every output has the shape and type of the first input; used where further outputs are rarely there."""
    operand = call.given(0) or NOTHING
    return [Fact(operand.shape, operand.dtype) for _ in call.node.outputs]


def dynamic_quantize_links(call: OperatorCall) -> AxisLinks:
    """`DynamicQuantizeLinear`: the range of all elements gives the scale and the zero point, which have no axes."""
    labels = identity_links(call)
    return AxisLinks(inputs=(labels,), outputs=(labels, (), ()), dynamic_range=True)


def quantize_links(call: OperatorCall) -> AxisLinks:
    """`QuantizeLinear`, `DequantizeLinear`: scales of one axis have its label; an axis in blocks cannot be traced."""
    labels = identity_links(call)
    axis = axis_of(call.integer("axis", 1), len(labels)) if len(labels) > 1 else 0
    inputs: list[Labels | None] = [labels]
    blocked: dict[Label, str | None] = {}
    for index in range(1, len(call.inputs)):
        shape = call.fact(index).shape or ()
        single = len(shape) == 1 and shape[0] != 1 and len(labels) > 0
        inputs.append((axis,) if single else None)
        if len(shape) == len(labels) > 1:
            blocked[axis] = "it quantizes blocks along the sequence"
    return AxisLinks(inputs=tuple(inputs), outputs=(labels,), blocked=blocked)


def channel_links(call: OperatorCall) -> AxisLinks:
    """`BatchNormalization`: further inputs hold an element for each channel. In training it mixes all others."""
    labels = identity_links(call)
    if call.integer("training_mode", 0):
        raise UntraceableAxesError("in training mode, it computes means over the batch and the tokens")
    return AxisLinks(inputs=(labels, *[(1,)] * (len(call.inputs) - 1)), outputs=(labels,) * len(call.node.outputs))


def draws_numbers(call: OperatorCall) -> bool:
    """Return whether a node gives other numbers each time it runs, as `Dropout` does in training mode."""
    if call.node.op_type == "Dropout":
        return call.given(2) is not None and call.numbers(2) != (False,) and call.numbers(1) != (0,)
    return call.node.op_type.startswith(NONDETERMINISTIC)


_ARITHMETIC = (Trait.BROADCAST, Trait.ARITHMETIC)
_SCALES = (*_ARITHMETIC, Trait.SCALE, Trait.LENGTH_SENSITIVE)
_ORDERS = (Trait.BROADCAST, Trait.ORDER, Trait.LENGTH_SENSITIVE)

OPERATORS: list[Operator] = [
    *entries(
        "Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Cosh Elu Erf Floor Gelu HardSigmoid "
        "HardSwish IsInf IsNaN LeakyRelu Log Mish Not QLinearLeakyRelu QLinearSigmoid QuickGelu Reciprocal Relu "
        "Round ScaledSiLU Selu Shrink Sigmoid Sign Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu",
        unary, kept, Trait.ELEMENTWISE,
    ),
    *entries("Exp Neg", unary, kept, Trait.ELEMENTWISE, Trait.ANALYTIC),
    *entries("Abs", unary, kept, Trait.ELEMENTWISE, Trait.ARITHMETIC),
    *entries("Identity", identity, kept, Trait.ELEMENTWISE, Trait.ARITHMETIC, Trait.IDENTITY, Trait.REARRANGE),
    *entries("Dropout", unary, kept, Trait.ELEMENTWISE, Trait.IDENTITY),
    *entries("Sin Cos", unary, kept, Trait.ELEMENTWISE, Trait.ROTARY),
    *entries("Clip", unary, kept, Trait.ELEMENTWISE, Trait.ARITHMETIC, Trait.BOUND, Trait.LENGTH_SENSITIVE),
    *entries("Cast", cast, kept, Trait.ELEMENTWISE, Trait.ARITHMETIC, Trait.IDENTITY),
    *entries("CastLike", cast, kept, Trait.ARITHMETIC, type_only=frozenset({1})),
    *entries("QuantizeLinear", quantize, quantize_links, Trait.ELEMENTWISE, Trait.QUANTIZATION),
    *entries("DequantizeLinear", dequantize, quantize_links, Trait.ELEMENTWISE, Trait.QUANTIZATION),
    *entries("DynamicQuantizeLinear", dynamic_quantize, dynamic_quantize_links),
    *entries("BatchNormalization", same_as_first, channel_links),
    *entries("BiasGelu FastGelu", unary, broadcast_links, Trait.ELEMENTWISE),
    *entries("SwiGLU GatedAdd", same_as_first, broadcast_links),
    *entries("Add", binary, broadcast_links, *_ARITHMETIC, Trait.ADD, Trait.ANALYTIC),
    *entries("Sub", binary, broadcast_links, *_ARITHMETIC, Trait.ADD, Trait.ANALYTIC, Trait.LENGTH_SENSITIVE),
    *entries("Max Min", binary, broadcast_links, *_ARITHMETIC, Trait.BOUND, Trait.LENGTH_SENSITIVE),
    *entries("Mul", binary, broadcast_links, *_SCALES, Trait.ANALYTIC),
    *entries("Div", binary, broadcast_links, *_SCALES),
    *entries("Mod Equal", binary, broadcast_links, Trait.BROADCAST, Trait.LENGTH_SENSITIVE),
    *entries("Less LessOrEqual Greater GreaterOrEqual", binary, broadcast_links, *_ORDERS),
    *entries("And BitShift BitwiseAnd BitwiseOr BitwiseXor Mean Or PRelu Pow Xor",
             binary, broadcast_links, Trait.BROADCAST),
    *entries("Sum Where", binary, broadcast_links, Trait.BROADCAST, Trait.ANALYTIC),
    *entries("QLinearAdd QLinearMul QLinearWhere", binary, broadcast_links, Trait.BROADCAST, Trait.QUANTIZATION),
    *entries("RandomNormalLike RandomUniformLike", same_as_first),
]  # fmt: skip
