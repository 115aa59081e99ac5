"""Replace a residual addition and the RMS norm of its sum by one operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import shapes_of
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.graph.constants import constant_tensor, small_constant
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import is_operator, producer_of
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class FuseSkipNorms:
    """Replace `x + y` and the RMS norm of the sum by `SkipSimplifiedLayerNormalization` of com.microsoft.

    Before: `h = Add(x, y)`, `h / Sqrt(ReduceMean(h * h) + epsilon) * weight`. After: one operator, which returns the
    norm and the sum. Several norms of one sum: the first is fused.

    Not handled: norms in another type than their input, or over other axes than the last one.
    """

    name: ClassVar[str] = "fuse-skip-norms"

    def apply(self, subject: Subject) -> Outcome:
        """Fuse the norms of sums in `subject.model`."""
        with deep_recursion():
            shapes = shapes_of(subject.model.graph)
            matches = {match.addition: match for match in reversed(list(_Norms(shapes).matches(subject.model.graph)))}
        if not matches:
            return Unchanged(reason="no RMS norm of a residual addition")
        editor = Editor(subject.model)
        for match in matches.values():
            _fuse(editor, match)
        editor.finish()
        return Changed(edits=editor.edits)


@dataclass(frozen=True, kw_only=True)
class _Match:
    """An RMS norm of a sum.

    Attributes:
        addition: The node that adds.
        norm: The node that multiplies with the weight.
        weight: The weight, [hidden].
        epsilon: The number that is added to the mean square.
    """

    addition: ir.Node
    norm: ir.Node
    weight: ir.Value
    epsilon: float


_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)  # that the kernel has


class _Norms:
    """Finds RMS norms of sums; casts to the type that a tensor has are looked through."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    def matches(self, graph: ir.Graph) -> Iterator[_Match]:
        """Yield the RMS norms of sums, all in one type and shape."""
        for node in graph:
            for normalized, weight in _operands(node):
                found = self._normalized(normalized)
                addition = None if found is None else self._producer(found[0], "Add")
                if found is None or addition is None or not self._has_width(found[0], weight):
                    continue
                values = (*addition.inputs, found[0], node.outputs[0])
                facts = [self.shapes[value] for value in values if value is not None]
                same = all((fact.shape, fact.dtype) == (facts[0].shape, facts[0].dtype) for fact in facts)
                if same and len(facts[0].shape or ()) == 3 and facts[0].dtype in _TYPES:
                    yield _Match(addition=addition, norm=node, weight=weight, epsilon=found[1])

    def _source(self, value: ir.Value | None) -> ir.Value | None:
        """Return the tensor that a value is, before casts that change nothing."""
        while value is not None and (cast := producer_of(value, "Cast")) is not None and cast.inputs[0] is not None:
            dtype = self.shapes[value].dtype
            if dtype is None or self.shapes[cast.inputs[0]].dtype is not dtype:
                break
            value = cast.inputs[0]
        return value

    def _producer(self, value: ir.Value | None, operator: str) -> ir.Node | None:
        return producer_of(self._source(value), operator)

    def _normalized(self, value: ir.Value) -> tuple[ir.Value, float] | None:
        """Return x and epsilon if a value is `x / sqrt(mean(x * x) + epsilon)`; None otherwise."""
        quotient, product = self._producer(value, "Div"), self._producer(value, "Mul")
        pairs: list[tuple[ir.Value | None, ir.Value | None]] = []
        if quotient is not None:
            pairs = [(quotient.inputs[0], quotient.inputs[1])]
        elif product is not None:
            pairs = [(product.inputs[place], self._inverted(product.inputs[1 - place])) for place in (0, 1)]
        for x, root in ((self._source(x), root) for x, root in pairs):
            epsilon = None if x is None or root is None else self._root_of_mean_square(root, x)
            if x is not None and epsilon is not None:
                return x, epsilon
        return None

    def _inverted(self, value: ir.Value | None) -> ir.Value | None:
        """Return y if a value is `1 / y`; None otherwise."""
        reciprocal, quotient = self._producer(value, "Reciprocal"), self._producer(value, "Div")
        if reciprocal is not None:
            return reciprocal.inputs[0]
        return quotient.inputs[1] if quotient is not None and _number(quotient.inputs[0]) == 1 else None

    def _root_of_mean_square(self, value: ir.Value | None, x: ir.Value) -> float | None:
        """Return epsilon if a value is `sqrt(mean(x * x) + epsilon)` over the last axis; None otherwise."""
        root = self._producer(value, "Sqrt")
        addition = None if root is None else self._producer(root.inputs[0], "Add")
        for place in (0, 1) if addition is not None else ():
            assert addition is not None
            epsilon, mean = _number(addition.inputs[place]), self._producer(addition.inputs[1 - place], "ReduceMean")
            if mean is not None and _is_over_last_axis(mean) and self._is_square(mean.inputs[0], x):
                return epsilon
        return None

    def _is_square(self, value: ir.Value | None, x: ir.Value) -> bool:
        power, product = self._producer(value, "Pow"), self._producer(value, "Mul")
        if power is not None:
            return self._source(power.inputs[0]) is x and _number(power.inputs[1]) == 2
        return product is not None and all(self._source(factor) is x for factor in product.inputs)

    def _has_width(self, x: ir.Value, weight: ir.Value) -> bool:
        shape, width = self.shapes[x].shape, self.shapes[weight].shape
        return bool(shape and width) and width == (shape or ())[-1:]


def _operands(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield both ways to read a product as a normalized tensor and a weight."""
    if not is_operator(node, "Mul") or node.inputs[0] is None or node.inputs[1] is None:
        return
    for place in (0, 1):
        normalized, weight = node.inputs[1 - place], node.inputs[place]
        if normalized is not None and weight is not None and constant_tensor(weight) is not None:
            yield normalized, weight


def _is_over_last_axis(node: ir.Node) -> bool:
    """Return whether a mean is over the last axis of three, which stays with a size of 1."""
    axes = node.attributes.get_ints("axes") if len(node.inputs) < 2 else small_constant(node.inputs[1])
    return axes is not None and list(axes) in ([-1], [2]) and node.attributes.get_int("keepdims", 1) == 1


def _number(value: ir.Value | None) -> float | None:
    constant = small_constant(value)
    return float(np.asarray(constant).reshape(-1)[0]) if constant is not None and constant.size == 1 else None


def _fuse(editor: Editor, match: _Match) -> None:
    total, result = match.addition.outputs[0], match.norm.outputs[0]
    inputs = [*match.addition.inputs, match.weight]
    norm = ir.Value(name=editor.unique_name(f"{result.name}.fused"), type=result.type, shape=result.shape)
    added = ir.Value(name=editor.unique_name(f"{total.name}.sum"), type=total.type, shape=total.shape)
    outputs = [norm, ir.Value(name=""), ir.Value(name=""), added]
    editor.operator(
        "com.microsoft", "SkipSimplifiedLayerNormalization", inputs, {"epsilon": match.epsilon}, outputs, match.norm
    )
    editor.replace(result, norm)
    editor.replace(total, added)
