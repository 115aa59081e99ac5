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

_SUM = 3  # output of SkipSimplifiedLayerNormalization


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
            matches = {match.addition: match for match in reversed(list(_matches(subject.model.graph, shapes)))}
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


def _matches(graph: ir.Graph, shapes: Shapes) -> Iterator[_Match]:
    for node in graph:
        for normalized, weight in _operands(node):
            found = _normalized(normalized)
            addition = None if found is None else producer_of(found[0], "Add")
            if found is None or addition is None or not _has_width(shapes, found[0], weight):
                continue
            facts = [shapes[value] for value in (*addition.inputs, found[0], node.outputs[0]) if value is not None]
            same = all((fact.shape, fact.dtype) == (facts[0].shape, facts[0].dtype) for fact in facts)
            if same and len(facts[0].shape or ()) == 3 and facts[0].dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                yield _Match(addition=addition, norm=node, weight=weight, epsilon=found[1])


def _operands(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield both ways to read a product as a normalized tensor and a weight."""
    if not is_operator(node, "Mul") or node.inputs[0] is None or node.inputs[1] is None:
        return
    for place in (0, 1):
        normalized, weight = node.inputs[1 - place], node.inputs[place]
        if normalized is not None and weight is not None and constant_tensor(weight) is not None:
            yield normalized, weight


def _normalized(value: ir.Value) -> tuple[ir.Value, float] | None:
    """Return x and epsilon if a value is `x / sqrt(mean(x * x) + epsilon)`; None otherwise."""
    quotient, product = producer_of(value, "Div"), producer_of(value, "Mul")
    if quotient is not None and quotient.inputs[0] is not None:
        epsilon = _root_of_mean_square(quotient.inputs[1], quotient.inputs[0])
        return None if epsilon is None else (quotient.inputs[0], epsilon)
    for place in (0, 1) if product is not None else ():
        assert product is not None
        x, root = product.inputs[place], _inverted(product.inputs[1 - place])
        epsilon = None if root is None or x is None else _root_of_mean_square(root, x)
        if epsilon is not None and x is not None:
            return x, epsilon
    return None


def _inverted(value: ir.Value | None) -> ir.Value | None:
    """Return y if a value is `1 / y`; None otherwise."""
    reciprocal, quotient = producer_of(value, "Reciprocal"), producer_of(value, "Div")
    if reciprocal is not None:
        return reciprocal.inputs[0]
    return quotient.inputs[1] if quotient is not None and _number(quotient.inputs[0]) == 1 else None


def _root_of_mean_square(value: ir.Value | None, x: ir.Value) -> float | None:
    """Return epsilon if a value is `sqrt(mean(x * x) + epsilon)` over the last axis; None otherwise."""
    root = producer_of(value, "Sqrt")
    addition = None if root is None else producer_of(root.inputs[0], "Add")
    for place in (0, 1) if addition is not None else ():
        assert addition is not None
        epsilon, mean = _number(addition.inputs[place]), producer_of(addition.inputs[1 - place], "ReduceMean")
        if epsilon is not None and mean is not None and _is_over_last_axis(mean) and _is_square(mean.inputs[0], x):
            return epsilon
    return None


def _is_square(value: ir.Value | None, x: ir.Value) -> bool:
    power, product = producer_of(value, "Pow"), producer_of(value, "Mul")
    if power is not None:
        return power.inputs[0] is x and _number(power.inputs[1]) == 2
    return product is not None and product.inputs[0] is x and product.inputs[1] is x


def _is_over_last_axis(node: ir.Node) -> bool:
    """Return whether a mean is over the last axis of three, which stays with a size of 1."""
    axes = node.attributes.get_ints("axes") if len(node.inputs) < 2 else small_constant(node.inputs[1])
    return axes is not None and list(axes) in ([-1], [2]) and node.attributes.get_int("keepdims", 1) == 1


def _has_width(shapes: Shapes, x: ir.Value, weight: ir.Value) -> bool:
    shape, width = shapes[x].shape, shapes[weight].shape
    return bool(shape and width) and width == (shape or ())[-1:]


def _number(value: ir.Value | None) -> float | None:
    constant = small_constant(value)
    return float(np.asarray(constant).reshape(-1)[0]) if constant is not None and constant.size == 1 else None


def _fuse(editor: Editor, match: _Match) -> None:
    total, result = match.addition.outputs[0], match.norm.outputs[0]
    inputs = [*match.addition.inputs, match.weight]
    names = (f"{result.name}.fused", "", "", f"{total.name}.sum")
    outputs = [ir.Value(name=name and editor.unique_name(name), type=total.type, shape=total.shape) for name in names]
    editor.operator(
        "com.microsoft", "SkipSimplifiedLayerNormalization", inputs, {"epsilon": match.epsilon}, outputs, match.norm
    )
    editor.replace(result, outputs[0])
    editor.replace(total, outputs[_SUM])
