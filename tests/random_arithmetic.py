"""Random graphs that compute numbers from the shape of an input, as exporters do: counts, ranges, slices."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INT32, INT64, FLOAT, DOUBLE, BOOL = (
    TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.BOOL
)  # fmt: skip
NUMBERS = (INT32, INT64, FLOAT, DOUBLE)
FLOATS = (FLOAT, DOUBLE)
INTEGERS = (0, 1, 1, 2, 2, 3, 4, 7, 8, 16, 64, 100, 300, -1, -2, -3)
DECIMALS = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 128.0, 300.0, 1e6, -0.5, -1.0, -2.0)
MANY = 3000  # elements of a list, at most


@dataclass(frozen=True)
class Value:
    """A value of the graph: a number, or a list of numbers of rank 1."""

    name: str
    dtype: int
    rank: int


class RandomArithmetic:
    """Writes a graph with the input `x` [b, n, 8] whose values are all outputs.

    Args:
        seed: Seed of everything that is drawn.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.values: list[Value] = []
        shape = self.add("Shape", ["x"], INT64, 1)
        for place in (0, 1):
            size = self.add("Gather", [shape, self.constant(place, INT64)], INT64, 0)
            self.add("Cast", [size], FLOAT, 0, to=FLOAT)
        writers = [
            *[self._arithmetic] * 8, *[self._one_operand] * 3, *[self._cast] * 4, *[self._comparison] * 2,
            *[self._choice] * 2, self._logic, self._list, self._joined, self._reduced, self._element, self._part,
            self._sums, self._range, self._created,
        ]  # fmt: skip
        for _ in range(self.random.randint(6, 16)):
            self.random.choice(writers)()

    def model(self) -> onnx.ModelProto:
        """Return the model."""
        outputs = [helper.make_tensor_value_info(one.name, one.dtype, [None] * one.rank) for one in self.values]
        inputs = [helper.make_tensor_value_info("x", FLOAT, ["b", "n", 8])]
        graph = helper.make_graph(self.nodes, "arithmetic", inputs, outputs)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)

    def add(self, operator: str, inputs: list[str], dtype: int, rank: int, **attributes: object) -> str:
        """Add a node; return the name of its output."""
        name = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        self.values.append(Value(name, dtype, rank))
        return name

    def constant(self, number: object, dtype: int) -> str:
        """Add a constant; return its name."""
        name = f"constant_{len(self.nodes)}"
        tensor = numpy_helper.from_array(np.array(number, helper.tensor_dtype_to_np_dtype(dtype)))
        self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def literal(self, dtype: int) -> str:
        """Add a random number."""
        return self.constant(self.random.choice(INTEGERS if dtype in (INT32, INT64) else DECIMALS), dtype)

    def pick(self, dtypes: tuple[int, ...], rank: int | None = None) -> Value | None:
        """Return a random value, more often a late one; None if there is none of these types."""
        found = [one for one in self.values if one.dtype in dtypes and rank in (None, one.rank)]
        return self.random.choice(found[-8:] if self.random.random() < 0.6 else found) if found else None

    def operand(self, dtype: int) -> Value:
        """Return a number of a type: two lists of different sizes cannot be broadcast."""
        found = self.pick((dtype,), 0) if self.random.random() < 0.5 else None
        return found or Value(self.literal(dtype), dtype, 0)

    def not_zero(self, value: Value) -> str:
        """Add 1 in place of 0: onnxruntime ends the process at a division by zero."""
        is_zero = self.add("Equal", [value.name, self.constant(0, value.dtype)], BOOL, value.rank)
        return self.add("Where", [is_zero, self.constant(1, value.dtype), value.name], value.dtype, value.rank)

    def size(self, smallest: int) -> str | None:
        """Add a list of one size that is not too large."""
        if (value := self.pick((INT64,), 0)) is None:
            return None
        bounds = [self.constant(bound, INT64) for bound in (smallest, MANY)]
        return self.add(
            "Unsqueeze", [self.add("Clip", [value.name, *bounds], INT64, 0), self.constant([0], INT64)], INT64, 1
        )

    def _arithmetic(self) -> None:
        operator = self.random.choice(("Add", "Sub", "Mul", "Div", "Div", "Min", "Max", "Mod"))
        left = self.pick(NUMBERS)
        right = self.operand(left.dtype)
        if self.random.random() < 0.3:
            left, right = right, left
        divisor = self.not_zero(right) if operator in ("Div", "Mod") else right.name
        attributes = {"fmod": int(left.dtype in FLOATS or self.random.random() < 0.5)} if operator == "Mod" else {}
        self.add(operator, [left.name, divisor], left.dtype, max(left.rank, right.rank), **attributes)

    def _one_operand(self) -> None:
        operator = self.random.choice(("Neg", "Abs", "Sign", "Floor", "Ceil", "Round", "Sqrt", "Reciprocal", "Clip"))
        value = self.pick(NUMBERS if operator in ("Neg", "Abs", "Sign", "Clip") else FLOATS)
        if value is not None:
            bounds = [self.literal(value.dtype), self.literal(value.dtype)] if operator == "Clip" else []
            self.add(operator, [value.name, *bounds], value.dtype, value.rank)

    def _cast(self) -> None:
        value, dtype = self.pick((*NUMBERS, BOOL)), self.random.choice(NUMBERS)
        self.add("Cast", [value.name], dtype, value.rank, to=dtype)

    def _comparison(self) -> None:
        operator = self.random.choice(("Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Equal"))
        left = self.pick(NUMBERS)
        right = self.operand(left.dtype)
        self.add(operator, [left.name, right.name], BOOL, max(left.rank, right.rank))

    def _choice(self) -> None:
        if (condition := self.pick((BOOL,), 0)) is not None:
            left = self.pick(NUMBERS)
            right = self.operand(left.dtype)
            rank = max(condition.rank, left.rank, right.rank)
            self.add("Where", [condition.name, left.name, right.name], left.dtype, rank)

    def _logic(self) -> None:
        if (left := self.pick((BOOL,))) is not None:
            right = self.pick((BOOL,), 0)
            operator = self.random.choice(("And", "Or", "Not"))
            operands = [left] if operator == "Not" or right is None else [left, right]
            operator = "Not" if len(operands) == 1 else operator
            self.add(operator, [one.name for one in operands], BOOL, max(one.rank for one in operands))

    def _list(self) -> None:
        if (value := self.pick((*NUMBERS, BOOL), 0)) is not None:
            self.add("Unsqueeze", [value.name, self.constant([0], INT64)], value.dtype, 1)

    def _joined(self) -> None:
        left = self.pick(NUMBERS, 1)
        right = self.pick((left.dtype,), 1)
        self.add("Concat", [left.name, right.name], left.dtype, 1, axis=0)

    def _reduced(self) -> None:
        value = self.pick(NUMBERS, 1)
        operator = self.random.choice(("ReduceSum", "ReduceProd", "ReduceMax", "ReduceMin", "ReduceMean"))
        self.add(operator, [value.name], value.dtype, 0, keepdims=0)

    def _element(self) -> None:
        value = self.pick(NUMBERS, 1)
        self.add("Gather", [value.name, self.constant(self.random.choice((0, -1)), INT64)], value.dtype, 0)

    def _part(self) -> None:
        value = self.pick(NUMBERS, 1)
        choices = ((0, 1, -1, -2), (1, 2, -1, 1 << 40, -(1 << 40)), (0,), (1, 1, 2, -1))  # start, end, axis, step
        bounds = [self.constant([self.random.choice(some)], INT64) for some in choices]
        self.add("Slice", [value.name, *bounds], value.dtype, 1)

    def _sums(self) -> None:
        value = self.pick(NUMBERS, 1)
        flags = {name: self.random.choice((0, 1)) for name in ("exclusive", "reverse")}
        self.add("CumSum", [value.name, self.constant(0, INT64)], value.dtype, 1, **flags)

    def _range(self) -> None:
        dtype = self.random.choice((INT64, INT64, FLOAT))
        if (end := self.pick((dtype,), 0)) is None:
            return
        start = self.literal(dtype) if self.random.random() < 0.7 else self.pick((dtype,), 0).name
        steps = (1, 2, 3, 16, -1, -2) if dtype == INT64 else (1.0, 0.25, 0.5, 2.0, 3.0, -1.0)
        stop = self.add("Min", [end.name, self.constant(MANY, dtype)], dtype, 0)
        self.add("Range", [start, stop, self.constant(self.random.choice(steps), dtype)], dtype, 1)
        self.add("Shape", [self.values[-1].name], INT64, 1)

    def _created(self) -> None:
        operator = self.random.choice(("ConstantOfShape", "Tile", "Expand"))
        if (size := self.size(int(operator == "Expand"))) is not None:
            first = {"ConstantOfShape": [], "Tile": [[1, 2]], "Expand": [1]}[operator]
            dtype = FLOAT if operator == "ConstantOfShape" else INT64
            self.add(operator, [*(self.constant(one, INT64) for one in first), size], dtype, 1)
            self.add("Shape", [self.values[-1].name], INT64, 1)
