"""Functions of a length: 0 for short texts, another number from a threshold on, or different at each length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from adversarial_models.graph_writer import GraphWriter

Function = Callable[[GraphWriter, str, int], str]
"""Takes a length, int64 [..., 1], and a threshold; returns float32 [..., 1]."""


@dataclass(frozen=True, kw_only=True)
class LengthFunction:
    """A function of a length."""

    name: str
    write: Function
    scalar: bool = False  # takes one length, [1], not one for each token
    threshold: int | None = None  # where it changes, if that cannot be chosen


def _where(write: GraphWriter, length: str, at: int) -> str:
    return write("Where", write("Greater", write.to_float(length), float(at)), 1.0, 0.0)


def _cast(write: GraphWriter, length: str, at: int) -> str:
    return write.to_float(write("GreaterOrEqual", length, at + 1))


def _not_less(write: GraphWriter, length: str, at: int) -> str:
    return write.to_float(write("Not", write("LessOrEqual", length, at)))


def _vector(write: GraphWriter, length: str, at: int) -> str:
    passed = write.to_float(write("Greater", write.to_float(length), np.array([at, 3.1e6, 1e9], np.float32)))
    return write.reduce("ReduceSum", passed, [-1])


def _arithmetic(write: GraphWriter, length: str, at: int) -> str:
    return write.to_float(write("Greater", write("Add", write("Mul", length, 3), 5), 3 * at + 5))


def _product_of_constants(write: GraphWriter, length: str, at: int) -> str:
    bound = write("Mul", np.array([float(at) / 8], np.float32), np.array([8.0], np.float32))
    return write.to_float(write("Greater", write.to_float(length), bound))


def _logarithm(write: GraphWriter, length: str, at: int) -> str:
    return write.to_float(write("Greater", write("Log", write.to_float(length)), math.log(at + 0.5)))


def _square(write: GraphWriter, length: str, at: int) -> str:
    return write.to_float(write("Greater", write("Mul", length, length), at * at))


def _root(write: GraphWriter, length: str, at: int) -> str:
    return write.to_float(write("Greater", write("Sqrt", write.to_float(length)), math.sqrt(at + 0.5)))


def _power(write: GraphWriter, length: str, at: int) -> str:
    return write.to_float(write("Greater", write("Pow", write.to_float(length), 1.5), (at + 0.5) ** 1.5))


def _integer_division(write: GraphWriter, length: str, at: int) -> str:
    return write.to_float(write("Div", length, at + 1))


def _floor(write: GraphWriter, length: str, at: int) -> str:
    return write("Floor", write("Div", write.to_float(length), at + 0.5))


def _round(write: GraphWriter, length: str, at: int) -> str:
    return write("Round", write("Div", write.to_float(length), 2.0 * at + 1))


def _multiples(write: GraphWriter, length: str, at: int) -> str:
    return write.to_float(write("Equal", write("Mod", length, at + 1), 0))


def _excess(write: GraphWriter, length: str, at: int) -> str:
    return write("Div", write("Max", write("Sub", write.to_float(length), float(at)), 0.0), 8.0)


def _clip(write: GraphWriter, length: str, at: int) -> str:
    ratio = write("Clip", write("Div", write.to_float(length), float(at)), np.float32(1.0), np.float32(2.0))
    return write("Mul", write("Sub", ratio, 1.0), 50.0)


def _minimum(write: GraphWriter, length: str, at: int) -> str:
    floats = write.to_float(length)
    ratio = write("Div", floats, write("Min", floats, float(at)))
    return write("Mul", write("Sub", ratio, 1.0), 50.0)


def _rectified(write: GraphWriter, length: str, at: int) -> str:
    return write("Sign", write("Relu", write("Sub", write.to_float(length), float(at))))


def _ceiling_of_logarithm(write: GraphWriter, length: str, at: int) -> str:
    over = write("Ceil", write("Sub", write("Log", write.to_float(length)), math.log(at + 0.5)))
    return write("Max", over, 0.0)


def _scaled_logarithm(write: GraphWriter, length: str, at: int) -> str:
    floats = write.to_float(length)
    ratio = write("Div", write("Log", floats), math.log(at))
    scaled = write("Where", write("Greater", floats, float(at)), ratio, 1.0)
    return write("Mul", write("Sub", scaled, 1.0), 50.0)


def _dynamic_base(write: GraphWriter, length: str, at: int) -> str:
    """The base of a rotary embedding scaled by length, less 1."""
    floats = write("Max", write.to_float(length), float(at))
    scale = write("Sub", write("Mul", floats, 2.0 / at), 1.0)
    return write("Mul", write("Sub", write("Pow", scale, 1.14), 1.0), 20.0)


def _table_of_blocks(write: GraphWriter, length: str, at: int) -> str:
    size = max(at // 4, 1)
    table = np.array([0, 0, 0, 0, 1, 2, 3, 4], np.float32)
    block = write("Min", write("Div", write("Sub", length, 1), size), np.array([7]))
    return write("Gather", write.weight(table), block)


def _table_of_lengths(write: GraphWriter, length: str, at: int) -> str:
    table = np.zeros(8192, np.float32)
    table[at:] = 1
    return write("Gather", write.weight(table), write("Sub", length, 1))


def _table_outside(write: GraphWriter, length: str, at: int) -> str:
    table = np.zeros(8192, np.float32)
    table[at:] = 1
    return write("Gather", write.weight(table, outside=True), write("Sub", length, 1))


def _table_from_end(write: GraphWriter, length: str, at: int) -> str:
    table = np.ones(8192, np.float32)
    table[8192 - at :] = 0
    return write("Gather", write.weight(table), write("Neg", length))


def _sigmoid(write: GraphWriter, length: str, at: int) -> str:
    return write("Sigmoid", write("Mul", write("Sub", write.to_float(length), at + 0.5), 40.0))


def _hyperbolic_tangent(write: GraphWriter, length: str, at: int) -> str:
    return write("Add", write("Tanh", write("Mul", write("Sub", write.to_float(length), at + 0.5), 40.0)), 1.0)


def _exponential(write: GraphWriter, length: str, at: int) -> str:
    return write("Exp", write("Mul", write("Min", write("Sub", write.to_float(length), at + 1.0), 0.0), 30.0))


def _overflow(write: GraphWriter, length: str, at: int) -> str:
    return write.to_float(write("IsInf", write("Mul", write.to_float(length), np.float32(3.4028e38 / (at + 0.5)))))


def _bits(write: GraphWriter, length: str, _: int) -> str:
    wide = write("Cast", length, to=TensorProto.UINT64)
    return write.to_float(write("BitShift", wide, np.array([9], np.uint64), direction="RIGHT"))


def _byte(write: GraphWriter, length: str, _: int) -> str:
    floats = write.to_float(length)
    narrow = write.to_float(write("Cast", length, to=TensorProto.UINT8))
    return write("Div", write("Sub", floats, narrow), 256.0)


def _half_precision(write: GraphWriter, length: str, _: int) -> str:
    floats = write.to_float(length)
    rounded = write.to_float(write("Cast", floats, to=TensorProto.FLOAT16))
    return write("Abs", write("Sub", rounded, floats))


def _parity(write: GraphWriter, length: str, _: int) -> str:
    return write.to_float(write("Mod", length, 2))


def _reciprocal(write: GraphWriter, length: str, _: int) -> str:
    return write("Mul", write("Reciprocal", write.to_float(length)), 3.0)


def _sine(write: GraphWriter, length: str, _: int) -> str:
    return write("Sin", write.to_float(length))


def _between(write: GraphWriter, length: str, at: int) -> str:
    inside = write("And", write("Greater", length, at), write("Less", length, at + 40))
    return write.to_float(inside)


def _exclusive_or(write: GraphWriter, length: str, at: int) -> str:
    return write.to_float(write("Xor", write("Greater", length, at), write("Greater", length, at + 50)))


def _hidden_band(write: GraphWriter, length: str, at: int) -> str:
    """One for 40 lengths from the threshold on, without comparing with a number."""
    floats = write.to_float(length)
    after, beyond = (
        write("Cast", write("Relu", write("Add", floats, 0.5 - start)), to=TensorProto.BOOL)
        for start in (at + 1, at + 41)
    )
    return write.to_float(write("And", after, write("Not", beyond)))


def _band_of_logarithm(write: GraphWriter, length: str, at: int) -> str:
    logarithm = write("Log", write.to_float(length))
    inside = write(
        "And",
        write("Greater", logarithm, math.log(at + 0.5)),
        write("Less", logarithm, math.log(at + 40.5)),
    )
    return write.to_float(inside)


def _table_of_band(write: GraphWriter, length: str, at: int) -> str:
    table = np.zeros(8192, np.float32)
    table[at : at + 40] = 1
    return write("Gather", write.weight(table), write("Sub", length, 1))


def _whole_overflow(write: GraphWriter, length: str, _: int) -> str:
    product = write("Mul", write("Cast", length, to=TensorProto.INT32), np.array([1 << 21], np.int32))
    return write.to_float(write("Less", product, np.array([0], np.int32)))


def _equal(write: GraphWriter, length: str, at: int) -> str:
    return write.to_float(write("Equal", length, at + 1))


def _one_hot(write: GraphWriter, length: str, at: int) -> str:
    block = write("Min", write("Div", length, at + 1), np.array([3]))
    hot = write("OneHot", block, np.array([4]), np.array([0.0, 1.0], np.float32))  # [..., 1, 4]
    first = write("Slice", hot, [0], [1], [-1])
    return write("Sub", 1.0, write("Squeeze", first, [-1]))


def _argmax(write: GraphWriter, length: str, at: int) -> str:
    ends = np.array([0, at, at + 200, at + 900], np.float32)
    below = write.to_float(write("Greater", write.to_float(length), ends))
    last = write("ArgMax", below, axis=-1, keepdims=1, select_last_index=1)
    return write.to_float(last)


def _branch(write: GraphWriter, length: str, at: int) -> str:
    condition = write("Squeeze", write("Greater", length, at))

    def graph(name: str, number: float) -> object:
        value = helper.make_tensor(name, TensorProto.FLOAT, [1], [number])
        node = helper.make_node("Constant", [], [name], value=value)
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])])

    then, other = write.name("then"), write.name("else")
    return write("If", condition, then_branch=graph(then, 1.0), else_branch=graph(other, 0.0))


def _rest_of_slice(write: GraphWriter, length: str, at: int) -> str:
    places = write("Range", 0, write("Squeeze", length), 1)
    return write("Sign", write.to_float(write("Shape", write("Slice", places, [at], [2**62], [0]))))


def _count(write: GraphWriter, length: str, at: int) -> str:
    places = write("Range", 0, write("Squeeze", length), 1)
    found = write("NonZero", write("GreaterOrEqual", places, at))
    return write("Sign", write.to_float(write("Shape", found, start=1)))


def _largest_position(write: GraphWriter, length: str, at: int) -> str:
    places = write.to_float(write("Range", 0, write("Squeeze", length), 1))
    return write.to_float(write("GreaterOrEqual", write.reduce("ReduceMax", places, [0]), float(at)))


def _mean_of_positions(write: GraphWriter, length: str, at: int) -> str:
    places = write.to_float(write("Range", 0, write("Squeeze", length), 1))
    return write.to_float(write("Greater", write.reduce("ReduceMean", places, [0]), (at - 1) / 2))


def _last_of_sum(write: GraphWriter, length: str, at: int) -> str:
    ones = write("Expand", np.array([1]), length)
    last = write("Slice", write("CumSum", ones, 0), [-1], [2**62], [0])
    return write.to_float(write("Greater", last, at))


def _table_slice(write: GraphWriter, length: str, at: int) -> str:
    table = np.zeros(8192, np.float32)
    table[at] = 1
    return write.reduce("ReduceMax", write("Slice", write.weight(table), [0], length, [0]), [0])


def _scattered(write: GraphWriter, length: str, at: int) -> str:
    """A one written to the place of the length, summed over the places after the threshold."""
    zeros = write.value(np.zeros(8192, np.float32))
    spot = write("ScatterElements", zeros, write("Sub", length, 1), np.ones(1, np.float32), axis=0)
    return write.reduce("ReduceSum", write("Slice", spot, [at], [2**62], [0]), [0])


def _reversed_range(write: GraphWriter, length: str, at: int) -> str:
    places = write("Range", write("Squeeze", length), 0, -1)
    return write.to_float(write("Greater", write("Slice", places, [0], [1], [0]), at))


def _kth_largest(write: GraphWriter, length: str, at: int) -> str:
    places = write.to_float(write("Range", 0, write("Squeeze", length), 1))
    values, _ = write("TopK", places, [1], outputs=2, axis=0)
    return write.to_float(write("GreaterOrEqual", values, float(at)))


FUNCTIONS: Mapping[str, LengthFunction] = {
    one.name: one
    for one in (
        *(
            LengthFunction(name=function.__name__.strip("_"), write=function)
            for function in (
                *(_where, _cast, _not_less, _vector, _arithmetic, _product_of_constants, _logarithm, _square, _root),
                *(_power, _integer_division, _floor, _round, _multiples, _excess, _clip, _minimum, _rectified),
                *(_ceiling_of_logarithm, _scaled_logarithm, _dynamic_base, _table_of_blocks, _table_of_lengths),
                *(_table_outside, _table_from_end, _sigmoid, _hyperbolic_tangent, _exponential, _overflow, _between),
                *(_exclusive_or, _equal, _one_hot, _argmax, _hidden_band, _band_of_logarithm, _table_of_band),
            )
        ),
        LengthFunction(name="whole_overflow", write=_whole_overflow, threshold=1023),
        LengthFunction(name="bits", write=_bits, threshold=511),
        LengthFunction(name="byte", write=_byte, threshold=255),
        LengthFunction(name="half_precision", write=_half_precision, threshold=2048),
        LengthFunction(name="parity", write=_parity, threshold=0),
        LengthFunction(name="reciprocal", write=_reciprocal, threshold=0),
        LengthFunction(name="sine", write=_sine, threshold=0),
        *(
            LengthFunction(name=function.__name__.strip("_"), write=function, scalar=True)
            for function in (
                *(_branch, _rest_of_slice, _count, _largest_position, _mean_of_positions, _last_of_sum),
                *(_table_slice, _scattered, _reversed_range, _kth_largest),
            )
        ),
    )
}
